"""Counter-based draws: random bits as an elementwise function of a key, a row and a column, so that the compiler fuses them into what reads them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from moe_jax.keys import mix


def bits(key: UInt32[Array, "2"], rows: Int[Array, "R"], columns: int, first: int = 0) -> UInt32[Array, "R C"]:
    """32 random bits for each row and each of `columns` columns from `first` on.

    The row is hashed once with both key words; each element then costs one mix.
    """
    row_word = mix(mix(rows.astype(jnp.uint32) ^ key[0]) + key[1])
    column_word = mix(jnp.arange(first, first + columns, dtype=jnp.uint32) + jnp.uint32(0x9E3779B9))
    return mix((row_word[:, None] + column_word[None, :]) ^ key[1])


def uniform(key: UInt32[Array, "2"], rows: Int[Array, "R"], columns: int) -> Float[Array, "R C"]:
    """Float32 in (0, 1), never 0 or 1: the centres of 2**23 equal cells."""
    return ((bits(key, rows, columns) >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)


def normal(key: UInt32[Array, "2"], rows: Int[Array, "R"], columns: int) -> Float[Array, "R C"]:
    """Standard normal float32, by the inverse error function; the largest value it can give is 5.3."""
    return jnp.float32(2.0**0.5) * jax.lax.erf_inv(2.0 * uniform(key, rows, columns) - 1.0)


def dropout_mask(key: UInt32[Array, "2"], rows: Int[Array, "R"], columns: int, rate: float, first: int = 0) -> Float[Array, "R C"]:
    """1/(1-rate) where kept and 0 where dropped, each element dropped with probability `rate`, 0 <= rate < 1."""
    keep = bits(key, rows, columns, first) >= jnp.uint32(min(int(rate * 2.0**32), 2**32 - 1))
    return keep.astype(jnp.float32) * jnp.float32(1.0 / (1.0 - rate))
