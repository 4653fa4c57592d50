"""Schedules against hand-worked numbers and against optax's own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.errors import ConfigError
from moe_jax.optim import schedules


def seed_multiplier(updates: int) -> float:
    """The seed study's formula, written out; valid for the 100 updates it ran (and to its planned end at 400)."""
    return updates / 20 if updates < 20 else 0.1 + 0.45 * (1 + math.cos(math.pi * (updates - 20) / 380))


def test_the_seeds_truncated_schedule():
    multiplier = schedules.warmup_cosine(20, 400, 0.1)
    values = [float(multiplier(count)) for count in range(100)]
    np.testing.assert_allclose(values, [seed_multiplier(count) for count in range(100)], atol=1e-6)
    assert values[0] == 0.0 and values[20] == 1.0
    assert round(values[50], 3) == 0.986 and round(values[99], 3) == 0.907


def test_cosine_ends_at_its_floor_and_stays_there():
    multiplier = schedules.warmup_cosine(2, 10, 0.25)
    assert float(multiplier(6)) == pytest.approx((1 + 0.25) / 2)
    assert float(multiplier(10)) == pytest.approx(0.25) and float(multiplier(1000)) == pytest.approx(0.25)


def test_cosine_equals_optax():
    ours, theirs = schedules.warmup_cosine(20, 400, 0.1), optax.warmup_cosine_decay_schedule(0.0, 1.0, 20, 400, 0.1)
    counts = jnp.arange(0, 500, 7)
    np.testing.assert_allclose(jax.vmap(ours)(counts), jax.vmap(theirs)(counts), atol=1e-6)


def test_linear_and_constant():
    linear = schedules.warmup_linear(4, 8, 0.5)
    assert [float(linear(count)) for count in (0, 1, 4, 6, 8, 9)] == [0, 0.25, 1, 0.75, 0.5, 0.5]
    constant = schedules.warmup_constant(2)
    assert [float(constant(count)) for count in (0, 1, 2, 50)] == [0, 0.5, 1, 1]


def test_no_warmup_starts_at_the_peak():
    assert float(schedules.warmup_cosine(0, 10)(0)) == 1.0 and float(schedules.warmup_constant(0)(0)) == 1.0


def test_traced_counts():
    multiplier = jax.jit(schedules.warmup_cosine(20, 400))(jnp.int32(10))
    assert float(multiplier) == 0.5 and multiplier.dtype == jnp.float32 and multiplier.shape == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("warmup_cosin", 1, 2), "did you mean 'warmup_cosine'"),
        (("warmup_cosine", 10, 10), "10 updates cannot warm up for 10"),
        (("warmup_linear", -1, 10), "cannot warm up for -1"),
        (("warmup_constant", -1, 10), "got -1"),
        (("warmup_cosine", 1, 10, 1.5), "got 1.5"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigError, match=message):
        schedules.schedule(*arguments)
