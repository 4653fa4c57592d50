"""Causal attention in blocks of queries, each against the keys it can see, with a derivative that computes the weights again.

As in FlashAttention (Dao et al. 2022) no [S, S] array is kept: the forward pass saves its output and each row's log-sum-exp. Dropout on the weights is
drawn by (token, head, key position), so the backward pass draws it again. S sequence, H heads, N head width, Q queries in a block, J keys it sees.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from moe_jax.dots import dot
from moe_jax.noise import draws
from moe_jax.platforms import platform

# queries at a time: few where a cache is to hold their scores, more where each block of them is a piece of a program that takes time to compile
BLOCKS = {"cpu": 128, "gpu": 512, "tpu": 512}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention(
    q: Float[Array, "B S H N"],
    k: Float[Array, "B S H N"],
    v: Float[Array, "B S H N"],
    key: UInt32[Array, "2"],
    rows: Int[Array, "B H S"],
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Array, "B S H N"]:
    """softmax(q k / sqrt(N)) v over keys j <= i, j > i - window; softmax in float32, products in the type of q with float32 sums.

    key, rows: the dropout's stream and its rows, global token * all heads + head. Logarithms, sums and draws are the same whatever the batch is split into.
    """
    return _forward(q, k, v, key, rows, window, dropout)[0]


def _forward(q, k, v, key, rows, window, dropout):
    def one_head(item):
        q, k, v, rows = item
        blocks = [_forward_block(q, k, v, key, rows, bounds, window, dropout) for bounds in _blocks(q.shape[0], window)]
        return tuple(jnp.concatenate(parts) for parts in zip(*blocks, strict=True))

    out, norm = _over_heads(one_head, (_split(q), _split(k), _split(v), rows.reshape(-1, q.shape[1])))
    out = _join(out, q)
    return out, (q, k, v, key, rows, out, norm)


def _forward_block(q, k, v, key, rows, bounds, window, dropout):
    """(output, log-sum-exp) of one block of queries."""
    first, begin, end = bounds
    scores = _scores(q[begin:end], k[first:end], bounds, window)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    kept = _drop(weights, key, rows, bounds, dropout).astype(v.dtype)
    return dot(kept, v[first:end], 1, 0) / total, (top + jnp.log(total))[:, 0]


def _backward(window, dropout, saved, d_out):
    q, k, v, key, rows, out, norm = saved

    def one_head(item):
        q, k, v, rows, out, d_out, norm = item
        through = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
        # the gradients of k and v as [N, S]: a product over both first axes lays its first operand out anew, and queries are smaller than scores
        d_q, d_k, d_v = [], jnp.zeros(k.shape[::-1], jnp.float32), jnp.zeros(v.shape[::-1], jnp.float32)
        for bounds in _blocks(q.shape[0], window):
            first, begin, end = bounds
            part = slice(begin, end)
            weights = jnp.exp(_scores(q[part], k[first:end], bounds, window) - norm[part, None])
            d_weights = _drop(dot(d_out[part], v[first:end], 1, 1), key, rows, bounds, dropout)
            d_scores = (weights * (d_weights - through[part, None]) * q.shape[-1] ** -0.5).astype(q.dtype)
            kept = _drop(weights, key, rows, bounds, dropout).astype(q.dtype)
            d_q.append(dot(d_scores, k[first:end], 1, 0))
            d_k = d_k.at[:, first:end].add(dot(q[part], d_scores, 0, 0))
            d_v = d_v.at[:, first:end].add(dot(d_out[part], kept, 0, 0))
        return jnp.concatenate(d_q), d_k.T, d_v.T

    items = (_split(q), _split(k), _split(v), rows.reshape(-1, q.shape[1]), _split(out), _split(d_out), norm)
    return *(_join(d, q) for d in _over_heads(one_head, items)), None, None


attention.defvjp(_forward, _backward)


def _blocks(length: int, window: int | None):
    """(first key, first query, end of both) of each block."""
    block = BLOCKS[platform()]
    for begin in range(0, length, block):
        yield 0 if window is None else max(0, begin - window + 1), begin, min(begin + block, length)


def _scores(q, k, bounds, window):
    """Scaled scores [Q, J], the largest negative number where a key is not seen (its exponential is exactly 0)."""
    first, begin, end = bounds
    distance = jnp.arange(begin, end)[:, None] - jnp.arange(first, end)[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return jnp.where(seen, dot(q, k, 1, 1) * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)


def _drop(values, key, rows, bounds, dropout):
    if not dropout:
        return values
    first, begin, end = bounds
    return values * draws.dropout_mask(key, rows[begin:end], end - first, dropout, (first, end))


def _over_heads(function, items):
    """A few heads at a time on a CPU, whose cache holds their blocks; all at once elsewhere."""
    return jax.lax.map(function, items, batch_size=4) if platform() == "cpu" else jax.vmap(function)(items)


def _split(x):
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _join(x, like):
    # heads are stacked in float32: XLA:CPU converts a whole bfloat16 stack for each part stored in it
    batch, length, heads, width = like.shape
    return x.reshape(batch, heads, length, width).transpose(0, 2, 1, 3).astype(like.dtype)
