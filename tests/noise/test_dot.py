"""The noisy matmul against a double loop over rows and columns in float64 that is given the same draws: every kind, in every pass and layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import keys
from moe_jax.keys import PASSES
from moe_jax.noise import Operator, draws
from moe_jax.noise.formats import round_trip
from moe_jax.products import matmul

SCALE, SITE, FORMAT = 0.25, "expert_up", "fp8_e4m3"
KEY = keys.fold(keys.Draw(seed=5, step=2, phase="train").key(), 3)
SIZES = np.array([2, 0, 3, 1])  # rows of each group; the second has none
GROUP = np.repeat(np.arange(4), SIZES)
R, M, N = 6, 5, 7
ROWS = np.array([40, 3, 7, 100, 8, 9])  # logical numbers, in no order
FIRST = 20
KINDS = ("relative", "additive", "rms_relative", "centred_relative", "accumulation", "jitter", "quantise", "bit_flip", "bias")
LAYOUTS = ("dense", "transposed", "grouped")


def operator(kind, passes=PASSES, scale=SCALE) -> Operator:
    return Operator(jnp.float32(scale), KEY, SITE, kind, passes, FORMAT if kind == "quantise" else None)


@functools.cache
def operands(layout):
    """(x, w, dy): whole numbers, so that the float32 sums of both sides are the same and flipped bits can be compared."""
    random = np.random.default_rng(1)
    w_shape = {"dense": (M, N), "transposed": (N, M), "grouped": (4, M, N)}[layout]
    return tuple(jnp.asarray(random.integers(-9, 10, shape), "float32") for shape in ((R, M), w_shape, (R, N)))


def options(layout) -> dict:
    return dict(sizes=jnp.asarray(SIZES)) if layout == "grouped" else dict(transposed=layout == "transposed")


@functools.cache
def results(layout, passes=PASSES, dtype="float32", kinds=KINDS):
    """kind -> (y, dx, dw) as the program computes them, all kinds in one; "clean": without an operator."""

    @jax.jit
    def run(x, w, dy):
        found = {}
        for kind in (None, *kinds):
            made = None if kind is None else operator(kind, passes)
            y, pull = jax.vjp(lambda x, w, made=made: matmul(x, w, made, jnp.asarray(ROWS), first=FIRST, **options(layout)), x, w)
            found[kind or "clean"] = (y, *pull(dy))
        return found

    x, w, dy = operands(layout)
    return run(x.astype(dtype), w, dy)


# --- the reference --------------------------------------------------------------------------------------------------------------


def product(a, b):
    """(a b, (a^2)(b^2)), element by element."""
    y, squares = np.zeros((len(a), b.shape[1])), np.zeros((len(a), b.shape[1]))
    for i in range(len(a)):
        for j in range(b.shape[1]):
            for m in range(a.shape[1]):
                y[i, j] += a[i, m] * b[m, j]
                squares[i, j] += (a[i, m] * b[m, j]) ** 2
    return y, squares


def with_error(kind, y, squares, pass_, rows):
    """y [R, C] with the error of `kind` and the draws of these logical rows."""
    key, rows = keys.fold(KEY, keys.name_word(f"{SITE}/{pass_}")), jnp.asarray(rows)
    n = np.asarray(draws.normal(key, rows, y.shape[1]), np.float64)
    if kind == "jitter":
        return y * (1 - SCALE + 2 * SCALE * np.asarray(draws.uniform(key, rows, y.shape[1]), np.float64))
    if kind == "bit_flip":  # probability 1/4 is the binary number .01: a coin "or" nothing, then "and" another
        coins = [np.asarray(draws.bits(keys.fold(key, digit), rows, y.shape[1])) for digit in (30, 31)]
        return (y.astype(np.float32).view(np.uint32) ^ (coins[0] & coins[1])).view(np.float32)
    error = {
        "relative": lambda: y * n,
        "additive": lambda: n,
        "rms_relative": lambda: np.sqrt((y**2).mean(-1, keepdims=True)) * n,
        "centred_relative": lambda: abs(y - y.mean(-1, keepdims=True)) * n,
        "accumulation": lambda: np.sqrt(squares) * n,
        "bias": lambda: np.sign(y) * abs(y).mean(-1, keepdims=True),
    }
    return y + SCALE * error[kind]()


def rounded(a, axis):
    """A quarter of the way to the value in the format, with its scale taken along `axis`."""
    return (1 - SCALE) * a + SCALE * np.asarray(round_trip(jnp.asarray(a, "float32"), FORMAT, axis), np.float64)


def one_group(kind, x, w, dy, rows, first):
    """(y, dx, dw) of x [R, M] and w [M, N]. first: the logical number of dw's first row. Rows are rounded along their last axis, w along M always."""
    if kind == "quantise":
        x_near, dy_near, w_near = rounded(x, -1), rounded(dy, -1), rounded(w, 0)
        return product(x_near, w_near)[0], product(dy_near, w_near.T)[0], product(x_near.T, dy_near)[0]
    places = first + np.arange(w.shape[0])
    return (
        with_error(kind, *product(x, w), "forward", rows),
        with_error(kind, *product(dy, w.T), "grad_input", rows),
        with_error(kind, *product(x.T, dy), "grad_weight", places),
    )


def reference(kind, layout):
    x, w, dy = (np.asarray(a, np.float64) for a in operands(layout))
    if layout == "dense":
        return one_group(kind, x, w, dy, ROWS, FIRST)
    if layout == "transposed":  # dw is [N, M] here, and so are the coordinates of its draws
        y, dx, _ = one_group(kind, x, w.T, dy, ROWS, FIRST)
        if kind == "quantise":
            return y, dx, product(rounded(dy, -1).T, rounded(x, -1))[0]
        return y, dx, with_error(kind, *product(dy.T, x), "grad_weight", FIRST + np.arange(N))
    parts = [one_group(kind, x[GROUP == g], w[g], dy[GROUP == g], ROWS[GROUP == g], FIRST + g * M) for g in range(4)]
    y, dx, dw = zip(*parts, strict=True)
    return np.concatenate(y), np.concatenate(dx), np.stack(dw)


# --- the tests ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_pass_against_a_double_loop(layout, kind):
    clean = results(layout)["clean"]
    for pass_, found, exact, expected in zip(PASSES, results(layout)[kind], clean, reference(kind, layout), strict=True):
        found, expected = np.asarray(found), np.asarray(expected)
        if kind == "bit_flip":
            assert (found != np.asarray(exact)).mean() > 0.9, pass_
            np.testing.assert_array_equal(found.view(np.uint32), expected.astype(np.float32).view(np.uint32), err_msg=pass_)
        else:
            assert abs(found - exact).max() > 0.1, f"no error in {pass_}: the test is empty"
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4, err_msg=pass_)


@pytest.mark.parametrize(
    "layout, passes",
    [("dense", ("forward",)), ("dense", ("grad_input",)), ("dense", ("grad_weight",)), ("grouped", ("grad_weight",))],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_one_pass_alone_leaves_the_others_to_the_bit(layout, passes):
    """The named pass is as it is with all three; the others are those of the clean matmul."""
    kinds = ("relative", "accumulation", "quantise", "bit_flip")  # one for each way that an operator makes its error
    every, alone = results(layout), results(layout, passes, kinds=kinds)
    for kind in kinds:
        for pass_, found, noisy, clean in zip(PASSES, alone[kind], every[kind], every["clean"], strict=True):
            wanted = noisy if pass_ in passes else clean
            np.testing.assert_array_equal(*(np.asarray(a).view(np.uint32) for a in (found, wanted)), err_msg=f"{kind} {pass_}")


def test_forward_noise_gives_the_clean_gradients_at_the_noisy_activations():
    """Two matmuls with a tanh between: the second one's dW reads the noisy hidden layer, and nothing knows how the error was made."""
    random = np.random.default_rng(2)
    x, first, second, dy = (random.normal(size=shape) for shape in ((R, M), (M, N), (N, 4), (R, 4)))
    noisy, rows = operator("relative", ("forward",)), jnp.asarray(ROWS)

    @jax.jit
    def run(x, first, second, dy):
        hidden = lambda x, first: matmul(x, first, noisy, rows)  # noqa: E731
        y, pull = jax.vjp(lambda x, a, b: matmul(jnp.tanh(hidden(x, a)), b, noisy, rows), x, first, second)
        return hidden(x, first), pull(dy)

    pre, (dx, d_first, d_second) = run(*(jnp.asarray(a, "float32") for a in (x, first, second, dy)))
    pre = np.asarray(pre, np.float64)
    assert abs(pre - x @ first).max() > 0.1
    d_pre = product(dy, second.T)[0] * (1 - np.tanh(pre) ** 2)
    for found, expected in ((d_second, product(np.tanh(pre).T, dy)), (d_first, product(x.T, d_pre)), (dx, product(d_pre, first.T))):
        np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["dense", "grouped"])
def test_the_noise_has_no_gradient(layout):
    x, w, _ = operands(layout)

    @jax.jit
    def gradients(made):
        return jax.grad(lambda made: jnp.square(matmul(x, w, made, jnp.asarray(ROWS), **options(layout))).sum(), allow_int=True)(made)

    for kind in ("relative", "accumulation", "quantise"):
        found = gradients(operator(kind))
        assert found.scale == 0 and found.key.dtype == jax.dtypes.float0, kind


@pytest.mark.parametrize("layout", ["dense", pytest.param("transposed", marks=pytest.mark.slow), "grouped"])
def test_scale_zero_is_clean_to_the_bit(layout):
    """Also where the order of a sum shows; but quantise has other operands, equal in value, of which a backend may make another program."""

    @jax.jit
    def run(scale, x, w, dy):
        made = [None, *(dataclasses.replace(operator(kind), scale=scale) for kind in KINDS)]
        found = []
        for one in made:
            y, pull = jax.vjp(lambda x, w, one=one: matmul(x, w, one, jnp.asarray(ROWS), **options(layout)), x, w)
            found.append((y, *pull(dy)))
        return found

    x, w, dy = operands(layout)
    whole, parts = run(jnp.float32(0.0), x, w, dy), run(jnp.float32(0.0), x + 0.3, w, dy * 0.7)
    for index, kind in enumerate(KINDS, start=1):
        clean, found = (run_[at] for at in (0, index) for run_ in [whole if kind == "quantise" else parts])
        for pass_, a, b in zip(PASSES, found, clean, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{kind} {pass_}")


def test_the_error_is_made_in_float32_before_the_cast():
    """From bfloat16 rows y is float32 and dX is rounded once, after its error; bits flip in the type that is kept."""
    kinds = ("relative", "accumulation", "bias", "bit_flip")
    wide, narrow = results("dense"), results("dense", dtype="bfloat16", kinds=kinds)  # whole numbers: the same products
    for kind in kinds[:3]:
        np.testing.assert_array_equal(narrow[kind][0], wide[kind][0])
        np.testing.assert_array_equal(narrow[kind][1], wide[kind][1].astype("bfloat16"))
        np.testing.assert_array_equal(narrow[kind][2], wide[kind][2])
    flipped = np.asarray(narrow["bit_flip"][0]).view(np.uint32)
    assert not (flipped & 0xFFFF).any(), "bits that a bfloat16 result does not have were flipped"


def test_draws_differ_by_pass_row_column_site_and_key():
    """A square problem whose three products are the same array: what differs is the draw alone."""
    ones, rows = jnp.ones((4, 4)), jnp.arange(4)

    def three(made):
        y, pull = jax.vjp(lambda x, w: matmul(x, w, made, rows), ones, ones)
        return [np.asarray(a) for a in (y, *pull(ones))]

    base = operator("relative")
    others = [dataclasses.replace(base, site="expert_down"), dataclasses.replace(base, key=keys.fold(KEY, 1))]
    found = np.concatenate([np.ravel(a) for made in (base, *others) for a in three(made)])
    assert len(np.unique(found)) == len(found) == 9 * 16


def test_accumulation_does_not_vanish_under_cancellation():
    """(1, -1) times (3, 3) is 0; the error of its two products is not."""
    x, w = jnp.array([[1.0, -1.0]]), jnp.array([[3.0], [3.0]])
    n = draws.normal(keys.fold(KEY, keys.name_word(f"{SITE}/forward")), jnp.array([9]), 1)
    assert float(matmul(x, w, operator("relative"), jnp.array([9]))[0, 0]) == 0
    np.testing.assert_allclose(matmul(x, w, operator("accumulation"), jnp.array([9])), SCALE * np.sqrt(18) * n, rtol=1e-6)
