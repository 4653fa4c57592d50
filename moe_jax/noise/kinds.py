"""The kinds of elementwise noise: what is added to a clean value y [R, C] with scale s and a draw n.

The noise itself is never differentiated: the gradient that passes is that of the clean value.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from moe_jax.noise import draws


def _additive(y, scale, key, rows):
    return scale * draws.normal(key, rows, y.shape[-1])


def _relative(y, scale, key, rows):
    return scale * y * draws.normal(key, rows, y.shape[-1])


def _rms_relative(y, scale, key, rows):
    return scale * jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True)) * draws.normal(key, rows, y.shape[-1])


def _centred_relative(y, scale, key, rows):
    return scale * jnp.abs(y - y.mean(axis=-1, keepdims=True)) * draws.normal(key, rows, y.shape[-1])


def _jitter(y, scale, key, rows):
    return scale * y * (2.0 * draws.uniform(key, rows, y.shape[-1]) - 1.0)


def _bias(y, scale, key, rows):
    return scale * jnp.sign(y) * jnp.mean(jnp.abs(y), axis=-1, keepdims=True)  # per row, so that a split batch gives the same


# kind -> error(y float32 [R, C], scale, key, rows) -> float32 [R, C]; what each means is in the table of NoiseSpec.
KINDS: Mapping[str, Callable] = {
    "additive": _additive,
    "relative": _relative,
    "rms_relative": _rms_relative,
    "centred_relative": _centred_relative,
    "jitter": _jitter,
    "bias": _bias,
}


def perturb(
    y: Float[Array, "R C"], kind: str, scale: Float[Array, ""], key: UInt32[Array, "2"], rows: Int[Array, "R"]
) -> Float[Array, "R C"]:
    """y plus its error, computed in float32 and returned in y's type. scale 0 returns y unchanged."""
    exact = y.astype(jnp.float32)
    error = KINDS[kind](jax.lax.stop_gradient(exact), scale, key, rows)
    return (exact + jax.lax.stop_gradient(error)).astype(y.dtype)
