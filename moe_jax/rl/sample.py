"""Answers to prompts, sampled in one compiled program that ends when all have ended, with the routes of the very forward passes that chose the tokens.

B answers, P tokens of the longest prompt, N tokens to sample, T = P + N, L MoE layers, K experts per token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.generate import Sampler
from moe_jax.keys import Draw
from moe_jax.model import Model
from moe_jax.noise import Noise
from moe_jax.routing import RoutingTrace, trace_dtype, unrecorded


@jax.tree_util.register_dataclass
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

    def kept(found):
        """Token, log-probability, whether it counts [B], and the routes [L, B, K] of the token that was read."""
        token, log_prob, _, counts, routes = found
        return token, log_prob, counts, *(part[:, :, 0] for part in routes or ())

    def put(steps, number, found):
        return tuple(jax.lax.dynamic_update_index_in_dim(every, part, number, 0) for every, part in zip(steps, kept(found), strict=True))

    state, first = sampler.begin(params, tokens, lengths, model.cache(rows, width + count), noise, draw, how)
    steps = put([jnp.zeros((count, *part.shape), part.dtype) for part in kept(first)], 0, first)

    def more(carry):
        number, state, _ = carry
        return (number < count) & ~state.done.all()

    def one(carry):
        number, state, steps = carry
        state, found = sampler.go_on(params, state, noise, draw, how)
        return number + 1, state, put(steps, number, found)

    # the routes of step n are of the token that it read, the one that step n - 1 chose; those of step 0 are not looked at
    _, state, steps = jax.lax.while_loop(more, one, (1, state, steps))
    return _assembled(model, tokens, lengths, state.done, steps, first[-1])


def _assembled(model: Model, prompts, lengths, done, steps, prompt_routes) -> Answers:
    token, log_prob, counts, *later_routes = steps
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
    return Answers(tokens, lengths, ends, log_probs, done, trace)
