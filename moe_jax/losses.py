"""Losses as (sum, count): cross-entropy in chunks, balance and z losses of a router.

T tokens, D model width, V vocabulary, E experts, K experts chosen per token.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from moe_jax.dots import dot
from moe_jax.errors import Unsupported, check_known
from moe_jax.manual import total, vary_like
from moe_jax.platforms import platform
from moe_jax.products import matmul, partial_sums, product, sum_count, weight_gradient

NORMALISATIONS = ("assignments", "topk")
BALANCE_SCOPES = ("sequence", "microbatch", "global_batch")  # over which tokens a balance loss counts the load
BLOCK = 2048  # words at a time on a CPU, whose cache holds their logits


def cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Integer[Array, "T"],
    weights: Float[Array, "T"],
    chunk: str = "tokens",
    size: int = 2048,
    operator: Any = None,
    rows: Integer[Array, "T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, tuple[jax.Array, jax.Array]]]:
    """Sum over tokens of weights * (-log softmax(hidden head^T)[target]) in nats, and metrics.

    chunk: "tokens" takes `size` tokens at a time and makes the gradient in the forward pass, so that logits are computed once (it holds
    size * V numbers of hidden's type); "vocabulary" takes `size` words at a time and computes logits again in the backward pass (least
    memory); "none" holds all logits. Logits are float32 whatever the type of hidden. operator, rows: how the head's products are computed
    (moe_jax.products), which the chunks of the vocabulary do not offer, and the tokens' global numbers. The weights get no gradient.
    Metrics: loss (sum, count) and accuracy (sum, count), without gradient.
    """
    sizes = (hidden.shape[0], targets.shape[0], weights.shape[0])
    if len(set(sizes)) > 1:
        raise ValueError(f"hidden, targets and weights must hold the same tokens, got {sizes}")
    functions = {"tokens": _by_tokens, "vocabulary": _by_vocabulary, "none": _whole}
    check_known("loss chunk", chunk, functions)
    if operator is not None and chunk == "vocabulary":
        raise Unsupported("noise at lm_head needs the logits of all words at once; set loss_chunk to tokens or none")
    rows = jnp.arange(targets.shape[0]) if rows is None else rows
    loss, correct = functions[chunk](hidden, head, targets, jax.lax.stop_gradient(weights.astype(jnp.float32)), operator, rows, size)
    count = total(weights.sum(dtype=jnp.float32), head)
    stop = jax.lax.stop_gradient
    return loss, {"loss": (stop(loss), count), "accuracy": (stop(correct), count)}


def token_log_probs(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Integer[Array, "T"],
    size: int = 2048,
    operator: Any = None,
    rows: Integer[Array, "T"] | None = None,
) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
    """Of each token log softmax(hidden head^T)[target] and the entropy of that softmax, in nats; `size` tokens at a time. Gives no gradient.

    Its noise is that of `cross_entropy` with the same operator and rows: the sum of weights * log-probability has the gradient of cross_entropy with
    -weights.
    """
    hidden, head = jax.lax.stop_gradient((hidden, head))
    rows = jnp.arange(targets.shape[0]) if rows is None else rows

    def one_chunk(chunk):
        h, t, row = chunk
        log_p = jax.nn.log_softmax(matmul(h, head, operator, row, transposed=True))
        return jnp.take_along_axis(log_p, t[:, None], -1)[:, 0], -(jnp.exp(log_p) * log_p).sum(-1)

    found = jax.lax.map(one_chunk, tuple(_token_chunks((hidden, targets, rows), size)))
    log_probs, entropy = (part.reshape(-1)[: len(targets)] for part in found)
    return log_probs, entropy


def _whole(hidden, head, targets, weights, operator, rows, size=None):
    logits = matmul(hidden, head, operator, rows, transposed=True)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    # right when the target reaches the largest logit; exact ties count as right
    correct = (chosen >= logits.max(-1)).astype(jnp.float32)
    return _sums(head, weights * (jax.nn.logsumexp(logits, axis=-1) - chosen), weights * correct)


def _sums(head, *parts):
    """Each part's sum over its tokens; in a shard_map, over those of all devices that share the head."""
    return tuple(total(part.sum(), head) for part in parts)


def _blocks(head, size):
    """The head as [blocks, words, D] with at most `size` words in each, padded with zeros."""
    words, width = head.shape
    count = -(-words // size)
    length = -(-words // count)
    return jnp.pad(head, ((0, count * length - words), (0, 0))).reshape(count, length, width)


# --- chunks of tokens -------------------------------------------------------------------------------------------------------------


def _token_chunks(arrays, size):
    """Each [T, ...] array as [chunks, size, ...], padded with zeros (a padded token has weight 0)."""
    count = arrays[0].shape[0]
    size = min(size, count)
    chunks = -(-count // size)
    pad = chunks * size - count
    return [jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(chunks, size, *a.shape[1:]) for a in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _by_tokens(hidden, head, targets, weights, operator, rows, size):
    words, blocks = head.shape[0], _blocks(head, _block_size(head, operator))

    def one_chunk(chunk):
        h, t, w, row = chunk
        return _loss(*_sweep(h, blocks, words, t, operator, row)[0], w)

    return _sums(head, *jax.lax.map(one_chunk, tuple(_token_chunks((hidden, targets, weights, rows), size))))


def _block_size(head, operator) -> int:
    """Words at a time: few on a CPU, whose cache holds their logits; all where a row's noise depends on the whole row."""
    parts = operator is None or operator.elementwise
    return BLOCK if parts and platform() == "cpu" else head.shape[0]


def _sweep(h, blocks, words: int, t, operator, row, kept=None) -> tuple[tuple[Any, Any, Any], Any]:
    """((top, summed, chosen) of each token's logits, stacks): a running maximum and sum over blocks of words, as in FlashAttention (Dao et al. 2022).

    stacks: with a type `kept`, each block's exponentials in it and the maximum that was subtracted.
    """
    length = blocks.shape[1]

    def one_block(carry, item):
        (top, summed, chosen), (index, matrix) = carry, item
        first = index * length
        logits = product(
            operator, "forward", row, h, matrix.astype(h.dtype), lambda a, b: dot(a, b, 1, 1), axis=-1, part=(first, len(blocks) * length)
        )
        if words % length:
            logits = jnp.where(first + jnp.arange(length) < words, logits, -jnp.inf)
        chosen = jnp.where(t // length == index, jnp.take_along_axis(logits, (t % length)[:, None], 1)[:, 0], chosen)
        high = jnp.maximum(top, logits.max(-1))
        exp = jnp.exp(logits - high[:, None])
        summed = summed * jnp.exp(top - high) + exp.sum(-1)
        return (high, summed, chosen), None if kept is None else (jax.lax.bitcast_convert_type(exp.astype(h.dtype), kept), high)

    zero = vary_like(jnp.zeros(t.shape, jnp.float32), h, t)
    return jax.lax.scan(one_block, (zero - jnp.inf, zero, zero), (jnp.arange(len(blocks)), blocks))


def _loss(top, summed, chosen, w):
    return (w * (jnp.log(summed) + top - chosen)).sum(), (w * (chosen >= top)).sum()


def _by_tokens_forward(hidden, head, targets, weights, operator, rows, size):
    words, blocks = head.shape[0], _blocks(head, _block_size(head, operator))
    length, width = blocks.shape[1:]
    inside, after = (operator, None) if len(blocks) == 1 else (None, operator)  # dX has its error where it is whole
    kept = jnp.uint16 if hidden.dtype.itemsize == 2 else hidden.dtype  # XLA:CPU converts a whole bfloat16 stack for each part stored in it

    def one_chunk(sums, chunk):
        h, t, w, row = chunk
        (top, summed, chosen), stacks = _sweep(h, blocks, words, t, operator, row, kept)

        def one_block(dh, item):
            index, matrix, sums, exp, high = item
            exp = jax.lax.bitcast_convert_type(exp, h.dtype).astype(jnp.float32)
            d_target = w * (jnp.exp(chosen - top) / summed - 1.0)
            others = exp * (w / summed * jnp.exp(high - top))[:, None]
            dlogits = jnp.where(index * length + jnp.arange(length) == t[:, None], d_target[:, None], others).astype(h.dtype)
            dh = dh + product(inside, "grad_input", row, dlogits, matrix.astype(h.dtype), lambda a, b: dot(a, b, 1, 0), axis=-1)
            return dh, jax.tree.map(jnp.add, sums, partial_sums(operator, h, dlogits, lambda a, b: dot(a, b, 0, 0)))

        dh, sums = jax.lax.scan(one_block, vary_like(jnp.zeros(h.shape, jnp.float32), h), (jnp.arange(len(blocks)), blocks, sums, *stacks))
        dh = product(after, "grad_input", row, h, None, lambda *_: dh)
        return sums, (*_loss(top, summed, chosen, w), dh.astype(h.dtype))

    chunks = tuple(_token_chunks((hidden, targets, weights, rows), size))
    empty = (vary_like(jnp.zeros((len(blocks), width, length), jnp.float32), hidden),) * sum_count(operator)
    sums, (losses, correct, dh) = jax.lax.scan(one_chunk, empty, chunks)
    dhead = weight_gradient(operator, tuple(part.transpose(0, 2, 1).reshape(-1, width)[:words] for part in sums), head)
    return _sums(head, losses, correct), (dh.reshape(-1, width)[: len(targets)], dhead.astype(head.dtype))


def _by_tokens_backward(size, saved, cotangents):
    dh, dhead = saved
    scale = cotangents[0]
    return (scale * dh).astype(dh.dtype), (scale * dhead).astype(dhead.dtype), None, None, None, None


_by_tokens.defvjp(_by_tokens_forward, _by_tokens_backward)


# --- chunks of the vocabulary -----------------------------------------------------------------------------------------------------


def _by_vocabulary(hidden, head, targets, weights, operator, rows, size):
    """A running log-sum-exp over chunks of words; each chunk's logits are computed again in the backward pass."""
    words, blocks = head.shape[0], _blocks(head, size)

    @jax.checkpoint
    def one_chunk(carry, block):
        top, whole, chosen, best = carry
        index, matrix = block
        word = index * len(matrix) + jnp.arange(len(matrix))
        logits = jnp.where(word < words, matmul(hidden, matrix, transposed=True), -jnp.inf)
        high = jax.lax.stop_gradient(jnp.maximum(top, logits.max(-1)))
        whole = whole * jnp.exp(top - high) + jnp.exp(logits - high[:, None]).sum(-1)
        chosen = chosen + jnp.where(word == targets[:, None], logits, 0.0).sum(-1)
        return (high, whole, chosen, jnp.maximum(best, jax.lax.stop_gradient(logits.max(-1)))), None

    low, zero = (vary_like(jnp.full(targets.shape, value), hidden, targets) for value in (jnp.finfo(jnp.float32).min, jnp.float32(0)))
    (top, whole, chosen, best), _ = jax.lax.scan(one_chunk, (low, zero, zero, low), (jnp.arange(len(blocks)), blocks))
    losses = jnp.log(whole) + top - chosen
    return _sums(head, weights * losses, weights * (chosen >= best))


# --- the router's losses ----------------------------------------------------------------------------------------------------------


def balance_loss(
    logits: Float[Array, "T E"], ids: Integer[Array, "T K"], score: str = "softmax", normalisation: str = "assignments", sequences: int = 1
) -> Float[Array, ""]:
    """E * sum_e f_e P_e of one layer (Fedus et al. 2021, eq. 4-6): f_e the share of the T*K assignments, P_e the mean score; 1 at balance.

    normalisation="topk" counts f per token, as Hugging Face and MaxText do, and is K at balance: the value times K. No gradient passes
    through f. score="sigmoid" takes each token's sigmoid scores divided by their sum. sequences: the tokens are so many sequences, each with a loss of
    its own, of which this is the mean.
    """
    check_known("normalisation", normalisation, NORMALISATIONS)
    if sequences > 1:
        cut = (x.reshape(sequences, -1, x.shape[-1]) for x in (logits, ids))
        return jax.vmap(lambda logits, ids: balance_loss(logits, ids, score, normalisation))(*cut).mean()
    counts, scores = balance_parts(logits, ids, score)
    share = counts / (ids.size if normalisation == "assignments" else ids.shape[0])
    return logits.shape[-1] * (share * scores).sum()


def balance_parts(logits: Float[Array, "T E"], ids: Integer[Array, "T K"], score: str = "softmax") -> tuple[jax.Array, jax.Array]:
    """(assignments of each expert [E], its mean score P [E], through which gradients pass): what a balance loss is made of."""
    experts = logits.shape[-1]
    counts = (ids[..., None] == jnp.arange(experts)).sum((0, 1), dtype=jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if score == "softmax" else jax.nn.sigmoid(logits)
    return counts, (scores if score == "softmax" else scores / scores.sum(-1, keepdims=True)).mean(0)


def balance_of(counts: Float[Array, "... E"], scores: Float[Array, "... E"]) -> Float[Array, "..."]:
    """E * sum_e f_e P_e from counts, perhaps of more tokens than the scores are of; 0 without any."""
    return counts.shape[-1] * (counts / jnp.maximum(counts.sum(-1, keepdims=True), 1) * scores).sum(-1)


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
