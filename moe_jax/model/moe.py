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
from moe_jax.dispatch import DispatchStats, dispatch
from moe_jax.experts import Experts
from moe_jax.losses import balance_loss, balance_parts, z_loss
from moe_jax.model.bind import declare
from moe_jax.model.config import ModelConfig
from moe_jax.model.layers import Scope, weight
from moe_jax.noise import draws
from moe_jax.products import matmul
from moe_jax.replay import Replay

ROUTER_SITES = ("router_logits", "router_input", "router_gemm")
# a backward pass that computes a layer again must use the ids and weights that were used, to the bit: they are always saved
ROUTING = "routing"

_LIVE = Replay(None, selection_bias="replayed")  # type: ignore[arg-type]  # without a replay, what is used is what was chosen


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.config = config
        experts, width, inner = config.num_experts, config.d_model, config.d_expert
        self.router = weight(config, (width, experts), ("embed", "router"), "router")
        self.up = weight(config, (experts, width, inner), ("experts", "embed", "expert_mlp"), "expert")
        self.down = weight(config, (experts, inner, width), ("experts", "expert_mlp", "embed"), "expert")
        if config.gated:
            self.gate = weight(config, (experts, width, inner), ("experts", "embed", "expert_mlp"), "expert")
        if config.learned_noise:
            self.noise = declare(ParamSpec((width, experts), ("embed", "router"), "router", "zeros", dtype=config.dtypes.params))
        if config.selection_bias:
            self.selection_bias = declare(ParamSpec((experts,), ("router",), "selection_bias", "zeros", dtype="float32"))

    def __call__(
        self, x: Float[Array, "B S D"], scope: Scope, routed: Float[Array, "B S D"] | None = None, replay: Replay | None = None
    ) -> tuple[Float[Array, "B S D"], dict]:
        """The layer's output, and what the router did. routed: what the router reads instead of x (x with another noise). replay: this layer's routes."""
        c, tokens = self.config, scope.tokens.reshape(-1)
        flat = x.reshape(-1, x.shape[-1])
        entered = flat if routed is None else routed.reshape(flat.shape)
        read = scope.perturb(entered, "router_input")
        if "stop_gate_gradient" in scope.freeze:
            read = jax.lax.stop_gradient(read)
        divided, exact = scope.layout is not None, jax.lax.Precision.HIGHEST
        dot = functools.partial(matmul, operator=scope.operator("router_gemm"), rows=tokens, precision=exact, divided=divided)
        clean = routing.router_logits(read, self.router[...], dot)
        noisy = self._learned(clean, read, scope) if c.learned_noise else scope.perturb(clean, "router_logits")
        seen = functools.partial(_seen_by, scope, clean, noisy)

        bias = self.selection_bias[...] if c.selection_bias else None
        live = ids = checkpoint_name(routing.select(seen("selection"), c.experts_per_token, bias=bias, top_k=scope.top_k), ROUTING)
        if replay is not None:
            recorded = replay.recorded(c.num_experts)
            ids = replay.ids(live, recorded)
        weights = routing.combine(seen("weights"), ids, c.router_score, c.renormalise)
        weights = checkpoint_name(weights if replay is None else replay.weights(weights, recorded), ROUTING)
        decision = routing.RoutingDecision(ids, weights)
        with jax.named_scope("dispatch"):
            how = {"layout": scope.layout, "factor": c.exchange_factor, "chunks": c.dispatch_chunks}
            y, stats = dispatch(flat, decision, self._experts(scope), c.dispatch, tokens, **how)

        router = {
            "ids": ids.astype(routing.trace_dtype(c.num_experts)).reshape(*x.shape[:2], -1),
            "weights": weights.reshape(*x.shape[:2], -1),
            "logits": seen("selection").reshape(*x.shape[:2], -1),
            **self._counted(stats, divided),
            **self._followed(seen("balance"), live, ids, stats.load, replay or _LIVE, scope),
            **routing_stats.health(seen("selection"), c.experts_per_token, top_k=scope.top_k),
        }
        if any(scope.noise(site) for site in ROUTER_SITES):
            exact = clean if not any(scope.noise(site) for site in ROUTER_SITES[1:]) else routing.router_logits(entered, self.router[...])
            before, after = (routing.ranked(logits, bias) for logits in (exact, seen("selection")))
            router |= routing_stats.flips(before, after, c.experts_per_token, top_k=scope.top_k)
        return y.reshape(x.shape), router | ({} if replay is None else replay.counts(live, ids, recorded))

    def _counted(self, stats: DispatchStats, divided: bool) -> dict:
        """Per assignment: those not computed, and on a mesh rows sent, buffers' overflow, rows computed for nothing."""
        computed = stats.load.sum()
        rows = {"sent": stats.sent, "overflow": stats.overflow, "padded": stats.padded} if divided else {}
        found = {f"router/{name}": (jnp.sum(jnp.asarray(count, jnp.float32)), computed) for name, count in rows.items()}
        if not divided and isinstance(stats.dropped, int) and not stats.dropped:
            return found  # on one device a dispatch that drops nothing says so by the number 0, which is no metric
        return found | {"router/dropped": (jnp.asarray(stats.dropped, jnp.float32), computed + stats.dropped)}

    def _followed(self, logits, live, used, load, rules: Replay, scope: Scope) -> dict:
        """The router's losses and loads, each of its own choice or of the experts used. load: of the experts used."""
        c = self.config

        def by(rule: str, of_live, of_used):
            value = of_live() if rule == "live" else of_used()
            return jax.tree.map(jnp.zeros_like, value) if rule == "off" else value

        logits = jax.lax.stop_gradient(logits) if "stop_aux_gradient" in scope.freeze else logits
        sequences = scope.tokens.shape[0] if scope.balance == "sequence" else 1
        balance = (functools.partial(balance_loss, logits, ids, c.router_score, sequences=sequences) for ids in (live, used))
        parts = (functools.partial(balance_parts, logits, ids, c.router_score) for ids in (live, used))
        z = functools.partial(z_loss, logits)
        count = functools.partial(routing.expert_load, live, c.num_experts)
        found = {
            "balance_loss": by(rules.balance_loss, *balance),
            "z_loss": by(rules.z_loss, z, z),
            "load": by(rules.load, count, lambda: load),
        }
        found |= {"balance": by(rules.balance_loss, *parts)} if scope.balance == "global_batch" else {}
        return found | ({"bias_load": by(rules.selection_bias, count, lambda: load)} if c.selection_bias else {})

    def ids_on(self, x: Float[Array, "B S D"], scope: Scope) -> Int[Array, "B S K"]:
        """The experts this router would choose if it read x, which it was not made for: the usage that the seed study measured."""
        logits = routing.router_logits(x.reshape(-1, x.shape[-1]), self.router[...])
        bias = self.selection_bias[...] if self.config.selection_bias else None
        ids = routing.select(logits, self.config.experts_per_token, bias=bias, top_k=scope.top_k)
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
