"""The model a user holds: a configuration bound to functions of a plain dict of parameters. It holds no arrays.

B batch, S sequence, T = B*S tokens, D model width, V vocabulary, L MoE layers, E experts, K experts per token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from moe_jax import paths
from moe_jax.axes import ParamSpec, Rules
from moe_jax.errors import ConfigError, check_known
from moe_jax.keys import Draw, parameter_key
from moe_jax.losses import BALANCE_SCOPES, cross_entropy, token_log_probs
from moe_jax.mesh import DEFAULT_RULES, Layout
from moe_jax.model.cache import Cache
from moe_jax.model.config import ModelConfig
from moe_jax.model.layers import Scope
from moe_jax.model.transformer import declare_decoder, layer_plan
from moe_jax.noise import Noise, NoiseSpec
from moe_jax.noise.sites import OUTSIDE_LAYERS
from moe_jax.products import matmul
from moe_jax.replay import Replay, check_freeze, check_shape, check_trace
from moe_jax.routing import RoutingTrace

CAPTURES = ("trace", "router_logits", "residual_ids")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "logits", "trace", "router_logits", "aux", "load", "residual_ids", "router", "bias_load", "balance"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Output:
    """What one forward pass returns. The fields that were not asked for are None."""

    hidden: Float[Array, "B S D"]  # after the final norm
    logits: Float[Array, "B S V"] | None  # float32
    trace: RoutingTrace | None  # capture "trace": the experts and weights that were used
    router_logits: Float[Array, "L B S E"] | None  # capture "router_logits": before softmax, as selection saw them
    aux: dict[str, tuple[jax.Array, jax.Array]]  # (sum, count): balance_loss and z_loss over layers, router/… over tokens and layers
    load: Float[Array, "L E"] | None  # assignments per expert; None for a dense model
    # capture "residual_ids": the choice if each router read its block's input (not real routing)
    residual_ids: Int[Array, "L B S K"] | None
    # router/… and replay/… of each layer: (sum [L], count [L])
    router: dict[str, tuple[jax.Array, jax.Array]] = dataclasses.field(default_factory=dict)
    bias_load: Float[Array, "L E"] | None = None  # of a model with a selection bias: the load that its update follows
    # scope "global_batch": counts and mean scores [L, E], for a loss over more than this batch
    balance: tuple[jax.Array, jax.Array] | None = None


class Model:
    """A decoder for one configuration, on one mesh.

    mesh: a jax Mesh, or None for wherever the arrays are. rules: logical axis -> mesh axis.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES):
        self.config, self.mesh, self.rules = config, mesh, rules
        self.specs, self._forward = declare_decoder(config)

    def init(self, seed: int | jax.Array = 0) -> dict[str, Any]:
        """The starting parameters, a nested dict: each a function of the seed and its own path, made where the mesh wants it."""
        if isinstance(seed, int) and not 0 <= seed < 1 << 32:
            raise ConfigError(f"an initialisation seed must be from 0 to 2**32 - 1, got {seed}")
        return self._init(jnp.asarray(seed, jnp.uint32))

    @functools.cached_property
    def _init(self):
        def init(seed):
            flat = paths.flatten(self.specs)
            return paths.unflatten({path: spec.initial(parameter_key(seed, path)) for path, spec in flat.items()})

        return jax.jit(init, out_shardings=self.shardings)

    @property
    def shardings(self) -> dict[str, Any] | None:
        """The NamedSharding of each parameter, or None without a mesh."""
        if self.mesh is None:
            return None
        mesh, sizes = self.mesh, dict(self.mesh.shape)
        return self._map(lambda spec: NamedSharding(mesh, self.rules.partition(spec.axes, spec.shape, sizes)))

    def place(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters that every process has, on the devices where they belong."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, params)
        return jax.tree.map(lambda x, at: jax.make_array_from_callback(x.shape, at, np.asarray(x).__getitem__), params, self.shardings)

    def layout(self, batch: int) -> Layout | None:
        """How `batch` sequences lie on the mesh; None without one."""
        return None if self.mesh is None else Layout.of(self.mesh, batch, self.rules)

    def abstract(self) -> dict[str, Any]:
        """The parameters as ShapeDtypeStructs, with their shardings when there is a mesh."""
        shapes = self._map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype))
        if self.mesh is None:
            return shapes
        return jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, self.shardings
        )

    def _map(self, function):
        return jax.tree.map(function, self.specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))

    def apply(
        self,
        params: dict[str, Any],
        tokens: Int[Array, "B S"],
        noise: NoiseSpec | Noise | None = None,
        draw: Draw | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        replay: Replay | None = None,
        freeze: tuple[str, ...] = (),
    ) -> Output:
        """One forward pass with logits.

        noise: what is perturbed; the scales are arrays, the rest static. draw: which draw of it (default: seed 0, step 0, phase "eval").
        train: dropout on. capture: any of "trace", "router_logits", "residual_ids". replay: routes to take. freeze: any of replay.FREEZES.
        Raises ConfigError for a sequence longer than max_seq_len, unknown captures, and noise on layers that are not there; TraceError for a replay
        of other layers, sizes or experts.
        """
        scope, scales = self._scope(tokens, noise, draw, train, freeze)
        out, _ = self._features(params, tokens, scope, scales, capture, replay)
        logits = matmul(out.hidden, self.head(params), scope.operator("lm_head"), scope.tokens, transposed=True)
        return dataclasses.replace(out, logits=logits)

    def cache(self, batch: int, length: int) -> Cache:
        """An empty cache with room for `length` tokens of each of `batch` sequences; raises ConfigError for more than max_seq_len."""
        c = self.config
        if not 1 <= length <= c.max_seq_len:
            raise ConfigError(f"a cache has room for 1 to max_seq_len={c.max_seq_len} tokens, got {length}")
        shape, layout = (c.num_layers, batch, length, c.kv_heads, c.head_width), self.layout(batch)
        where = None if layout is None else NamedSharding(layout.mesh, layout.spec(None, "batch", None, "kv_heads", None, shape=shape))
        return Cache(*(jnp.zeros(shape, c.dtypes.compute, device=where) for _ in range(2)), fresh=True)

    def decode(
        self,
        params: dict[str, Any],
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        cache: Cache,
        last: Int[Array, "B"] | None = None,
        noise: NoiseSpec | Noise | None = None,
        draw: Draw | None = None,
        capture: tuple[str, ...] = (),
        replay: Replay | None = None,
        freeze: tuple[str, ...] = (),
    ) -> tuple[Output, Cache]:
        """As `apply`, for tokens that follow those in the cache, and the cache with them; the first go into a `fresh` one, at positions from 0 on.

        A draw of noise, and so a route, is that of the same token in one pass of `apply` over as many tokens as the cache has room for. last: which of
        the S logits each row is asked for (logits [B, 1, V]); None: all. What a cache holds at and after the position of a row's next token is not read.
        """
        scope, scales = self._scope(tokens, noise, draw, False, freeze, positions, cache.length)
        out, cache = self._features(params, tokens, scope, scales, capture, replay, positions, cache)
        hidden, numbers = out.hidden, scope.tokens
        if last is not None:
            hidden, numbers = jnp.take_along_axis(hidden, last[:, None, None], 1), jnp.take_along_axis(numbers, last[:, None], 1)
        logits = matmul(hidden, self.head(params), scope.operator("lm_head"), numbers, transposed=True)
        return dataclasses.replace(out, logits=logits), dataclasses.replace(cache, fresh=False)

    def features(self, params, tokens, noise=None, draw=None, train=False, capture=(), replay=None, freeze=()) -> Output:
        """As `apply`, without the head's matmul: logits is None."""
        return self._features(params, tokens, *self._scope(tokens, noise, draw, train, freeze), capture, replay)[0]

    def _scope(
        self, tokens, noise: NoiseSpec | Noise | None, draw: Draw | None, train: bool, freeze, positions=None, length: int | None = None
    ) -> tuple[Scope, dict[str, jax.Array]]:
        """What stands outside the layers knows, and the noise scales of the layers, [L] by site. length: of the whole sequences, which number the tokens."""
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] > config.max_seq_len:
            raise ConfigError(f"tokens must be [batch, sequence up to max_seq_len={config.max_seq_len}], got shape {tokens.shape}")
        check_ids(tokens, config.vocab_size)
        draw = Draw() if draw is None else draw
        resolved = config.resolve(noise) if isinstance(noise, NoiseSpec) else noise
        scales = resolved.scales if resolved else {}
        for site, scale in scales.items():
            if site not in OUTSIDE_LAYERS and scale.shape != (config.num_layers,):
                raise ConfigError(f"noise at {site!r} was resolved for {scale.shape[0]} layers, the model has {config.num_layers}")
        acting = resolved.in_phase(draw.phase) if resolved else None
        sites = acting.structure if acting else ()
        outside = {site: scales[site] for site, _ in sites if site in OUTSIDE_LAYERS}
        batch, length = tokens.shape[0], length or tokens.shape[1]
        rows = (jnp.asarray(draw.row_offset, jnp.int32) + jnp.arange(batch))[:, None] * length
        rows = rows + (jnp.arange(length) if positions is None else positions)
        fixed = draw.key(fixed=True) if any(noise.draws == "fixed" for _, noise in sites) else None
        scope = Scope(
            draw.key(), -1, rows, outside, sites, config.dropout if train else 0.0, fixed, check_freeze(freeze), self.layout(batch)
        )
        return scope, {site: scales[site] for site, _ in sites if site not in OUTSIDE_LAYERS}

    def _features(
        self, params, tokens, scope: Scope, scales: dict[str, jax.Array], capture, replay: Replay | None, positions=None, cache: Any = None
    ) -> tuple[Output, Any]:
        unknown = [name for name in capture if name not in CAPTURES]
        if unknown:
            raise ConfigError(f"unknown capture {unknown}; known: {', '.join(CAPTURES)}")
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
        if replay is not None:
            self._check_replay(replay, *tokens.shape)
        hidden, router, cache = self._forward(params, tokens, positions, scope, scales, tuple(capture), replay, cache)
        return self._output(hidden, router, capture), cache

    def _check_replay(self, replay: Replay, batch: int, length: int) -> None:
        """The values too where they are at hand, which they are not while a program is being traced."""
        config, traced = self.config, any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(replay))
        check = check_shape if traced else check_trace
        check(replay.trace, config.moe_layers, config.num_experts, config.experts_per_token, batch, length)

    def loss(
        self,
        params,
        tokens,
        targets,
        weights=None,
        noise=None,
        draw=None,
        train=False,
        capture=(),
        replay=None,
        freeze=(),
        balance_scope="microbatch",
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]], Output]:
        """Sum over tokens of the cross-entropy in nats, its metrics as (sum, count), and the Output; the rest as for `apply`.

        tokens, targets: Int[B, S]. weights: Float[B, S], 0 where a token does not count; None counts all; or a function of the tokens' log-probabilities and
        entropies, both [B, S] without gradient, that gives weights and more metrics: so any loss whose derivative by the log-probabilities is known has its
        gradient. balance_scope: "microbatch" counts the load of
        these B sequences together, on all devices; "sequence" of each by itself; "global_batch" as "microbatch", and gives `Output.balance` besides.
        """
        check_known("balance_scope", balance_scope, BALANCE_SCOPES)
        scope, scales = self._scope(tokens, noise, draw, train, freeze)
        scope = dataclasses.replace(scope, balance=balance_scope)
        out, _ = self._features(params, tokens, scope, scales, capture, replay)
        more: dict[str, Any] = {}
        if callable(weights):
            weigh: Any = weights
            weights, more = weigh(*self._token_log_probs(params, out, targets, scope))
        weights = jnp.ones(targets.size, jnp.float32) if weights is None else weights.reshape(-1)

        def function(weights, flat, head, targets, operator, rows):
            return cross_entropy(flat, head, targets, weights, self.config.loss_chunk, self.config.loss_chunk_size, operator, rows)

        total, metrics = self._on_tokens(function, params, out, targets, scope, (weights,))
        return total, metrics | more, out

    def log_probs(
        self, params, tokens, targets, noise=None, draw=None, capture=(), replay=None, freeze=()
    ) -> tuple[Float[Array, "B S"], Float[Array, "B S"], Output]:
        """Of each token the log-probability of its target and the entropy of the next-token distribution, in nats, and the Output; the rest as for `apply`."""
        scope, scales = self._scope(tokens, noise, draw, False, freeze)
        out, _ = self._features(params, tokens, scope, scales, capture, replay)
        return *self._token_log_probs(params, out, targets, scope), out

    def _token_log_probs(self, params, out: Output, targets: Int[Array, "B S"], scope: Scope) -> Any:
        def function(flat, head, targets, operator, rows):
            return token_log_probs(flat, head, targets, self.config.loss_chunk_size, operator, rows)

        found = self._on_tokens(function, params, out, targets, scope, by_token=True)
        return tuple(part.reshape(targets.shape) for part in found)

    def _on_tokens(self, function, params, out: Output, targets, scope: Scope, more: tuple = (), by_token: bool = False) -> Any:
        """function(*more, hidden, head, targets, operator, rows) of all tokens in a row; on a mesh every device has some of them and all of the head."""
        flat, operator = out.hidden.reshape(-1, out.hidden.shape[-1]), scope.operator("lm_head")
        arrays = (*more, flat, self.head(params), targets.reshape(-1), operator, scope.tokens.reshape(-1))
        if scope.layout is not None:
            rows, whole = PartitionSpec(scope.layout.tokens or None), PartitionSpec()
            function = scope.layout.mapped(function, (*(rows,) * len(more), rows, whole, rows, whole, rows), rows if by_token else whole)
        with jax.named_scope("head"):
            return function(*arrays)

    def head(self, params) -> Float[Array, "V D"]:
        """The matrix that turns hidden states into logits."""
        return params["embedding"] if self.config.tie_embeddings else params["head"]

    def _output(self, hidden, router, capture) -> Output:
        if not router:
            return Output(hidden, None, None, None, {}, None, None)
        trace = None
        if "trace" in capture:
            trace = RoutingTrace(router["ids"], router["weights"], jnp.array(self.config.moe_layers, jnp.int32))
        layers = jnp.asarray(len(self.config.moe_layers), jnp.float32)
        aux = {name: (router[name].sum(), layers) for name in ("balance_loss", "z_loss")}
        each = {name: value for name, value in router.items() if name.startswith(("router/", "replay/"))}
        aux |= {name: (total.sum(), count.sum()) for name, (total, count) in each.items()}
        logits = router["logits"] if "router_logits" in capture else None
        kept = {name: router.get(name) for name in ("load", "residual_ids", "bias_load", "balance")}
        return Output(hidden, None, trace, logits, aux, router=each, **kept)

    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Name of each stack of layers -> the absolute layers that the leading axis of its parameters counts."""
        return {stack.name: stack.layers for segment in layer_plan(self.config) for stack in segment}

    def layers_of(self, role: str) -> dict[str, tuple[int, ...]]:
        """Path of each stacked parameter of a role -> the absolute layers that its leading axis counts."""
        stacks = self.stacks()
        found = {path: path.split("/")[0] for path, spec in paths.flatten(self.specs).items() if spec.role == role}
        return {path: stacks[name] for path, name in found.items() if name in stacks}

    def parameter_count(self) -> int:
        return sum(spec.size for spec in paths.flatten(self.specs).values())

    def active_parameter_count(self) -> int:
        """Parameters that work on one token: all but the experts it is not sent to."""
        idle = self.config.num_experts - self.config.experts_per_token
        experts = sum(spec.size for spec in paths.flatten(self.specs).values() if spec.role == "expert")
        return self.parameter_count() - (experts // self.config.num_experts * idle if self.config.num_experts else 0)

    def param_table(self) -> str:
        """Name, shape, logical axes and role of every parameter, aligned, with the totals."""
        rows = [
            (path, str(spec.shape), " ".join(spec.axes), spec.role, f"{spec.size:,}") for path, spec in paths.flatten(self.specs).items()
        ]
        rows = [("parameter", "shape", "axes", "role", "count"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"total {self.parameter_count():,}, active {self.active_parameter_count():,}"])


def check_ids(tokens: Int[Array | np.ndarray, "B S"], vocab_size: int) -> None:
    """ConfigError for ids that are no words, which the lookup would take for others. Where they are being traced they are not at hand, and pass."""
    if isinstance(tokens, Tracer) or not getattr(tokens, "is_fully_addressable", True) or not tokens.size:
        return
    host = np.asarray(tokens)  # numpy computes even while a program that holds these ids is being traced
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"token ids go from {low} to {high}, the model's vocabulary from 0 to {vocab_size - 1}; was another tokenizer meant?"
        )
