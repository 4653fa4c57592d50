"""Answers to prompts, sampled in one compiled program that ends when all have ended, with the routes of the very forward passes that chose the tokens.

B answers, P tokens of the longest prompt, N tokens to sample, T = P + N, L MoE layers, K experts per token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.generate import Sampler
from moe_jax.keys import Draw
from moe_jax.model import Model
from moe_jax.noise import Noise
from moe_jax.routing import RoutingTrace, trace_dtype, unrecorded


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("tokens", "prompt_lengths", "lengths", "log_probs", "stopped", "trace"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Answers:
    """What was sampled."""

    tokens: Int[Array, "B T"]  # prompt and answer; 0 behind the end
    prompt_lengths: Int[Array, "B"]
    lengths: Int[Array, "B"]  # with the prompt, and the token that ended it
    log_probs: Float[Array, "B T"]  # of each sampled token, at its place; else 0
    stopped: Array  # Bool[B]: by a stop token, not by the limit
    trace: RoutingTrace | None  # [L, B, T, K]; none recorded for the last token of an answer, which was never read, and behind it


def sample(
    model: Model,
    count: int,
    params: dict[str, Any],
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    noise: Noise | None,
    draw: Draw,
    how: Any,
) -> Answers:
    """Up to `count` tokens after each prompt. how: arrays (temperature, top_p, stop tokens, seed); temperature 0 takes the likeliest.

    A draw of noise is that of the same token in one pass of the model over all T positions.
    """
    sampler = Sampler(model, trace=bool(model.config.moe_layers))
    rows, width = tokens.shape
    state, first = sampler.begin(params, tokens, lengths, model.cache(rows, width + count), noise, draw, how)
    token, log_prob, _, counts, found = first
    prompt_routes: Any = found
    now = [jnp.zeros((count, *part.shape), part.dtype) for part in (token, log_prob, counts)]
    steps = _Steps(now[0], now[1], now[2], ())
    if prompt_routes is not None:
        steps = dataclasses.replace(steps, routes=tuple(jnp.zeros((count, *x.shape[:2], x.shape[-1]), x.dtype) for x in prompt_routes))
    none = tuple(stack[0] for stack in steps.routes)
    steps = steps.put(0, _Steps(token, log_prob, counts, none))

    def more(carry):
        number, state, _ = carry
        return (number < count) & ~state.done.all()

    def one(carry):
        number, state, steps = carry
        state, (token, log_prob, _, counts, found) = sampler.go_on(params, state, noise, draw, how)
        routes: Any = found or ()
        found = _Steps(token, log_prob, counts, tuple(part[:, :, 0] for part in routes))
        return number + 1, state, steps.put(number, found)

    # the routes of step n are of the token that it read, the one that step n - 1 chose
    _, state, steps = jax.lax.while_loop(more, one, (1, state, steps))
    return _assembled(model, tokens, lengths, state.done, steps, prompt_routes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("token", "log_prob", "counts", "routes"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class _Steps:
    """[N, B, …] of each step; routes [N, L, B, K]."""

    token: Array
    log_prob: Array
    counts: Array
    routes: tuple[Any, ...]

    def put(self, number: Any, one: "_Steps") -> "_Steps":
        """These with step `number` in its place."""
        return jax.tree.map(lambda every, part: jax.lax.dynamic_update_index_in_dim(every, part, number, 0), self, one)


def _assembled(model: Model, prompts, lengths, done, steps: _Steps, prompt_routes) -> Answers:
    rows, width = prompts.shape
    count = len(steps.token)
    place = jnp.arange(width + count)[None]
    number = place - lengths[:, None]  # of the sampled token that stands here
    ends = lengths + steps.counts.sum(0, dtype=jnp.int32)
    answered = (number >= 0) & (place < ends[:, None])

    def at(stack, number):
        """stack [N, B] at each place's number."""
        return jnp.take_along_axis(stack.T, jnp.clip(number, 0, count - 1), 1)

    def padded(x, axis: int):
        return jnp.pad(x, [(0, count if axis == each else 0) for each in range(x.ndim)])

    tokens = jnp.where(answered, at(steps.token, number), jnp.where(number < 0, padded(prompts, 1), 0))
    log_probs = jnp.where(answered, at(steps.log_prob, number), 0)
    trace = None
    if prompt_routes is not None:
        c = model.config
        every, number = jnp.arange(rows)[:, None], jnp.clip(number + 1, 0, count - 1)  # the step that read the token
        read = [stack.transpose(2, 0, 1, 3)[every, number].transpose(2, 0, 1, 3) for stack in steps.routes]
        of_prompt, known = (place < lengths[:, None])[None, ..., None], (place < ends[:, None] - 1)[None, ..., None]
        routes = [jnp.where(of_prompt, padded(part, 2), later) for part, later in zip(prompt_routes, read, strict=True)]
        kind = trace_dtype(c.num_experts)
        ids = jnp.where(known, routes[0], unrecorded(kind)).astype(kind)
        trace = RoutingTrace(ids, jnp.where(known, routes[1], 0), jnp.array(c.moe_layers, jnp.int32))
    return Answers(tokens, lengths, ends, log_probs, done, trace)
