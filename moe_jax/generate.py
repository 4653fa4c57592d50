"""Text out of a model: batched sampling with a key-value cache, one compiled step for each token of all sequences.

B sequences, P tokens of the longest prompt, N tokens to sample, V vocabulary, L MoE layers, K experts per token.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax import keys
from moe_jax.errors import ConfigError, Unsupported
from moe_jax.keys import Draw
from moe_jax.model import Model
from moe_jax.model.cache import Cache
from moe_jax.noise import Noise, NoiseSpec, draws
from moe_jax.routing import RoutingTrace, trace_dtype, unrecorded


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one at temperature 0, else by softmax(logits / temperature) among the likeliest."""

    max_tokens: int = 64  # N
    temperature: float = 0.0
    top_k: int | None = None  # among so many
    top_p: float | None = None  # among the fewest that have this probability together
    stop: tuple[int, ...] = ()  # tokens after which a sequence ends
    seed: int = 0

    def __post_init__(self):
        if self.max_tokens < 1 or not 0 <= self.temperature < np.inf:
            raise ConfigError(
                f"max_tokens must be at least 1 and temperature finite and not negative, got {self.max_tokens} and {self.temperature}"
            )
        if (self.top_k is not None and self.top_k < 1) or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise ConfigError(f"top_k must be at least 1 and top_p in (0, 1], got {self.top_k} and {self.top_p}")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"a sampling seed must be from 0 to 2**32 - 1, got {self.seed}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """What was sampled: arrays of jax inside a program, of NumPy from a `Sampler`."""

    tokens: Int[Array, "B P+N"]  # prompt and what follows; 0 behind the end
    prompt_lengths: Int[Array, "B"]
    lengths: Int[Array, "B"]  # with the prompt, and the token that ended it
    # of each sampled token, at its place, under softmax(logits / temperature) over all tokens (temperature 1 where it is 0); else 0
    log_probs: Float[Array, "B P+N"]
    stopped: Bool[Array, "B"]  # by a stop token, not by the limit
    trace: RoutingTrace | None  # [L, B, P+N, K]; no route is recorded for the last token of a sequence, which was never read, and behind it

    def sampled(self, row: int) -> np.ndarray:
        """The tokens after a sequence's prompt."""
        return np.asarray(self.tokens)[row, self.prompt_lengths[row] : self.lengths[row]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Between two steps."""

    cache: Cache
    token: Int[Array, "B"]  # the next to be read
    position: Int[Array, "B"]  # where it stands
    done: Bool[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The compiled functions for one model, kind of sampling and noise structure: make it once, call it often."""

    model: Model
    top_k: int | None = None
    trace: bool = False

    def __call__(
        self,
        params: dict[str, Any],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        noise: NoiseSpec | Noise | None = None,
        draw: Draw | None = None,
        room: int | None = None,
        progress: Callable[[int, int], None] = lambda step, unfinished: None,
    ) -> Generated:
        """Samples after each prompt, until its stop token or max_tokens.

        A sequence's tokens are a function of its prompt, its row and the seed: not of the other prompts' lengths, of when they end, or of the mesh. draw: of
        the noise; its phase is "rollout" unless it says another. room: tokens of the cache, by which draws of noise are numbered; None: P + N. progress: gets
        the steps done and the sequences that go on.
        Raises ConfigError for an empty prompt, ids that the vocabulary lacks, and more than max_seq_len tokens.
        """
        if jax.process_count() > 1:
            raise Unsupported(f"generation in a job of {jax.process_count()} processes is not supported; start one")
        tokens, lengths = _padded(prompts, self.model.config.vocab_size)
        (rows, width), count = tokens.shape, sampling.max_tokens
        cache = self.model.cache(rows, width + count if room is None else room)
        if cache.length < width + count:
            raise ConfigError(f"room for {cache.length} tokens is less than the {width} of a prompt and {count} to sample")
        resolved = self.model.config.resolve(noise) if isinstance(noise, NoiseSpec) else noise
        draw = Draw(phase="rollout") if draw is None else draw
        draw = dataclasses.replace(
            draw, **{name: np.uint32(int(getattr(draw, name)) & 0xFFFFFFFF) for name in ("seed", "step", "row_offset")}
        )
        how = (
            np.float32(sampling.temperature),
            np.float32(sampling.top_p or 1),
            np.array(sampling.stop, np.int32),
            np.uint32(sampling.seed),
        )
        common = (resolved, draw, how)
        state, found = self.prefill(params, jnp.asarray(tokens), jnp.asarray(lengths), cache, *common)
        steps, pending = [found], None
        for step in range(1, count):
            pending, before = found, pending
            unfinished = rows if before is None else int((~np.asarray(before[2])).sum())  # one step late, so that the device need not wait
            progress(step, unfinished)
            if not unfinished:
                break
            state, found = self.step(params, state, *common)
            steps.append(found)
        host = jax.device_get(steps)
        stacks = [np.stack(parts) for parts in zip(*map(kept, host), strict=True)]
        stacks = [np.concatenate([stack, np.zeros((count - len(host), *stack.shape[1:]), stack.dtype)]) for stack in stacks]
        return jax.device_get(assembled(self.model, tokens, lengths, state.done, stacks, host[0][-1]))

    @functools.cached_property
    def prefill(self):
        """`begin`, compiled."""
        return jax.jit(self.begin, donate_argnums=3)

    @functools.cached_property
    def step(self):
        """`go_on`, compiled."""
        return jax.jit(self.go_on, donate_argnums=1)

    def begin(self, params, tokens: Int[Array, "B P"], lengths: Int[Array, "B"], cache: Cache, noise, draw: Draw, how):
        """Reads the prompts: the state with each sequence's first token, and (token, log-probability, done, whether it counts, routes) of it.

        how: arrays (temperature, top_p, stop tokens, seed).
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        out, cache = self.model.decode(params, tokens, positions, cache, lengths - 1, noise, draw, self._capture)
        return self._chosen(out, cache, lengths, jnp.zeros(len(tokens), bool), draw, how)

    def go_on(self, params, state: State, noise, draw: Draw, how):
        """Reads the last token of each sequence and chooses the next; as `begin`."""
        out, cache = self.model.decode(
            params, state.token[:, None], state.position[:, None], state.cache, noise=noise, draw=draw, capture=self._capture
        )
        return self._chosen(out, cache, state.position + 1, state.done, draw, how)

    @property
    def _capture(self) -> tuple[str, ...]:
        return ("trace",) if self.trace and self.model.config.moe_layers else ()

    def _chosen(self, out, cache: Cache, position: Int[Array, "B"], done: Bool[Array, "B"], draw: Draw, how):
        """The state with the token that was chosen for `position`, and what is kept of this step: (token, log-probability, done, whether it counts, routes)."""
        temperature, top_p, stop, seed = how
        logits = out.logits[:, -1]
        scaled = logits / jnp.where(temperature > 0, temperature, 1)
        rows = (jnp.asarray(draw.row_offset, jnp.int32) + jnp.arange(len(logits))) * self.model.config.max_seq_len + position
        stream = keys.stream(keys.fold(jnp.array([0x13198A2E, 0x03707344], jnp.uint32), seed), -1, "sample", "forward")
        gumbel = -jnp.log(-jnp.log(draws.uniform(stream, rows, logits.shape[-1])))
        drawn = jnp.argmax(jnp.where(_allowed(scaled, self.top_k, top_p), scaled + gumbel, -jnp.inf), axis=-1)
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(scaled), token[:, None], 1)[:, 0]
        counts = ~done
        token = jnp.where(counts, token, 0)
        ended = done | (token[:, None] == stop).any(-1)
        routes = None if out.trace is None else (out.trace.ids, out.trace.weights)
        return State(cache, token, position, ended), (token, log_prob, ended, counts, routes)


def kept(found: tuple) -> tuple:
    """Of a step: token, log-probability, whether it counts [B], and the routes [L, B, K] of the token that was read."""
    token, log_prob, _, counts, routes = found
    return token, log_prob, counts, *(part[:, :, 0] for part in routes or ())


def assembled(model: Model, prompts, lengths, done, stacks, prompt_routes) -> Generated:
    """Every token, log-probability and route in its place. stacks: of each part of `kept`, [N, ...]; prompt_routes: of the first step, [L, B, P, K] or None.

    The routes of step n are of the token that it read, the one that step n - 1 chose; those of step 0 are not looked at.
    """
    token, log_prob, counts, *later_routes = map(jnp.asarray, stacks)
    (rows, width), count = prompts.shape, len(token)
    place = jnp.arange(width + count)[None]
    number = place - lengths[:, None]  # of the sampled token that stands here
    ends = lengths + counts.sum(0, dtype=jnp.int32)
    answered = (number >= 0) & (place < ends[:, None])

    def at(stack, number):
        """stack [N, B] at each place's number."""
        return jnp.take_along_axis(stack.T, jnp.clip(number, 0, count - 1), 1)

    def padded(x, axis: int):
        return jnp.pad(x, [(0, count if axis == each else 0) for each in range(x.ndim)])

    tokens = jnp.where(answered, at(token, number), jnp.where(number < 0, padded(prompts, 1), 0))
    log_probs = jnp.where(answered, at(log_prob, number), 0)
    trace = None
    if prompt_routes is not None:
        c = model.config
        every, number = jnp.arange(rows)[:, None], jnp.clip(number + 1, 0, count - 1)  # the step that read the token
        read = [stack.transpose(2, 0, 1, 3)[every, number].transpose(2, 0, 1, 3) for stack in later_routes]
        of_prompt, known = (place < lengths[:, None])[None, ..., None], (place < ends[:, None] - 1)[None, ..., None]
        routes = [jnp.where(of_prompt, padded(part, 2), later) for part, later in zip(prompt_routes, read, strict=True)]
        kind = trace_dtype(c.num_experts)
        ids = jnp.where(known, routes[0], unrecorded(kind)).astype(kind)
        trace = RoutingTrace(ids, jnp.where(known, routes[1], 0), jnp.array(c.moe_layers, jnp.int32))
    return Generated(tokens, lengths, ends, log_probs, done, trace)


def _allowed(scaled: Float[Array, "B V"], top_k: int | None, top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """Which tokens may be sampled; the likeliest always may."""
    kept = jnp.ones(scaled.shape, bool)
    if top_k is not None:
        kept &= scaled >= jax.lax.top_k(scaled, min(top_k, scaled.shape[-1]))[0][:, -1:]

    def nucleus(kept):
        ordered = jnp.sort(jnp.where(kept, scaled, -jnp.inf), axis=-1, descending=True)
        shares = jax.nn.softmax(ordered)
        inside = jnp.cumsum(shares, axis=-1) - shares < top_p  # what stands before a token is not enough
        return kept & (scaled >= jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True))

    return jax.lax.cond(top_p < 1, nucleus, lambda kept: kept, kept)


def _padded(prompts: Sequence[Sequence[int]], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, P] with zeros behind each prompt, and the lengths."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ConfigError(
            f"every prompt needs at least one token, got {len(prompts)} prompts of {[len(prompt) for prompt in prompts][:8]} tokens"
        )
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ConfigError(
            f"a prompt has the token {tokens.max() if tokens.max() >= vocabulary else tokens.min()}, the vocabulary is 0 to {vocabulary - 1}"
        )
    return tokens, lengths


def generate(
    model: Model, params: dict[str, Any], prompts: Sequence[Sequence[int]], sampling: Sampling = Sampling(), **how: Any
) -> Generated:
    """Samples once: `Sampler(model, sampling.top_k, trace)(params, prompts, sampling, …)`, which compiles; see there. trace: whether to return the routes."""
    return Sampler(model, sampling.top_k, how.pop("trace", False))(params, prompts, sampling, **how)
