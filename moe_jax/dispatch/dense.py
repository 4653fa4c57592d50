"""Dispatch by computing every expert on every assignment: E times the work, and obviously right. The reference for all others."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.dispatch.base import DispatchStats, row_numbers
from moe_jax.experts import Experts, expert_mlp
from moe_jax.products import matmul
from moe_jax.routing import RoutingDecision, expert_load


def dispatch_dense(x, decision: RoutingDecision, experts: Experts, tokens=None):
    """See `dispatch`; y is float32. Every expert gets all T*K rows, those that are not its own as zeros, in both directions."""
    rows = row_numbers(tokens, decision).reshape(-1)
    x_rows = jnp.repeat(x, decision.ids.shape[1], axis=0)

    def one_expert(weights, expert):
        mine = (decision.ids.reshape(-1) == expert)[:, None]

        def dot(a, name):
            w = weights[name]
            return jnp.where(
                mine, matmul(jnp.where(mine, a, 0), w, experts.operators.get(name), rows, first=(experts.first + expert) * w.shape[0]), 0.0
            )

        return expert_mlp(x_rows, rows, dataclasses.replace(experts, weights=weights), dot)

    out = jax.vmap(one_expert)(experts.weights, jnp.arange(experts.count)).sum(0)
    y = (decision.weights[..., None] * out.reshape(*decision.ids.shape, -1)).sum(1)
    return y, DispatchStats(expert_load(decision.ids, experts.count))
