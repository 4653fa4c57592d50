"""The integer arithmetic of the exchanges against loops that put one assignment after the other, on all small cases and on larger ones drawn at random."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.dispatch.base import sort_by_expert
from moe_jax.dispatch.offsets import buffer_slots, capacity, device_counts, inverse, overflow, ragged_offsets


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def computed(ids, experts, devices, capacities):
    """For each capacity [(source, slot, counts, overflow)] of each routing of a batch [B, R]."""

    def one(ids):
        order, sizes = sort_by_expert(ids[:, None], experts)
        counts = device_counts(sizes, devices)
        return [(*buffer_slots(order, counts, rows), counts, overflow(counts, rows)) for rows in capacities]

    return jax.vmap(one)(ids)


def loop(ids, experts, devices, rows):
    """The same, by filling buffers expert by expert; an id past the experts goes nowhere."""
    nowhere = devices * rows
    source, slot, counts, left = [len(ids)] * nowhere, [nowhere] * len(ids), [0] * devices, 0
    for expert in range(experts):
        for assignment, chosen in enumerate(ids):
            if chosen != expert:
                continue
            device = expert // (experts // devices)
            if counts[device] < rows:
                slot[assignment] = device * rows + counts[device]
                source[slot[assignment]] = assignment
            else:
                left += 1
            counts[device] += 1
    return source, slot, counts, left


def check(routings, experts, devices, capacities):
    for rows, got in zip(capacities, computed(jnp.asarray(routings), experts, devices, capacities), strict=True):
        want = [loop(ids, experts, devices, rows) for ids in routings.tolist()]
        for a, b in zip(got, zip(*want, strict=True), strict=True):
            np.testing.assert_array_equal(a, np.asarray(b).reshape(a.shape))


QUICK = [(2, 2, 6), (4, 1, 3), (4, 2, 1), (4, 2, 4), (4, 4, 4)]  # a program each
SHAPES = [(experts, devices, assignments) for experts, devices in [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)] for assignments in range(1, 7)]


@pytest.mark.parametrize(
    "experts, devices, assignments", [shape if shape in QUICK else pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES]
)
def test_every_small_routing(experts, devices, assignments):
    """Every routing of up to 6 assignments, at every capacity."""
    nowhere = assignments < 5  # those that go nowhere too, where that is not too many
    routings = np.array(list(itertools.product(range(experts + nowhere), repeat=assignments)))
    check(routings, experts, devices, tuple(range(1, assignments + 1)))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(96, 16, 8, 16), (33, 6, 3, 11)]),
    skew=st.floats(0, 5),
)
def test_larger_routings(seed, shape, skew):
    assignments, experts, devices, rows = shape
    rng = np.random.default_rng(seed)
    chances = np.exp(skew * rng.normal(size=experts))
    check(rng.choice(experts, (3, assignments), p=chances / chances.sum()), experts, devices, (rows,))


def test_capacity():
    assert capacity(100 / 4, 100, 1.0) == 32  # 25, up to a multiple of 8
    assert capacity(24, 96, 1.0) == 24
    assert capacity(24, 96, 1.01) == 32
    assert capacity(24, 96, 4.0) == 96 and capacity(24, 96, 50.0) == 96 and capacity(24, 96, math.inf) == 96
    assert capacity(2.5, 5, 1.0) == 5  # no more than can come
    assert capacity(24, 96, 1e-9) == 8
    for factor in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="factor must be above 0, got"):
            capacity(24, 96, factor)


def test_inverse():
    for order in itertools.permutations(range(4)):
        assert inverse(jnp.array(order)).tolist() == [order.index(i) for i in range(4)]


def ragged_all_to_all(operands, outputs, offsets):
    """What lax.ragged_all_to_all's documentation says it does, on all devices: operands, outputs and offsets have an entry for each."""
    results = [output.copy() for output in outputs]
    for source, (operand, (begins, sizes, lands, _)) in enumerate(zip(operands, offsets, strict=True)):
        for target, result in enumerate(results):
            size = sizes[target]
            assert size == offsets[target][3][source], "a receiver must expect what is sent"
            assert 0 <= begins[target] <= len(operand) - size and 0 <= lands[target] <= len(result) - size, "outside of a buffer"
            result[lands[target] : lands[target] + size] = operand[begins[target] : begins[target] + size]
    return results


@jax.jit
def all_offsets(counts):
    """(there, back) of every device, for a batch of counts [B, N, N]: each a tuple of four [B, N, N]."""
    return jax.vmap(lambda counts: jax.vmap(lambda me: ragged_offsets(counts, me))(jnp.arange(counts.shape[0])))(counts)


def check_ragged(batch):
    """Each device names its assignments; all arrive at their device in the order of the sender, nothing else does, and they come home again."""
    batch = np.asarray(batch)
    there, back = jax.tree.map(np.asarray, all_offsets(batch))
    devices = batch.shape[1]
    for case, counts in enumerate(batch):
        homes = [np.array([(i, j, n) for j in range(devices) for n in range(counts[i, j])], int).reshape(-1, 3) for i in range(devices)]
        empty = [np.full((counts[:, j].sum() + 3, 3), -1) for j in range(devices)]  # 3 rows too many, that must stay as they are
        arrived = ragged_all_to_all(homes, empty, [[part[case, me] for part in there] for me in range(devices)])
        for j, rows in enumerate(arrived):
            want = [(i, j, n) for i in range(devices) for n in range(counts[i, j])] + 3 * [(-1, -1, -1)]
            np.testing.assert_array_equal(rows, want)
        home = ragged_all_to_all(
            arrived, [np.full_like(rows, -1) for rows in homes], [[part[case, me] for part in back] for me in range(devices)]
        )
        for rows, want in zip(home, homes, strict=True):
            np.testing.assert_array_equal(rows, want)


def compositions(total, parts):
    """All ways to divide `total` assignments over `parts` devices."""
    if parts == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in compositions(total - first, parts - 1)]


@pytest.mark.parametrize("devices, assignments", [(1, 6), *((2, n) for n in range(1, 7)), (4, 1)])
def test_every_small_ragged_exchange(devices, assignments):
    check_ragged(list(itertools.product(compositions(assignments, devices), repeat=devices)))


@pytest.mark.slow
def test_every_ragged_exchange_of_two_rows_each_among_four_devices():
    check_ragged(list(itertools.product(compositions(2, 4), repeat=4)))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(seed=st.integers(0, 2**32 - 1), devices=st.sampled_from([4, 8]), mean=st.floats(0.1, 9), empty=st.floats(0, 0.9))
def test_larger_ragged_exchanges(seed, devices, mean, empty):
    rng = np.random.default_rng(seed)
    check_ragged(rng.poisson(mean, (1, devices, devices)) * (rng.random((1, devices, devices)) >= empty))
