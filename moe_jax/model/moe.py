"""The mixture-of-experts layer: the one place where routing, noise and dispatch meet.

T = B*S tokens, D model width, E experts, K experts per token.
"""

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_jax import routing, routing_stats
from moe_jax.axes import ParamSpec
from moe_jax.dispatch import dispatch
from moe_jax.experts import Experts
from moe_jax.losses import balance_loss, z_loss
from moe_jax.model.bind import declare
from moe_jax.model.config import ModelConfig
from moe_jax.model.layers import Scope, weight
from moe_jax.noise import draws

ROUTING_IDS = "routing_ids"  # a backward pass that computes a layer again must use the ids that were used: they are always saved


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.config = config
        experts, width, inner = config.num_experts, config.d_model, config.d_expert
        self.router = weight(config, (width, experts), ("embed", "router"), "router")
        self.up = weight(config, (experts, width, inner), ("experts", "embed", "mlp"), "expert")
        self.down = weight(config, (experts, inner, width), ("experts", "mlp", "embed"), "expert")
        if config.gated:
            self.gate = weight(config, (experts, width, inner), ("experts", "embed", "mlp"), "expert")
        if config.selection_bias:
            self.selection_bias = declare(ParamSpec((experts,), ("router",), "selection_bias", "zeros", dtype="float32"))

    def __call__(self, x: Float[Array, "B S D"], scope: Scope) -> tuple[Float[Array, "B S D"], dict]:
        """The layer's output, and what the router did."""
        c = self.config
        flat = x.reshape(-1, x.shape[-1])
        clean = routing.router_logits(scope.perturb(flat, "router_input"), self.router[...])
        noisy = scope.perturb(clean, "router_logits")
        seen = functools.partial(_seen_by, scope, clean, noisy)

        bias = self.selection_bias[...] if c.selection_bias else None
        ids = checkpoint_name(routing.select(seen("selection"), c.experts_per_token, bias=bias), ROUTING_IDS)
        weights = routing.combine(seen("weights"), ids, c.router_score, c.renormalise)
        decision = routing.RoutingDecision(ids, weights)
        y, stats = dispatch(flat, decision, self._experts(scope), c.dispatch, tokens=scope.tokens.reshape(-1))

        router = {
            "ids": ids.astype(routing.trace_dtype(c.num_experts)).reshape(*x.shape[:2], -1),
            "weights": weights.reshape(*x.shape[:2], -1),
            "logits": seen("selection").reshape(*x.shape[:2], -1),
            "load": stats.load,
            "dropped": stats.dropped,
            "balance_loss": balance_loss(seen("balance"), ids, c.router_score),
            "z_loss": z_loss(seen("balance")),
            **routing_stats.health(seen("selection"), c.experts_per_token),
        }
        return y.reshape(x.shape), router

    def ids_on(self, x: Float[Array, "B S D"]) -> Int[Array, "B S K"]:
        """The experts this router would choose if it read x, which it was not made for: the usage that the seed study measured."""
        logits = routing.router_logits(x.reshape(-1, x.shape[-1]), self.router[...])
        ids = routing.select(logits, self.config.experts_per_token)
        return ids.astype(routing.trace_dtype(self.config.num_experts)).reshape(*x.shape[:2], -1)

    def _experts(self, scope: Scope) -> Experts:
        weights = {"up": self.up[...], "down": self.down[...]}
        if self.config.gated:
            weights["gate"] = self.gate[...]
        if not scope.dropout:
            return Experts(weights, activation=self.config.activation)
        return Experts(weights, scope.stream("dropout_expert_hidden"), self.config.activation, mask=_dropout(scope.dropout))


def _seen_by(scope: Scope, clean, noisy, reader: str):
    noise = dict(scope.sites).get("router_logits")
    return noisy if noise is not None and reader in noise.reach else clean


@functools.cache
def _dropout(rate: float):
    """One function object per rate, since a function is part of a program's identity."""

    def mask(key: jax.Array, rows: jax.Array, width: int) -> jax.Array:
        return draws.dropout_mask(key, rows, width, rate)

    return mask
