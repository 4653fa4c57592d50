"""Draws are functions of their coordinates to the bit; their statistics are tested in test_draws_statistics.py."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe_jax import keys
from moe_jax.keys import Draw
from moe_jax.noise import draws

R, C = 512, 512
COUNT = R * C
BASE = dict(seed=11, step=5, phase="train", layer=3, site="router_logits", pass_="forward")


def key_of(**changes):
    at = BASE | changes
    return keys.stream(Draw(at["seed"], at["step"], at["phase"]).key(), at["layer"], at["site"], at["pass_"])


sample_bits = jax.jit(draws.bits, static_argnums=2)
sample_normal = jax.jit(draws.normal, static_argnums=2)


def normals(rows=None, **changes) -> np.ndarray:
    rows = jnp.arange(R) if rows is None else rows
    return np.asarray(sample_normal(key_of(**changes), rows, C), np.float64)


@pytest.fixture(scope="module")
def base():
    return normals()


def close(value, expected, standard_error):
    assert abs(value - expected) < 5 * standard_error, (
        f"{value} is {abs(value - expected) / standard_error:.1f} standard errors from {expected}"
    )


def test_a_draw_does_not_know_how_the_array_is_cut(base):
    key = key_of()
    parts = [sample_normal(key, jnp.arange(start, start + R // 4), C) for start in range(0, R, R // 4)]
    np.testing.assert_array_equal(np.concatenate(parts), base)
    order = np.random.default_rng(0).permutation(R)
    np.testing.assert_array_equal(normals(jnp.asarray(order)), base[order])
    np.testing.assert_array_equal(sample_normal(key, jnp.arange(R), 7), base[:, :7])  # a column does not know how many there are
    np.testing.assert_array_equal(normals(jnp.arange(R, dtype=jnp.uint32)), base)


def test_jit_and_eager_give_the_same_bits(base):
    key = key_of()
    np.testing.assert_array_equal(draws.bits(key, jnp.arange(R), C), sample_bits(key, jnp.arange(R), C))
    np.testing.assert_array_equal(draws.normal(key, jnp.arange(R), C), base)
    shards = jax.NamedSharding(jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P("rows"))
    np.testing.assert_array_equal(sample_normal(key, jax.device_put(jnp.arange(R), shards), C), base)


def test_they_do_as_users_compile_too():
    """With code optimised, when products and sums become multiply-adds: another process, since how jax compiles cannot be changed in this one."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=3"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "jit_and_eager"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_the_ends_of_the_uniform_are_inside_and_their_normals_finite(monkeypatch):
    for word, uniform in ((0, 2.0**-24), (2**32 - 1, 1 - 2.0**-24)):
        monkeypatch.setattr(draws, "bits", lambda key, rows, columns, part, word=word: jnp.full((rows.shape[0], columns), word, jnp.uint32))
        assert draws.uniform(key_of(), jnp.arange(1), 1)[0, 0] == uniform
        assert abs(abs(draws.normal(key_of(), jnp.arange(1), 1)[0, 0]) - stats.norm.isf(2.0**-24)) < 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_mask(rate):
    mask = np.asarray(jax.jit(draws.dropout_mask, static_argnums=(2, 3))(key_of(), jnp.arange(R), C, rate))
    assert set(np.unique(mask)) == {0.0, np.float32(1 / (1 - rate))}
    close((mask == 0).mean(), rate, (rate * (1 - rate) / COUNT) ** 0.5)
    close(mask.mean(dtype=np.float64), 1.0, (rate / (1 - rate) / COUNT) ** 0.5)


def test_dropout_of_nothing():
    np.testing.assert_array_equal(draws.dropout_mask(key_of(), jnp.arange(R), C, 0.0), 1.0)
