"""Causal self-attention with rotary positions, grouped key-value heads, optional q/k norms, biases and a sliding window.

B batch, S sequence (Q queries, K keys), D model width, H heads, G key-value heads, N head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_jax.model.config import ModelConfig
from moe_jax.model.layers import RMSNorm, Scope, bias, linear, rotate, weight
from moe_jax.noise import draws

WEIGHTS_AT_ONCE = 1 << 21  # elements of attention weights computed together, 8 MB in float32


def causal_mask(size: int, window: int | None) -> Bool[Array, "Q K"]:
    """True where query q may see key k: k <= q, and k > q - window."""
    distance = jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def attend(q: Float[Array, "B S H N"], k: Float[Array, "B S G N"], v: Float[Array, "B S G N"], window: int | None, scope: Scope):
    """softmax(q k / sqrt(N)) v over the visible keys, softmax in float32, with dropout on the weights; returns [B, S, H, N].

    With dropout there is no fused kernel: so many examples at a time that their [H, S, S] weights stay near a CPU's cache.
    """
    if not scope.dropout:
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
    heads, groups = q.shape[2], k.shape[2]
    mask = causal_mask(q.shape[1], window)
    key = scope.stream("dropout_attention")

    def one_example(example):
        q, k, v, tokens = example
        q = q.reshape(q.shape[0], groups, heads // groups, -1)
        scores = jnp.einsum("qgrn,kgn->grqk", q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        rows = (tokens[None, :] * heads + jnp.arange(heads)[:, None]).reshape(-1)
        kept = draws.dropout_mask(key, rows, mask.shape[1], scope.dropout).reshape(weights.shape)
        out = jnp.einsum("grqk,kgn->qgrn", (weights * kept).astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out.reshape(out.shape[0], heads, -1).astype(v.dtype)

    together = max(1, WEIGHTS_AT_ONCE // (heads * mask.size))
    if together >= q.shape[0]:
        return jax.vmap(one_example)((q, k, v, scope.tokens))
    return jax.lax.map(one_example, (q, k, v, scope.tokens), batch_size=together if together > 1 else None)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.config = config
        width, query, key = config.d_model, config.num_heads * config.head_width, config.kv_heads * config.head_width
        if config.fused_qkv:
            self.qkv = weight(config, (width, query + 2 * key), ("embed", "heads"))
        else:
            self.q = weight(config, (width, query), ("embed", "heads"))
            self.k = weight(config, (width, key), ("embed", "kv_heads"))
            self.v = weight(config, (width, key), ("embed", "kv_heads"))
        if config.attention_bias:
            self.q_bias = bias(config, query, "heads")
            self.k_bias = bias(config, key, "kv_heads")
            self.v_bias = bias(config, key, "kv_heads")
        self.o = weight(config, (query, width), ("heads", "embed"))
        if config.output_bias:
            self.o_bias = bias(config, width, "embed")
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(config, config.head_width if per_head else query, "head_dim" if per_head else "heads")
            self.k_norm = RMSNorm(config, config.head_width if per_head else key, "head_dim" if per_head else "kv_heads")

    def __call__(self, x: Float[Array, "B S D"], positions, scope: Scope) -> Float[Array, "B S D"]:
        c = self.config
        q, k, v = self._project(x)
        if c.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:2], -1, c.head_width) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(y, positions, c.rope_theta, c.rope_style) for y in (q, k))
        out = attend(q, k, v, c.sliding_window, scope)
        out = linear(out.reshape(*out.shape[:2], -1), self.o[...])
        return out + self.o_bias[...].astype(out.dtype) if c.output_bias else out

    def _project(self, x):
        c = self.config
        if c.fused_qkv:
            query, key = c.num_heads * c.head_width, c.kv_heads * c.head_width
            parts = jnp.split(linear(x, self.qkv[...]), (query, query + key), axis=-1)
        else:
            parts = [linear(x, w[...]) for w in (self.q, self.k, self.v)]
        if c.attention_bias:
            parts = [y + b[...].astype(y.dtype) for y, b in zip(parts, (self.q_bias, self.k_bias, self.v_bias), strict=True)]
        return parts
