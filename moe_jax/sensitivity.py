"""Where the damage of noise comes from: experts that routers choose otherwise, or plain error; and what the noise did to the routers.

An arm is one forward pass: some factors (groups of noise sites) noisy, the others clean, the experts chosen live or as recorded. All see the same
tokens and draws; scales switch a factor, and live is the replay of an empty trace, so that all arms of one structure are one compiled program.

L MoE layers, B sequences, S positions, T = B*S tokens, E experts, K experts chosen per token, D model width, V vocabulary.
"""

import dataclasses
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax import routing, routing_stats
from moe_jax.errors import ConfigError
from moe_jax.keys import Draw
from moe_jax.model.model import Model, check_ids
from moe_jax.noise import Noise, NoiseSpec, SiteNoise
from moe_jax.noise.sites import GROUPS
from moe_jax.products import matmul
from moe_jax.replay import Replay, check_trace, empty_trace
from moe_jax.studies.stats import Contrast, paired, t_quantile

FACTORS = {"router": ("router_input", "router_logits", "router_gemm"), "experts": GROUPS["experts"], "attention": GROUPS["attention"]}
ROUTES = ("live", "ids", "ids+weights")  # whose experts an arm takes: its own, or the recorded ones, or these with the recorded weights
OPPOSITE = "noisy ids"  # the experts that the pass with all noise chose, in the clean model: flips without any other error
CLEAN = {"loss": 0.0, "kl": 0.0, "agreement": 1.0}  # metric -> the clean pass's value, where it is not measured


@dataclasses.dataclass(frozen=True)
class Ratio:
    """mean(part) / mean(whole) of paired values, with the interval of Fieller (1954), which is exact for normal values."""

    value: float
    interval: tuple[float, float]
    undefined: str = ""  # why there is none


def ratio(part: Any, whole: Any, alpha: float = 0.05) -> Ratio:
    """Undefined unless the mean of `whole` is above 0 by its own t interval of level 1 - alpha: else the ratio could be anything."""
    x, y = np.asarray(whole, np.float64), np.asarray(part, np.float64)
    if x.size < 2:
        return Ratio(np.nan, (np.nan, np.nan), "one value has no interval")
    (xx, xy), (_, yy) = np.cov(x, y) * t_quantile(x.size - 1, alpha) ** 2 / x.size
    a, b, c = x.mean() ** 2 - xx, x.mean() * y.mean() - xy, y.mean() ** 2 - yy
    if a <= 0 or x.mean() <= 0:
        return Ratio(np.nan, (np.nan, np.nan), "the damage is not distinguishable from 0" if a <= 0 else "the noise did no damage")
    half = max(b * b - a * c, 0.0) ** 0.5
    return Ratio(float(y.mean() / x.mean()), (float((b - half) / a), float((b + half) / a)))


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """What `sensitivity` found. L layers that route, R noise seeds, N batches.

    values: of "loss" (nats), "kl" (of the words' distribution to the clean pass, KL(clean || arm), nats) and "agreement" (share of tokens whose
    likeliest word is the clean pass's). routers: by pass ("clean"; "all" and "router": live, with this much noise; "own": each router's own noise on the
    inputs of the clean pass) and name; router/… are means over tokens [R, L], the others sums: margin/… [R, L, bins], load, gained and
    lost [R, L, E], first (layer that differs; L: none) [R, L+1]. Margins are of the logits: a selection bias is not in them.
    """

    factors: dict[str, tuple[str, ...]]  # factor -> its noise sites
    layers: tuple[int, ...]  # absolute indices
    seeds: tuple[int, ...]
    tokens: tuple[int, ...]  # of each batch, those that count
    live_rows: float  # share of (layer, token) rows without a recorded route: they are live in every arm
    arms: tuple[tuple[str, tuple[str, ...]], ...]  # (routes, noisy factors)
    values: dict[str, np.ndarray]  # metric -> Float[arms, R, N], means over tokens
    clean: np.ndarray  # Float[N], loss
    routers: dict[str, dict[str, np.ndarray]]

    def at(self, metric: str = "loss", routes: str = "live", noisy: Sequence[str] | None = None, over: str = "seeds") -> np.ndarray:
        """One arm's differences from the clean pass, one per noise seed, or per batch (over="batches"). noisy: factors; None: all of them."""
        arm = (routes, tuple(name for name in self.factors if noisy is None or name in noisy))
        if metric not in CLEAN or arm not in self.arms or not set(noisy or ()) <= set(self.factors) or over not in ("seeds", "batches"):
            given = f"{routes!r} with noisy {noisy} and metric {metric!r} over {over!r}"
            raise ConfigError(f"there is no arm {given}; factors: {', '.join(self.factors)}; over: seeds, batches")
        found = self.values[metric][self.arms.index(arm)] - (self.clean if metric == "loss" else CLEAN[metric])
        return found @ np.array(self.tokens) / sum(self.tokens) if over == "seeds" else found.mean(0)

    def damage(self, metric="loss", routes="live", noisy=None, over="seeds") -> Contrast:
        """An arm minus the clean pass with its t interval, over noise seeds or batches of text, of which it needs 2 (else ValueError)."""
        values = self.at(metric, routes, noisy, over)
        return paired(values.tolist(), [0.0] * values.size, self.seeds if over == "seeds" else None)

    def share(self, routes: str, metric: str = "loss", noisy: Sequence[str] | None = None, over: str = "seeds") -> Ratio:
        """The part of the damage of noise in the factors `noisy` that goes away when the experts ("ids"), or these and their weights ("ids+weights"),
        are the recorded ones; for OPPOSITE, the damage that the flips of all noise do alone, over that of `noisy`."""
        whole = self.at(metric, "live", noisy, over)
        part = self.at(metric, OPPOSITE, (), over) if routes == OPPOSITE else whole - self.at(metric, routes, noisy, over)
        return ratio(part, whole)


def factor_of(site: str, noise: SiteNoise) -> str:
    """The factor that switches a site; what is neither router, experts nor attention is "rest"."""
    if site == "norm_moe" and noise.reach is not None and len(noise.reach) == 1:
        return noise.reach[0]  # "router" or "experts": its only reader
    return next((factor for factor, sites in FACTORS.items() if site in sites), "rest")


def arms_of(noise: Noise) -> tuple[dict[str, tuple[str, ...]], tuple[tuple[str, tuple[str, ...]], ...]]:
    """(factor -> its sites, the arms as (routes, noisy factors)) of a resolved noise."""
    of = {site: factor_of(site, how) for site, how in noise.structure}
    factors = {name: tuple(site for site in of if of[site] == name) for name in (*FACTORS, "rest") if name in of.values()}
    subsets = [tuple(itertools.compress(factors, on)) for on in itertools.product((False, True), repeat=len(factors))]
    return factors, (*itertools.product(ROUTES, subsets), (OPPOSITE, ()))


def sensitivity(
    model: Model,
    params: Any,
    batches: Any,
    noise: NoiseSpec,
    seeds: Iterable[int] = range(8),
    phase: str = "eval",
    routes: Callable[[int, np.ndarray], routing.RoutingTrace] | None = None,
    look: Callable[[jax.Array, np.ndarray], None] = lambda logits, weight: None,
    progress: Callable[[int, float], None] = lambda batches, share: None,
) -> Sensitivity:
    """The damage that `noise` does, arm by arm, and what became of the routes.

    batches: Int[B, S+1] windows, an iterable of them, or of dicts as `train.data.Data.validation_batches` yields; all of one shape. seeds: of the
    noise, at least 2. phase: of the draws. routes: (number of the batch, its tokens) -> the trace to replay; None: the clean pass's own. look: gets
    each batch's clean router logits Float[L, T, E] and weight Float[T]. progress: gets the batches done and the share of the next. Nothing else is
    kept of a batch but sums. The same call gives the same bits.
    Raises ConfigError (a dense model, a spec that does not act in the phase, fewer than 2 seeds, no batch, ids beyond the
    vocabulary) and TraceError (routes that do not fit).
    """
    seeds = tuple(seeds)
    if not model.config.moe_layers:
        raise ConfigError("a dense model has no routes that noise could change; give a model with experts")
    if len(set(seeds)) < max(2, len(seeds)):
        raise ConfigError(f"the intervals need at least 2 noise seeds, each given once; got {list(seeds)}")
    acting = model.config.resolve(noise).in_phase(phase)
    if acting is None:
        raise ConfigError(f"this noise does not act in the phase {phase!r}: {noise!r}")
    run = _Run(model, params, acting, seeds, phase)
    for index, batch in enumerate(map(_as_batch, [batches] if hasattr(batches, "shape") else batches)):
        run.add(batch, routes and routes(index, batch["tokens"]), look, progress)
    if not run.tokens:
        raise ConfigError("there is no batch of text to measure on")
    return run.result()


class _Run:
    """The sums over batches so far."""

    def __init__(self, model: Model, params, acting: Noise, seeds: tuple[int, ...], phase: str):
        self.model, self.params, self.acting, self.seeds, self.phase = model, params, acting, seeds, phase
        self.factors, self.arms = arms_of(acting)
        self.tokens, self.values, self.clean, self.live_rows = [], [], [], []
        self.routers: dict[str, dict[int, Any]] = {}  # pass -> number of the seed -> sums

    def add(self, batch: dict[str, np.ndarray], given: Any, look, progress) -> None:
        """All arms on one batch. given: the routes to replay; None: the clean pass's."""
        config, weight, own = self.model.config, batch["weight"].reshape(-1), given is None
        sizes = config.moe_layers, config.num_experts, config.experts_per_token, *batch["tokens"].shape
        check_ids(batch["tokens"], config.vocab_size)
        replays = {"live": _replay(empty_trace(*sizes))}
        clean, loss = self._pass(batch, (), replays["live"], self.seeds[0])
        given = clean[1] if given is None else given
        check_trace(given, *sizes)
        replays |= {what: _replay(given, what) for what in ROUTES[1:] if what == "ids" or given.weights is not None}
        self.arms = tuple(arm for arm in self.arms if arm[0] in (*replays, OPPOSITE))
        # a router that reads the clean pass's inputs shows its own noise; what it would choose is in the logits unless there is a selection bias
        passes: dict[Any, str] = {("ids+weights", ("router",)): "own"} if own and not config.selection_bias else {}
        passes |= {("live", ("router",)): "router", ("live", tuple(self.factors)): "all"}
        self._note("clean", 0, clean, clean, weight)
        values = np.zeros((len(self.arms), len(self.seeds), len(CLEAN)))
        for (number, seed), (index, (routes, noisy)) in itertools.product(enumerate(self.seeds), enumerate(self.arms)):
            if not noisy and number and routes != OPPOSITE:
                values[index, number] = values[index, 0]  # no noise: the same for every seed
                continue
            state, values[index, number] = self._pass(batch, noisy, replays[routes], seed, clean)
            if name := passes.get((routes, noisy)):
                self._note(name, number, clean, state, weight)
                replays |= {OPPOSITE: _replay(state[1])} if name == "all" else {}
            progress(len(self.tokens), (number * len(self.arms) + index + 1) / (len(self.arms) * len(self.seeds)))
        self.tokens.append(int(weight.sum()))
        self.values.append(values)
        self.clean.append(loss[0])
        self.live_rows.append(1.0 - float(np.asarray(given.valid).mean()))
        look(clean[2].reshape(len(config.moe_layers), -1, config.num_experts), weight)

    def _pass(self, batch, noisy, replay: Replay, seed: int, clean=None) -> tuple[Any, np.ndarray]:
        """(hidden, trace, router logits) of an arm, and the means over tokens of loss, KL and agreement, float64."""
        on = {site: float(name in noisy) for name, sites in self.factors.items() for site in sites}
        noise = Noise({site: scale * on[site] for site, scale in self.acting.scales.items()}, self.acting.structure)
        draw = Draw(jnp.uint32(seed & 0xFFFFFFFF), jnp.uint32(0), self.phase, jnp.int32(len(self.tokens) * len(batch["tokens"])))
        state = _forward(self.model, self.params, batch["tokens"], noise, draw, replay)
        each = _measure(self.model, self.params, batch, noise, draw, (clean or state)[0], state[0])
        return state, np.average(np.asarray(each, np.float64), -1, batch["weight"].reshape(-1))

    def _note(self, name: str, number: int, clean, state, weight) -> None:
        sums = _diagnose(self.model.config.experts_per_token, name == "own", weight, *clean[1:], *state[1:])
        sums, kept = jax.tree.map(lambda x: np.asarray(x, np.float64), sums), self.routers.setdefault(name, {})
        kept[number] = jax.tree.map(np.add, kept[number], sums) if number in kept else sums

    def result(self) -> Sensitivity:
        """The sums as means."""
        routers: dict[str, dict[str, np.ndarray]] = {}
        for name, by_seed in self.routers.items():
            by_key = {key: [sums[key] for sums in by_seed.values()] for key in by_seed[0]}
            routers[name] = {key: np.stack([np.divide(*x) if isinstance(x, tuple) else x for x in found]) for key, found in by_key.items()}
        values = dict(zip(CLEAN, np.moveaxis(np.stack(self.values, -1), 2, 0), strict=True))
        layers, tokens, live = self.model.config.moe_layers, tuple(self.tokens), float(np.mean(self.live_rows))
        return Sensitivity(self.factors, layers, self.seeds, tokens, live, self.arms, values, np.array(self.clean), routers)


def _replay(trace: routing.RoutingTrace, what: str = "ids") -> Replay:
    """The replay, of arrays of one kind, whether read or computed: else a program is compiled again."""
    return Replay(jax.tree.map(jnp.asarray, trace if what == "ids+weights" else dataclasses.replace(trace, weights=None)), what)


def _as_batch(batch: Any) -> dict[str, np.ndarray]:
    if isinstance(batch, dict):
        return {name: np.asarray(batch[name]) for name in ("tokens", "targets", "weight")}
    windows = np.asarray(batch)
    if windows.ndim != 2 or windows.shape[1] < 2:
        raise ConfigError(f"a batch is Int[B, S+1], windows of S tokens and the next; got the shape {windows.shape}")
    return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "weight": np.ones(windows[:, 1:].shape, np.float32)}


@functools.partial(jax.jit, static_argnames="model")
def _forward(model: Model, params, tokens, noise: Noise, draw: Draw, replay: Replay):
    out = model.features(params, tokens, noise, draw, capture=("trace", "router_logits"), replay=replay)
    return out.hidden, out.trace, out.router_logits


@functools.partial(jax.jit, static_argnames="model")
def _measure(model: Model, params, batch, noise: Noise, draw: Draw, clean, hidden) -> Float[Array, "3 T"]:
    """Loss, KL and agreement of each token, some tokens' words at a time. clean, hidden: [B, S, D] of the clean pass and of the arm."""
    scope, _ = model._scope(batch["tokens"], noise, draw, False, ())
    operator, head, count = scope.operator("lm_head"), model.head(params), batch["targets"].size
    exact = operator and dataclasses.replace(operator, scale=jnp.zeros_like(operator.scale))
    size = next(n for n in range(max(1, min(count, (1 << 25) // len(head))), 0, -1) if count % n == 0)

    def some(item):
        (a, b), rows, targets = item
        log_p, log_q = (jax.nn.log_softmax(matmul(h, head, op, rows, transposed=True)) for h, op in ((a, exact), (b, operator)))
        d = log_q - log_p
        kl = (jnp.exp(log_p) * (jnp.expm1(jnp.minimum(d, 80.0)) - d)).sum(-1)  # sum p(e^d - 1) is 0, and with it no term is negative
        loss = -jnp.take_along_axis(log_q, targets[:, None], axis=-1)[:, 0]
        return jnp.stack([loss, kl, (log_p.argmax(-1) == log_q.argmax(-1)).astype(jnp.float32)])

    parts = (clean, hidden), scope.tokens, batch["targets"]
    found = jax.lax.map(some, jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[2:]), parts))
    return found.swapaxes(0, 1).reshape(len(CLEAN), count)


@functools.partial(jax.jit, static_argnames=("k", "own"))
def _diagnose(k: int, own: bool, weight, clean: Any, clean_logits, noisy: Any, noisy_logits):
    """Of each layer what `routing_stats` finds, as (sum, count) or sums; own: of the experts that the noisy routers would choose, not of those used."""

    def one_layer(ids_a, weights_a, logits_a, ids_b, weights_b, logits_b):
        found = routing_stats.compare(ids_a, ids_b, logits_a, logits_b, weights_a, None if own else weights_b, weight > 0)
        found |= routing_stats.health(logits_b, k, weight)
        moved = (logits_b - logits_a).var(-1)  # without the common shift, which changes no route
        found["router/logit_error_variance"] = (moved @ weight, weight.sum())
        found |= {f"margin/{name}": x for name, x in routing_stats.explained_by_margin(logits_a, logits_b, k, weight).items()}
        gained, lost = routing_stats.gained_lost(ids_a, ids_b, logits_a.shape[-1], weight > 0)
        return found | {"gained": gained, "lost": lost, "load": routing.expert_load(ids_b, logits_a.shape[-1], weight)}

    chosen = routing.select(noisy_logits, k).astype(noisy.ids.dtype) if own else noisy.ids
    sides = [x.reshape(len(x), -1, x.shape[-1]) for x in (clean.ids, clean.weights, clean_logits, chosen, noisy.weights, noisy_logits)]
    first = routing_stats.first_difference(sides[0], sides[3])
    return jax.vmap(one_layer)(*sides) | {"first": routing.expert_load(first[:, None], len(chosen) + 1, weight)}


class _CallableModule(types.ModuleType):
    """`mj.sensitivity(...)` is a name that users call, and importing this module makes `mj.sensitivity` the module: so it can be called."""

    __call__ = staticmethod(sensitivity)


sys.modules[__name__].__class__ = _CallableModule
