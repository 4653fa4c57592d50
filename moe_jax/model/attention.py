"""Causal self-attention with rotary positions, grouped key-value heads, optional q/k norms, biases and a sliding window.

B batch, S sequence, D model width, H heads, G key-value heads, N head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moe_jax.model import blockwise
from moe_jax.model.cache import Cache
from moe_jax.model.config import ModelConfig
from moe_jax.model.layers import RMSNorm, Scope, bias, linear, rotate, weight
from moe_jax.platforms import platform


def attend(q: Float[Array, "B S H N"], k: Float[Array, "B S G N"], v: Float[Array, "B S G N"], window: int | None, scope: Scope):
    """softmax(q k / sqrt(N)) v over the keys k <= q, k > q - window, softmax in float32, with dropout on the weights; returns [B, S, H, N].

    Without dropout on a GPU jax's own; otherwise the blocks of `blockwise`, which keep no [S, S] array. On a mesh each device has its sequences and heads.
    """
    numbers = jnp.arange(q.shape[2])
    key = scope.stream("dropout_attention") if scope.dropout else scope.key
    rows = (scope.tokens[:, None] * q.shape[2] + numbers[:, None]).astype(jnp.int32)  # of the dropout's draws
    function = functools.partial(_attend, window, scope.dropout)
    if scope.layout is None:
        return function(q, k, v, rows, key)
    heads, groups = (scope.layout.spec("batch", None, name, None, shape=y.shape) for name, y in (("heads", q), ("kv_heads", k)))
    each = scope.layout.spec("batch", "heads", None)
    return scope.layout.mapped(function, (heads, groups, groups, each, PartitionSpec()), heads)(q, k, v, rows, key)


def _attend(window: int | None, dropout: float, q, k, v, rows: Int[Array, "B H S"], key):
    if not dropout and platform() == "gpu":
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(y, repeats, axis=2) if repeats > 1 else y for y in (k, v))
    return blockwise.attention(q, k, v, key, rows, window, dropout)


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

    def __call__(
        self, x: Float[Array, "B S D"], positions, scope: Scope, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """The output, and the cache with these tokens in it. Without a cache the sequences are whole; with one they follow what it holds."""
        c = self.config
        q, k, v = self._project(x, scope)
        if c.qk_norm == "projection":
            q, k = self.q_norm(q, scope, "norm_q"), self.k_norm(k, scope, "norm_k")
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -c.clip_qkv, c.clip_qkv) for y in (q, k, v))
        q, k, v = (y.reshape(*y.shape[:2], -1, c.head_width) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q, scope, "norm_q"), self.k_norm(k, scope, "norm_k")
        q, k = (rotate(y, positions, c.rope_theta, c.rope_style) for y in (q, k))
        cache = None if cache is None else cache.written(scope.layer, positions, k, v)
        if cache is None or cache.fresh:
            out: Any = attend(q, k, v, c.sliding_window, scope)
        else:
            out = cache.attend(scope.layer, q, positions, c.sliding_window)
        out = linear(out.reshape(*out.shape[:2], -1), self.o[...], scope, "attention_o")
        return out + self.o_bias[...].astype(out.dtype) if c.output_bias else out, cache

    def _project(self, x, scope: Scope):
        c, sites = self.config, ("attention_q", "attention_k", "attention_v")
        query, key = c.num_heads * c.head_width, c.kv_heads * c.head_width
        if c.fused_qkv:
            matrices = jnp.split(self.qkv[...], (query, query + key), axis=-1)
        else:
            matrices = [w[...] for w in (self.q, self.k, self.v)]
        if c.fused_qkv and not any(scope.noise(site) for site in sites):
            parts = jnp.split(linear(x, self.qkv[...], scope, sites[0]), (query, query + key), axis=-1)
        else:
            parts = [linear(x, w, scope, site) for w, site in zip(matrices, sites, strict=True)]
        if c.attention_bias:
            parts = [y + b[...].astype(y.dtype) for y, b in zip(parts, (self.q_bias, self.k_bias, self.v_bias), strict=True)]
        return parts
