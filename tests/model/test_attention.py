"""Blockwise attention against NumPy and autodiff: grouped heads, causality, the window, dropout by coordinates, the hand-written derivative."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.keys import Draw
from moe_jax.model import blockwise
from moe_jax.model.attention import attend
from moe_jax.model.layers import Scope
from moe_jax.noise import draws

B, S, H, N = 3, 7, 4, 6
RANDOM = np.random.default_rng(1)
ALMOST_NONE = 1e-9  # a rate that takes the path with dropout and drops nothing


def inputs(groups):
    return [jnp.asarray(RANDOM.normal(size=(B, S, heads, N)), "float32") for heads in (H, groups, groups)]


def scope_of(dropout, offset=0):
    return Scope(Draw(3, 1, "train").key(), jnp.int32(2), (offset + jnp.arange(B * S)).reshape(B, S), {}, (), dropout)


def reference(q, k, v, window, kept=1.0):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, H // a.shape[2], axis=2) for a in (k, v))  # query head h reads group h // (H / G)
    scores = np.einsum("bqhn,bkhn->bhqk", q, k) / N**0.5
    for i in range(S):
        for j in range(S):
            if j > i or (window is not None and j <= i - window):
                scores[:, :, i, j] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True) * kept
    return np.einsum("bhqk,bkhn->bqhn", weights, v)


@pytest.mark.parametrize("window", [None, 3, 1])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_with_and_without_dropout_against_numpy(groups, window):
    q, k, v = inputs(groups)
    expected = reference(q, k, v, window)
    for dropout in (0.0, ALMOST_NONE):
        found = jax.jit(lambda q, k, v, d=dropout: attend(q, k, v, window, scope_of(d)))(q, k, v)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_dropout_multiplies_the_weights_by_a_mask_of_token_head_and_key():
    q, k, v = inputs(2)
    scope = scope_of(0.4, offset=100)
    rows = np.asarray(scope.tokens)[:, None, :] * H + np.arange(H)[:, None]  # [B,H,S]
    key = scope.stream("dropout_attention")
    kept = np.asarray(draws.dropout_mask(key, jnp.asarray(rows.reshape(-1)), S, 0.4), np.float64).reshape(B, H, S, S)
    assert (kept == 0).any()
    found = jax.jit(attend, static_argnums=3)(q, k, v, None, scope)
    np.testing.assert_allclose(found, reference(q, k, v, None, kept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_the_size_of_a_block_changes_nothing(monkeypatch, window):
    """Output and gradients, with dropout, in one block, in blocks that do not divide the sequence, and one query at a time."""
    q, k, v = inputs(2)
    scope, direction = scope_of(0.4), jnp.asarray(RANDOM.normal(size=(B, S, H, N)), "float32")
    results, texts = [], []
    for size in (128, 3, 1):
        monkeypatch.setitem(blockwise.BLOCKS, "cpu", size)

        def both(q, k, v, size=size):
            out, pull = jax.vjp(lambda *inputs: attend(*inputs, window, scope), q, k, v)
            return out, pull(direction)

        traced = jax.jit(both).trace(q, k, v)
        texts.append(str(traced.jaxpr))
        results.append(traced.lower().compile()(q, k, v))
    assert len(set(texts)) == 3
    for other in results[1:]:
        chex.assert_trees_all_close(other, results[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_the_derivative_is_that_of_the_plain_formula(window):
    """The hand-written backward pass with dropout against autodiff of the formula with the same mask."""
    q, k, v = inputs(4)
    scope = scope_of(0.4)
    rows = (scope.tokens[:, None, :] * H + jnp.arange(H)[:, None]).reshape(-1)
    kept = draws.dropout_mask(scope.stream("dropout_attention"), rows, S, 0.4).reshape(B, H, S, S)
    distance = jnp.arange(S)[:, None] - jnp.arange(S)[None, :]
    seen = (distance >= 0) & (distance < (window or S))

    def plain(q, k, v):
        scores = jnp.where(seen, jnp.einsum("bqhn,bkhn->bhqk", q, k) / N**0.5, -1e30)
        return jnp.einsum("bhqk,bkhn->bqhn", jax.nn.softmax(scores, axis=-1) * kept, v)

    direction = jnp.asarray(RANDOM.normal(size=(B, S, H, N)), "float32")
    found, expected = (
        jax.jit(lambda *inputs, f=function: jax.vjp(f, *inputs)[1](direction))(q, k, v)
        for function in (lambda *inputs: attend(*inputs, window, scope), plain)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
