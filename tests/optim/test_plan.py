"""The optimizer plan: its table, its refusals, and what its transformation does to each kind of leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from moe_jax.axes import ParamSpec, Rules
from moe_jax.errors import ConfigError
from moe_jax.optim import muon
from moe_jax.optim.plan import OptimizerConfig, plan
from moe_jax.paths import flatten

SPECS = {
    "embedding": ParamSpec((50, 8), ("vocab", "embed"), "embedding"),
    "norm": ParamSpec((8,), ("embed",), "norm"),
    "head": ParamSpec((8, 50), ("embed", "vocab"), "head"),
    "layers": {
        "norm": ParamSpec((2, 8), ("layers", "embed"), "norm"),
        "qkv": ParamSpec((2, 8, 24), ("layers", "embed", "qkv"), "hidden"),
        "qkv_bias": ParamSpec((2, 24), ("layers", "qkv"), "bias"),
        "router": ParamSpec((2, 8, 4), ("layers", "embed", "router"), "router"),
        "selection_bias": ParamSpec((2, 4), ("layers", "router"), "selection_bias"),
        "up": ParamSpec((2, 4, 8, 16), ("layers", "experts", "embed", "expert_width"), "expert"),
        "down": ParamSpec((2, 4, 16, 8), ("layers", "experts", "expert_width", "embed"), "expert"),
    },
}
FREE = {"warmup": 0, "total": 10, "floor": 1.0}  # multiplier 1 throughout
SEED_TABLE = """
parameter              shape     axes                               role            optimizer  matrices  decay  peak rate  parameters
embedding              50x8      vocab,embed                        embedding       adamw      -           0.1      0.001         400
head                   8x50      embed,vocab                        head            adamw      -           0.1      0.001         400
layers/down            2x4x16x8  layers,experts,expert_width,embed  expert          muon       8 x 16x8      0       0.01       1,024
layers/norm            2x8       layers,embed                       norm            adamw      -           0.1      0.001          16
layers/qkv             2x8x24    layers,embed,qkv                   hidden          muon       2 x 8x24      0       0.01         384
layers/qkv_bias        2x24      layers,qkv                         bias            adamw      -           0.1      0.001          48
layers/router          2x8x4     layers,embed,router                router          muon       2 x 8x4       0       0.01          64
layers/selection_bias  2x4       layers,router                      selection_bias  frozen     -             0          -           8
layers/up              2x4x8x16  layers,experts,embed,expert_width  expert          muon       8 x 8x16      0       0.01       1,024
norm                   8         embed                              norm            adamw      -           0.1      0.001           8
muon       4 leaves            2,496 parameters
adamw      5 leaves              872 parameters
frozen     1 leaves                8 parameters
total     10 leaves            3,376 parameters
"""


def test_matrices_may_have_adamw():
    """As fine-tuning often does; the router has its own choice."""
    labels = {leaf.path: leaf.label for leaf in plan(SPECS, OptimizerConfig(matrices="adamw")).leaves}
    assert {path for path, label in labels.items() if label == "muon"} == {"layers/router"}
    both = plan(SPECS, OptimizerConfig(matrices="adamw", router="adamw"))
    assert {leaf.label for leaf in both.leaves} == {"adamw", "frozen"}
    before, after, _ = train(OptimizerConfig(matrices="adamw", router="adamw", **FREE))
    assert all((after[path] != before[path]).any() for path in labels if labels[path] != "frozen")


def draw(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: jnp.asarray(scale * generator.standard_normal(spec.shape, np.float32)), SPECS)


@functools.cache
def step_of(config):
    """(initial state of parameters, jitted update): one program for each config."""
    transformation = plan(SPECS, config).transformation()

    @jax.jit
    def step(params, state, gradients):
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return transformation.init, step


def train(config, steps=3, gradient_scale=1.0, alter=lambda gradients: gradients):
    """Parameters before and after `steps` jitted updates, and the final state."""
    init, step = step_of(config)
    start = params = draw(0)
    state = init(params)
    for index in range(steps):
        params, state = step(params, state, alter(draw(index + 1, gradient_scale)))
    return flatten(start), flatten(params), state


def test_the_seeds_table():
    assert plan(SPECS, OptimizerConfig()).table() == SEED_TABLE.strip()


def test_moonlight_spares_norms_and_biases_and_decays_muon():
    config = OptimizerConfig(variant="moonlight", router="adamw")
    decays = {leaf.path: leaf.weight_decay for leaf in plan(SPECS, config).leaves}
    spared = {"norm", "layers/norm", "layers/qkv_bias", "layers/selection_bias"}
    assert {path for path, decay in decays.items() if decay == 0} == spared
    assert set(decays.values()) == {0.0, 0.1}
    explicit = plan(SPECS, OptimizerConfig(variant="moonlight", muon_weight_decay=0.0))
    assert {leaf.weight_decay for leaf in explicit.leaves if leaf.label == "muon"} == {0.0}


def test_dimension_numbers_come_from_axes_in_any_order():
    specs = {"up": ParamSpec((8, 4, 16, 2), ("embed", "experts", "expert_width", "layers"), "expert")}
    leaf = plan(specs, OptimizerConfig()).leaves[0]
    assert leaf.dimension_numbers == MuonDimensionNumbers(-4, -2) and leaf.matrices == "8 x 8x16"


@pytest.mark.parametrize(
    ("axes", "role", "count"),
    [
        (("layers", "embed"), "hidden", 1),
        (("embed", "heads", "head_dim"), "hidden", 3),
        (("experts", "embed"), "expert", 1),
        (("router",), "router", 1),
    ],
)
def test_a_matrix_role_must_be_a_matrix(axes, role, count):
    with pytest.raises(ConfigError, match=f"parameter a/w .* leave {count} besides the stack axes"):
        plan({"a": {"w": ParamSpec(tuple(range(2, 2 + len(axes))), axes, role)}}, OptimizerConfig())


def test_leaves_that_the_plan_does_not_cover():
    transformation = plan(SPECS, OptimizerConfig()).transformation()
    params = draw(0)
    extra = params | {"surprise": jnp.zeros(3)}
    with pytest.raises(ConfigError, match="surprise is not in the plan"):
        transformation.init(extra)
    with pytest.raises(ConfigError, match=r"head is missing"):
        transformation.init({name: leaf for name, leaf in params.items() if name != "head"})
    with pytest.raises(ConfigError, match=r"norm has shape \(9,\), not \(8,\)"):
        transformation.init(params | {"norm": jnp.zeros(9)})


FROZEN = [
    ({"router": "frozen"}, {"layers/router"}),
    ({"freeze_roles": ("router", "embedding", "norm")}, {"layers/router", "embedding", "norm", "layers/norm"}),
    ({"freeze_roles": ("expert",), "variant": "moonlight"}, {"layers/up", "layers/down"}),
]


@pytest.mark.parametrize(("settings", "frozen"), FROZEN)
def test_frozen_leaves_keep_every_bit_and_nothing_else_does(settings, frozen):
    config = OptimizerConfig(**settings, **FREE, weight_decay=0.5, muon_weight_decay=0.5)
    before, after, _ = train(config, steps=5)
    unchanged = {path for path in before if before[path].tobytes() == after[path].tobytes()}
    assert unchanged == frozen | {"layers/selection_bias"}


def test_a_frozen_minus_zero_stays_minus_zero():
    transformation = plan(SPECS, OptimizerConfig(router="frozen")).transformation()
    params = draw(0)
    params["layers"]["router"] = jnp.full((2, 8, 4), -0.0)
    updates, _ = jax.jit(transformation.update)(draw(1), transformation.init(params), params)
    assert np.signbit(optax.apply_updates(params, updates)["layers"]["router"]).all()


@pytest.mark.parametrize(("settings", "frozen"), FROZEN)
def test_frozen_leaves_have_no_state(settings, frozen):
    planned = plan(SPECS, OptimizerConfig(**settings))
    state = planned.transformation().init(draw(0))
    copies = {"muon": 1, "adamw": 2, "frozen": 0}  # a momentum; two moments
    want = sum(copies[leaf.label] * leaf.size for leaf in planned.leaves)
    assert frozen <= {leaf.path for leaf in planned.leaves if leaf.label == "frozen"}
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == want


def test_clip_and_norm_count_trainable_leaves_only():
    def louder(gradients):
        layers = gradients["layers"] | {name: 1e6 * gradients["layers"][name] for name in ("router", "selection_bias")}
        return gradients | {"layers": layers}

    config = OptimizerConfig(matrices="adamw", router="frozen", **FREE)
    _, quiet, _ = train(config)
    _, loud, _ = train(config, alter=louder)
    for path in quiet:
        np.testing.assert_array_equal(quiet[path], loud[path])
    gradients, planned = draw(1), plan(SPECS, config)
    trainable = [np.ravel(leaf) for path, leaf in flatten(gradients).items() if path not in ("layers/router", "layers/selection_bias")]
    want = np.linalg.norm(np.concatenate(trainable))
    assert float(planned.global_norm(gradients)) == float(planned.global_norm(louder(gradients))) == pytest.approx(want, rel=1e-6)


def test_clipping_scales_gradients_to_the_limit():
    planned = plan(SPECS, OptimizerConfig(clip_norm=0.5, **FREE))
    state = planned.transformation().init(draw(0))
    _, state = jax.jit(planned.transformation().update)(draw(1), state, draw(0))
    moments = [leaf for leaf in jax.tree.leaves(optax.tree.get(state, "momentum"))]
    norm = float(planned.global_norm(draw(1)))
    raw = [0.05 * leaf for path, leaf in flatten(draw(1)).items() if path in ("layers/down", "layers/qkv", "layers/router", "layers/up")]
    for got, want in zip(moments, raw, strict=True):
        np.testing.assert_allclose(got, want * 0.5 / norm, rtol=1e-5)


one_matrix = jax.jit(muon.orthogonalise)


def test_one_update_by_hand():
    config = OptimizerConfig(
        learning_rate=0.02, adamw_learning_rate=0.003, weight_decay=0.25, muon_weight_decay=0.5, clip_norm=None, **FREE
    )
    before, after, _ = train(config, steps=1)
    gradients = flatten(draw(1))
    for path in ("layers/qkv", "layers/up", "layers/down", "layers/router"):
        mixed = (0.05 + 0.95 * 0.05) * np.asarray(gradients[path]).reshape(-1, *before[path].shape[-2:])
        direction = np.stack([one_matrix(matrix) for matrix in mixed]).reshape(before[path].shape)
        rows, columns = before[path].shape[-2:]
        want = before[path] - 0.02 * (max(1, columns / rows) ** 0.5 * direction + 0.5 * before[path])
        np.testing.assert_allclose(after[path], want, atol=2e-5)
    for path in ("embedding", "head", "norm", "layers/norm", "layers/qkv_bias"):  # Adam's first step is the gradient's sign
        want = before[path] - 0.003 * (np.sign(gradients[path]) + 0.25 * before[path])
        np.testing.assert_allclose(after[path], want, atol=2e-5)


def test_adamw_leaves_equal_optax_adamw():
    config = OptimizerConfig(matrices="adamw", router="adamw", clip_norm=None, betas=(0.8, 0.95), **FREE)
    _, after, _ = train(config, steps=4)
    adamw = optax.adamw(0.001, 0.8, 0.95, weight_decay=0.1)
    params = {"embedding": draw(0)["embedding"]}
    state = adamw.init(params)
    update = jax.jit(adamw.update)
    for step in range(4):
        updates, state = update({"embedding": draw(step + 1)["embedding"]}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["embedding"], params["embedding"], atol=1e-6)


def test_bfloat16_iteration_on_stacks_in_one_program():
    before, single, _ = train(OptimizerConfig(ns_dtype="bfloat16", **FREE), steps=1)
    _, double, _ = train(OptimizerConfig(**FREE), steps=1)
    for path in before:
        moved = np.abs(double[path] - before[path]).max()
        np.testing.assert_allclose(single[path], double[path], atol=0.15 * moved)
    assert (single["layers/down"] != double["layers/down"]).any()


def test_learning_rates_follow_the_count_of_updates():
    config = OptimizerConfig(warmup=2, total=4, floor=0.5, weight_decay=0.0, clip_norm=None)
    planned = plan(SPECS, config)
    rates = [float(planned.learning_rate(count)["adamw"]) for count in range(5)]
    np.testing.assert_allclose(rates, [0, 0.0005, 0.001, 0.00075, 0.0005], rtol=1e-6)
    assert float(planned.learning_rate(2)["muon"]) == pytest.approx(0.01)
    before, after, _ = train(config, steps=1)  # update 0 has rate 0
    for path in before:
        np.testing.assert_array_equal(before[path], after[path])
    _, later, _ = train(config, steps=2)
    assert all((before[path] != later[path]).any() for path in before if path != "layers/selection_bias")


def silence_expert(gradients):
    layers = gradients["layers"]
    return gradients | {"layers": layers | {name: layers[name].at[1, 2].set(0.0) for name in ("up", "down")}}


@pytest.mark.parametrize("dead", ["keep", "skip"])
def test_a_dead_expert_through_the_plan(dead):
    planned = plan(SPECS, OptimizerConfig(dead_expert=dead, clip_norm=None, **FREE))
    transformation, params = planned.transformation(), draw(0)
    update = jax.jit(transformation.update)
    _, state = update(draw(1), transformation.init(params), params)
    updates, _ = update(silence_expert(draw(2)), state, params)
    rms = planned.update_rms(updates)
    assert set(rms) == {"layers/up", "layers/down", "layers/qkv", "layers/router"} and rms["layers/up"].shape == (2, 4)
    assert (float(rms["layers/up"][1, 2]) == 0.0) == (dead == "skip")
    assert float(rms["layers/up"][1, 1]) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "moonlite"}, "did you mean 'moonlight'"),
        ({"router": "adam"}, "did you mean 'adamw'"),
        ({"matrices": "frozen"}, "unknown matrices 'frozen'; known: muon, adamw"),
        ({"freeze_roles": ("routr",)}, "did you mean 'router'"),
        ({"ns_form": "gramm"}, "did you mean 'gram'"),
        ({"ns_batch": "loop"}, "unknown ns_batch 'loop'; known: map, vmap"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"warmup": 400}, "400 updates cannot warm up for 400"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"muon_weight_decay": -1.0}, "muon_weight_decay must be a finite number, 0 or more; got -1.0"),
        ({"momentum": 1.0}, "momentum 1.0 must be"),
        ({"clip_norm": 0.0}, "clip_norm above 0"),
        ({"ns_steps": 10**22}, "ns_steps must be from 1 to 100"),
        ({"total": 2**31}, "at most 2,147,483,647 updates, got 2147483648"),
    ],
)
def test_config_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)


def test_nothing_to_train():
    with pytest.raises(ConfigError, match="all 1 parameters are frozen"):
        plan({"norm": SPECS["norm"]}, OptimizerConfig(freeze_roles=("norm",)))


def test_where_matrices_are_orthogonalised():
    """Experts stay; layers go over the axes that divide them, those that cut the matrices first; nothing is laid over one axis twice."""
    rules = Rules((("experts", ("expert", "tensor")), ("embed", "fsdp"), ("qkv", "tensor")))
    leaves = {leaf.path: leaf for leaf in plan(SPECS, OptimizerConfig(router="muon")).leaves}

    def places(path, **sizes):
        return leaves[path].places(rules, sizes)

    assert places("layers/up", fsdp=2, expert=4) == (P(None, "expert", "fsdp", None), P("fsdp", "expert", None, None))
    assert places("layers/up", data=2, expert=2, tensor=2)[1] == P("data", ("expert", "tensor"), None, None)
    assert places("layers/qkv", fsdp=2, tensor=2) == (P(None, "fsdp", "tensor"), P("fsdp", None, None))  # two layers: one of the axes
    assert places("layers/qkv", fsdp=4, tensor=2)[1] == P("tensor", None, None)
    assert places("layers/router", data=4) == (P(None, None, None), P(None, None, None))  # two layers do not divide over four devices
