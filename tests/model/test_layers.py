"""Norm, linear map, rotary positions and the dense MLP against NumPy, in float32 and bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from moe_jax.keys import Draw
from moe_jax.model import ModelConfig
from moe_jax.model.bind import bind
from moe_jax.model.layers import MLP, Scope, linear, rms_norm, rotate
from moe_jax.noise import draws

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(2, 6, 8)), "float32")


def test_rms_norm():
    scale = jnp.asarray(RANDOM.normal(size=8), "float32")
    exact = np.asarray(X, np.float64)
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(rms_norm(X, scale, 1e-3), expected, rtol=1e-5)
    narrow = rms_norm(jnp.asarray(1000 * X, "bfloat16"), scale, 1e-3)  # squares of 1000 summed in bfloat16 would be off by percents
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        narrow.astype("float32"), exact / np.sqrt((exact**2).mean(-1, keepdims=True)) * scale, rtol=2.0**-7, atol=1e-3
    )
    np.testing.assert_array_equal(rms_norm(jnp.zeros((1, 8)), scale, 1e-6), 0.0)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2.0**-7)])
def test_linear_and_its_gradients(dtype, tolerance):
    """In bfloat16 the result and both gradients are those of the rounded operands, rounded; the weight's gradient is float32 as the weight."""
    w = RANDOM.normal(size=(8, 5)).astype(np.float32)
    direction = RANDOM.normal(size=(2, 6, 5)).astype(np.float32)
    x = jnp.asarray(X, dtype)
    scope = Scope(Draw().key(), 0, jnp.arange(12).reshape(2, 6), {})
    y, pull = jax.vjp(lambda x, w: linear(x, w, scope, "mlp_up"), x, jnp.asarray(w))
    dx, dw = pull(jnp.asarray(direction, dtype))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, "float32")
    exact_x, exact_w, exact_dy = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (X, w, direction))
    pairs = (y, exact_x @ exact_w), (dx, exact_dy @ exact_w.T), (dw, np.einsum("bsd,bsf->df", exact_x, exact_dy))
    for found, expected in pairs:
        assert abs(np.asarray(found, np.float64) - expected).max() < tolerance * abs(expected).max()


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotate_turns_pairs_by_position_over_frequency(style):
    x = np.asarray(RANDOM.normal(size=(2, 6, 3, 8)), np.float32)
    positions = np.array([np.arange(6), np.arange(10, 16)])
    angles = positions[..., None, None] * 100.0 ** (-np.arange(4) / 4)
    first, second = (x[..., :4], x[..., 4:]) if style == "half" else (x[..., ::2], x[..., 1::2])
    turned = (first + 1j * second) * np.exp(1j * angles)
    expected = np.empty(x.shape)
    if style == "half":
        expected[..., :4], expected[..., 4:] = turned.real, turned.imag
    else:
        expected[..., ::2], expected[..., 1::2] = turned.real, turned.imag
    np.testing.assert_allclose(rotate(jnp.asarray(x), jnp.asarray(positions), 100.0, style), expected, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = (jnp.asarray(RANDOM.normal(size=(1, 1, 1, 8)), "float32") for _ in range(2))
    for style in ("half", "interleaved"):
        at = jax.jit(lambda i, style=style: (rotate(q, i[:1, None], 1e4, style) * rotate(k, i[1:, None], 1e4, style)).sum())
        np.testing.assert_allclose(at(jnp.array([7, 3])), at(jnp.array([24, 20])), rtol=1e-4)
        assert abs(at(jnp.array([7, 3])) - at(jnp.array([7, 4]))) > 1e-3


@pytest.mark.parametrize("gated", [True, False])
def test_mlp(gated):
    specs, call = bind(MLP(ModelConfig.preset("tiny", d_model=8, d_ff=10, gated=gated)))
    assert {name: spec.shape for name, spec in specs.items()} == {"up": (8, 10), "down": (10, 8)} | ({"gate": (8, 10)} if gated else {})
    w = {name: jnp.asarray(RANDOM.normal(size=spec.shape), "float32") for name, spec in specs.items()}
    silu = lambda z: z * expit(z)  # noqa: E731
    exact, exact_w = np.asarray(X, np.float64), {name: np.asarray(value, np.float64) for name, value in w.items()}
    hidden = silu(exact @ exact_w["gate"]) * (exact @ exact_w["up"]) if gated else silu(exact @ exact_w["up"])
    scope = Scope(Draw().key(), 0, jnp.arange(12).reshape(2, 6), {})
    y, router = call(w, X, scope)
    assert router == {}
    np.testing.assert_allclose(y, hidden @ exact_w["down"], rtol=1e-4, atol=1e-4)
    dropping = dataclasses.replace(scope, dropout=0.4)
    mask = np.asarray(draws.dropout_mask(scope.stream("dropout_expert_hidden"), jnp.arange(12), 10, 0.4)).reshape(2, 6, 10)
    np.testing.assert_allclose(call(w, X, dropping)[0], (hidden * mask) @ exact_w["down"], rtol=1e-4, atol=1e-4)


def test_a_scope_without_dropout_or_noise_returns_its_argument():
    scope = Scope(Draw().key(), 0, jnp.arange(12).reshape(2, 6), {})
    rows = X.reshape(-1, 8)
    assert scope.drop(X, "embedding") is X and scope.perturb(rows, "router_input") is rows
