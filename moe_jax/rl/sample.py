"""Answers to prompts, sampled in one compiled program that ends when all have ended, with the routes of the very forward passes that chose the tokens.

B answers, P tokens of the longest prompt, N tokens to sample, T = P + N, L MoE layers, K experts per token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.generate import Generated, Sampler, assembled, kept
from moe_jax.keys import Draw
from moe_jax.model import Model
from moe_jax.noise import Noise


def sample(
    model: Model,
    count: int,
    params: dict[str, Any],
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    noise: Noise | None,
    draw: Draw,
    how: Any,
) -> Generated:
    """Up to `count` tokens after each prompt. how: arrays (temperature, top_p, stop tokens, seed); temperature 0 takes the likeliest.

    A draw of noise is that of the same token in one pass of the model over all T positions.
    """
    sampler = Sampler(model, trace=bool(model.config.moe_layers))
    rows, width = tokens.shape

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

    _, state, steps = jax.lax.while_loop(more, one, (1, state, steps))
    return assembled(model, tokens, lengths, state.done, steps, first[-1])
