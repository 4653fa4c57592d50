"""The contract of a dispatch: it takes tokens, a routing decision and experts, and returns their weighted sum and a count of what happened.

    y[t] = sum_k weights[t, k] * mlp_{ids[t, k]}(x[t])

No implementation may change the decision, drop a row without counting it, or let a result depend on the order or place in which rows are
computed beyond rounding. An id of E is nobody's here: it adds 0 and is not counted. Products are those of `moe_jax.products` with the rows' logical
numbers (token*K + slot), so that whatever is drawn there is the same in every implementation. T tokens, D model width, E experts, K experts per token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.routing import RoutingDecision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchStats:
    """What a dispatch did with the T*K assignments. On a mesh `sent` and `received` have an entry for each device, the others are sums over all."""

    load: Float[Array, "E"]  # assignments computed by each expert
    padded: Int[Array, ""] | int = 0  # rows computed or sent beyond the assignments, to fill blocks
    dropped: Int[Array, ""] | int = 0  # assignments not computed; 0 in every implementation that does not say otherwise
    overflow: Int[Array, ""] | int = 0  # assignments that found their buffer full: the layer was then computed in another way
    sent: Int[Array, "N"] | int = 0  # rows that a device sent to other devices
    received: Int[Array, "N"] | int = 0  # assignments of other devices' tokens that a device computed


@dataclasses.dataclass(frozen=True)
class Group:
    """The devices among which the experts of a layer are divided, as seen inside a shard_map.

    Device i, counted over `axes` in row-major order, holds experts i*E/size to (i+1)*E/size - 1. everyone: all axes over which tokens or experts are
    divided; where a branch depends on the routing, all these devices take the same one, since weight gradients are summed inside it.
    """

    axes: tuple[str, ...]
    size: int
    everyone: tuple[str, ...]


def row_numbers(tokens: Int[Array, "T"] | None, decision: RoutingDecision) -> Int[Array, "T K"]:
    """The logical row number token*K + slot of each assignment; tokens: global token numbers, default 0..T-1."""
    count, slots = decision.ids.shape
    tokens = jnp.arange(count) if tokens is None else tokens
    return tokens[:, None].astype(jnp.int32) * slots + jnp.arange(slots, dtype=jnp.int32)


def sort_by_expert(ids: Int[Array, "T K"], num_experts: int) -> tuple[Int[Array, "R"], Int[Array, "E"]]:
    """(order, sizes): order lists the flat assignments expert by expert, in token order inside one (a stable sort); sizes counts each expert's."""
    flat = ids.reshape(-1)
    sizes = (flat[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    return jnp.argsort(flat, stable=True).astype(jnp.int32), sizes
