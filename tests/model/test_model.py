"""What a user holds: initial values by path, causality, the same draws on any cut of the batch and any mesh, and bfloat16's distance."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import paths
from moe_jax.errors import ConfigError
from moe_jax.mesh import MeshSpec
from moe_jax.model import DTypePolicy, Model, ModelConfig
from moe_jax.noise import NoiseSpec

# --- initial values ---------------------------------------------------------------------------------------------------------------


def test_initial_values_are_functions_of_seed_and_path():
    """Not of how the program runs, of the other parameters, or of the order in which they are made."""
    changes = dict(num_layers=1, gated=False, fused_qkv=True)
    base = Model(ModelConfig.preset("tiny", **changes))
    first = paths.flatten(base.init(0))
    other = paths.flatten(Model(ModelConfig.preset("tiny", **changes, tie_embeddings=False, remat="full", scan_layers=False)).init(0))
    assert set(other) == {*first, "head"}
    for path, value in first.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)
    again, reseeded = paths.flatten(base.init(jnp.uint32(0))), paths.flatten(base.init(1))
    for path, value in first.items():
        spec = paths.flatten(base.specs)[path]
        assert value.shape == spec.shape and value.dtype == spec.dtype
        np.testing.assert_array_equal(value, again[path])
        assert (value == reseeded[path]).all() == (spec.init != "normal"), path
        if spec.init == "normal":  # 5 standard errors of a standard deviation
            assert abs(float(value.std()) / 0.02 - 1) < 5 / (2 * spec.size) ** 0.5, path
    matrices = [value.reshape(-1)[:200] for path, value in first.items() if value.size > 200]
    assert abs(np.corrcoef(matrices) - np.eye(len(matrices))).max() < 0.4  # 5 standard errors of 200 pairs


def test_counts_and_abstract_values_need_no_arrays():
    model = Model(ModelConfig.preset("seed_79m"))
    leaves = jax.tree.leaves(model.abstract())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves) and sum(leaf.size for leaf in leaves) == 79_059_840
    assert model.shardings is None
    table = Model(ModelConfig.preset("tiny")).param_table().splitlines()
    assert table[0].split() == ["parameter", "shape", "axes", "role", "count"]
    row = next(line.split() for line in table if line.startswith("layers/feed_forward/router"))
    assert row == ["layers/feed_forward/router", "(2,", "32,", "4)", "layers", "embed", "router", "router", "256"]


# --- causality --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_what_a_position_can_see(window, make_params):
    """The gradient of each position's output to each token's embedding: exactly zero ahead, and beyond 2 layers of the window; else not."""
    model = Model(ModelConfig.preset("tiny", sliding_window=window, tie_embeddings=False))
    params, length = make_params(model), 9
    tokens = jnp.arange(length)[None] + 5
    direction = jnp.asarray(np.random.default_rng(0).normal(size=32), "float32")

    @jax.jit
    def sensitivity(params):
        def seen(embedding):
            return (model.apply(params | {"embedding": embedding}, tokens).hidden * direction).sum(-1)[0]

        _, pull = jax.vjp(seen, params["embedding"])
        return jax.lax.map(lambda cotangent: abs(pull(cotangent)[0][tokens[0]]).max(-1), jnp.eye(length))

    distance = np.arange(length)[:, None] - np.arange(length)
    reach = length if window is None else 2 * (window - 1)
    np.testing.assert_array_equal(np.asarray(sensitivity(params)) > 0, (distance >= 0) & (distance <= reach))


# --- the same network on any cut of the batch and any mesh ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(make_model):
    """Jitted (params, tokens, noise, draw) -> Output of the tiny model in training, with dropout."""
    return jax.jit(lambda *given: make_model(dropout=0.1).features(*given, train=True, capture=("trace", "router_logits")))


@pytest.fixture(scope="module")
def whole(features, params, tokens, noise, draw):
    return features(params, tokens, noise, draw)


def test_a_batch_in_two_halves(features, params, tokens, noise, draw, whole):
    """With noise and dropout on: ids exactly, and hidden states as close as float32 sums allow, so the masks were the same."""
    halves = [features(params, tokens[at : at + 2], noise, dataclasses.replace(draw, row_offset=at)) for at in (0, 2)]
    np.testing.assert_array_equal(jnp.concatenate([half.trace.ids for half in halves], axis=1), whole.trace.ids)
    np.testing.assert_allclose(jnp.concatenate([half.hidden for half in halves]), whole.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sum(half.load for half in halves), whole.load)
    wrong = features(params, tokens[2:], noise, draw)  # without the offset the second half would get the first one's draws
    assert abs(wrong.hidden - whole.hidden[2:]).max() > 0.1 and (wrong.trace.ids != whole.trace.ids[:, 2:]).any()


def test_the_draw_changes_with_seed_and_step_and_repeats(features, params, tokens, noise, draw, whole):
    for change in (dict(seed=8), dict(step=4), dict(row_offset=1)):
        assert abs(features(params, tokens, noise, dataclasses.replace(draw, **change)).hidden - whole.hidden).max() > 0.1
    np.testing.assert_array_equal(features(params, tokens, noise, draw).hidden, whole.hidden)


@pytest.mark.slow
def test_the_same_ids_on_one_device_and_on_eight(make_model, params, noise, draw):
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 260, (8, 8)))
    run = jax.jit(lambda *given: make_model().features(*given, capture=("trace",)))
    alone = run(params, tokens, noise, draw)
    mesh = MeshSpec(data=8).build()
    placed = jax.device_put(params, Model(make_model().config, mesh).shardings)
    cut = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    assert len(cut.sharding.device_set) == 8 and cut.addressable_shards[0].data.shape == (1, 8)
    spread = run(placed, cut, noise, draw)
    assert len(spread.hidden.sharding.device_set) == 8
    np.testing.assert_array_equal(spread.trace.ids, alone.trace.ids)
    np.testing.assert_allclose(spread.hidden, alone.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spread.aux["balance_loss"][0], alone.aux["balance_loss"][0], rtol=1e-5)


# --- losses, gradients, number types ----------------------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_apply(make_model, params, tokens):
    model = make_model()
    weights = jnp.asarray(np.random.default_rng(1).random(tokens.shape) > 0.3, jnp.float32)
    targets = tokens[:, ::-1]

    @jax.jit
    def both(params):
        total, metrics, _ = model.loss(params, tokens, targets, weights)
        return total, metrics, model.apply(params, tokens).logits, model.loss(params, tokens, targets)[1]

    total, metrics, logits, unweighted = both(params)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, (losses * np.asarray(weights)).sum(), rtol=1e-5)
    assert metrics["loss"] == (total, weights.sum())
    np.testing.assert_allclose(unweighted["loss"][0], losses.sum(), rtol=1e-5)
    assert unweighted["loss"][1] == tokens.size


def test_every_parameter_gets_a_gradient(program, params, tokens, draw):
    gradients = program(False)(params, tokens, None, draw)[1]
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, params)
    chex.assert_tree_all_finite(gradients)
    for path, gradient in paths.flatten(gradients).items():
        assert (gradient != 0).any(axis=tuple(range(1, gradient.ndim))).all() or path == "embedding", path  # each layer's


def test_bfloat16_is_near_float32(make_model, params, tokens):
    """Activations of 8 bits through 2 layers: the loss moves by under 1 %, ids in under 5 % of slots; the parameters stay float32."""
    wide, narrow = (make_model(dtypes=DTypePolicy(compute=compute)) for compute in ("float32", "bfloat16"))

    @jax.jit
    def both(params):
        return [model.loss(params, tokens, tokens[:, ::-1], capture=("trace", "router_logits")) for model in (wide, narrow)]

    (loss, _, out), (other, _, other_out) = both(params)
    assert (
        other_out.hidden.dtype == jnp.bfloat16
        and other.dtype == other_out.router_logits.dtype == other_out.trace.weights.dtype == jnp.float32
    )
    assert 0 < abs(other / loss - 1) < 0.01
    assert (other_out.trace.ids != out.trace.ids).mean() < 0.05
    assert 0 < abs(other_out.router_logits - out.router_logits).max() < 0.05 * abs(out.router_logits).max()


def test_ids_that_are_no_words_are_refused(make_model, params, tokens):
    for wrong, message in ((tokens.at[0, 1].set(260), "from . to 260"), (tokens.at[0, 1].set(-1), "from -1 to")):
        with pytest.raises(ConfigError, match=f"token ids go {message}.*, the model's vocabulary from 0 to 259"):
            make_model().apply(params, wrong)


def test_a_balance_scope_that_is_none_is_refused(make_model, params, tokens):
    with pytest.raises(
        ConfigError, match=r"unknown balance_scope 'sequences' \(did you mean 'sequence'\?\); known: sequence, microbatch, global_batch"
    ):
        make_model().loss(params, tokens, tokens, balance_scope="sequences")


def test_noise_must_fit_the_model(make_model, params, tokens):
    with pytest.raises(ValueError, match=r"names layers \[2\], the model has layers 0 to 1"):
        make_model().apply(params, tokens, NoiseSpec.parse("router_logits=additive:0.1:layers=2"))
