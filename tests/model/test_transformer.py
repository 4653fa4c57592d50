"""The stack of layers: one scan or unrolled, recomputed or kept, in any pattern of dense layers, it is the same network with the same draws."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.model import Model, ModelConfig
from moe_jax.model.bind import bind
from moe_jax.model.layers import Scope
from moe_jax.model.transformer import Block, layer_plan
from moe_jax.noise import draws

# --- scan, remat, dispatch --------------------------------------------------------------------------------------------------------

VARIANTS = {
    "unrolled": dict(scan_layers=False),
    "dots": dict(remat="dots"),
    "full": dict(remat="full"),
    "dense": dict(dispatch="dense"),
}


@pytest.fixture(scope="module")
def traced(program, params, tokens, noise, draw):
    """The tiny model with a variant's changes, in training: dropout and noise on."""

    @functools.cache
    def one(variant):
        return program(True, dropout=0.1, **VARIANTS.get(variant, {})).trace(params, tokens, noise, draw)

    return one


@pytest.fixture(scope="module")
def found(traced, params, tokens, noise, draw):
    """What a variant computes."""
    return functools.cache(lambda variant: traced(variant).lower().compile()(params, tokens, noise, draw))


@pytest.fixture(scope="module")
def text(traced):
    """A variant's program as text."""
    return functools.cache(lambda variant: str(traced(variant).jaxpr))


@pytest.mark.parametrize("variant", [pytest.param(name, marks=pytest.mark.slow if name == "unrolled" else []) for name in VARIANTS])
def test_variants_are_other_programs_of_one_network(text, found, variant):
    """The ids are the same exactly; the rest differs by rounding: the order of float32 sums."""
    (loss, out), gradients = found("plain")
    (other_loss, other_out), other_gradients = found(variant)
    assert text(variant) != text("plain")
    np.testing.assert_array_equal(other_out.trace.ids, out.trace.ids)
    np.testing.assert_array_equal(other_out.load, out.load)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    chex.assert_trees_all_close(other_out, out, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(other_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_the_programs_are_what_they_say(text):
    texts = {variant: text(variant) for variant in ("plain", *VARIANTS)}
    assert "remat" not in texts["plain"] and all("remat" in texts[variant] for variant in ("dots", "full"))
    assert texts["dots"] != texts["full"]
    scans = {variant: text.count("= scan[") for variant, text in texts.items()}
    assert scans["unrolled"] < scans["plain"]


def test_noise_and_dropout_were_on(found, program, params, tokens, noise, draw):
    """Else the variants were compared in an easier case."""
    (loss, out), _ = found("plain")
    clean_loss, clean = program(False)(params, tokens, None, draw)[0]
    assert abs(loss - clean_loss) > 1e-3 and (out.trace.ids != clean.trace.ids).mean() > 0.02


# --- patterns of layers -----------------------------------------------------------------------------------------------------------

# dense_layers of 4 layers -> segments of (name, routes?, absolute layers)
PLANS = {
    (): [[("layers", True, (0, 1, 2, 3))]],
    (0, 1, 2, 3): [[("layers", False, (0, 1, 2, 3))]],
    (0,): [[("layers_0", False, (0,))], [("layers_1", True, (1, 2, 3))]],
    (1, 2): [[("layers_0", True, (0,))], [("layers_1", False, (1, 2))], [("layers_2", True, (3,))]],
    (0, 2): [[("layers_0", False, (0, 2)), ("layers_1", True, (1, 3))]],
    (1, 3): [[("layers_0", True, (0, 2)), ("layers_1", False, (1, 3))]],
}


@pytest.mark.parametrize("dense", PLANS, ids=str)
def test_layer_plan(dense):
    plan = layer_plan(ModelConfig.preset("tiny", num_layers=4, dense_layers=dense))
    assert [[(stack.name, stack.moe, stack.layers) for stack in segment] for segment in plan] == PLANS[dense]


def test_layer_plan_of_one_layer_and_of_a_longer_period():
    plan = layer_plan(ModelConfig.preset("tiny", num_layers=1))
    assert [[stack.layers for stack in segment] for segment in plan] == [[(0,)]]
    plan = layer_plan(ModelConfig.preset("tiny", num_layers=6, dense_layers=(0, 3)))
    assert [[(stack.moe, stack.layers) for stack in segment] for segment in plan] == [[(False, (0, 3)), (True, (1, 4)), (True, (2, 5))]]


@pytest.mark.parametrize("count, dense", [(4, (1, 2)), (6, (0, 3))], ids=["runs", "pattern"])
def test_the_forward_pass_is_the_layers_one_after_the_other(count, dense, make_params, tokens, noise, draw):
    """With a scale for each layer, so that the absolute index of a layer matters to its scale and its draw.

    Six layers with (0, 3) dense are one scan over stacks (0, 3), (1, 4) and (2, 5): what the routers did must be put back in order.
    """
    config = ModelConfig.preset("tiny", num_layers=count, dense_layers=dense)
    model = Model(config)
    params = make_params(model)
    scales = noise.resolve(count)
    scales.scales["router_logits"] = 0.1 * jnp.arange(1.0, count + 1)
    out = jax.jit(lambda params, noise: model.features(params, tokens, noise, draw, capture=("trace",)))(params, scales)

    places = {layer: (stack.name, index) for segment in layer_plan(config) for stack in segment for index, layer in enumerate(stack.layers)}
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    scope = Scope(draw.key(), -1, jnp.arange(batch * length).reshape(batch, length), {}, scales.structure)
    blocks = {moe: jax.jit(bind(Block(config, moe))[1], static_argnums=4) for moe in (True, False)}
    x, ids = params["embedding"][tokens], []
    for layer in range(count):
        name, index = places[layer]
        here = scope.at(jnp.int32(layer), {site: scale[layer] for site, scale in scales.scales.items()})
        x, router, _ = blocks[layer not in dense](jax.tree.map(lambda leaf, i=index: leaf[i], params[name]), x, positions, here, ())
        ids.extend([router["ids"]] if router else [])
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * params["norm_final"]["scale"]
    np.testing.assert_array_equal(out.trace.layer_index, [layer for layer in range(count) if layer not in dense])
    np.testing.assert_array_equal(out.trace.ids, ids)
    np.testing.assert_allclose(out.hidden, x, rtol=1e-4, atol=1e-5)


def test_a_dense_model(make_params, tokens):
    model = Model(ModelConfig.preset("tiny", num_experts=0, num_layers=1))
    out = jax.eval_shape(lambda params: model.apply(params, tokens, capture=("trace", "router_logits")), make_params(model))
    assert out.trace is out.load is out.router_logits is None and out.aux == {} and out.logits.shape == (*tokens.shape, 260)
    assert model.active_parameter_count() == model.parameter_count()


# --- dropout ----------------------------------------------------------------------------------------------------------------------

DROPOUT_SITES = ["embedding", "attention", "attention_output", "expert_hidden", "feed_forward_output", "final"]


def test_each_of_six_sites_drops_in_training_and_none_in_evaluation(monkeypatch, make_model, params, tokens, draw):
    """Every site has a switch here: each alone changes the output in its own way, all off is the evaluation."""
    model = make_model(dropout=0.2, dispatch="dense")
    site_of, switches, real_stream, real_mask = {}, {}, Scope.stream, draws.dropout_mask

    def stream(self, site):
        key = real_stream(self, site)
        site_of[id(key)] = (site.removeprefix("dropout_"), key)  # the key is held so that its id stays its own
        return key

    def mask(key, *arguments):
        site, _ = site_of.get(id(key), ("attention", None))  # inside attention's own derivative rule the key is another object
        return jnp.where(switches["on"][DROPOUT_SITES.index(site)], real_mask(key, *arguments), 1.0)

    monkeypatch.setattr(Scope, "stream", stream)
    monkeypatch.setattr(draws, "dropout_mask", mask)

    @jax.jit
    def hidden(on):
        switches["on"] = on
        return model.features(params, tokens, draw=draw, train=True).hidden

    found = {site: np.asarray(hidden(jnp.array([site == other for other in DROPOUT_SITES]))) for site in DROPOUT_SITES}
    assert {site for site, _ in site_of.values()} == set(DROPOUT_SITES)
    silent = np.asarray(hidden(jnp.zeros(6, bool)))
    for i, (site, value) in enumerate(found.items()):
        for other in (silent, *list(found.values())[:i]):
            assert abs(value - other).max() > 1e-2, site

    site_of.clear()
    evaluated = jax.jit(lambda: model.features(params, tokens, draw=draw).hidden)()
    assert not site_of, "evaluation asked for a dropout key"
    np.testing.assert_allclose(evaluated, silent, rtol=1e-4, atol=1e-5)


# --- bad inputs and captures ------------------------------------------------------------------------------------------------------


def test_bad_inputs(make_model, params, tokens):
    model = make_model()
    with pytest.raises(ConfigError, match=r"sequence up to max_seq_len=64\], got shape \(1, 65\)"):
        model.apply(params, jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(ConfigError, match=r"got shape \(8,\)"):
        model.apply(params, tokens[0, :8])
    with pytest.raises(ConfigError, match=r"unknown capture \['traces'\]; known: trace, router_logits, residual_ids"):
        model.apply(params, tokens, capture=("traces",))


def test_captures(make_model, params, tokens):
    """Only what was asked for comes back; residual_ids are each router's choice on its block's input."""
    model = make_model()
    nothing = jax.eval_shape(lambda: model.features(params, tokens))
    assert nothing.logits is nothing.trace is nothing.router_logits is nothing.residual_ids is None and nothing.load.shape == (2, 4)
    everything = ("trace", "router_logits", "residual_ids")
    out = jax.jit(lambda params: model.features(params, tokens, capture=everything))(params)
    assert out.trace.ids.shape == out.trace.weights.shape == out.residual_ids.shape == (2, *tokens.shape, 2)
    assert out.router_logits.shape == (2, *tokens.shape, 4) and out.trace.valid.all()
    np.testing.assert_array_equal(out.trace.ids, np.argsort(-np.asarray(out.router_logits), -1, kind="stable")[..., :2])
    first = np.asarray(params["embedding"])[np.asarray(tokens)] @ np.asarray(params["layers"]["feed_forward"]["router"])[0]
    np.testing.assert_array_equal(out.residual_ids[0], np.argsort(-first, -1, kind="stable")[..., :2])
    assert (out.residual_ids != out.trace.ids).any()
    load = [np.bincount(np.asarray(layer).reshape(-1), minlength=4) for layer in out.trace.ids]
    np.testing.assert_array_equal(out.load, load)
    assert out.aux["balance_loss"][1] == 2 and out.aux["router/entropy"][1] == 2 * tokens.size
