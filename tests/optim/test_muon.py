"""Muon against a float64 NumPy iteration, against optax, and one matrix at a time."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from moe_jax.errors import ConfigError
from moe_jax.optim import muon
from moe_jax.platforms import tracing_for

orthogonalise = jax.jit(muon.orthogonalise, static_argnames=("form", "dtype", "batch"))


def reference(x, steps=5, eps=1e-7):
    """The quintic of one matrix in float64, as it is written: no transposes, no Gram form."""
    a, b, c = muon.COEFFICIENTS
    x = np.asarray(x, np.float64)
    x = x / (np.linalg.norm(x) + eps)
    for _ in range(steps):
        r = x @ x.T
        x = a * x + (b * r + c * r @ r) @ x
    return x


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_spectrum(singular, m, n):
    u, v = (np.linalg.qr(normal(seed, size, m))[0] for seed, size in ((1, m), (2, n)))
    return ((u * singular) @ v.T).astype(np.float32)


SPECTRA = {
    "random": normal(0, 24, 96),
    "low rank and noise": normal(1, 24, 3) @ normal(2, 3, 96) + 1e-3 * normal(3, 24, 96),
    "condition 1e6": with_spectrum(np.logspace(0, -6, 24), 24, 96),
    "rank deficient": normal(4, 24, 5) @ normal(5, 5, 96),
    "large": 1e12 * normal(6, 24, 96),
    "tiny": 1e-20 * normal(7, 24, 96),
    "zero": np.zeros((24, 96), np.float32),
}


# Largest error of an entry relative to the largest entry. Five steps multiply small singular values by up to 3.4^5 = 480, and rounding with
# them: float32 (6e-8) then gives some 3e-5. The Gram matrix holds squares, so values below 1e-3 of the largest lose digits there. bfloat16
# (4e-3) has nothing right about singular values below a hundredth, so only spectra without them are compared with a number.
# In the gram form rounding moves the factors of one matrix apart, and the norm may end a little higher (1.48 here).
TOLERANCES = {("standard", "float32"): 5e-5, ("gram", "float32"): 2e-3, ("standard", "bfloat16"): 0.15, ("gram", "bfloat16"): 0.15}


@pytest.mark.parametrize(
    ("name", "tall"), [*((name, False) for name in SPECTRA), *((name, True) for name in ("random", "condition 1e6", "zero"))]
)
@pytest.mark.parametrize(("form", "dtype"), TOLERANCES)
def test_against_float64(name, form, dtype, tall):
    x = SPECTRA[name].T if tall else SPECTRA[name]
    got = np.asarray(orthogonalise(x, form=form, dtype=dtype))
    want = reference(x)
    assert got.dtype == np.float32 and np.isfinite(got).all()
    assert np.linalg.norm(got, 2) < (1.6 if (form, dtype) == ("gram", "bfloat16") else 1.3)
    if dtype == "float32" or name in ("random", "large", "tiny", "zero"):
        assert np.abs(got - want).max() <= TOLERANCES[form, dtype] * np.abs(want).max()


def test_the_forms_are_different_programs():
    def products(form):
        return str(jax.make_jaxpr(lambda x: muon.orthogonalise(x, form=form, batch="vmap"))(jnp.zeros((8, 32)))).count("dot_general")

    # Each step is written once: X Xᵀ and R² before the loop, P X, X Xᵀ and R² in it, P X after; against X Xᵀ and R², then R P, P R P, R² and P Q, then Q X.
    assert products("standard") == 2 + 3 + 1 and products("gram") == 2 + 4 + 1


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_product_has_operands_of_the_type_asked_for(form, dtype):
    text = jax.jit(lambda x: muon.orthogonalise(x, form=form, dtype=dtype)).lower(jnp.zeros((2, 8, 32))).as_text()
    found = re.findall(r"dot_general.* : \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\) -> tensor<\S*x(\w+)>", text)
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    assert len(found) == text.count("stablehlo.dot_general") > 5 and set(found) == {(short, short, "f32")}


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("name", ["random", "low rank and noise", "condition 1e6", "square powers"])
def test_the_gram_form_in_bfloat16_errs_as_the_standard_form_does(name, tall):
    """On spectra where it lost every digit while P was rounded together with a I, whole matrices compared (Frobenius norm)."""
    rows, columns = 96, 256
    x = {
        "random": normal(1, rows, columns),
        "low rank and noise": normal(1, rows, 16) @ normal(2, 16, columns) / 4 + 1e-3 * normal(3, rows, columns),
        "condition 1e6": with_spectrum(np.logspace(0, -6, rows), rows, columns),
        "square powers": with_spectrum(1 / np.arange(1, rows + 1) ** 2, rows, columns),
    }[name]
    x = x.T if tall else x
    want = reference(x)
    standard, gram = (np.linalg.norm(np.asarray(orthogonalise(x, form=form, dtype="bfloat16")) - want) for form in ("standard", "gram"))
    assert 0 < gram < 1.7 * standard < 0.5 * np.linalg.norm(want)


def test_singular_values_end_near_one():
    got = np.linalg.svd(np.asarray(orthogonalise(normal(0, 3, 16, 64))), compute_uv=False)
    assert got.shape == (3, 16) and 0.6 < got.min() and got.max() < 1.3


STACKS = [(2, 3, 8, 24), (2, 3, 24, 8), (3, 8, 8), (8, 24)]
CASES = [
    *((form, "float32", batch, shape) for form in ("standard", "gram") for batch in ("map", "vmap") for shape in STACKS),
    *((form, "bfloat16", "map", shape) for form in ("standard", "gram") for shape in STACKS[:2]),
    ("standard", "float32", None, STACKS[0]),
]


@pytest.mark.parametrize(("form", "dtype", "batch", "shape"), CASES)
def test_a_stack_is_its_matrices_one_by_one(form, dtype, batch, shape):
    x = normal(1, *shape)
    x[..., :, :] *= 10.0 ** normal(2, *shape[:-2])[..., None, None]  # every matrix its own scale: a norm over the stack would show
    got = np.asarray(orthogonalise(x, form=form, dtype=dtype, batch=batch)).reshape(-1, *shape[-2:])
    for matrix, one in zip(x.reshape(-1, *shape[-2:]), got, strict=True):
        np.testing.assert_allclose(one, reference(matrix), atol=TOLERANCES[form, dtype])


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(2, 384, 192), (384, 192), (2, 192, 384), (2, 64, 8)])
def test_bfloat16_between_transposes(shape, form):
    """XLA:CPU has no bfloat16 product with a transposed layout; it used to choose one when a transpose came before or after."""
    x = jnp.asarray(normal(4, *shape))
    got = jax.jit(lambda x: 2 * muon.orthogonalise(x.mT, form=form, dtype="bfloat16", batch=None).mT)(x)
    want = 2 * orthogonalise(x, form="standard")
    assert float(jnp.abs(got - want).max()) < TOLERANCES[form, "bfloat16"] * float(jnp.abs(want).max())


@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [
        ((2, 8, 16), "float32", "gram"),
        ((2, 16, 8), "float32", "gram"),
        ((2, 8, 12), "float32", "standard"),
        ((2, 8, 16), "bfloat16", "standard"),
    ],
)
def test_auto_takes_the_gram_form_for_rectangular_float32_matrices_only(shape, dtype, form):
    def program(form):
        return str(jax.make_jaxpr(lambda x: muon.orthogonalise(x, form=form, dtype=dtype, batch="vmap"))(jnp.zeros(shape)))

    other = {"gram": "standard", "standard": "gram"}[form]
    assert program("auto") == program(form) != program(other)


def test_accelerators_do_not_merge_the_stack_axes():
    with tracing_for("tpu"):
        traced = jax.jit(lambda x: muon.orthogonalise(x)).trace(jax.ShapeDtypeStruct((2, 3, 8, 24), jnp.float32))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tensor<2x3x8x8xf32>" in text and "tensor<6x" not in text


@pytest.mark.parametrize(
    "form, dtype, bound, shape, steps",
    [
        *((form, "float32", 2e-6, shape, 5) for form in ("standard", "gram") for shape in ((3, 8, 24), (24, 8))),
        *((form, "float32", 2e-6, (3, 8, 24), 1) for form in ("standard", "gram")),
        ("standard", "bfloat16", 0.02, (3, 8, 24), 5),
        ("gram", "bfloat16", 0.02, (3, 8, 24), 5),
    ],
)
def test_accelerators_give_what_a_cpu_gives(form, dtype, bound, shape, steps):
    def both(x):
        return muon.orthogonalise(x, steps=steps, form=form, dtype=dtype)

    x = normal(3, *shape)
    here, program = jax.jit(both)(x), str(jax.make_jaxpr(both)(x))
    with tracing_for("gpu"):
        assert program != str(jax.make_jaxpr(both)(x))
        there = jax.jit(both)(x)
    chex.assert_trees_all_close(there, here, atol=bound, rtol=0)


def stack_gradients(count=4):
    shapes = {"qkv": (2, 8, 24), "out": (2, 8, 8), "up": (2, 3, 8, 32), "down": (2, 3, 32, 8)}
    return [{name: jnp.asarray(normal(10 * step + len(name), *shape)) for name, shape in shapes.items()} for step in range(count)]


def run(transform, gradients, params=None):
    state, updates, step = transform.init(gradients[0]), [], jax.jit(transform.update)
    for gradient in gradients:
        update, state = step(gradient, state, params)
        updates.append(update)
    return updates


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_the_first_update_equals_optaxs(consistent_rms):
    """Optax corrects the bias of the mean. Of one gradient that changes the size alone, which an orthogonal matrix does not have."""
    gradients = stack_gradients(1)
    numbers = jax.tree.map(lambda _: muon.MATRIX, gradients[0])
    theirs = optax.contrib.muon(-1.0, eps=1e-8, muon_weight_dimension_numbers=numbers, consistent_rms=consistent_rms)
    ours = muon.scale_by_muon(consistent_rms=consistent_rms, eps=1e-8, form="standard")
    ((got,), (want,)) = run(ours, gradients), run(theirs, gradients, gradients[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), got, want)


def test_without_bias_correction_the_seeds_mix():
    first, second = (np.asarray(g["out"][0], np.float64) for g in stack_gradients(2))
    buffer = 0.95 * (0.05 * first) + 0.05 * second
    want = reference(0.05 * second + 0.95 * buffer)
    got = run(muon.scale_by_muon(), stack_gradients(2))[1]["out"][0]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_scale_is_root_of_out_over_in_when_wider():
    assert muon.shape_scale((8, 32)) == 2.0 and muon.shape_scale((5, 32, 8)) == 1.0
    assert muon.shape_scale((4, 16, 25), consistent_rms=0.2) == pytest.approx(1.0)


def test_dimension_numbers_name_any_axes():
    x = jnp.asarray(normal(0, 2, 6, 4, 5))  # stack 2 and 4, input axis 5, output axis 6
    got = run(muon.scale_by_muon(dimension_numbers=MuonDimensionNumbers(3, 1)), [{"w": x}])[0]["w"]
    plain = run(muon.scale_by_muon(), [{"w": x.transpose(0, 2, 3, 1)}])[0]["w"]
    np.testing.assert_allclose(got, plain.transpose(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize("dead", ["keep", "skip"])
def test_an_expert_without_gradient(dead):
    alive = jnp.asarray(normal(0, 1, 2, 8, 32))
    one_dead = alive.at[0, 1].set(0.0)
    before, after = run(muon.scale_by_muon(dead=dead), [{"w": alive}, {"w": one_dead}])
    rms = muon.matrix_rms(after["w"])
    full = float(muon.matrix_rms(before["w"])[0, 1])
    assert float(rms[0, 0]) > 0.5 * full
    assert float(rms[0, 1]) == 0.0 if dead == "skip" else float(rms[0, 1]) > 0.5 * full


def test_a_skipped_experts_momentum_decays():
    transform, gradient = muon.scale_by_muon(dead="skip"), {"w": jnp.asarray(normal(0, 1, 2, 8, 32))}
    _, state = transform.update(gradient, transform.init(gradient))
    _, later = transform.update({"w": gradient["w"].at[0, 1].set(0.0)}, state)
    np.testing.assert_allclose(later.momentum["w"][0, 1], 0.95 * state.momentum["w"][0, 1], rtol=1e-6)


def test_a_nan_stays_in_its_matrix():
    x = jnp.asarray(normal(0, 3, 8, 32)).at[1, 2, 3].set(jnp.nan)
    got = orthogonalise(x)
    assert bool(jnp.isfinite(got[0]).all()) and bool(jnp.isfinite(got[2]).all()) and bool(jnp.isnan(got[1]).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "gramm"}, "did you mean 'gram'"),
        ({"dtype": "bfloat"}, "unknown dtype 'bfloat'"),
        ({"batch": "loop"}, "known: map, vmap"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigError, match=message):
        muon.orthogonalise(jnp.zeros((2, 4, 8)), **arguments)
    with pytest.raises(ConfigError, match=r"got shape \(4,\)"):
        muon.orthogonalise(jnp.zeros(4))
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        muon.scale_by_muon(dead="skipp")
