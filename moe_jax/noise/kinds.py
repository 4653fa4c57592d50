"""The kinds of noise: the value that takes the place of a clean y [R, C], with scale s and draws by row and column.

The noise itself is never differentiated: the gradient that passes is that of the clean value.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, UInt32

from moe_jax.keys import fold
from moe_jax.noise import draws
from moe_jax.noise.formats import round_trip


def _additive(y, scale, normal):
    return y + scale * normal()


def _relative(y, scale, normal):
    return y * (1.0 + scale * normal())


def _rms_relative(y, scale, normal):
    return y + scale * jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True)) * normal()


def _centred_relative(y, scale, normal):
    return y + scale * jnp.abs(y - y.mean(axis=-1, keepdims=True)) * normal()


def _bias(y, scale, normal):
    del normal
    return y + scale * jnp.sign(y) * jnp.mean(jnp.abs(y), axis=-1, keepdims=True)  # per row, so that a split batch gives the same


# kind -> value(y float32 [R, C], scale, function that draws normals) -> float32 [R, C]; NoiseSpec's table says what each means.
_NORMAL: Mapping[str, Callable] = {
    "additive": _additive,
    "relative": _relative,
    "rms_relative": _rms_relative,
    "centred_relative": _centred_relative,
    "bias": _bias,
    "learned": _additive,  # of zeros; its place multiplies it by the learned spread
}
ELEMENTWISE = ("relative", "additive", "jitter", "bit_flip")  # an element's error depends on nothing else in its row
KINDS = (*_NORMAL, "jitter", "bit_flip", "quantise", "accumulation")


def perturb(
    y: Float[Array, "R C"],
    kind: str,
    scale: Float[Array, "..."] | float,
    key: UInt32[Array, "2"],
    rows: Integer[Array, "R"],
    format: str | None = None,
    stored: Any = None,
    part: draws.Part = (0, 0),
) -> Float[Array, "R C"]:
    """y with its error, computed in float32 and returned in y's type, with the gradient of y. At scale 0 it equals y.

    scale: one number, or anything that broadcasts to [R, C]. format: of "quantise", which rounds each row. stored: the type whose bits "bit_flip" flips,
    default y's own. part: which columns y has (draws.bits), for the kinds in ELEMENTWISE.
    """
    exact = y.astype(jnp.float32)
    shape = key, rows, y.shape[-1], part
    if kind == "quantise":
        value = (1.0 - scale) * exact + scale * round_trip(exact, str(format))
    elif kind == "jitter":
        value = exact * (1.0 + scale * (2.0 * draws.uniform(*shape) - 1.0))
    elif kind == "bit_flip":
        value = _flip(exact.astype(stored or y.dtype), scale, *shape).astype(jnp.float32)
    else:
        value = _NORMAL[kind](exact, scale, lambda: draws.normal(*shape))
    return _instead_of(exact, value).astype(y.dtype)


@jax.custom_jvp
def _instead_of(clean, value):
    """value, with the derivative of `clean`."""
    del clean
    return value


@_instead_of.defjvp
def _(primals, tangents):
    return primals[1], tangents[0]


def _flip(y, probability, key, rows, columns: int, part):
    """y with each stored bit flipped with a probability, to a resolution of 2**-32.

    Reading the probability's binary digits from the last: a digit 1 joins a fair coin by "or", a digit 0 by "and", which halves what went before.
    """
    digits = jnp.minimum(probability * 2.0**32, 2.0**32 - 256).astype(jnp.uint32)
    flips = jnp.zeros((rows.shape[0], columns), jnp.uint32)
    for digit in range(32):
        coin = draws.bits(fold(key, digit), rows, columns, part)
        flips = jnp.where((digits >> digit) & 1 == 1, flips | coin, flips & coin)
    whole = {2: jnp.uint16, 4: jnp.uint32}[y.dtype.itemsize]
    return lax.bitcast_convert_type(lax.bitcast_convert_type(y, whole) ^ flips.astype(whole), y.dtype)
