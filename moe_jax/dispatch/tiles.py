"""Where sorted assignments go: each expert's rows are cut into tiles of a few static sizes, and tiles of like size are computed side by side.

R = T*K assignments, E experts, N tiles, C size classes, G tiles in a group. Class c holds tiles of c*unit rows. Every expert that has rows gets one tile
of its remainder's class, 1 to C, and as many tiles of the largest size as it needs besides: class C+1. So an expert is mostly one matmul of nearly its
true size, and its tile in classes 1 to C can set what the others add to. Tiles are ordered by class and computed in groups of G, all of the size of the
group's largest: G small products are independent, so that the compiler can run them at once. All sizes are static and hold any routing: nothing drops.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static half of a layout: `unit` rows is the step between size classes, `classes` how many there are, `group` tiles go side by side."""

    assignments: int  # R
    experts: int  # E
    unit: int
    classes: int
    group: int

    @classmethod
    def fit(cls, assignments: int, experts: int, unit: int, largest: int, group: int = 1) -> "Tiling":
        """A tiling whose largest tile is at most `largest` rows, rounded up to the unit, and no larger than all the work."""
        return cls(assignments, experts, unit, max(1, -(-min(largest, assignments) // unit)), group)

    @property
    def largest(self) -> int:
        return self.classes * self.unit

    @property
    def _used(self) -> int:
        return min(self.experts, self.assignments)  # experts that can have rows

    @property
    def rows(self) -> int:
        """Rows that any routing fits into: R, at most unit - 1 more for each expert with any, and what groups of unequal tiles add: each group's
        smaller tiles grow to its largest, and as classes only ascend that is at most G - 1 times the way from nothing to the largest."""
        return -(-(self.assignments + self._used * (self.unit - 1)) // self.unit) * self.unit + (self.group - 1) * self.largest

    @property
    def tiles(self) -> int:
        """Tiles of any routing, in whole groups."""
        return -(-(self.rows // self.largest + self._used) // self.group) * self.group


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
    expert: Int[Array, "N"]  # the four below: per tile, in ascending class
    first: Int[Array, "N"]  # its first position in `order`
    start: Int[Array, "N"]  # its first row
    filled: Int[Array, "N"]  # how many of its rows are assignments; the rest is padding
    bounds: Int[Array, "C+3"]  # class c is groups bounds[c] to bounds[c+1]; class 0 is the unused ones
    padded: Int[Array, ""]  # rows computed beyond the assignments


def make_tables(ids: Int[Array, "T K"], tiling: Tiling) -> Tables:
    """The layout of one routing decision: one sort, one scatter of R scalars, and arithmetic on E and N numbers."""
    flat = ids.reshape(-1).astype(jnp.int32)
    order, begins = _sort(flat, tiling.experts)
    sizes = jnp.diff(begins)
    by_expert, expert, offset, size_class = _cut(sizes, tiling)

    by_size = jnp.argsort(size_class, stable=True)
    group_class = size_class[by_size][tiling.group - 1 :: tiling.group]
    rows = jnp.minimum(group_class, tiling.classes) * tiling.unit  # of every tile of a group
    ends = jnp.cumsum(rows) * tiling.group
    start = (jnp.repeat(ends - rows * tiling.group, tiling.group) + jnp.tile(jnp.arange(tiling.group), rows.size) * jnp.repeat(rows, tiling.group)).astype(
        jnp.int32
    )
    # An unused tile that shares the first group with used ones does the work of the group's last tile over again: the same rows, the same results.
    unused = (size_class[by_size] == 0) & (jnp.repeat(group_class, tiling.group) > 0)
    last = jnp.arange(tiling.tiles) // tiling.group * tiling.group + tiling.group - 1
    place = jnp.where(unused, last, jnp.arange(tiling.tiles))
    source = by_size[place]

    tile_of = jnp.zeros(tiling.tiles, jnp.int32).at[by_size].set(start, unique_indices=True)  # first row by tile in expert order
    within = jnp.arange(tiling.assignments, dtype=jnp.int32) - begins[flat[order]]
    row = tile_of[by_expert[flat[order]] + within // tiling.largest] + within % tiling.largest
    return Tables(
        order=jnp.concatenate([order, jnp.zeros(tiling.largest, jnp.int32)]),
        row_of=jnp.zeros_like(flat).at[order].set(row, unique_indices=True, mode="promise_in_bounds"),
        sizes=sizes,
        expert=expert[source],
        first=(begins[expert] + offset)[source],
        start=start[place],
        filled=jnp.clip(sizes[expert] - offset, 0, tiling.largest)[source],
        bounds=jnp.searchsorted(group_class, jnp.arange(tiling.classes + 3)).astype(jnp.int32),
        padded=(ends[-1] - tiling.assignments).astype(jnp.int32),
    )


def _cut(sizes: Int[Array, "E"], tiling: Tiling):
    """Tiles in expert order: (each expert's first tile [E], and per tile [N] its expert, its offset in the expert's rows, its class)."""
    counts = -(-sizes // tiling.largest)
    ends = jnp.cumsum(counts)
    tile = jnp.arange(tiling.tiles, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), tiling.experts - 1).astype(jnp.int32)
    by_expert = (ends - counts).astype(jnp.int32)
    offset = (tile - by_expert[expert]) * tiling.largest
    units = -(-(sizes[expert] - offset) // tiling.unit)
    return by_expert, expert, offset, jnp.where(tile < ends[-1], jnp.minimum(units, tiling.classes + 1), 0)


def _sort(flat: Int[Array, "R"], experts: int, limit: int = 2**31) -> tuple[Int[Array, "R"], Int[Array, "E+1"]]:
    """(order, begins): the assignments expert by expert, in token order inside one, and where each expert's begin."""
    count = flat.shape[0]
    if count * experts < limit:  # one key that holds both numbers sorts faster than a pair
        key = jnp.sort(flat * count + jnp.arange(count, dtype=jnp.int32))
        ranked, order = key // count, key % count
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        ranked = flat[order]
    return order, jnp.searchsorted(ranked, jnp.arange(experts + 1)).astype(jnp.int32)
