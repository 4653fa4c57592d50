"""Learning-rate schedules: functions from the number of updates already done to a multiplier of the peak rate.

The seed study's schedule is `warmup_cosine(20, 400)` stopped after 100 updates: it was written for 400 ticks but ticked once per
update of four micro-batches, so warm-up is a fifth of the run and the rate never falls below .907 of its peak.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from moe_jax.errors import ConfigError, check_known

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]  # updates done so far -> multiplier of the peak learning rate


def warmup_constant(warmup: int, total: int = 0, floor: float = 1.0) -> Schedule:
    """0 at update 0, rising linearly to 1 at update `warmup`, then 1. `total` and `floor` are not used."""
    del total, floor
    return _after_warmup(warmup, optax.constant_schedule(1.0))


def warmup_cosine(warmup: int, total: int, floor: float = 0.1) -> Schedule:
    """Linear from 0 to 1 at update `warmup`, then half a cosine down to `floor` at update `total`, constant from there."""
    _check(warmup, total, floor)
    return _after_warmup(warmup, optax.cosine_decay_schedule(1.0, total - warmup, alpha=floor))


def warmup_linear(warmup: int, total: int, floor: float = 0.1) -> Schedule:
    """Linear from 0 to 1 at update `warmup`, then linear down to `floor` at update `total`, constant from there."""
    _check(warmup, total, floor)
    return _after_warmup(warmup, optax.linear_schedule(1.0, floor, total - warmup))


SCHEDULES = {"warmup_cosine": warmup_cosine, "warmup_linear": warmup_linear, "warmup_constant": warmup_constant}


def schedule(name: str, warmup: int, total: int, floor: float = 0.1) -> Schedule:
    """The schedule called `name`; raises ConfigError for an unknown name or numbers that make no schedule."""
    check_known("schedule", name, SCHEDULES)
    return SCHEDULES[name](warmup, total, floor)


def _after_warmup(warmup: int, decay: optax.Schedule) -> Schedule:
    if not 0 <= warmup < 2**31:
        raise ConfigError(f"warmup must be 0 to {2**31 - 1:,} updates, got {warmup}")

    def multiplier(count):
        count = jnp.asarray(count)
        rising = count.astype(jnp.float32) / max(warmup, 1)
        return jnp.where(count < warmup, rising, jnp.asarray(decay(count - warmup), jnp.float32))

    return multiplier


def _check(warmup: int, total: int, floor: float) -> None:
    if not total < 2**31:
        raise ConfigError(f"a schedule has at most {2**31 - 1:,} updates, got {total}")
    if not 0 <= warmup < total:
        raise ConfigError(f"a schedule of {total} updates cannot warm up for {warmup}; choose warmup from 0 to {total - 1}")
    if not 0 <= floor <= 1:
        raise ConfigError(f"floor is a fraction of the peak learning rate, from 0 to 1; got {floor}")
