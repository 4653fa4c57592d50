"""Every kind of noise against NumPy given the same draws, its gradient that of the clean value, and zero scale the value itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import keys
from moe_jax.noise import draws, perturb
from moe_jax.noise.formats import round_trip
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
    "learned": lambda y, s: y + s * N,  # of zeros, times what is learned, elsewhere
    "quantise": lambda y, s: (1 - s) * y + s * np.asarray(round_trip(jnp.asarray(y, jnp.float32), "fp8_e4m3")),
}


@functools.partial(jax.jit, static_argnums=1)
def noisy(y, kind, scale, key, rows):
    return perturb(y, kind, scale, key, rows, "fp8_e4m3" if kind == "quantise" else None)


def test_every_kind_has_a_reference():
    """bit_flip has its own below; accumulation needs the operands and is an Operator's."""
    assert {*NUMPY, "bit_flip", "accumulation"} == set(KINDS)


@pytest.mark.parametrize("dtype, bits", [("float32", np.uint32), ("bfloat16", np.uint16)])
def test_bit_flip_flips_each_stored_bit_by_its_own_coins(dtype, bits):
    """Against the digits of the probability read with Python's integers, and the rate of each bit, at 5 standard errors."""
    probability, rows = 0.3125, jnp.arange(400)
    y = jnp.asarray(np.resize(np.asarray(Y), (400, C)), dtype)
    found = np.asarray(noisy(y, "bit_flip", jnp.float32(probability), KEY, rows)).view(bits) ^ np.asarray(y).view(bits)
    flips = np.zeros((400, C), np.uint32)
    for digit in range(32):
        coin = np.asarray(draws.bits(keys.fold(KEY, digit), rows, C))
        flips = flips | coin if int(probability * 2**32) >> digit & 1 else flips & coin
    assert (found != flips.astype(bits)).sum() <= ((0.003 * found.size) if dtype == "float32" else 0), "only a NaN may lose its bits"
    width = 8 * np.dtype(bits).itemsize
    rates = [(found >> bit & 1).mean() for bit in range(width)]
    assert abs(np.array(rates) - probability).max() < 5 * (probability * (1 - probability) / found.size) ** 0.5


def test_bit_flip_of_a_narrow_result_kept_wide_until_it_is_stored():
    """stored: a float32 sum that will be kept in bfloat16 has the 16 bits of bfloat16 to flip."""
    y = Y.astype("bfloat16")
    wide = jax.jit(lambda y: perturb(y, "bit_flip", jnp.float32(0.1), KEY, ROWS, stored="bfloat16"))(y.astype("float32"))
    narrow = noisy(y, "bit_flip", jnp.float32(0.1), KEY, ROWS)
    found, expected, given = (np.asarray(a.astype("bfloat16")).view(np.uint16) for a in (wide, narrow, y))
    numbers = ~np.isnan(np.asarray(narrow, np.float32))  # a cast may change the bits of what is no number
    np.testing.assert_array_equal(found[numbers], expected[numbers])
    assert (expected != given).mean() > 0.5  # of 16 bits, one at least flips with probability 0.81


@pytest.mark.parametrize("kind", NUMPY)
def test_against_numpy(kind):
    exact = np.asarray(Y, np.float64)
    found = noisy(Y, kind, jnp.float32(0.3), KEY, ROWS)
    assert abs(found - Y).max() > 0.05, "no noise: the test is empty"
    np.testing.assert_allclose(found, NUMPY[kind](exact, 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*NUMPY, "bit_flip"])
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
    """The gradient is that of the clean value, for the value; for the scale it is 0. Rounding too has derivative 1."""
    direction = jax.random.normal(jax.random.key(1), Y.shape)

    @jax.jit
    def gradients(y, scale):
        return {
            kind: jax.grad(lambda y, s, kind=kind: (noisy(y, kind, s, KEY, ROWS) * direction).sum(), (0, 1))(y, scale)
            for kind in (*NUMPY, "bit_flip")
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
