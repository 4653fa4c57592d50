"""Which routes the trainer's passes take over what was sampled, and how far its own routes are from the sampler's.

B answers, T positions of a prompt and its answer, L MoE layers, K experts per token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moe_jax import routing_stats
from moe_jax.replay import Replay
from moe_jax.routing import RoutingTrace, unrecorded

# self: those of the pass before the updates, replayed in the updates (what RL stacks call R2). rollout: those of sampling, in the pass before the updates and
# in the updates (R3). reference: those of the checkpoint that the run began with, without noise, over the sampled tokens; in both. Sampling routes live.
SOURCES = ("self", "rollout", "reference")


def recorded(trace: RoutingTrace, lengths: Int[Array, "B"]) -> RoutingTrace:
    """The trace without the routes of each answer's last token and of what lies behind it: a sampler has none there, so no source has."""
    known = jnp.arange(trace.ids.shape[2]) < lengths[:, None] - 1
    ids = jnp.where(known[None, ..., None], trace.ids, unrecorded(trace.ids.dtype))
    return dataclasses.replace(trace, ids=ids.astype(trace.ids.dtype))


def replayed(trace: RoutingTrace, what: str) -> Replay:
    """As an argument of a forward pass; weights only where they are used."""
    return Replay(trace if what == "ids+weights" else dataclasses.replace(trace, weights=None), what=what)


def mismatch(sampler: RoutingTrace, trainer: RoutingTrace, answered: Bool[Array, "B T"]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Over the positions whose output chose a token, as (sum, count).

    route/changed_experts: the share of experts that the trainer did not use. route/changed_rows: of (token, layer) pairs with another set.
    route/changed_tokens: of tokens with another set in any layer. route/growth: the changed experts of the last layer less those of the first.
    """
    layers, experts = sampler.ids.shape[0], sampler.ids.shape[-1]
    pairs = [tuple(trace.ids[layer].reshape(-1, experts) for trace in (sampler, trainer)) for layer in range(layers)]
    each = [routing_stats.compare(a, b, valid=answered.reshape(-1)) for a, b in pairs]
    zero = jnp.zeros(())
    rows = sum((found["router/tokens_changed"][1] for found in each), zero)
    overlap, changed = (sum((found[f"router/{name}"][0] for found in each), zero) for name in ("set_overlap", "tokens_changed"))
    # a layer at a time: all of them at once, [L, B*T, K, K], are 64 GB at the size of Qwen3-30B-A3B's study
    differs = functools.reduce(jnp.logical_or, (routing_stats.first_difference(a[None], b[None]) == 0 for a, b in pairs))
    tokens = answered.sum(dtype=jnp.float32)
    any_layer = (differs & answered.reshape(-1)).sum(dtype=jnp.float32)
    return {
        "route/changed_experts": (rows - overlap, rows),
        "route/changed_rows": (changed, rows),
        "route/changed_tokens": (any_layer, tokens),
        "route/growth": (each[0]["router/set_overlap"][0] - each[-1]["router/set_overlap"][0], each[0]["router/set_overlap"][1]),
    }
