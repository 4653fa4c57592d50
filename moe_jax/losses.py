"""Losses as (sum, count): cross-entropy in chunks, balance and z losses of a router.

T tokens, D model width, V vocabulary, E experts, K experts chosen per token.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dots import dot

NORMALISATIONS = ("assignments", "topk")


def cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "T"],
    weights: Float[Array, "T"],
    chunk: str = "tokens",
    size: int = 512,
) -> tuple[Float[Array, ""], dict[str, tuple[jax.Array, jax.Array]]]:
    """Sum over tokens of weights * (-log softmax(hidden head^T)[target]) in nats, and metrics.

    chunk: "tokens" takes `size` tokens at a time and makes the gradient in the forward pass, so that logits are computed once and never
    kept; "vocabulary" takes `size` words at a time and computes logits again in the backward pass (least memory); "none" holds all
    logits. Logits are float32 whatever the type of hidden. The weights get no gradient. Metrics: loss (sum, count) and accuracy (sum, count), without gradient.
    """
    sizes = (hidden.shape[0], targets.shape[0], weights.shape[0])
    if len(set(sizes)) > 1:
        raise ValueError(f"hidden, targets and weights must hold the same tokens, got {sizes}")
    functions = {"tokens": _by_tokens, "vocabulary": _by_vocabulary, "none": _whole}
    if chunk not in functions:
        raise ValueError(f"unknown loss chunk {chunk!r}; known: {', '.join(functions)}")
    loss, correct = functions[chunk](hidden, head, targets, jax.lax.stop_gradient(weights.astype(jnp.float32)), size)
    count = weights.sum(dtype=jnp.float32)
    stop = jax.lax.stop_gradient
    return loss, {"loss": (stop(loss), count), "accuracy": (stop(correct), count)}


def _logits(hidden, head):
    """Float32 logits; the head is rounded to the hidden's type, sums are float32."""
    return dot(hidden, head.astype(hidden.dtype), 1, 1)


def _whole(hidden, head, targets, weights, size):
    logits = _logits(hidden, head)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    # right when the target reaches the largest logit; exact ties count as right
    correct = (chosen >= logits.max(-1)).astype(jnp.float32)
    return (weights * (jax.nn.logsumexp(logits, axis=-1) - chosen)).sum(), (weights * correct).sum()


# --- chunks of tokens -------------------------------------------------------------------------------------------------------------


def _token_chunks(arrays, size):
    """Each [T, ...] array as [chunks, size, ...], padded with zeros (a padded token has weight 0)."""
    count = arrays[0].shape[0]
    size = min(size, count)
    chunks = -(-count // size)
    pad = chunks * size - count
    return [jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(chunks, size, *a.shape[1:]) for a in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_tokens(hidden, head, targets, weights, size):
    sums = jax.lax.map(lambda c: _whole(c[0], head, c[1], c[2], size), tuple(_token_chunks((hidden, targets, weights), size)))
    return sums[0].sum(), sums[1].sum()


def _by_tokens_forward(hidden, head, targets, weights, size):
    def one_chunk(dhead, chunk):
        h, t, w = chunk
        logits = _logits(h, head)
        top = logits.max(axis=-1, keepdims=True)
        exp = jnp.exp(logits - top)
        total = exp.sum(-1, keepdims=True)
        word = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        chosen = jnp.where(word == t[:, None], logits, 0.0).sum(-1)
        losses = jnp.log(total[:, 0]) + top[:, 0] - chosen
        dlogits = (exp * (w[:, None] / total) - jnp.where(word == t[:, None], w[:, None], 0.0)).astype(h.dtype)
        dh = dot(dlogits, head.astype(h.dtype), 1, 0)
        dhead += dot(h, dlogits, 0, 0)
        correct = (chosen >= top[:, 0]).astype(jnp.float32)
        return dhead, ((w * losses).sum(), (w * correct).sum(), dh.astype(h.dtype))

    dhead, (losses, correct, dh) = jax.lax.scan(
        one_chunk, jnp.zeros(head.shape[::-1], jnp.float32), tuple(_token_chunks((hidden, targets, weights), size))
    )
    dh = dh.reshape(-1, hidden.shape[-1])[: hidden.shape[0]]
    return (losses.sum(), correct.sum()), (dh, dhead.T.astype(head.dtype))


def _by_tokens_backward(size, saved, cotangents):
    dh, dhead = saved
    scale = cotangents[0]
    return (scale * dh).astype(dh.dtype), (scale * dhead).astype(dhead.dtype), None, None


_by_tokens.defvjp(_by_tokens_forward, _by_tokens_backward)


# --- chunks of the vocabulary -----------------------------------------------------------------------------------------------------


def _by_vocabulary(hidden, head, targets, weights, size):
    """A running log-sum-exp over chunks of words; each chunk's logits are computed again in the backward pass."""
    words, width = head.shape
    chunks = -(-words // size)
    blocks = jnp.pad(head, ((0, chunks * size - words), (0, 0))).reshape(chunks, size, width)

    @jax.checkpoint
    def one_chunk(carry, block):
        top, total, chosen, best = carry
        index, matrix = block
        logits = _logits(hidden, matrix)
        word = index * size + jnp.arange(size)
        logits = jnp.where(word < words, logits, -jnp.inf)
        high = jax.lax.stop_gradient(jnp.maximum(top, logits.max(-1)))
        total = total * jnp.exp(top - high) + jnp.exp(logits - high[:, None]).sum(-1)
        chosen = chosen + jnp.where(word == targets[:, None], logits, 0.0).sum(-1)
        return (high, total, chosen, jnp.maximum(best, jax.lax.stop_gradient(logits.max(-1)))), None

    low = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
    zero = jnp.zeros(targets.shape, jnp.float32)
    (top, total, chosen, best), _ = jax.lax.scan(one_chunk, (low, zero, zero, low), (jnp.arange(chunks), blocks))
    losses = jnp.log(total) + top - chosen
    return (weights * losses).sum(), (weights * (chosen >= best)).sum()


# --- the router's losses ----------------------------------------------------------------------------------------------------------


def balance_loss(
    logits: Float[Array, "T E"], ids: Int[Array, "T K"], score: str = "softmax", normalisation: str = "assignments"
) -> Float[Array, ""]:
    """E * sum_e f_e P_e of one layer (Fedus et al. 2021, eq. 4-6): f_e the share of the T*K assignments, P_e the mean score; 1 at balance.

    normalisation="topk" counts f per token, as Hugging Face and MaxText do, and is K at balance: the value times K. No gradient passes
    through f. score="sigmoid" takes each token's sigmoid scores divided by their sum.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"unknown normalisation {normalisation!r}; known: {', '.join(NORMALISATIONS)}")
    experts = logits.shape[-1]
    counts = (ids[..., None] == jnp.arange(experts)).sum((0, 1), dtype=jnp.float32)
    share = counts / (ids.size if normalisation == "assignments" else ids.shape[0])
    if score == "softmax":
        mean_score = jax.nn.softmax(logits, axis=-1).mean(0)
    else:
        sigmoid = jax.nn.sigmoid(logits)
        mean_score = (sigmoid / sigmoid.sum(-1, keepdims=True)).mean(0)
    return experts * (share * mean_score).sum()


def convert_balance_weight(weight: float, k: int, source: str, target: str) -> float:
    """The coefficient under `target` normalisation that presses as hard as `weight` does under `source`."""
    factor = {"assignments": 1.0, "topk": float(k)}
    return weight * factor[source] / factor[target]


def z_loss(logits: Float[Array, "T E"]) -> Float[Array, ""]:
    """Mean over tokens of logsumexp(logits)^2 of one layer (Zoph et al. 2022, eq. 5)."""
    return jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean()


def load_cv_squared(load: Float[Array, "E"]) -> Float[Array, ""]:
    """Variance over squared mean of a load (Shazeer et al. 2017), whose gradient at exact balance is finite, unlike that of the CV."""
    return load.var() / jnp.square(load.mean())
