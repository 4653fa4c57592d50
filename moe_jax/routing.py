"""Routing as pure steps on arrays: logits, which experts, and with what weights. It knows no noise, no mesh and no dispatch.

T tokens, D model width, E experts, K experts chosen per token.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from moe_jax.errors import check_known

SCORES = ("softmax", "sigmoid")
MOST_EXPERTS = 65_535  # so many ids, and the mark of no route, are what a uint16 holds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingDecision:
    """What dispatch receives: for each token its K experts and their weights."""

    ids: Integer[Array, "T K"]  # 0..E-1, in descending score
    weights: Float[Array, "T K"]  # float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingTrace:
    """The decisions of all MoE layers in global batch order; ids in the narrowest unsigned type, whose largest value means "not recorded"."""

    ids: Integer[Array | np.ndarray, "L B S K"]  # uint8 up to 255 experts, uint16 above
    weights: Float[Array | np.ndarray, "L B S K"] | None  # float32; None where only ids were recorded
    layer_index: Integer[Array | np.ndarray, "L"]  # absolute layer in the model, dense layers counted

    @property
    def valid(self):
        """Bool[L, B, S]: which rows hold a recorded route."""
        return self.ids[..., 0] != unrecorded(self.ids.dtype)


def trace_dtype(num_experts: int) -> jnp.dtype:
    """The narrowest unsigned type that holds num_experts + 1 values."""
    return jnp.dtype(jnp.uint8 if num_experts <= 255 else jnp.uint16)


def unrecorded(dtype) -> int:
    """The id that means "no recorded route here": the type's largest value, never 0, which is an expert."""
    return int(jnp.iinfo(dtype).max)


def router_logits(x: Float[Array, "T D"], w: Float[Array, "D E"], dot=None) -> Float[Array, "T E"]:
    """The gate's output, always float32: inputs and weights are cast up and multiplied at full precision (a TPU or GPU would round them otherwise)."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST) if dot is None else dot(x, w)


def select(
    logits: Float[Array, "T E"],
    k: int,
    replay_ids: Integer[Array, "T K"] | None = None,
    bias: Float[Array, "E"] | None = None,
    top_k: Callable = jax.lax.top_k,
) -> Integer[Array, "T K"]:
    """The k experts of each token, in descending score; a tie goes to the lower expert id. No gradient passes.

    replay_ids: recorded experts, returned as they are. bias: selection bias [E], added to the scores here and nowhere else (DeepSeek-V3,
    2.1.2). top_k: as jax.lax.top_k, for rows that are divided over devices. Raises ValueError when k exceeds the number of experts.
    """
    experts = logits.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"cannot choose {k} of {experts} experts; experts_per_token must be between 1 and {experts}")
    if replay_ids is not None:
        if replay_ids.shape != (*logits.shape[:-1], k):
            raise ValueError(
                f"replay_ids have shape {replay_ids.shape}; {k} experts for logits {logits.shape} need {(*logits.shape[:-1], k)}"
            )
        return replay_ids.astype(jnp.int32)
    return top_k(jax.lax.stop_gradient(ranked(logits, bias)), k)[1]


def ranked(logits: Float[Array, "T E"], bias: Float[Array, "E"] | None = None) -> Float[Array, "T E"]:
    """What selection orders experts by: the logits, or with a selection bias sigmoid(logits) + bias."""
    return logits if bias is None else jax.nn.sigmoid(logits) + bias


def combine(
    logits: Float[Array, "T E"], ids: Integer[Array, "T K"], score: str = "softmax", renormalise: bool = True
) -> Float[Array, "T K"]:
    """The weight of each chosen expert, float32, gathered from the dense logits so that the router always has a gradient.

    softmax, renormalise=True: softmax over the K chosen logits (Mixtral, Qwen3 norm_topk_prob), which equals softmax over E, gather,
    divide by their sum. softmax, renormalise=False: softmax over E, gather (OLMoE). sigmoid: sigmoid, gather, and divide by their sum if
    renormalise (DeepSeek-V3).
    """
    check_known("score", score, SCORES)
    if score == "sigmoid":
        chosen = jnp.take_along_axis(jax.nn.sigmoid(logits), ids, axis=-1)
        # 1e-20 as in DeepSeek's code: scores that all underflow give weights of 0, not nan
        return chosen / (chosen.sum(-1, keepdims=True) + 1e-20) if renormalise else chosen
    if renormalise:
        return jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)
    return jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), ids, axis=-1)


def expert_load(ids: Integer[Array, "T K"], num_experts: int, weights: Float[Array, "T"] | None = None) -> Float[Array, "E"]:
    """How many of the T*K assignments go to each expert, float32 (exact up to 2**24 of them); a token with weight 0 does not count."""
    hits = ids[..., None] == jnp.arange(num_experts, dtype=ids.dtype)
    return (hits if weights is None else hits * weights[:, None, None]).sum((0, 1), dtype=jnp.float32)
