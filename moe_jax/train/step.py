"""One update and one evaluation step, as pure functions of (state, batch, knobs).

A micro-batches, B sequences in one, S sequence length, L MoE layers, E experts.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax import paths, routing, routing_stats
from moe_jax.errors import ConfigError, check_known
from moe_jax.keys import Draw
from moe_jax.losses import BALANCE_SCOPES, balance_of
from moe_jax.model import Model
from moe_jax.optim.plan import Plan
from moe_jax.replay import check_freeze
from moe_jax.train.state import Knobs, TrainState

Sums = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, besides the cross-entropy averaged over a micro-batch's tokens: static choices about the routers."""

    layer_reduction: str = "sum"  # balance and z losses of the layers: "sum" (the seed) or "mean"
    freeze: tuple[str, ...] = ()  # of replay.FREEZES: what of the routers stands still
    balance_scope: str = (
        "microbatch"  # over which tokens the load is counted: each "sequence", a "microbatch", or all of the update's so far
    )
    bias_rate: float = 0.0  # the selection bias moves this far towards balance after each update (Wang et al. 2024), unless it is frozen

    def __post_init__(self):
        object.__setattr__(self, "freeze", check_freeze(self.freeze))
        if not 0 <= self.bias_rate < math.inf:
            raise ConfigError(f"bias_rate must be finite and not negative, got {self.bias_rate}")
        check_known("balance_scope", self.balance_scope, BALANCE_SCOPES)
        if self.layer_reduction not in ("sum", "mean"):
            raise ConfigError(f"layer_reduction must be sum or mean, got {self.layer_reduction!r}")

    def router_losses(self, aux: Sums, knobs: Knobs) -> jax.Array:
        """Weighted balance and z losses of one micro-batch; 0 for a dense model."""
        total = jnp.zeros(())
        for name, weight in (("balance_loss", knobs.balance_weight), ("z_loss", knobs.z_weight)):
            if name in aux:
                value, layers = aux[name]
                total += weight * (value if self.layer_reduction == "sum" else value / layers)
        return total


def init_state(model: Model, plan: Plan, seed: jax.Array | int) -> TrainState:
    """The state before the first update."""
    params = model.init(seed)
    return TrainState(jnp.zeros((), jnp.int32), params, plan.transformation(model.mesh, model.rules).init(params))


def cross_entropy_of(model: Model, params, micro, knobs: Knobs, draw: Draw, **how: Any) -> tuple[jax.Array, Sums, Any]:
    """What supervised training minimises on a micro-batch, the mean cross-entropy over its tokens, or by their `weights`; metrics; the Output."""
    total, metrics, out = model.loss(
        params, micro["tokens"], micro["targets"], micro.get("weights"), noise=knobs.noise, draw=draw, train=True, **how
    )
    return total / metrics["loss"][1], metrics, out


def make_train_step(
    model: Model, plan: Plan, objective: Objective, record: bool = False, minimised: Callable[..., tuple] = cross_entropy_of
) -> Callable:
    """step(state, batch, knobs) -> (state, metrics, flags).

    batch: tokens and targets Int32[A, B, S]; gradients are averaged over the A micro-batches; perhaps a `replay`, cut into micro-batches, and `weights`
    Float[A, B, S] of the tokens. minimised: the loss of a micro-batch, besides the routers'; see `cross_entropy_of`. What else a batch holds is its affair,
    with a leading axis A: a `draw` is the noise's (steps Int32[A], numbers of the first rows Int32[A]).
    metrics: (sum, count) pairs, "router/load" Float[L, E] and, to record, "trace": the RoutingTrace of the A*B rows. flags: Bool per parameter
    in path order, True where a gradient (or, in the last entry, the loss) is not finite; if any is, the returned state is the one that was given.
    """
    transformation = plan.transformation(model.mesh, model.rules)

    def micro_batch(params, micro, index, step, knobs: Knobs, before):
        """before: assignments of each expert in this update's micro-batches so far [L, E], for the balance loss over the global batch."""

        def objective_of(params):
            at, first = micro["draw"] if "draw" in micro else (step, index * micro["tokens"].shape[0])
            draw = Draw(seed=knobs.noise_seed, step=at, phase="train", row_offset=first)
            how = {"replay": micro.get("replay"), "freeze": objective.freeze, "balance_scope": objective.balance_scope}
            value, metrics, out = minimised(model, params, micro, knobs, draw, capture=("trace",) if record else (), **how)
            aux, counts = out.aux, None
            if out.balance is not None:
                counts, scores = out.balance
                together = balance_of(counts + before, scores)
                aux = aux | {"balance_loss": (together.sum(), aux["balance_loss"][1])}
            found: dict[str, Any] = metrics | aux
            extra = {"router/load": out.load, "router/bias_load": out.bias_load, "trace": out.trace, "balance_counts": counts}
            found |= {name: value for name, value in extra.items() if value is not None}
            return value + objective.router_losses(aux, knobs), found

        return jax.grad(objective_of, has_aux=True)(params)

    def train_step(state: TrainState, batch, knobs: Knobs):
        count = batch["tokens"].shape[0]
        if count == 1:
            grads, metrics = micro_batch(state.params, jax.tree.map(lambda a: a[0], batch), 0, state.step, knobs, 0.0)
        else:
            grads, metrics = _accumulate(
                lambda micro, index, before: micro_batch(state.params, micro, index, state.step, knobs, before), batch, count
            )
        metrics.pop("balance_counts", None)
        flags = non_finite(grads, metrics["loss"][0])
        with jax.named_scope("optimizer"):
            updates, opt_state = transformation.update(grads, state.opt_state, state.params)
        params: Any = _move_bias(model, optax.apply_updates(state.params, updates), metrics.pop("router/bias_load", None), objective)
        moved = TrainState(state.step + 1, params, opt_state)
        # elementwise, so the compiler joins it to the update instead of passing over the state again
        kept = jax.tree.map(lambda new, old: jnp.where(flags.any(), old, new), moved, state)
        return kept, _with_derived(metrics, plan, grads, updates), flags

    return train_step


def _accumulate(gradient: Callable, batch, count: int):
    """Gradients averaged and metrics summed over the micro-batches, one at a time; a trace is laid out as one batch."""

    def of(item, before):
        grads, metrics = gradient(*item, before)
        return (grads, {name: value for name, value in metrics.items() if name != "trace"}), metrics.get("trace")

    def body(carry, item):
        found, trace = of(item, carry[1].get("balance_counts", 0.0))
        return jax.tree.map(jnp.add, carry, found), trace

    items = (batch, jnp.arange(count))
    shapes, _ = jax.eval_shape(of, jax.tree.map(lambda a: a[0], items), 0.0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, metrics), trace = jax.lax.scan(body, zeros, items)
    if trace is not None:
        ids, weights = (x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in (trace.ids, trace.weights))
        metrics["trace"] = routing.RoutingTrace(ids, weights, trace.layer_index[0])
    return jax.tree.map(lambda g: g / count, grads), metrics


def _move_bias(model: Model, params, load: jax.Array | None, objective: Objective):
    """The selection biases moved towards balance: up where an expert gets less than the mean load, down where it gets more."""
    if load is None or not objective.bias_rate or {"freeze_params", "freeze_bias"} & set(objective.freeze):
        return params
    flat = paths.flatten(params)
    for path, layers in model.layers_of("selection_bias").items():
        rows = load[jnp.array([model.config.moe_layers.index(layer) for layer in layers])]
        flat[path] = flat[path] + objective.bias_rate * jnp.sign(rows.mean(-1, keepdims=True) - rows)
    return paths.unflatten(flat)


def non_finite(grads: dict[str, Any], loss: jax.Array) -> jax.Array:
    """Bool[leaves + 1]: which gradients, in path order, and then whether the loss, hold a value that is not finite."""
    leaves = [*paths.flatten(grads).values(), loss]

    def each():
        return jnp.stack([~jnp.isfinite(leaf.astype(jnp.float32)).all() for leaf in leaves])

    # the sums of squares are those of the gradient norm: as long as they are finite, no pass over the gradients is spent on this
    squares = sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves)
    return jax.lax.cond(jnp.isfinite(squares), lambda: jnp.zeros(len(leaves), bool), each)


def _with_derived(metrics, plan: Plan, grads, updates):
    """The metrics with the pre-clip gradient norm, how far expert matrices moved, and the imbalance of the load."""
    one = jnp.ones(())
    metrics = metrics | {"optimizer/gradient_norm": (plan.global_norm(grads), one)}
    experts = {leaf.path for leaf in plan.leaves if leaf.role == "expert"}
    rms = [value.reshape(-1) for path, value in plan.update_rms(updates).items() if path in experts]
    if rms:
        each = jnp.concatenate(rms)
        metrics |= {"optimizer/expert_update_rms_min": (each.min(), one), "optimizer/expert_update_rms_max": (each.max(), one)}
    if "router/load" in metrics:
        load = metrics["router/load"]
        layers = jnp.asarray(load.shape[0], jnp.float32)
        metrics |= {
            "router/load_cv": (routing_stats.load_cv(load).sum(), layers),
            "router/dead_experts": (routing_stats.dead_experts(load).sum(), one),
        }
    return metrics


def make_evaluate_step(model: Model) -> Callable:
    """evaluate(params, batch, knobs) -> metrics as (sum, count), with "router/load" and "router/residual_load" Float[L, E].

    batch: tokens and targets Int32[B, S], weight Float32[B, S] (0 for padding), row_offset Int32, the number of the first window, perhaps a `replay`. No
    dropout, no router losses; noise where the knobs' spec names the phase "eval". Loads and losses count the tokens of weight 1.
    """
    capture = ("trace", "residual_ids") if model.config.moe_layers else ()

    def loads(ids, weight):
        return jax.vmap(lambda ids: routing.expert_load(ids, model.config.num_experts, weight.reshape(-1)))(
            ids.reshape(*ids.shape[:1], -1, ids.shape[-1])
        )

    def evaluate(params, batch, knobs: Knobs):
        draw = Draw(seed=knobs.noise_seed, phase="eval", row_offset=batch["row_offset"])
        _, sums, out = model.loss(
            params,
            batch["tokens"],
            batch["targets"],
            batch["weight"],
            noise=knobs.noise,
            draw=draw,
            capture=capture,
            replay=batch.get("replay"),
        )
        metrics: dict[str, Any] = dict(sums) | {name: value for name, value in out.aux.items() if name.startswith("replay/")}
        if out.trace is not None:
            metrics |= {
                "router/load": loads(out.trace.ids, batch["weight"]),
                "router/residual_load": loads(out.residual_ids, batch["weight"]),
            }
        return metrics

    return evaluate
