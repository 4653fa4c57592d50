"""Where sorted assignments go: each expert's rows are padded to a unit and cut into tiles of a few static sizes.

R = T*K assignments, E experts, N tiles, C size classes. Class c holds tiles of c*unit rows. Every expert that has rows gets one tile of its remainder's class,
1 to C, and before it as many tiles of the largest size as it needs: class C+1. So an expert is mostly one matmul of nearly its true size, and its tile in
classes 1 to C is the one that can set what the others add to. All sizes are static and hold any routing: nothing drops.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static half of a layout: `unit` rows is the step between size classes, `classes` how many there are."""

    assignments: int  # R
    experts: int  # E
    unit: int
    classes: int
    partial: bool = False  # whether assignments may be nobody's (expert E): they find a row of zeros, the last one

    @classmethod
    def fit(cls, assignments: int, experts: int, unit: int | None = None, largest: int | None = None, share: float | None = None) -> Self:
        """A tiling for a mean load of R / E rows, or of share * R / E where assignments may be nobody's.

        unit: default a twelfth of the mean load, from 4,096 assignments on a sixteenth, as a power of two from 8 to 64: padding stays near 4 or 3 %.
        largest: rows of the largest tile, default 16 units, or 32: each is a loop to compile, 16 take 4 to 5 s; no larger than all the work.
        """
        classes, fraction = (32, 16) if assignments >= 4096 else (16, 12)
        least = assignments * (1.0 if share is None else share) / experts / fraction
        unit = unit or next((size for size in (64, 32, 16) if size <= least), 8)
        return cls(assignments, experts, unit, max(1, -(-min(largest or classes * unit, assignments) // unit)), share is not None)

    @property
    def largest(self) -> int:
        return self.classes * self.unit

    @property
    def rows(self) -> int:
        """Rows that any routing fits into: R, and at most unit - 1 more for each expert that has any."""
        filled = -(-(self.assignments + min(self.experts, self.assignments) * (self.unit - 1)) // self.unit)
        return (filled + self.partial) * self.unit

    @property
    def tiles(self) -> int:
        return self.rows // self.largest + min(self.experts, self.assignments)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("order", "row_of", "sizes", "expert", "first", "start", "filled", "bounds", "padded"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Tables:
    """The traced half: which assignments a tile computes, and in which row each assignment is found."""

    order: Int[Array, "R_pad"]  # flat assignments (token*K + slot, local) sorted by expert; then zeros, so that any tile may slice it
    row_of: Int[Array, "R"]  # the row that computes each flat assignment
    sizes: Int[Array, "E"]  # assignments of each expert
    expert: Int[Array, "N"]  # the four below: per tile, tiles in ascending size
    first: Int[Array, "N"]  # its first position in `order`
    start: Int[Array, "N"]  # its first row
    filled: Int[Array, "N"]  # how many of its rows are assignments; the rest is padding
    bounds: Int[Array, "C_plus_3"]  # class c is tiles bounds[c] to bounds[c+1]; class 0 is the unused ones
    padded: Int[Array, ""]  # rows beyond the assignments


def make_tables(ids: Int[Array, "T K"], tiling: Tiling) -> Tables:
    """The layout of one routing decision: one sort, one scatter of R scalars, and arithmetic on E and N numbers. ids: 0 to E, E only if `partial`."""
    flat, unit, largest = ids.reshape(-1).astype(jnp.int32), tiling.unit, tiling.largest
    order, begins = _sort(flat, tiling.experts)
    sizes = jnp.diff(begins)
    units = -(-sizes // unit)
    ends = jnp.cumsum(units) * unit
    starts = ends - units * unit

    position = jnp.arange(tiling.assignments, dtype=jnp.int32)
    row = position + (starts - begins[:-1])[flat[order]]
    if tiling.partial:
        row = jnp.where(position < begins[-1], row, tiling.rows - 1)
    row_of = jnp.zeros_like(flat).at[order].set(row, unique_indices=True, mode="promise_in_bounds")

    counts = -(-units // tiling.classes)
    last = jnp.cumsum(counts)
    tile = jnp.arange(tiling.tiles, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(last, tile, side="right"), tiling.experts - 1).astype(jnp.int32)
    offset = (tile - (last - counts)[expert]) * largest
    left = units[expert] - offset // unit
    size_class = jnp.where(tile < last[-1], jnp.minimum(left, tiling.classes + 1), 0)
    by_size = jnp.argsort(size_class, stable=True)
    return Tables(
        order=jnp.concatenate([order, jnp.zeros(largest, jnp.int32)]),
        row_of=row_of,
        sizes=sizes,
        expert=expert[by_size],
        first=(begins[expert] + offset)[by_size],
        start=(starts[expert] + offset)[by_size],
        filled=jnp.clip(sizes[expert] - offset, 0, largest)[by_size],
        bounds=jnp.searchsorted(size_class[by_size], jnp.arange(tiling.classes + 3)).astype(jnp.int32),
        padded=ends[-1] - begins[-1],
    )


def _sort(flat: Int[Array, "R"], experts: int, limit: int = 2**31) -> tuple[Int[Array, "R"], Int[Array, "E_plus_1"]]:
    """(order, begins): the assignments expert by expert, in token order inside one, and where each expert's begin."""
    count = flat.shape[0]
    if count * (experts + 1) < limit:  # one key that holds both numbers sorts faster than a pair
        key = jnp.sort(flat * count + jnp.arange(count, dtype=jnp.int32))
        ranked, order = key // count, key % count
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        ranked = flat[order]
    return order, jnp.searchsorted(ranked, jnp.arange(experts + 1)).astype(jnp.int32)
