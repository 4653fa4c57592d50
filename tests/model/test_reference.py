"""The whole forward pass against a plain float64 NumPy decoder that shares no line with the library: loops over tokens, heads and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import Model, ModelConfig

# The small seed study's architecture at a small size.
SEED = dict(
    gated=False,
    rope_style="interleaved",
    fused_qkv=True,
    scale_embedding=True,
    tie_embeddings=True,
    norm_eps=1.1920929e-07,
    experts_per_token=2,
    num_experts=4,
)
# A Qwen3-like one, with Qwen2's biases: a dense layer among the MoE layers, fewer and wider heads than D / H says, an untied head.
QWEN = dict(
    num_layers=4,
    dense_layers=(1,),
    d_ff=20,
    num_kv_heads=2,
    head_dim=10,
    qk_norm="head",
    attention_bias=True,
    output_bias=True,
    tie_embeddings=False,
    num_experts=6,
    experts_per_token=3,
    rope_theta=1e3,
)
# OLMoE's differences: norms over the whole projection, weights that do not sum to 1; and a window.
OLMOE = dict(qk_norm="projection", renormalise=False, sliding_window=3, activation="gelu")


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def softmax(x):
    exp = np.exp(x - x.max())
    return exp / exp.sum()


ACTIVATIONS = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
}


def rotated(x, position, c):
    """One head of one token."""
    half, out = len(x) // 2, x.copy()
    for i in range(half):
        a, b = (i, i + half) if c.rope_style == "half" else (2 * i, 2 * i + 1)
        angle = position * c.rope_theta ** (-i / half)
        out[a], out[b] = x[a] * np.cos(angle) - x[b] * np.sin(angle), x[b] * np.cos(angle) + x[a] * np.sin(angle)
    return out


def attention(x, p, c):
    """One sequence [S, D]."""
    n, query, key = c.head_width, c.num_heads * c.head_width, c.kv_heads * c.head_width
    if c.fused_qkv:
        q, k, v = x @ p["qkv"][:, :query], x @ p["qkv"][:, query : query + key], x @ p["qkv"][:, query + key :]
    else:
        q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    if c.attention_bias:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if c.qk_norm == "projection":
        q, k = norm(q, p["q_norm"]["scale"], c.norm_eps), norm(k, p["k_norm"]["scale"], c.norm_eps)
    out = np.zeros((len(x), query))
    for head in range(c.num_heads):
        group = head // (c.num_heads // c.kv_heads)
        qs, ks, vs = q[:, head * n : (head + 1) * n], k[:, group * n : (group + 1) * n], v[:, group * n : (group + 1) * n]
        if c.qk_norm == "head":
            qs, ks = norm(qs, p["q_norm"]["scale"], c.norm_eps), norm(ks, p["k_norm"]["scale"], c.norm_eps)
        qs, ks = (np.array([rotated(row, position, c) for position, row in enumerate(rows)]) for rows in (qs, ks))
        for i in range(len(x)):
            first = 0 if c.sliding_window is None else max(0, i - c.sliding_window + 1)
            weights = softmax(ks[first : i + 1] @ qs[i] / np.sqrt(n))
            out[i, head * n : (head + 1) * n] = weights @ vs[first : i + 1]
    return out @ p["o"] + (p["o_bias"] if c.output_bias else 0)


def mlp(x, p, c):
    act = ACTIVATIONS[c.activation]
    return (act(x @ p["gate"]) * (x @ p["up"]) if c.gated else act(x @ p["up"])) @ p["down"]


def mixture(x, p, c, ids_out):
    """One sequence; the chosen experts are appended to ids_out."""
    out, ids = np.zeros_like(x), []
    for t, row in enumerate(x):
        logits = row @ p["router"]
        chosen = np.argsort(-logits, kind="stable")[: c.experts_per_token]
        weights = softmax(logits)[chosen]
        weights = weights / weights.sum() if c.renormalise else weights
        for expert, weight in zip(chosen, weights, strict=True):
            out[t] += weight * mlp(row, {name: p[name][expert] for name in p if name != "router"}, c)
        ids.append(chosen)
    ids_out.append(ids)
    return out


def decoder(params, tokens, c, layer_params):
    """(logits [S,V], ids [L_moe,S,K]) of one sequence. layer_params: one dict per layer."""
    x, ids = params["embedding"][tokens], []
    x = x * np.sqrt(c.d_model) if c.scale_embedding else x
    for layer, p in enumerate(layer_params):
        x = x + attention(norm(x, p["norm_attention"]["scale"], c.norm_eps), p["attention"], c)
        read = norm(x, p["norm_moe"]["scale"], c.norm_eps)
        x = x + (mixture(read, p["feed_forward"], c, ids) if layer in c.moe_layers else mlp(read, p["feed_forward"], c))
    return norm(x, params["norm_final"]["scale"], c.norm_eps) @ params["embedding" if c.tie_embeddings else "head"].T, np.array(ids)


# Where each layer's parameters lie: (name of the stack, index in it), written by hand for the patterns above.
PLACES = {2: [("layers", 0), ("layers", 1)], 4: [("layers_0", 0), ("layers_1", 0), ("layers_2", 0), ("layers_2", 1)]}


@pytest.mark.parametrize("changes", [SEED, QWEN, OLMOE], ids=["seed", "qwen", "olmoe"])
def test_forward_against_numpy(changes, make_params):
    config = ModelConfig.preset("tiny", vocab_size=40, d_model=16, d_expert=12, **changes)
    model = Model(config)
    params = make_params(model, seed=2)
    tokens = np.random.default_rng(3).integers(0, 40, (2, 6))
    out = jax.jit(lambda params, tokens: model.apply(params, tokens, capture=("trace",)))(params, jnp.asarray(tokens))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layers = [jax.tree.map(lambda leaf, i=index: leaf[i], exact[name]) for name, index in PLACES[config.num_layers]]
    logits, ids = zip(*(decoder(exact, row, config, layers) for row in tokens), strict=True)
    assert len({tuple(row) for row in np.sort(ids, -1).reshape(-1, config.experts_per_token)}) > 3, "the routing is too plain to test"
    np.testing.assert_array_equal(out.trace.ids, np.stack(ids, axis=1))
    np.testing.assert_allclose(out.logits, np.stack(logits), rtol=1e-5, atol=1e-5 * abs(np.stack(logits)).max())
