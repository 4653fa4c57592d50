"""Named low-precision formats: an array written in one and read back, in plain float32 arithmetic that any backend runs and fuses.

A value is x = element * scale. Elements round to nearest even and saturate; they are rounded by arithmetic, which gives on every backend the values
of the casts of ml_dtypes (the tests compare them) and on a CPU takes a third of their time. Three rules hold for all formats:
a float32 scale keeps 16 significant bits, so that element * scale is exact and what was read back stays what it is when written again;
no scale is so small that a result would be subnormal, which some backends flush to zero; a block that holds inf or NaN comes back all NaN.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.errors import check_known


@dataclasses.dataclass(frozen=True)
class Format:
    """How a format stores numbers. `description` says it in one line, block size and rounding included."""

    dtype: Any  # of an element
    largest: float  # element
    block: int | None  # consecutive values along the axis that share a scale; None: the whole axis
    scale: str  # "amax": amax/largest; "power_of_two": 2^(floor(log2 amax) - 2); "two_level": amax/largest in e4m3 times a float32
    description: str


FORMATS: dict[str, Format] = {
    "fp8_e4m3": Format(jnp.float8_e4m3fn, 448.0, None, "amax", "float8_e4m3fn, a float32 scale amax/448 per row, nearest even"),
    "fp8_e5m2": Format(jnp.float8_e5m2, 57344.0, None, "amax", "float8_e5m2, a float32 scale amax/57344 per row, nearest even"),
    "mxfp4": Format(
        *(jnp.float4_e2m1fn, 6.0, 32, "power_of_two"),
        "float4_e2m1fn, a scale 2^(floor(log2 amax) - 2) per block of 32 (OCP MX: amax may saturate), nearest even",
    ),
    "nvfp4": Format(
        *(jnp.float4_e2m1fn, 6.0, 16, "two_level"),
        "float4_e2m1fn, an e4m3 scale amax/6 per block of 16 times a float32 scale per row (NVIDIA's is per tensor), nearest even",
    ),
    "int8": Format(jnp.int8, 127.0, None, "amax", "integers -127 to 127, a float32 scale amax/127 per row, nearest even"),
}


def round_trip(x: Float[Array, "..."], name: str, axis: int = -1) -> Float[Array, "..."]:
    """x written in the format `name` and read back, float32 of the same shape. "Row" in a description means all of `axis`.

    Blocks run along `axis`, the last one filled up with zeros. nvfp4's second scale is taken over the axis and not the tensor, so that no token's
    result depends on the other tokens. The gradient is zero, as of any rounding; the caller gives a straight-through one. Unknown name: ConfigError.
    """
    check_known("number format", name, FORMATS)
    form, x = FORMATS[name], jnp.moveaxis(jax.lax.stop_gradient(x).astype(jnp.float32), axis, -1)
    block = form.block or max(x.shape[-1], 1)
    count = -(-x.shape[-1] // block)
    blocks = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * block - x.shape[-1])]).reshape(*x.shape[:-1], count, block)
    scale = _scale(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True, initial=0.0), form)
    read = _to_element(blocks / scale, form.dtype, form.largest) * scale
    return jnp.moveaxis(read.reshape(*x.shape[:-1], count * block)[..., : x.shape[-1]], -1, axis)


def _scale(amax: jax.Array, form: Format) -> jax.Array:
    """The scale of each block [..., N, 1] from its largest magnitude."""
    floor = 2.0**-126 / _grid(form.dtype)[0]
    if form.scale == "power_of_two":
        return jnp.maximum(_power_of_two(amax) * 0.25, floor)
    if form.scale == "amax":
        return jnp.maximum(_sixteen_bits(amax * jnp.float32(1.0 / form.largest)), floor)
    # The e4m3 scale stays normal (2^-6 at least, as in torchao): a subnormal one would lose a block's values, or move them again each time.
    row = jnp.maximum(
        _sixteen_bits(amax.max(axis=-2, keepdims=True, initial=0.0) * jnp.float32(1.0 / (form.largest * 448.0))), floor * 2.0**6
    )
    return row * jnp.maximum(_to_element(amax * jnp.float32(1.0 / form.largest) / row, jnp.float8_e4m3fn, 448.0), 2.0**-6)


def _to_element(x: jax.Array, dtype: Any, largest: float) -> jax.Array:
    """The nearest value of an element type, ties to even: a whole multiple of the spacing at x. Beyond `largest` it is `largest`."""
    smallest, digits = _grid(dtype)
    spacing = jnp.maximum(_power_of_two(x) * 2.0**-digits, smallest)
    return jnp.clip(jnp.round(x / spacing) * spacing, -largest, largest)


def _grid(dtype: Any) -> tuple[float, int]:
    """The smallest positive value of an element type, and its digits after the binary point; integers are a grid of ones up to 2**7."""
    return (1.0, 7) if jnp.issubdtype(dtype, jnp.integer) else (float(jnp.finfo(dtype).smallest_subnormal), jnp.finfo(dtype).nmant)


def _power_of_two(x: jax.Array) -> jax.Array:
    """2**floor(log2(abs(x))), exactly, by keeping the exponent's bits; 0 for 0, inf for inf and NaN."""
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000), jnp.float32)


def _sixteen_bits(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=15)
