"""Routing step by step: exact choices with ties to the lower id, combine weights against their definitions, gradients where they belong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing

T, E, K = 12, 6, 3
LOGITS = jax.random.normal(jax.random.key(0), (T, E))


def softmax(x):
    exp = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def chosen_mask(ids):
    return (np.asarray(ids)[..., None] == np.arange(E)).any(1)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_ties_go_to_the_lower_id(wrap):
    rows = jnp.array([[1, 1, 1, 1, 1, 1], [0, 2, 1, 2, 1, 2], [5, 0, 0, 0, 0, 5], [-1, -2, -1, -2, -1, -3]], jnp.float32)
    ids = wrap(lambda logits: routing.select(logits, 3))(rows)
    np.testing.assert_array_equal(ids, [[0, 1, 2], [1, 3, 5], [0, 5, 1], [0, 2, 4]])


def test_ties_of_quantised_logits_against_a_stable_sort():
    logits = jax.random.randint(jax.random.key(1), (500, E), -2, 3).astype(jnp.float32)
    for k in range(1, E + 1):
        expected = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :k]
        np.testing.assert_array_equal(routing.select(logits, k), expected)


@pytest.mark.parametrize("k", [0, E + 1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"cannot choose {k} of {E} experts; .* between 1 and {E}"):
        routing.select(LOGITS, k)


def test_router_logits_are_float32_from_the_inputs_as_they_are():
    x, w = jax.random.normal(jax.random.key(2), (T, 40)), jax.random.normal(jax.random.key(3), (40, E))
    for dtype in ("float32", "bfloat16"):
        logits = routing.router_logits(x.astype(dtype), w)
        assert logits.dtype == jnp.float32
        exact = np.asarray(x.astype(dtype), np.float64) @ np.asarray(w, np.float64)
        np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)  # 40 float32 products of size 1
    seen = []
    routing.router_logits(x.astype("bfloat16"), w, dot=lambda a, b: seen.append((a.dtype, b.dtype)) or a @ b)
    assert seen == [(jnp.float32, jnp.float32)]


def test_renormalised_softmax_is_softmax_over_all_gathered_and_divided():
    ids = routing.select(LOGITS, K)
    gathered = np.take_along_axis(softmax(LOGITS), np.asarray(ids), -1)
    weights = routing.combine(LOGITS, ids)
    np.testing.assert_allclose(weights, gathered / gathered.sum(-1, keepdims=True), rtol=1e-6)
    assert weights.dtype == jnp.float32 and (np.diff(weights, axis=-1) <= 0).all()
    # OLMoE leaves the sum below 1
    np.testing.assert_allclose(routing.combine(LOGITS, ids, renormalise=False), gathered, rtol=1e-6)


def test_sigmoid_with_a_bias_in_selection_alone():
    bias = jnp.array([0.0, 0.0, 0.9, 0.0, -0.9, 0.0])
    scores = 1 / (1 + np.exp(-np.asarray(LOGITS, np.float64)))
    ids = routing.select(LOGITS, K, bias=bias)
    np.testing.assert_array_equal(ids, np.argsort(-(scores + np.asarray(bias)), axis=-1, kind="stable")[:, :K])
    assert (np.asarray(ids) != np.asarray(routing.select(LOGITS, K))).any(), "the bias changes nothing here: the test is empty"
    gathered = np.take_along_axis(scores, np.asarray(ids), -1)
    np.testing.assert_allclose(routing.combine(LOGITS, ids, "sigmoid"), gathered / gathered.sum(-1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(routing.combine(LOGITS, ids, "sigmoid", renormalise=False), gathered, rtol=1e-6)


def test_unknown_score():
    with pytest.raises(ValueError, match="unknown score 'softmx' \\(did you mean 'softmax'\\?\\); known: softmax, sigmoid"):
        routing.combine(LOGITS, routing.select(LOGITS, K), "softmx")


@pytest.mark.parametrize(
    "score, renormalise, reaches", [("softmax", True, "chosen"), ("softmax", False, "all"), ("sigmoid", True, "chosen")]
)
def test_the_gradient_of_combine_reaches_the_logits_it_should(score, renormalise, reaches):
    ids = routing.select(LOGITS, K)
    direction = jax.random.normal(jax.random.key(4), ids.shape)

    def value(logits):
        return (routing.combine(logits, ids, score, renormalise) * direction).sum()

    value = jax.jit(value)
    gradient = np.asarray(jax.jit(jax.grad(value))(LOGITS))
    expected = np.ones((T, E), bool) if reaches == "all" else chosen_mask(ids)
    np.testing.assert_array_equal(gradient != 0, expected)
    logits, step = np.asarray(LOGITS), np.float32(1e-3)
    for t, e in ((0, int(ids[0, 0])), (5, int(ids[5, 2])), (7, int(np.argmin(LOGITS[7])))):
        at = step * (np.arange(T)[:, None] == t) * (np.arange(E) == e)
        numeric = (value(logits + at) - value(logits - at)) / (2 * step)
        assert abs(numeric - gradient[t, e]) < 1e-3  # float32 differences of sums of size 1 over a step of 1e-3


def test_select_passes_no_gradient():
    bias = jnp.linspace(-0.1, 0.1, E)
    for arguments in ((), (bias,)):

        def value(logits, arguments=arguments):
            return (routing.select(logits, K, None, *arguments) * logits[:, :K]).sum()

        only_the_factor = np.pad(routing.select(LOGITS, K, None, *arguments), ((0, 0), (0, E - K)))
        np.testing.assert_array_equal(jax.jit(jax.grad(value))(LOGITS), only_the_factor)


def test_replayed_ids_come_back_as_they_are_and_the_router_still_learns():
    recorded = jnp.argsort(LOGITS, axis=-1)[:, :K]  # the worst experts, worst first: nothing that select would choose
    np.testing.assert_array_equal(routing.select(LOGITS, K, replay_ids=recorded.astype(jnp.uint8)), recorded)
    x, w = jax.random.normal(jax.random.key(5), (T, 8)), jax.random.normal(jax.random.key(6), (8, E))

    def value(w, ids):
        logits = routing.router_logits(x, w)
        ids = routing.select(logits, K, replay_ids=ids)
        return (routing.combine(logits, ids) * jnp.arange(1.0, K + 1)).sum(), ids

    gradients = jax.jit(jax.grad(value, has_aux=True))
    gradient, ids = gradients(w, recorded)
    np.testing.assert_array_equal(ids, recorded)
    assert (np.asarray(gradient) != 0).all()
    # replaying one's own choice is the live computation, to the bit
    live = routing.select(routing.router_logits(x, w), K)
    for replayed, fresh in zip(gradients(w, live), gradients(w, None), strict=True):
        np.testing.assert_array_equal(replayed, fresh)


def test_expert_load():
    ids = jnp.array([[0, 1], [1, 2], [5, 1]])
    np.testing.assert_array_equal(routing.expert_load(ids, E), [1, 3, 1, 0, 0, 1])
    np.testing.assert_array_equal(routing.expert_load(ids, E, jnp.array([1.0, 0.0, 0.5])), [1, 1.5, 0, 0, 0, 0.5])
    np.testing.assert_array_equal(routing.expert_load(ids.astype(jnp.uint8), E), [1, 3, 1, 0, 0, 1])
    assert routing.expert_load(ids, E).dtype == jnp.float32


@pytest.mark.parametrize(
    "experts, dtype, sentinel", [(8, "uint8", 255), (255, "uint8", 255), (256, "uint16", 65535), (1000, "uint16", 65535)]
)
def test_trace_types_hold_every_id_and_one_more(experts, dtype, sentinel):
    assert routing.trace_dtype(experts) == jnp.dtype(dtype) and routing.unrecorded(routing.trace_dtype(experts)) == sentinel
    assert sentinel > experts - 1


def test_valid_rows_of_a_trace():
    ids = jnp.array([[[[0, 1], [255, 255]]], [[[254, 0], [3, 255]]]], jnp.uint8)
    trace = routing.RoutingTrace(ids, jnp.zeros(ids.shape), jnp.arange(2))
    np.testing.assert_array_equal(trace.valid, [[[True, False]], [[True, True]]])
    assert len(jax.tree.leaves(trace)) == 3
