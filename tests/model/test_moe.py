"""The layer where routing, noise and dispatch meet: who reads the noisy logits, and what comes back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.dispatch import dispatch
from moe_jax.keys import Draw
from moe_jax.losses import balance_loss, z_loss
from moe_jax.mesh import MeshSpec
from moe_jax.model import Model, ModelConfig
from moe_jax.model.bind import bind
from moe_jax.model.layers import Scope
from moe_jax.model.moe import MoE
from moe_jax.noise import NoiseSpec, SiteNoise, perturb

B, S, D, E, K = 3, 8, 32, 4, 2
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), "float32")
TOKENS = 50 + jnp.arange(B * S).reshape(B, S)
LAYER = 1


def layer_of(**changes):
    """(params, jitted call) of one MoE layer."""
    specs, call = bind(MoE(ModelConfig.preset("tiny", **changes)))
    random = np.random.default_rng(1)
    return {name: jnp.asarray(0.3 * random.normal(size=spec.shape), spec.dtype) for name, spec in specs.items()}, jax.jit(call)


def scope_of(spec=None) -> Scope:
    draw = Draw(seed=5, step=2, phase="train")
    noise = spec.resolve(2).in_phase("train") if spec else None
    scales = {site: scale[LAYER] for site, scale in noise.scales.items()} if noise else {}
    return Scope(draw.key(), LAYER, TOKENS, scales, noise.structure if noise else ())


@pytest.fixture(scope="module")
def layer():
    return layer_of()


@pytest.fixture(scope="module")
def clean(layer):
    params, call = layer
    return call(params, X, scope_of())


def test_what_the_router_did(layer, clean):
    params, _ = layer
    y, router = clean
    logits = routing.router_logits(X.reshape(-1, D), params["router"])
    ids = routing.select(logits, K)
    np.testing.assert_array_equal(router["ids"].reshape(-1, K), ids)
    assert router["ids"].dtype == jnp.uint8 and router["ids"].shape == (B, S, K) and y.shape == X.shape
    np.testing.assert_allclose(router["logits"].reshape(-1, E), logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(router["weights"].reshape(-1, K), routing.combine(logits, ids), rtol=1e-5)
    np.testing.assert_array_equal(router["load"], np.bincount(np.asarray(ids).reshape(-1), minlength=E))
    np.testing.assert_allclose(router["balance_loss"], balance_loss(logits, ids), rtol=1e-5)
    np.testing.assert_allclose(router["z_loss"], z_loss(logits), rtol=1e-5)
    assert router["router/entropy"][1] == B * S and "router/dropped" not in router  # nothing that could be dropped


def test_what_a_dispatch_drops_is_a_metric(monkeypatch):
    """Of each layer's first token nothing is computed. On a mesh the count is always there."""
    divided = Model(ModelConfig.preset("tiny"), MeshSpec(expert=4).build(jax.devices()[:4]))
    assert "router/dropped" in jax.eval_shape(divided.apply, divided.abstract(), jnp.zeros((4, S), jnp.int32)).aux

    def forgetful(x, decision, experts, *about, **how):
        y, stats = dispatch(x, dataclasses.replace(decision, ids=decision.ids.at[0].set(E)), experts, *about, **how)
        return y, dataclasses.replace(stats, dropped=jnp.int32(K))

    monkeypatch.setattr("moe_jax.model.moe.dispatch", forgetful)
    model = Model(ModelConfig.preset("tiny"))
    out = jax.jit(model.apply)(model.init(0), TOKENS)
    assert out.aux["router/dropped"] == (2 * K, 2 * B * S * K) and out.load.sum() == 2 * (B * S - 1) * K


REACHES = [("selection",), ("weights",), ("balance",), ("selection", "weights", "balance")]


@pytest.mark.parametrize("reach", REACHES, ids="+".join)
def test_each_reader_of_the_logits_has_its_switch(layer, clean, reach):
    """Selection alone changes ids and weighs them by clean logits; weights alone leaves the ids; balance alone leaves the output."""
    params, call = layer
    scope = scope_of(NoiseSpec({"router_logits": SiteNoise("additive", 1.0, reach=reach)}))
    y, router = call(params, X, scope)
    quiet = clean[1]["logits"].reshape(-1, E)
    noisy = perturb(quiet, "additive", jnp.float32(1.0), scope.stream("router_logits"), TOKENS.reshape(-1))
    seen = {reader: noisy if reader in reach else quiet for reader in ("selection", "weights", "balance")}
    ids = routing.select(seen["selection"], K)

    changed = (np.asarray(ids) != np.asarray(clean[1]["ids"]).reshape(-1, K)).mean()
    assert changed > 0.1 if "selection" in reach else changed == 0
    np.testing.assert_array_equal(router["ids"].reshape(-1, K), ids)
    np.testing.assert_allclose(router["weights"].reshape(-1, K), routing.combine(seen["weights"], ids), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(router["logits"].reshape(-1, E), seen["selection"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(router["balance_loss"], balance_loss(seen["balance"], ids), rtol=1e-5)
    np.testing.assert_allclose(router["z_loss"], z_loss(seen["balance"]), rtol=1e-5)
    if reach == ("balance",):
        np.testing.assert_array_equal(y, clean[0])
        np.testing.assert_array_equal(router["weights"], clean[1]["weights"])
        assert router["balance_loss"] != clean[1]["balance_loss"]


def test_noise_on_the_routers_input_leaves_the_experts_input_clean(layer, clean):
    params, call = layer
    scope = scope_of(NoiseSpec({"router_input": SiteNoise("relative", 0.5)}))
    y, router = call(params, X, scope)
    flat = X.reshape(-1, D)
    read = perturb(flat, "relative", jnp.float32(0.5), scope.stream("router_input"), TOKENS.reshape(-1))
    np.testing.assert_allclose(router["logits"].reshape(-1, E), routing.router_logits(read, params["router"]), rtol=1e-5, atol=1e-5)
    assert (router["ids"] != clean[1]["ids"]).any()
    # the output is the clean experts' on the noisy decision
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    up, gate, down, x = (np.asarray(a, np.float64) for a in (params["up"], params["gate"], params["down"], flat))
    ids, weights = np.asarray(router["ids"]).reshape(-1, K), np.asarray(router["weights"]).reshape(-1, K)
    expected = [
        sum(w * ((silu(row @ gate[e]) * (row @ up[e])) @ down[e]) for e, w in zip(i, v, strict=True))
        for row, i, v in zip(x, ids, weights, strict=True)
    ]
    np.testing.assert_allclose(y.reshape(-1, D), expected, rtol=1e-4, atol=1e-5)


def test_sigmoid_scores_and_a_selection_bias():
    params, call = layer_of(router_score="sigmoid", selection_bias=True, renormalise=False)
    params["selection_bias"] = jnp.array([0.0, 0.5, 0.0, -0.5])
    _, router = call(params, X, scope_of())
    logits = router["logits"].reshape(-1, E)
    ids = routing.select(logits, K, bias=params["selection_bias"])
    assert (ids != routing.select(logits, K)).any()
    np.testing.assert_array_equal(router["ids"].reshape(-1, K), ids)
    np.testing.assert_allclose(
        router["weights"].reshape(-1, K), np.take_along_axis(1 / (1 + np.exp(-np.asarray(logits))), np.asarray(ids), 1), rtol=1e-5
    )
    np.testing.assert_allclose(router["balance_loss"], balance_loss(logits, ids, "sigmoid"), rtol=1e-5)


def test_with_a_selection_bias_flips_are_those_of_the_chosen():
    """A bias that decides alone: noise on the logits changes nobody's experts, and the router's own ids on another input are as biased."""
    params, call = layer_of(router_score="sigmoid", selection_bias=True)
    params["selection_bias"] = jnp.array([10.0, 0.0, 0.0, 10.0])
    scope = scope_of(NoiseSpec.parse("router_logits=additive:1.0"))
    _, router = call(params, X, scope)
    assert set(np.unique(router["ids"])) == {0, 3} and router["router/flips"][0] == 0 < router["router/flips"][1]
    _, ids_on = bind(
        type("Residual", (MoE,), {"__call__": MoE.ids_on})(ModelConfig.preset("tiny", router_score="sigmoid", selection_bias=True))
    )
    assert set(np.unique(ids_on(params, X, scope))) == {0, 3}


def test_flips_are_against_what_the_router_reads(layer):
    """Where the experts alone read a noisy norm, the router's tiny noise flips nothing."""
    params, call = layer
    scope = scope_of(NoiseSpec.parse("router_gemm=relative:1e-7"))
    _, router = call(params, X + 2.0 * jnp.roll(X, 1, 0), scope, routed=X)
    assert router["router/flips"][0] == 0


def test_router_logits_are_float32_whatever_the_activations_are(layer):
    """From bfloat16 activations the logits are exact to float32 rounding; a product in bfloat16 is 100 times farther off."""
    params, call = layer
    narrow = X.astype("bfloat16")
    y, router = call(params, narrow, scope_of())
    exact = np.asarray(narrow, np.float64).reshape(-1, D) @ np.asarray(params["router"], np.float64)
    assert y.dtype == jnp.bfloat16 and router["logits"].dtype == router["weights"].dtype == jnp.float32
    assert abs(np.asarray(router["logits"]).reshape(-1, E) - exact).max() < 1e-5
    rounded = (narrow.reshape(-1, D) @ params["router"].astype("bfloat16")).astype("float32")
    assert abs(np.asarray(rounded) - exact).max() > 1e-3
