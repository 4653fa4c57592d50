"""Dispatch by computing every expert on every token: E/K times the work, and obviously right. The reference for all others."""

import jax
import jax.numpy as jnp

from moe_jax.dispatch.base import DispatchStats, row_numbers
from moe_jax.experts import Experts, expert_mlp
from moe_jax.routing import RoutingDecision, expert_load


def dispatch_dense(x, decision: RoutingDecision, experts: Experts, tokens=None):
    """See `dispatch`. Each slot is computed by all experts, since what is drawn for a row depends on its slot; the chosen one is kept."""
    rows = row_numbers(tokens, decision)

    def one_expert(weights, expert):
        def one_slot(slot):
            def dot(a, w, site):
                return experts.product(experts.context, site, "forward", rows[:, slot], a, w.astype(a.dtype), (1, 0))

            out = expert_mlp(x, rows[:, slot], _with_weights(experts, weights), dot)
            chosen = decision.ids[:, slot] == expert
            return jnp.where(chosen[:, None], decision.weights[:, slot, None] * out, 0.0)

        return jnp.stack([one_slot(slot) for slot in range(decision.ids.shape[1])]).sum(0)

    outputs = jax.vmap(one_expert)(experts.weights, jnp.arange(experts.count))
    zero = jnp.zeros((), jnp.int32)
    return outputs.sum(0).astype(x.dtype), DispatchStats(expert_load(decision.ids, experts.count), zero, zero)


def _with_weights(experts: Experts, weights) -> Experts:
    return Experts(weights, experts.context, experts.activation, experts.product, experts.mask)
