"""Counter-based draws: random bits as an elementwise function of a key, a row and a column, so that the compiler fuses them into what reads them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt32

from moe_jax.keys import mix

Part = tuple[Any, int]  # of a result's columns: the first one's number, which may be traced, and how many columns there are in all


def bits(key: UInt32[Array, "2"], rows: Integer[Array, "R"], columns: int, part: Part = (0, 0)) -> UInt32[Array, "R C"]:
    """32 random bits for each row and each of `columns` columns, from 0 on unless `part` says where.

    The row is hashed once with both key words; each element then costs one mix.
    """
    row_word = mix(mix(rows.astype(jnp.uint32) ^ key[0]) + key[1])
    first, total = part
    words = (
        jax.lax.dynamic_slice_in_dim(jnp.asarray(_column_words(max(total, columns))), first, columns) if total else _column_words(columns)
    )
    return mix((row_word[:, None] + words[None, :]) ^ key[1])


@functools.cache
def _column_words(count: int) -> np.ndarray:
    """The hash of each column's number: a constant of the program, since XLA would compute it again for every row."""
    with jax.ensure_compile_time_eval():
        return np.asarray(mix(jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(0x9E3779B9)))


def uniform(key: UInt32[Array, "2"], rows: Integer[Array, "R"], columns: int, part: Part = (0, 0)) -> Float[Array, "R C"]:
    """Float32 in (0, 1), never 0 or 1: the centres of 2**23 equal cells."""
    return ((bits(key, rows, columns, part) >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)


# Two minimax fits that make `normal`: log2(1 + t) = t + t (1 - t) c(t) to 1.2e-4, and sqrt(2) erfinv(z) / z as a polynomial in
# sqrt(1.3 - log2(1 - z^2)) to 1.2e-4, over all z that 23 bits can name. An exact inverse costs 4 times as much (two logarithms, two polynomials).
_LOG = (0.4387255000387064, -0.2390572922399752, 0.08212992483713233)
_QUANTILE = (0.6095086, 1.1239383, -1.1747264, 0.8392275, -0.2460349, 0.033813253, -0.0018021264)


def normal(key: UInt32[Array, "2"], rows: Integer[Array, "R"], columns: int, part: Part = (0, 0)) -> Float[Array, "R C"]:
    """Standard normal float32, the inverse distribution function of a 23-bit uniform to 1.4e-4 of its value; the largest it can give is 5.3."""
    return _normal_of(bits(key, rows, columns, part))


@functools.partial(jax.jit, inline=True)  # outside jit one program too: op by op, products and sums are not fused, and last digits differ
def _normal_of(word: UInt32[Array, "R C"]) -> Float[Array, "R C"]:
    centred = (word >> 8 | jnp.uint32(1)).astype(jnp.int32) - (1 << 23)  # odd, so never 0, and exact as a float
    z = centred.astype(jnp.float32) * jnp.float32(2.0**-23)
    word = jax.lax.bitcast_convert_type((1.0 - z) * (1.0 + z), jnp.int32)
    t = jax.lax.bitcast_convert_type(word & 0x7FFFFF | 0x3F800000, jnp.float32) - 1.0
    log2 = (127 - (word >> 23)).astype(jnp.float32) - (t + t * (1.0 - t) * _polynomial(_LOG, t))  # -log2(1 - z^2)
    return z * _polynomial(_QUANTILE, jnp.sqrt(log2 + 1.3))


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    return functools.reduce(lambda total, c: total * x + jnp.float32(c), coefficients[-2::-1], jnp.float32(coefficients[-1]))


def dropout_mask(key: UInt32[Array, "2"], rows: Integer[Array, "R"], columns: int, rate: float, part: Part = (0, 0)) -> Float[Array, "R C"]:
    """1/(1-rate) where kept and 0 where dropped, each element dropped with probability `rate`, 0 <= rate < 1."""
    keep = bits(key, rows, columns, part) >= jnp.uint32(min(int(rate * 2.0**32), 2**32 - 1))
    return keep.astype(jnp.float32) * jnp.float32(1.0 / (1.0 - rate))
