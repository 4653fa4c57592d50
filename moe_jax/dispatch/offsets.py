"""Where rows go when devices exchange them: arithmetic on counts, with no rows in it and no device.

R assignments of one device, listed expert by expert and so device by device; N devices, E experts of them all; C rows of the buffer between two devices.
Experts are divided in order and evenly: device n has experts n*E/N to (n+1)*E/N - 1.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

# What lax.ragged_all_to_all takes, Int[N] each: where the rows for each device begin here, how many, where they begin there, how many come from it.
Offsets = tuple[Int[Array, "N"], Int[Array, "N"], Int[Array, "N"], Int[Array, "N"]]


def capacity(expected: float, most: int, factor: float) -> int:
    """Rows of a buffer that is to hold `factor` times the expected number: up to a multiple of 8, and no more than `most`, which always suffice.

    Raises ValueError when factor is not above 0.
    """
    if not factor > 0:
        raise ValueError(f"a buffer's factor must be above 0, got {factor}; 1 holds evenly spread assignments and no more")
    return most if math.isinf(factor) else min(most, -(-math.ceil(factor * expected) // 8) * 8)


def device_counts(sizes: Int[Array, "E"], devices: int) -> Int[Array, "N"]:
    """How many assignments each of N devices computes, from how many each expert does."""
    return sizes.reshape(devices, -1).sum(1, dtype=jnp.int32)


def overflow(counts: Int[Array, "..."], rows: int) -> Int[Array, ""]:
    """How many of `counts` assignments find their buffer of `rows` rows full."""
    return jnp.maximum(counts - rows, 0).sum(dtype=jnp.int32)


def inverse(order: Int[Array, "R"]) -> Int[Array, "R"]:
    """The place of each assignment in `order`, a permutation."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True, mode="promise_in_bounds")


def buffer_slots(order: Int[Array, "R"], counts: Int[Array, "N"], rows: int) -> tuple[Int[Array, "NC"], Int[Array, "R"]]:
    """(source, slot) for a buffer of C = `rows` rows to each of N devices, N*C in all; device n's are filled from n*C on, in the order of `order`.

    order: the flat assignments by device, of which counts[n] go to device n, and at last those that go nowhere. source: the flat assignment in each row,
    R where there is none. slot: the row of each flat assignment, N*C where it goes nowhere or its buffer is full.
    """
    devices, ends, position = counts.size, jnp.cumsum(counts), jnp.arange(order.size, dtype=jnp.int32)
    begins = ends - counts
    device = jnp.searchsorted(ends, position, side="right", method="compare_all").astype(jnp.int32)
    rank = position - begins[device]
    slot = jnp.where((device < devices) & (rank < rows), device * rows + rank, devices * rows)[inverse(order)]
    rank = jnp.arange(rows, dtype=jnp.int32)
    taken = order.at[begins[:, None] + rank].get(mode="clip")
    return jnp.where(rank < counts[:, None], taken, order.size).reshape(-1), slot


def ragged_offsets(counts: Int[Array, "N N"], me: Any) -> tuple[Offsets, Offsets]:
    """(there, back): the offsets of device `me` for sending its assignments, and for sending results back.

    counts[i, j]: how many assignments device i has for device j. At home they lie sorted by device, without gaps; where they are computed,
    sorted by the device they came from, without gaps.
    """
    begins = jnp.cumsum(counts, 1) - counts  # [i, j]: where device i has its assignments for j
    lands = jnp.cumsum(counts, 0) - counts  # [i, j]: where device j has those that came from i
    there = begins[me], counts[me], lands[me], counts[:, me]
    back = lands[:, me], counts[:, me], begins[:, me], counts[me]
    return there, back
