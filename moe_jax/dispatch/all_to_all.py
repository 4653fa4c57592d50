"""Experts divided over devices: each assignment's row is sent to the device that holds its expert, and the result is sent back.

Between each two devices goes a buffer of fixed size. If any is too small, all devices compute the whole layer by `fallback` instead and say how many
assignments did not fit: nothing is dropped. Collectives of a layer: forward 4 all-to-all (rows, labels, weights, results) and one all-reduce of a number
(does every buffer suffice?); backward 3 all-to-all (of results, rows and weights). Rows are packed and put back by gathers in both directions.
Everything here runs inside a shard_map. T tokens of one device, D model width, K experts per token, N devices, C rows of one buffer.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.base import DispatchStats, Group, row_numbers, sort_by_expert
from moe_jax.dispatch.offsets import buffer_slots, capacity, device_counts, overflow
from moe_jax.experts import Experts
from moe_jax.manual import vary_like, varying
from moe_jax.routing import RoutingDecision


def exchange_all_to_all(
    x: Float[Array, "T D"],
    decision: RoutingDecision,
    experts: Experts,
    tokens: Int[Array, "T"],
    group: Group,
    local: Callable,
    fallback: Callable,
    factor: float,
) -> tuple[Float[Array, "T D"], DispatchStats]:
    """y[t] = sum_k weights[t,k] * mlp_{ids[t,k]}(x[t]) in float32, and this device's DispatchStats.

    decision: of this device's tokens, by global ids; that of no expert goes nowhere. experts: those that this device holds. tokens: global token numbers.
    local: (rows [R,D], RoutingDecision [R,1] with ids from this device's first expert on, experts, logical row numbers [R]) -> (float32 [R,D],
    DispatchStats); an id of experts.count is nobody's and adds 0. fallback: (x, decision, experts, tokens) -> what this function returns; its
    intermediate values are not kept for the backward pass. factor: a buffer holds factor*T*K/N rows, up to a multiple of 8, at most T*K.
    In the stats: `padded` counts the rows that arrived here empty besides those of `local`; `overflow` this device's assignments past their buffers.
    Raises ValueError when tokens are not divided over the group's axes, or factor is not above 0.
    """
    check_divided(x, group)
    assignments, slots = decision.ids.size, decision.ids.shape[1]
    rows = capacity(assignments / group.size, assignments, factor)
    order, sizes = sort_by_expert(decision.ids, group.size * experts.count)
    counts = device_counts(sizes, group.size)
    source, slot = buffer_slots(order, counts, rows)

    def exchange(x, decision, experts, tokens):
        def swap(a):
            return lax.all_to_all(a, group.axes, 0, 0, tiled=True)

        nobody = jnp.array([[experts.count, 0]], jnp.int32)
        ids, numbers = swap(jnp.concatenate([labels(decision, experts, tokens), nobody])[source]).T
        x_rows = swap(spread(x, source // slots, slot.reshape(-1, slots)))
        weights = swap(spread(decision.weights.reshape(-1), source, slot[:, None]))
        out, stats = local(x_rows, RoutingDecision(ids[:, None], weights[:, None]), experts, numbers)
        y = collect(swap(out), slot.reshape(-1, slots), source // slots)
        return y, traffic(stats, counts, ids, group)

    return or_fallback(overflow(counts, rows), exchange, fallback, group, x, decision, experts, tokens)


def check_divided(x, group: Group):
    """Raises ValueError where tokens are repeated over the devices that would exchange them."""
    missing = [axis for axis in group.axes if lax.axis_size(axis) > 1 and axis not in varying(x)]
    if missing:
        raise ValueError(f"an exchange of rows needs tokens divided over the mesh axes {missing}; use all_gather where they are repeated")


def labels(decision: RoutingDecision, experts: Experts, tokens) -> Int[Array, "R 2"]:
    """What travels with each flat assignment: its expert, counted from its device's first, and its logical row number."""
    return jnp.stack([decision.ids.astype(jnp.int32) % experts.count, row_numbers(tokens, decision)], -1).reshape(-1, 2)


def traffic(stats: DispatchStats, counts: Int[Array, "N"], ids: Int[Array, "R"], group: Group) -> DispatchStats:
    """The stats of a device that has counts[n] assignments for device n and was sent rows of the experts `ids`."""
    mine, filled = counts[lax.axis_index(group.axes)], (ids < stats.load.size).sum(dtype=jnp.int32)
    return dataclasses.replace(stats, padded=stats.padded + ids.size - filled, sent=counts.sum() - mine, received=filled - mine)


def or_fallback(overflow: Int[Array, ""], exchange: Callable, fallback: Callable, group: Group, *operands):
    """exchange(*operands), or fallback(*operands) on all devices where any of them has overflow, with this device's overflow in the stats."""

    def named(*operands):
        with jax.named_scope("fallback"):  # by which a compiled program's collectives are told apart
            return fallback(*operands)

    def typed(function):
        def run(*operands):  # a cond's branches must agree in types and in what may differ between devices
            out = function(*operands)
            return vary_like(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), out), operands)

        return run

    fits = lax.psum(overflow, group.everyone) == 0
    # A cond keeps what the backward passes of both its branches need: of the one that is hardly ever taken, keep nothing but what it was given.
    y, stats = lax.cond(fits, typed(exchange), jax.checkpoint(typed(named)), *operands)
    return y, dataclasses.replace(stats, overflow=overflow)


@jax.custom_vjp
def spread(values: Float[Array, "T ..."], index: Int[Array, "R"], places: Int[Array, "T K"]) -> Float[Array, "R ..."]:
    """values[index], 0 where index is T. places: the rows of the result in which each value is found, R for none; of them its gradient is gathered."""
    return values.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.custom_vjp
def collect(rows: Float[Array, "R ..."], places: Int[Array, "T K"], index: Int[Array, "R"]) -> Float[Array, "T ..."]:
    """sum_k rows[places[:,k]], a place R adding 0, summed in float32 and returned in the type of rows: the transpose of `spread`."""
    taken = (rows.at[place].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(jnp.float32) for place in places.T)
    return functools.reduce(jnp.add, taken).astype(rows.dtype)


spread.defvjp(
    lambda values, index, places: (spread(values, index, places), (places, index)), lambda saved, d: (collect(d, *saved), None, None)
)
collect.defvjp(
    lambda rows, places, index: (collect(rows, places, index), (index, places)), lambda saved, d: (spread(d, *saved), None, None)
)
