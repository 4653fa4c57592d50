"""Dispatch on a mesh: a shard_map in which each device has its share of the tokens and, of the experts, its own or all.

Tokens are divided over every axis (`Layout.tokens`). With dense, blocked and ragged they stay where they are, and each device gets all experts' weights
(one all-gather for each matrix, none of it for tokens): cheap where the weights are small. With all_gather, all_to_all and ragged_all_to_all the weights
stay, and rows travel to the device that has their expert. Either way a row is computed with its logical number, and weight gradients are summed over the
devices before their noise: on any mesh the same numbers but for the order of sums. T tokens, D model width, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.dispatch.all_gather import exchange_all_gather, one_by_one
from moe_jax.dispatch.all_to_all import exchange_all_to_all
from moe_jax.dispatch.base import DispatchStats, Group
from moe_jax.dispatch.ragged_all_to_all import exchange_ragged_all_to_all
from moe_jax.experts import Experts
from moe_jax.manual import vary_like, varying
from moe_jax.mesh import Layout
from moe_jax.routing import RoutingDecision

EXCHANGES = ("all_gather", "all_to_all", "ragged_all_to_all")


def pick_exchange(group: Group, slots: int, factor: float) -> str:
    """The exchange that moves fewer rows: to `size` devices every token, or its K assignments and their buffers' slack."""
    return "all_to_all" if slots * factor < group.size else "all_gather"


def dispatch_sharded(
    x,
    decision: RoutingDecision,
    experts: Experts,
    tokens,
    layout: Layout,
    name: str | None,
    local: Callable,
    factor: float,
    force: bool,
    chunks: int = 1,
) -> tuple[Any, DispatchStats]:
    """See `dispatch`. local: (x, decision, experts, tokens, share) -> (y float32, stats), on one device. name: of EXCHANGES; "" keeps tokens in place,
    None chooses. chunks: parts of a device's tokens that are exchanged and computed one after the other, in the memory of one.
    """
    axes = tuple(axis for axis in layout.rules.axes_of("experts") if layout.size(axis) > 1)
    group = Group(axes, layout.size(*axes), layout.all_axes)
    if name is None:
        name = pick_exchange(group, decision.ids.shape[1], factor) if axes else ""
    stays = not name or not axes
    exchange = local if stays else _exchange(name, group, local, factor, force, divided=set(axes) <= set(layout.tokens))

    in_parts = functools.partial(one_by_one, exchange, chunks) if chunks > 1 else exchange

    def body(x, decision, experts, tokens):
        if not stays:
            experts = dataclasses.replace(experts, first=lax.axis_index(axes) * experts.count)
        y, stats = in_parts(x, decision, experts, tokens)
        return y.astype(x.dtype), _summed(stats, x, experts, layout.all_axes)

    rows, weights = P(layout.tokens or None), P() if stays else layout.spec("experts", shape=(experts.count,))
    given = dataclasses.replace(experts, weights=dict.fromkeys(experts.weights, weights), operators=P(), context=P(), first=P())
    each = P(layout.all_axes or None)
    specs: Any = (weights, P(), P(), P(), each, each)
    stats = DispatchStats(*specs)
    placed = dataclasses.replace(experts, first=jnp.asarray(experts.first))
    return layout.mapped(body, (rows, rows, given, rows), (rows, stats))(x, decision, placed, tokens)


def _exchange(name: str, group: Group, local: Callable, factor: float, force: bool, divided: bool) -> Callable:
    """(x, decision, experts, tokens) -> (y, this device's stats). Where tokens are not divided over the whole group, each device has them already."""
    gather = functools.partial(exchange_all_gather, group=group, local=functools.partial(local, share=1 / group.size))
    if name == "all_gather" or not divided:
        return gather
    send = exchange_all_to_all if name == "all_to_all" else functools.partial(exchange_ragged_all_to_all, force=force)
    filled = functools.partial(local, share=min(1.0, max(1 / group.size, 1 / factor)))  # room for factor means, at most for all
    return functools.partial(send, group=group, local=filled, fallback=functools.partial(gather, lean=True), factor=factor)


def _summed(stats: DispatchStats, x, experts: Experts, everyone: tuple[str, ...]) -> DispatchStats:
    """The devices' numbers added up: each expert's load over the devices that share it, the rest over all; sent and received side by side."""
    shared = tuple(axis for axis in everyone if axis not in varying(experts.weights["up"]))
    like = (x, experts.weights["up"])

    def over(value, axes):
        value = vary_like(jnp.asarray(value), *like)
        present = tuple(axis for axis in axes if axis in varying(value))
        return lax.psum(value, present) if present else value

    total = {name: over(getattr(stats, name), everyone) for name in ("padded", "dropped", "overflow")}
    each = {name: vary_like(jnp.asarray(getattr(stats, name), jnp.int32), *like)[None] for name in ("sent", "received")}
    return DispatchStats(load=over(stats.load, shared), **total, **each)
