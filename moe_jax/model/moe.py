"""The mixture-of-experts layer: the one place where routing, noise and dispatch meet.

T = B*S tokens, D model width, E experts, K experts per token.
"""

import functools

import jax
import jax.numpy as jnp
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
from moe_jax.products import matmul

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
        if config.learned_noise:
            self.noise = declare(ParamSpec((width, experts), ("embed", "router"), "router", "zeros", dtype=config.dtypes.params))
        if config.selection_bias:
            self.selection_bias = declare(ParamSpec((experts,), ("router",), "selection_bias", "zeros", dtype="float32"))

    def __call__(
        self, x: Float[Array, "B S D"], scope: Scope, routed: Float[Array, "B S D"] | None = None
    ) -> tuple[Float[Array, "B S D"], dict]:
        """The layer's output, and what the router did. routed: what the router reads instead of x (x with another noise)."""
        c, tokens = self.config, scope.tokens.reshape(-1)
        flat = x.reshape(-1, x.shape[-1])
        read = scope.perturb(flat if routed is None else routed.reshape(flat.shape), "router_input")
        dot = functools.partial(matmul, operator=scope.operator("router_gemm"), rows=tokens, precision=jax.lax.Precision.HIGHEST)
        clean = routing.router_logits(read, self.router[...], dot)
        noisy = self._learned(clean, read, scope) if c.learned_noise else scope.perturb(clean, "router_logits")
        seen = functools.partial(_seen_by, scope, clean, noisy)

        bias = self.selection_bias[...] if c.selection_bias else None
        ids = checkpoint_name(routing.select(seen("selection"), c.experts_per_token, bias=bias), ROUTING_IDS)
        weights = routing.combine(seen("weights"), ids, c.router_score, c.renormalise)
        decision = routing.RoutingDecision(ids, weights)
        y, stats = dispatch(flat, decision, self._experts(scope), c.dispatch, tokens=tokens)

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

    def _learned(self, clean, read, scope: Scope):
        """clean + s n softplus(x W) (Shazeer et al. 2017, eq. 4); the gradient reaches W and the logits, not the draw. Without noise here: clean."""
        noise = scope.noise("router_logits")
        if noise is None or noise.kind != "learned":
            return scope.perturb(clean, "router_logits")
        spread = jax.nn.softplus(routing.router_logits(read, self.noise[...]))
        return clean + spread * (scope.perturb(jnp.zeros_like(clean), "router_logits"))

    def _experts(self, scope: Scope) -> Experts:
        weights = {"up": self.up[...], "down": self.down[...]}
        if self.config.gated:
            weights["gate"] = self.gate[...]
        operators = {name: scope.operator(f"expert_{name}") for name in weights if scope.noise(f"expert_{name}")}
        if not scope.dropout:
            return Experts(weights, operators, activation=self.config.activation)
        key = scope.stream("dropout_expert_hidden")
        return Experts(weights, operators, key, self.config.activation, mask=_dropout(scope.dropout))


def _seen_by(scope: Scope, clean, noisy, reader: str):
    noise = scope.noise("router_logits")
    return noisy if noise is not None and reader in (noise.reach or (reader,)) else clean


@functools.cache
def _dropout(rate: float):
    """One function object per rate, since a function is part of a program's identity."""

    def mask(key: jax.Array, rows: jax.Array, width: int) -> jax.Array:
        return draws.dropout_mask(key, rows, width, rate)

    return mask
