"""The router's numbers against NumPy, on hand-made cases where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing_stats

T, E = 50, 8


@pytest.mark.parametrize("k", [1, 3, E])
def test_health_against_numpy(k):
    logits = 2 * jax.random.normal(jax.random.key(k), (T, E)) + 5
    exact = np.asarray(logits, np.float64)
    p = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    ranked = -np.sort(-exact, axis=-1)
    expected = {
        "router/entropy": -(p * np.log(p)).sum(),
        "router/logit_mean": exact.mean(-1).sum(),
        "router/logit_std": exact.std(-1).sum(),
        "router/margin": (ranked[:, k - 1] - ranked[:, k]).sum() if k < E else 0.0,
    }
    found = routing_stats.health(logits, k)
    assert set(found) == set(expected)
    for name, (value, count) in found.items():
        assert count == T and value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


def test_health_at_the_extremes_and_without_gradient():
    even = routing_stats.health(jnp.zeros((T, E)), 2)
    np.testing.assert_allclose(even["router/entropy"][0] / T, np.log(E), rtol=1e-6)
    assert even["router/margin"][0] == even["router/logit_std"][0] == 0
    certain = routing_stats.health(jnp.zeros((T, E)).at[:, 3].set(200.0), 1)
    assert certain["router/entropy"][0] == 0 and certain["router/margin"][0] == 200 * T
    gradient = jax.grad(lambda logits: sum(value for value, _ in routing_stats.health(logits, 2).values()))(jnp.ones((T, E)))
    np.testing.assert_array_equal(gradient, 0)


def test_load_cv_and_dead_experts():
    load = jnp.array([[2.0, 2.0, 2.0, 2.0], [4.0, 0.0, 4.0, 0.0], [8.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(routing_stats.load_cv(load), [0, 1, 3**0.5, 0], rtol=1e-6)
    np.testing.assert_array_equal(routing_stats.dead_experts(load), [0, 2, 3, 4])
