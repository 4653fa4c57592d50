"""One update: micro-batches, the balance weight as data, refusal of what is not finite, frozen routers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.keys import Draw
from moe_jax.losses import balance_of
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.train.program import Program, off
from moe_jax.train.state import Knobs
from moe_jax.train.step import Objective

MODEL = ModelConfig.preset("tiny", num_layers=1, vocab_size=64, d_model=16, d_expert=16)
OPTIMIZER = OptimizerConfig(warmup=0, total=20, schedule="warmup_constant")
ADAMW = dataclasses.replace(OPTIMIZER, matrices="adamw", router="adamw")  # which compiles faster


def knobs(noise=0.1, balance=0.01, seed=0) -> Knobs:
    spec = NoiseSpec.parse(f"router_logits=additive:{noise}:phases=train+eval").resolve(MODEL.num_layers)
    return Knobs(spec, jnp.uint32(seed), jnp.float32(balance), jnp.float32(0.0))


def batch(accumulation=1, rows=4, length=8, seed=0):
    windows = np.random.default_rng(seed).integers(0, 64, (accumulation, rows, length + 1)).astype(np.int32)
    return {"tokens": windows[..., :-1], "targets": windows[..., 1:]}


@pytest.fixture(scope="module")
def program():
    return Program(MODEL, OPTIMIZER, Objective())


def test_one_program_for_every_value(program):
    """Noise scale, balance weight, seeds and data are values: twelve combinations compile training once."""
    for index in range(12):
        state = program.init(jnp.uint32(index))
        state, _, flags = program.train(state, batch(seed=index), knobs(noise=0.05 * index, balance=0.01 * index, seed=index))
        assert not flags.any() and state.step == 1
    assert program.compiled["train"] == 1 and program.compiled["init"] == 1


def test_zero_noise_is_the_same_value_as_no_noise(program):
    """Scale 0 gives the bits of a program that was never told of noise."""
    silent = dataclasses.replace(knobs(), noise=None)
    ours, _, _ = program.train(program.init(jnp.uint32(0)), batch(), off(knobs(0.3)))
    theirs, _, _ = program.train(program.init(jnp.uint32(0)), batch(), silent)
    noisy, _, _ = program.train(program.init(jnp.uint32(0)), batch(), knobs(0.3))
    chex.assert_trees_all_equal(ours.params, theirs.params)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(noisy.params), strict=True))


def test_micro_batches_sum_to_the_batch():
    """Four micro-batches of two rows give the gradients of one batch of eight when nothing is averaged per micro-batch but the loss."""
    program = Program(MODEL, ADAMW, Objective())
    whole = batch(1, rows=8)
    parts = {name: value.reshape(4, 2, -1) for name, value in whole.items()}
    quiet = knobs(noise=0.1, balance=0.0)
    one, metrics_one, _ = program.train(program.init(jnp.uint32(0)), whole, quiet)
    four, metrics_four, _ = program.train(program.init(jnp.uint32(0)), parts, quiet)
    assert program.compiled["train"] == 2  # the two sides are different programs
    chex.assert_trees_all_close(one.params, four.params, atol=2e-6)
    np.testing.assert_array_equal(metrics_one["router/load"], metrics_four["router/load"])  # same draws, so the same experts
    np.testing.assert_allclose(metrics_one["loss"], metrics_four["loss"], rtol=1e-6)


def test_balance_weight_reaches_the_router_alone_through_the_aux_loss(program):
    """A large balance weight moves the router further than none; its loss is at least the number of layers."""
    plain, metrics, _ = program.train(program.init(jnp.uint32(0)), batch(), knobs(balance=0.0))
    pressed, _, _ = program.train(program.init(jnp.uint32(0)), batch(), knobs(balance=10.0))
    assert metrics["balance_loss"][0] >= 0.9
    router = lambda state: state.params["layers"]["feed_forward"]["router"]  # noqa: E731
    assert jnp.abs(router(plain) - router(pressed)).max() > 1e-4


@pytest.mark.parametrize("where", ["embedding", "layers/feed_forward/router"])
def test_a_non_finite_value_refuses_the_update(program, where):
    """The state comes back bit for bit, and the flags name the gradients."""
    state = program.init(jnp.uint32(0))
    params = jax.tree.map(lambda leaf: leaf, state.params)
    if where == "embedding":
        params["embedding"] = params["embedding"].at[3, 0].set(jnp.nan)
    else:
        params["layers"]["feed_forward"]["router"] = params["layers"]["feed_forward"]["router"].at[0, 0, 0].set(jnp.inf)
    state = dataclasses.replace(state, params=params)
    before = jax.device_get(state)
    tokens = batch()
    tokens["tokens"][0, 0, 0] = 3
    after, _, flags = program.train(state, tokens, knobs())
    assert flags.any()
    chex.assert_trees_all_equal(jax.device_get(after), before)


def test_a_frozen_router_never_changes():
    """With weight decay on the rest, and its gradient alive."""
    program = Program(MODEL, dataclasses.replace(OPTIMIZER, router="frozen"), Objective())
    state = program.init(jnp.uint32(0))
    before = jax.device_get(state.params)
    for index in range(3):
        state, _, _ = program.train(state, batch(seed=index), knobs())
    after = jax.device_get(state.params)
    np.testing.assert_array_equal(after["layers"]["feed_forward"]["router"], before["layers"]["feed_forward"]["router"])
    assert (after["layers"]["feed_forward"]["up"] != before["layers"]["feed_forward"]["up"]).any()


def test_evaluation_counts_only_real_tokens(program):
    """Padding of weight 0 changes neither the loss nor the loads."""
    state = program.init(jnp.uint32(0))
    rows = batch(1, rows=4)
    rows = {name: value[0] for name, value in rows.items()} | {"weight": np.ones((4, 8), np.float32)}
    padded = {name: np.concatenate([value, value[:2]]) for name, value in rows.items()}
    padded["weight"][4:] = 0
    plain = program.evaluate(state.params, [rows], knobs())
    with_padding = program.evaluate(state.params, [padded], knobs())
    np.testing.assert_allclose(plain["loss"], with_padding["loss"], rtol=1e-6)
    assert plain["loss"][1] == 32
    np.testing.assert_array_equal(plain["router/load"], with_padding["router/load"])
    np.testing.assert_array_equal(plain["router/residual_load"], with_padding["router/residual_load"])


def test_layers_reduced_by_mean_or_sum():
    aux = {"balance_loss": (jnp.float32(6.0), jnp.float32(4.0)), "z_loss": (jnp.float32(8.0), jnp.float32(4.0))}
    weights = Knobs(None, 0, jnp.float32(0.5), jnp.float32(0.25))
    assert Objective("sum").router_losses(aux, weights) == 5.0
    assert Objective("mean").router_losses(aux, weights) == 1.25
    with pytest.raises(ConfigError, match="layer_reduction must be sum or mean"):
        Objective("median")


def test_the_global_batch_counts_the_micro_batches_before():
    """The second micro-batch's balance loss has the load of both."""
    twice = batch(2, rows=4)
    model = Model(MODEL)
    params = model.init(0)

    @jax.jit
    def parts_of(tokens, targets, first):
        draw = Draw(jnp.uint32(0), jnp.int32(0), "train", first)
        out = model.loss(params, tokens, targets, noise=knobs().noise, draw=draw, train=True, balance_scope="global_batch")[2]
        return out.balance

    parts = [parts_of(twice["tokens"][index], twice["targets"][index], index * 4) for index in range(2)]
    (first, scores), (second, later) = parts
    wanted = (balance_of(first, scores) + balance_of(first + second, later)).sum()
    plain = (balance_of(first, scores) + balance_of(second, later)).sum()
    found = {}
    for scope in ("microbatch", "global_batch"):
        program = Program(MODEL, ADAMW, Objective(balance_scope=scope))
        _, metrics, _ = program.train(program.init(jnp.uint32(0)), twice, knobs())
        found[scope] = float(metrics["balance_loss"][0])
        assert "balance_counts" not in metrics
    assert found["global_batch"] == pytest.approx(float(wanted), rel=2e-6)
    assert found["microbatch"] == pytest.approx(float(plain), rel=2e-6) and abs(float(wanted) - float(plain)) > 2e-5


def test_an_unknown_balance_scope_is_refused():
    with pytest.raises(
        ConfigError, match=r"unknown balance_scope 'global' \(did you mean 'global_batch'\?\); known: sequence, microbatch, global_batch"
    ):
        Objective(balance_scope="global")
