"""The integer tables of a tile layout, against a plain loop over experts."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.dispatch import sharded, tiles
from moe_jax.dispatch.base import Group
from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.dispatch.tiles import Tiling, make_tables


def layout(ids, tiling):
    """(order, row of each assignment, tiles by class as sets of (expert, first, start, filled), padded rows) by a loop."""
    order, row_of, by_class, start = [], np.full(ids.size, -1), {}, 0
    for expert in range(tiling.experts):
        mine = [i for i, e in enumerate(ids) if e == expert]
        for place, assignment in enumerate(mine):
            row_of[assignment] = start + place
        first, left = len(order), len(mine)
        order += mine
        while left > 0:
            size_class = tiling.classes + 1 if left > tiling.largest else -(-left // tiling.unit)
            size = min(size_class, tiling.classes) * tiling.unit
            by_class.setdefault(size_class, set()).add((expert, first, start, min(left, size)))
            first, start, left = first + size, start + size, left - size
    return order, row_of, by_class, start - ids.size


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=st.sampled_from([(1, 1, 4, 8), (24, 3, 4, 12), (40, 16, 2, 4), (64, 5, 8, 8), (7, 9, 4, 64)]))
def test_tables_equal_a_plain_loop(data, shape):
    assignments, experts, unit, largest = shape
    used = data.draw(st.integers(1, experts))
    ids = np.array(data.draw(st.lists(st.integers(0, used - 1), min_size=assignments, max_size=assignments)))
    tiling = Tiling.fit(assignments, experts, unit, largest)
    tables = make_tables(jnp.asarray(ids)[:, None], tiling)
    order, row_of, by_class, padded = layout(ids, tiling)

    np.testing.assert_array_equal(tables.order[:assignments], order)
    np.testing.assert_array_equal(tables.row_of, row_of)
    np.testing.assert_array_equal(tables.sizes, np.bincount(ids, minlength=experts))
    assert int(tables.padded) == padded
    for size_class in range(1, tiling.classes + 2):
        span = slice(int(tables.bounds[size_class]), int(tables.bounds[size_class + 1]))
        found = list(zip(*(np.asarray(a)[span].tolist() for a in (tables.expert, tables.first, tables.start, tables.filled)), strict=True))
        assert len(set(found)) == len(found) and set(found) == by_class.get(size_class, set())


def test_the_sizes_follow_the_mean_load_of_the_assignments_that_are_somebodys():
    sizes = {given: Tiling.fit(*given) for given in [(100, 8), (2048, 8), (4096, 8), (6144, 8), (24576, 128), (10**6, 8)]}
    assert [(t.unit, t.largest) for t in sizes.values()] == [(8, 104), (16, 256), (32, 1024), (32, 1024), (8, 256), (64, 2048)]
    on_two = Tiling.fit(24576, 64, share=0.5)  # half of the experts, and of the assignments of both devices
    assert (on_two.unit, on_two.largest, on_two.partial, sizes[24576, 128].partial) == (8, 256, True, False)


@pytest.mark.parametrize("factor, share", [(2.0, 0.5), (0.5, 1.0), (100.0, 0.25)])
def test_an_exchange_says_how_many_of_the_assignments_are_its_own(factor, share):
    """Of four devices' assignments a fourth; of a buffer's rows what its slack leaves, and no less than a fourth, since it never holds more than all."""
    group = Group(("expert",), 4, ("expert",))
    send = sharded._exchange("all_to_all", group, dispatch_blocked, factor, force=False, divided=True).keywords
    gather = sharded._exchange("all_gather", group, dispatch_blocked, factor, force=False, divided=True).keywords
    assert [part.keywords["share"] for part in (send["local"], send["fallback"].keywords["local"], gather["local"])] == [share, 0.25, 0.25]


def test_any_routing_fits_the_static_bound():
    for unit, largest in [(1, 1), (4, 12), (64, 1024)]:
        for assignments, experts in [(1, 1), (30, 7), (5, 64)]:
            tiling = Tiling.fit(assignments, experts, unit, largest)
            spread = [assignments - min(experts, assignments) + 1] + [1] * (
                min(experts, assignments) - 1
            )  # every group as bad as it can be
            for loads in (spread, [assignments]):
                rows = sum(-(-n // unit) * unit for n in loads)
                assert rows <= tiling.rows and sum(-(-n // tiling.largest) for n in loads) <= tiling.tiles
            assert tiling.largest <= tiling.rows or experts == 1


def test_the_sort_of_pairs_equals_the_sort_of_keys():
    """More than 2**31 keys do not fit one number; the other branch must not be wrong because no test is that large."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 5, 64), jnp.int32)
    for one, other in zip(tiles._sort(ids, 5, limit=2**31), tiles._sort(ids, 5, limit=0), strict=True):
        np.testing.assert_array_equal(one, other)
