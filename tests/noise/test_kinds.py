"""Every kind of noise against NumPy given the same draws, its gradient that of the clean value, and zero scale the value itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import keys
from moe_jax.noise import draws, perturb
from moe_jax.noise.kinds import KINDS

R, C = 20, 16
Y = 3 * jax.random.normal(jax.random.key(0), (R, C)) + 1
KEY = keys.stream(keys.Draw(seed=5).key(), 1, "router_logits", "forward")
ROWS = jnp.arange(40, 40 + R)
N = np.asarray(draws.normal(KEY, ROWS, C), np.float64)
U = np.asarray(draws.uniform(KEY, ROWS, C), np.float64)

NUMPY = {
    "additive": lambda y, s: y + s * N,
    "relative": lambda y, s: y * (1 + s * N),
    "rms_relative": lambda y, s: y + s * np.sqrt((y**2).mean(-1, keepdims=True)) * N,
    "centred_relative": lambda y, s: y + s * abs(y - y.mean(-1, keepdims=True)) * N,
    "jitter": lambda y, s: y * (1 - s + 2 * s * U),
    "bias": lambda y, s: y + s * np.sign(y) * abs(y).mean(-1, keepdims=True),
}
noisy = jax.jit(perturb, static_argnums=1)


def test_every_kind_has_a_reference():
    assert set(NUMPY) == set(KINDS)


@pytest.mark.parametrize("kind", NUMPY)
def test_against_numpy(kind):
    exact = np.asarray(Y, np.float64)
    found = noisy(Y, kind, jnp.float32(0.3), KEY, ROWS)
    assert abs(found - Y).max() > 0.1, "no noise: the test is empty"
    np.testing.assert_allclose(found, NUMPY[kind](exact, 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NUMPY)
def test_scale_zero_is_the_value_itself(kind):
    np.testing.assert_array_equal(noisy(Y, kind, jnp.float32(0.0), KEY, ROWS), Y)
    narrow = Y.astype("bfloat16")
    found = noisy(narrow, kind, jnp.float32(0.0), KEY, ROWS)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, narrow)


@pytest.mark.parametrize("kind", NUMPY)
def test_the_error_is_made_in_float32_and_rounded_once(kind):
    narrow = Y.astype("bfloat16")
    wide = noisy(narrow.astype("float32"), kind, jnp.float32(0.3), KEY, ROWS)
    np.testing.assert_array_equal(noisy(narrow, kind, jnp.float32(0.3), KEY, ROWS), wide.astype("bfloat16"))


def test_noise_is_not_differentiated():
    """The gradient is that of the clean value, for the value and for the scale."""
    direction = jax.random.normal(jax.random.key(1), Y.shape)

    @jax.jit
    def gradients(y, scale):
        return {
            kind: jax.grad(lambda y, s, kind=kind: (perturb(y, kind, s, KEY, ROWS) * direction).sum(), (0, 1))(y, scale) for kind in KINDS
        }

    for kind, (in_value, in_scale) in gradients(Y, jnp.float32(0.3)).items():
        np.testing.assert_array_equal(in_value, direction, err_msg=kind)
        assert in_scale == 0, kind


def test_a_common_offset_moves_relative_noise_and_not_centred():
    """Softmax ignores an offset of all logits; relative noise does not, centred_relative does."""
    scale, offset = jnp.float32(0.1), 100.0
    for kind, sensitive in (("relative", True), ("rms_relative", True), ("centred_relative", False), ("additive", False)):
        change = (noisy(Y + offset, kind, scale, KEY, ROWS) - offset) - noisy(Y, kind, scale, KEY, ROWS)
        assert (abs(change).max() > 1.0) == sensitive and (sensitive or abs(change).max() < 1e-4), kind
