"""`all_to_all` without padding between devices, by lax.ragged_all_to_all: for TPUs whose network has it and for GPUs. XLA:CPU has none.

A device has one buffer of factor*T*K rows for all that it receives, so it overflows only where its experts together are asked for more, and no two devices
need to agree on a share. Collectives of a layer: forward 4 ragged all-to-all (rows, labels, weights, results), an all-gather of N counts and an all-reduce
of a number; backward 3 ragged all-to-all. T tokens of one device, D model width, K experts per token, N devices, R rows.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.all_to_all import check_divided, collect, labels, or_fallback, spread, traffic
from moe_jax.dispatch.base import DispatchStats, Group, sort_by_expert
from moe_jax.dispatch.offsets import Offsets, capacity, device_counts, inverse, overflow, ragged_offsets
from moe_jax.errors import Unsupported
from moe_jax.experts import Experts
from moe_jax.manual import vary_like
from moe_jax.platforms import platform
from moe_jax.routing import RoutingDecision


def exchange_ragged_all_to_all(
    x: Float[Array, "T D"],
    decision: RoutingDecision,
    experts: Experts,
    tokens: Int[Array, "T"],
    group: Group,
    local: Callable,
    fallback: Callable,
    factor: float,
    force: bool = False,
) -> tuple[Float[Array, "T D"], DispatchStats]:
    """See `exchange_all_to_all`. factor: the receive buffer holds factor*T*K rows, up to a multiple of 8; N always suffices.

    `padded` counts the empty rows of the receive buffer, which are not sent; `overflow` the assignments for this device's experts that it cannot
    hold. force: trace it on a CPU all the same, to compile for another platform.
    Raises Unsupported on a CPU without `force`, ValueError as `exchange_all_to_all` does.
    """
    if platform() == "cpu" and not force:
        raise Unsupported("XLA has no ragged all-to-all for CPUs; use all_to_all, or force=True to compile for another platform")
    check_divided(x, group)
    assignments, slots = decision.ids.size, decision.ids.shape[1]
    rows = capacity(assignments, group.size * assignments, factor)
    order, sizes = sort_by_expert(decision.ids, group.size * experts.count)
    place, counts = inverse(order), device_counts(sizes, group.size)
    everyones, me = lax.all_gather(counts, group.axes), lax.axis_index(group.axes)
    there, back = ragged_offsets(everyones, me)

    def exchange(x, decision, experts, tokens):
        send = functools.partial(_move, group.axes, (assignments, rows))
        nobody = jnp.broadcast_to(jnp.array([experts.count, 0], jnp.int32), (rows, 2))
        ids, numbers = _ragged(group.axes, labels(decision, experts, tokens)[order], nobody, there).T
        x_rows = send(spread(x, order // slots, place.reshape(-1, slots)), there, back)
        weights = send(spread(decision.weights.reshape(-1, 1), order, place[:, None]), there, back)
        out, stats = local(x_rows, RoutingDecision(ids[:, None], weights), experts, numbers)
        sorted_out = _move(group.axes, (rows, assignments), out, back, there)
        return collect(sorted_out, place.reshape(-1, slots), order // slots), traffic(stats, counts, ids, group)

    return or_fallback(overflow(everyones[:, me].sum(), rows), exchange, fallback, group, x, decision, experts, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _move(axes: tuple[str, ...], sizes: tuple[int, int], rows: Float[Array, "R D"], there: Offsets, back: Offsets) -> Float[Array, "M D"]:
    """The rows that arrive, then zeros; sizes: (R, M). Its derivative is the same with the offsets of the way back.

    jax's own gathers those offsets by two more all-to-alls.
    """
    del back
    return _ragged(axes, rows, jnp.zeros((sizes[1], *rows.shape[1:]), rows.dtype), there)


_move.defvjp(
    lambda axes, sizes, rows, there, back: (_move(axes, sizes, rows, there, back), (back, there)),
    lambda axes, sizes, saved, d: (_move(axes, sizes[::-1], d, *saved), None, None),
)


def _ragged(axes: tuple[str, ...], rows: Array, empty: Array, offsets: Offsets) -> Int[Array, "M D"] | Float[Array, "M D"]:
    """`empty` with the rows that arrive written into it."""
    return lax.ragged_all_to_all(rows, vary_like(empty, rows, offsets), *offsets, axis_name=axes)
