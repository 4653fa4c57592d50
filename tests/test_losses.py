"""Losses against float64 NumPy and analytic gradients; the chunked cross-entropies are different programs with one answer."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import losses, routing
from moe_jax.errors import Unsupported
from moe_jax.keys import PASSES, Draw
from moe_jax.losses import balance_loss, balance_of, balance_parts
from moe_jax.mesh import MeshSpec
from moe_jax.noise import Operator

T, D, V, E, K = 22, 12, 29, 5, 2  # no chunk below divides T or V
CHUNKS = [("none", 8), ("tokens", 8), ("tokens", 100), ("vocabulary", 8), ("vocabulary", 100)]
HIDDEN = jax.random.normal(jax.random.key(0), (T, D))
HEAD = jax.random.normal(jax.random.key(1), (V, D))
BEST = np.argmax(np.asarray(HIDDEN) @ np.asarray(HEAD).T, axis=-1)
TARGETS = jnp.asarray(
    np.where(np.arange(T) % 3 == 0, BEST, np.arange(T) * (V - 1) // (T - 1))
)  # a third right; first and last word are there
WEIGHTS = jax.random.uniform(jax.random.key(3), (T,)).at[jnp.array([0, 7, T - 1])].set(0.0)


def reference(hidden, head, targets, weights):
    """(loss, accuracy, gradient of hidden, gradient of head) of the weighted sum, in float64."""
    h, w, c = (np.asarray(a, np.float64) for a in (hidden, head, weights))
    logits = h @ w.T
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - top)
    log_z = np.log(p.sum(-1)) + top[:, 0]
    p /= p.sum(-1, keepdims=True)
    one_hot = np.eye(V)[np.asarray(targets)]
    d_logits = c[:, None] * (p - one_hot)
    loss = (c * (log_z - (logits * one_hot).sum(-1))).sum()
    accuracy = (c * (logits.argmax(-1) == np.asarray(targets))).sum()
    return loss, accuracy, d_logits @ w, d_logits.T @ h


def value_and_gradients(chunk, size):
    def loss(hidden, head):
        return losses.cross_entropy(hidden, head, TARGETS, WEIGHTS, chunk, size)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def test_the_three_methods_are_different_programs():
    texts = [str(jax.make_jaxpr(value_and_gradients(chunk, 8))(HIDDEN, HEAD)) for chunk in ("none", "tokens", "vocabulary")]
    assert len(set(texts)) == 3
    whole = f"f32[{T},{V}]"
    assert whole in texts[0] and whole not in texts[1] and whole not in texts[2]  # the chunked ones never hold all logits


@pytest.mark.parametrize("chunk, size, block", [(*case, losses.BLOCK) for case in CHUNKS] + [("tokens", 8, 8), ("tokens", 100, 6)])
def test_cross_entropy_against_float64(chunk, size, block, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK", block)  # words at a time; neither 8 nor 6 divides V
    (loss, metrics), (d_hidden, d_head) = jax.jit(value_and_gradients(chunk, size))(HIDDEN, HEAD)
    expected, accuracy, expected_hidden, expected_head = reference(HIDDEN, HEAD, TARGETS, WEIGHTS)
    assert accuracy > 0, "no prediction is right: the accuracy is not tested"
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(d_hidden, expected_hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_head, expected_head, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(d_hidden[WEIGHTS == 0], 0.0)
    assert set(metrics) == {"loss", "accuracy"} and metrics["loss"][0] == loss
    np.testing.assert_allclose(metrics["accuracy"][0], accuracy, rtol=1e-5)
    for _, count in metrics.values():
        np.testing.assert_allclose(count, np.asarray(WEIGHTS, np.float64).sum(), rtol=1e-6)


@pytest.mark.parametrize("chunk, size", CHUNKS[:2] + CHUNKS[3:4])
def test_cross_entropy_scaled_by_what_follows_and_metrics_without_gradient(chunk, size):
    """The cotangent of the sum may be anything (here -3), and metrics carry none."""

    def value(hidden, head):
        loss, metrics = losses.cross_entropy(hidden, head, TARGETS, WEIGHTS, chunk, size)
        return -3.0 * loss + 100.0 * metrics["loss"][0] + 100.0 * metrics["accuracy"][0]

    found = jax.jit(jax.grad(value, argnums=(0, 1)))(HIDDEN, HEAD)
    for gradient, expected in zip(found, reference(HIDDEN, HEAD, TARGETS, WEIGHTS)[2:], strict=True):
        np.testing.assert_allclose(gradient, -3.0 * expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("chunk, size", CHUNKS[:2] + CHUNKS[3:4])
def test_cross_entropy_in_bfloat16(chunk, size):
    """Operands of 8 bits, sums of float32: the loss is that of the rounded operands; gradients are rounded again, twice (2^-8 each)."""
    hidden = HIDDEN.astype("bfloat16")
    (loss, _), (d_hidden, d_head) = jax.jit(value_and_gradients(chunk, size))(hidden, HEAD)
    expected, _, expected_hidden, expected_head = reference(hidden, HEAD.astype("bfloat16"), TARGETS, WEIGHTS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == HEAD.dtype
    for gradient, exact in ((d_hidden, expected_hidden), (d_head, expected_head)):
        assert abs(np.asarray(gradient, np.float64) - exact).max() < 2 * 2.0**-8 * abs(exact).max()


@pytest.mark.parametrize("chunk", ["none", "tokens", "vocabulary"])
def test_cross_entropy_of_large_logits_is_finite(chunk):
    (loss, _), gradients = jax.jit(value_and_gradients(chunk, 8))(100 * HIDDEN, 10 * HEAD)
    np.testing.assert_allclose(loss, reference(100 * HIDDEN, 10 * HEAD, TARGETS, WEIGHTS)[0], rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


# kind: passes; a rounding of gradients would turn the last bit of a sum into a step of the format
NOISY = {kind: PASSES for kind in ("relative", "additive", "jitter", "accumulation", "rms_relative", "bias")} | {"quantise": ("forward",)}
SAME = ("additive", "jitter")  # of each element by itself, as relative is


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SAME else []) for kind in NOISY])
def test_a_noisy_head_in_chunks_is_the_noisy_head(kind, monkeypatch):
    """Chunks of tokens, and blocks of words in them, have the draws that all logits at once have: loss and both gradients, and without a derivative."""
    monkeypatch.setattr(losses, "BLOCK", 8)  # does not divide V
    scale, form = (1.0, "fp8_e5m2") if kind == "quantise" else (0.2, None)
    operator = Operator(jnp.float32(scale), Draw(3).key(), "lm_head", kind, NOISY[kind], form)
    rows = 100 + 3 * jnp.arange(T)

    def loss(chunk, operator):
        return lambda h, w: losses.cross_entropy(h, w, TARGETS, WEIGHTS, chunk, 8, operator, rows)

    @jax.jit
    def run(operator):
        return [jax.value_and_grad(loss(chunk, operator), (0, 1), has_aux=True)(HIDDEN, HEAD) for chunk in ("tokens", "none")], loss(
            "tokens", operator
        )(HIDDEN, HEAD)

    (((value, metrics), found), ((wanted, wanted_metrics), gradients)), (alone, alone_metrics) = run(operator)
    exact = reference(HIDDEN, HEAD, TARGETS, WEIGHTS)
    assert abs(wanted / exact[0] - 1) > 1e-4, "no noise: the test is empty"
    np.testing.assert_allclose([value, alone], [wanted, wanted], rtol=1e-5)
    np.testing.assert_allclose([metrics["accuracy"][0], alone_metrics["accuracy"][0]], [wanted_metrics["accuracy"][0]] * 2, rtol=1e-5)
    for name, a, b, clean in zip(("hidden", "head"), found, gradients, exact[2:], strict=True):
        assert abs(b - clean).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=name)


def test_a_noisy_head_in_chunks_of_words_is_refused():
    operator = Operator(jnp.float32(0.2), Draw(3).key(), "lm_head", "relative", PASSES)
    with pytest.raises(Unsupported, match="noise at lm_head .* set loss_chunk to tokens or none"):
        losses.cross_entropy(HIDDEN, HEAD, TARGETS, WEIGHTS, "vocabulary", 8, operator, jnp.arange(T))


def test_unknown_chunk():
    with pytest.raises(ValueError, match=r"unknown loss chunk 'token' \(did you mean 'tokens'\?\); known: tokens, vocabulary, none"):
        losses.cross_entropy(HIDDEN, HEAD, TARGETS, WEIGHTS, "token")


# --- the router's losses ----------------------------------------------------------------------------------------------------------


LOGITS = jax.random.normal(jax.random.key(4), (T, E))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_loss_is_one_at_balance_and_the_experts_at_collapse(score):
    even, certain = np.zeros((2 * E, E), np.float32), np.full((2 * E, E), -60.0, np.float32)
    certain[:, 2] = 60.0
    balanced, collapsed = (np.arange(2 * E)[:, None] + np.arange(K)) % E, np.full((2 * E, K), 2)
    loss = jax.jit(lambda logits, ids: losses.balance_loss(logits, ids, score))
    np.testing.assert_allclose(loss(even, balanced), 1.0, rtol=1e-6)
    np.testing.assert_allclose(loss(certain, collapsed), E, rtol=1e-6)
    # at even scores the choice does not matter, at even choice the scores do not
    np.testing.assert_allclose(loss(even, collapsed), 1.0, rtol=1e-6)
    np.testing.assert_allclose(loss(certain, balanced), 1.0, rtol=1e-6)


def test_balance_loss_against_numpy_and_its_normalisations():
    ids = routing.select(LOGITS, K)
    p = np.exp(np.asarray(LOGITS, np.float64))
    p /= p.sum(-1, keepdims=True)
    share = np.bincount(np.asarray(ids).reshape(-1), minlength=E) / (T * K)
    expected = E * (share * p.mean(0)).sum()
    np.testing.assert_allclose(losses.balance_loss(LOGITS, ids), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.balance_loss(LOGITS, ids, normalisation="topk"), K * expected, rtol=1e-6)
    weight = losses.convert_balance_weight(0.01, K, "assignments", "topk")
    np.testing.assert_allclose(weight * losses.balance_loss(LOGITS, ids, normalisation="topk"), 0.01 * expected, rtol=1e-6)
    assert losses.convert_balance_weight(weight, K, "topk", "assignments") == 0.01
    assert losses.convert_balance_weight(0.3, K, "topk", "topk") == 0.3
    with pytest.raises(ValueError, match="unknown normalisation 'tokens'.*; known: assignments, topk"):
        losses.balance_loss(LOGITS, ids, normalisation="tokens")


def test_no_gradient_of_the_balance_loss_passes_through_the_counts():
    """d/dz_te = E / T * p_te * (f_e - sum_j f_j p_tj), with f constant although the ids come from the same logits."""
    p = np.exp(np.asarray(LOGITS, np.float64))
    p /= p.sum(-1, keepdims=True)
    share = np.bincount(np.asarray(routing.select(LOGITS, K)).reshape(-1), minlength=E) / (T * K)
    expected = E / T * p * (share - (p @ share)[:, None])
    gradient = jax.jit(jax.grad(lambda logits: losses.balance_loss(logits, routing.select(logits, K))))(LOGITS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_z_loss():
    log_z = np.log(np.exp(np.asarray(LOGITS, np.float64)).sum(-1))
    np.testing.assert_allclose(losses.z_loss(LOGITS), (log_z**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(losses.z_loss(jnp.full((3, E), 500.0)), (500 + np.log(E)) ** 2, rtol=1e-6)  # no overflow
    p = np.exp(np.asarray(LOGITS, np.float64) - log_z[:, None])
    np.testing.assert_allclose(jax.jit(jax.grad(losses.z_loss))(LOGITS), 2 / T * log_z[:, None] * p, rtol=1e-4, atol=1e-7)


def test_load_cv_squared_and_its_gradient_at_balance():
    load = jnp.array([4.0, 0.0, 4.0, 0.0])
    np.testing.assert_allclose(losses.load_cv_squared(load), 1.0, rtol=1e-6)
    even = jnp.full((4,), 3.0)
    np.testing.assert_array_equal(jax.grad(losses.load_cv_squared)(even), 0.0)
    # the coefficient of variation itself has none there, which is why the square is used
    assert np.isnan(jax.grad(lambda load: load.std() / load.mean())(even)).all()
    uneven = np.array([1.0, 2.0, 3.0, 6.0])  # mean 3, squares' mean 12.5: d(12.5 / 9 - 1) = 2 x / (4 * 9) - 2 * 12.5 / (4 * 27)
    np.testing.assert_allclose(jax.grad(losses.load_cv_squared)(jnp.asarray(uneven, jnp.float32)), uneven / 18 - 12.5 / 54, rtol=1e-5)


# --- over which tokens the load is counted --------------------------------------------------------------------------------------


def test_balance_over_each_sequence_by_hand():
    """Two sequences of two tokens, two experts, K = 1, equal scores: each sequence is wholly on one expert, both together are balanced."""
    logits, ids = jnp.log(jnp.array([[3.0, 1], [3, 1], [1, 3], [1, 3]])), jnp.array([[0], [0], [1], [1]])
    assert float(balance_loss(logits, ids)) == pytest.approx(2 * (0.5 * 0.5 + 0.5 * 0.5))
    assert float(balance_loss(logits, ids, sequences=2)) == pytest.approx(2 * (1.0 * 0.75))  # of either sequence, so of the mean


def test_balance_over_more_tokens_than_the_scores():
    """Counts of two micro-batches with the scores of one of them."""
    counts, scores = balance_parts(jnp.log(jnp.array([[3.0, 1], [3, 1]])), jnp.array([[0], [0]]))
    np.testing.assert_allclose(scores, [0.75, 0.25])
    assert float(balance_of(counts, scores)) == pytest.approx(2 * 0.75)
    assert float(balance_of(counts + jnp.array([0.0, 6.0]), scores)) == pytest.approx(2 * (0.25 * 0.75 + 0.75 * 0.25))


@pytest.mark.parametrize("sequences", [1, 8])
def test_balance_is_the_same_on_eight_devices(sequences):
    """Counted over all data shards before the product: a mean of the shards' losses would be another number."""
    random = np.random.default_rng(0)
    logits, ids = jnp.asarray(random.normal(size=(64, 4)), jnp.float32), jnp.asarray(random.integers(0, 4, (64, 2)))
    mesh = MeshSpec(data=8).build()
    function = jax.jit(jax.value_and_grad(functools.partial(balance_loss, sequences=sequences)))
    alone = function(logits, ids)
    divided = function(*jax.device_put((logits, ids), NamedSharding(mesh, PartitionSpec("data"))))
    chex.assert_trees_all_close(divided, alone, rtol=1e-6, atol=1e-9)
    by_shard = np.mean(
        [balance_loss(x, i, sequences=max(1, sequences // 8)) for x, i in zip(logits.reshape(8, 8, 4), ids.reshape(8, 8, 2), strict=True)]
    )
    assert (abs(by_shard - alone[0]) < 1e-6) == (sequences == 8)
