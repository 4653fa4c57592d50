"""Draws: functions of their coordinates to the bit, uniform and normal to 5 standard errors, and uncorrelated along everything that varies.

The seeds are fixed, so a test passes always or never. Its threshold is what a true generator would cross with the probability stated: 5 standard errors
are 6e-7, and a Kolmogorov-Smirnov p of 1e-5 is 1e-5; about 150 numbers are looked at, so a false alarm in all had a chance of 1 in 5,000.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe_jax import keys
from moe_jax.keys import PASSES, PHASES, Draw
from moe_jax.noise import draws

R, C = 512, 512
COUNT = R * C
BASE = dict(seed=11, step=5, phase="train", layer=3, site="router_logits", pass_="forward")


def key_of(**changes):
    at = BASE | changes
    return keys.stream(Draw(at["seed"], at["step"], at["phase"]).key(), at["layer"], at["site"], at["pass_"])


sample_bits = jax.jit(draws.bits, static_argnums=2)
sample_normal = jax.jit(draws.normal, static_argnums=2)
sample_uniform = jax.jit(draws.uniform, static_argnums=2)


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


# --- functions of coordinates -----------------------------------------------------------------------------------------------------


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


OTHERS = [
    *(dict(seed=seed) for seed in (10, 12, -11)),
    *(dict(step=step) for step in (4, 6)),
    *(dict(phase=phase) for phase in PHASES if phase != "train"),
    *(dict(layer=layer) for layer in (-1, 2, 4)),
    *(dict(site=site) for site in ("router_input", "dropout_final")),
    *(dict(pass_=pass_) for pass_ in PASSES if pass_ != "forward"),
    dict(seed=5, step=11),
]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_each_coordinate_gives_an_unrelated_draw(base, changes):
    """Of 2**23 cells, 262,144 independent pairs share 0.03 on average; correlations of values and squares are zero."""
    other = normals(**changes)
    assert (other == base).sum() < 6
    close((other * base).mean(), 0.0, COUNT**-0.5)
    close((other**2 * base**2).mean(), 1.0, (8 / COUNT) ** 0.5)


def test_correlation_over_many_neighbours():
    """Lag-1 along seeds, steps and layers: 64 draws of 64 x 64 each."""
    for name in ("seed", "step", "layer"):
        one = jax.jit(lambda value, name=name: draws.normal(key_of(**{name: value}), jnp.arange(64), 64))
        values = np.asarray(jax.lax.map(one, jnp.arange(64)), np.float64)
        close((values[1:] * values[:-1]).mean(), 0.0, (63 * 64 * 64) ** -0.5)


def test_no_correlation_along_rows_and_columns(base):
    for lag in (1, 2, 16, 64):
        for pair in ((base[lag:], base[:-lag]), (base[:, lag:], base[:, :-lag])):
            close((pair[0] * pair[1]).mean(), 0.0, pair[0].size ** -0.5)
    # no row or column of its own mean or size
    for axis in (0, 1):
        assert stats.kstest(base.mean(axis) * R**0.5, "norm").pvalue > 1e-5
        assert stats.kstest(((base**2).sum(axis) - R) / (2 * R) ** 0.5, "norm").pvalue > 1e-5  # chi-squared of 512, nearly normal


# --- distributions ----------------------------------------------------------------------------------------------------------------


def test_bits_are_even():
    bits = np.asarray(sample_bits(key_of(), jnp.arange(R), C)).reshape(-1)
    for bit in range(32):
        close(((bits >> bit) & 1).mean(), 0.5, 0.5 / COUNT**0.5)
    # as many repeats as random words have: n^2 / 2^33 = 8
    assert len(bits) - len(np.unique(bits)) < 8 + 5 * 8**0.5


def test_words_repeat_as_often_as_random_ones():
    """8,388,608 words: n^2 / 2^33 = 8,192 repeats. Rows that were shifts of one another along a column would make thousands more, or none."""
    rows, columns = 8192, 1024
    words = np.sort(np.asarray(sample_bits(key_of(), jnp.arange(rows), columns)).reshape(-1))
    close((words[1:] == words[:-1]).sum(), 8192, 8192**0.5)


def test_rows_of_two_streams_that_meet_once_part_again():
    """Among 131,072 rows of each of 4 streams some 24 pairs agree in one column; none may be the same row from there on."""
    streams = [np.asarray(sample_bits(key_of(layer=layer), jnp.arange(1 << 17), 2)) for layer in range(4)]
    met = 0
    for i, one in enumerate(streams):
        for other in streams[:i]:
            _, here, there = np.intersect1d(one[:, 0], other[:, 0], return_indices=True)
            met += len(here)
            assert (one[here, 1] != other[there, 1]).all()
    assert met > 4


def test_uniform():
    values = np.asarray(sample_uniform(key_of(), jnp.arange(R), C), np.float64).reshape(-1)
    assert 0 < values.min() < 1e-4 and 1 - 1e-4 < values.max() < 1
    close(values.mean(), 0.5, (1 / 12 / COUNT) ** 0.5)
    close(values.var(), 1 / 12, (1 / 180 / COUNT) ** 0.5)
    assert stats.kstest(values, "uniform").pvalue > 1e-5


def test_the_ends_of_the_uniform_are_inside_and_their_normals_finite(monkeypatch):
    for word, uniform in ((0, 2.0**-24), (2**32 - 1, 1 - 2.0**-24)):
        monkeypatch.setattr(draws, "bits", lambda key, rows, columns, word=word: jnp.full((rows.shape[0], columns), word, jnp.uint32))
        assert draws.uniform(key_of(), jnp.arange(1), 1)[0, 0] == uniform
        assert abs(abs(draws.normal(key_of(), jnp.arange(1), 1)[0, 0]) - stats.norm.isf(2.0**-24)) < 1e-3


def test_normal_moments_and_shape(base):
    close(base.mean(), 0.0, COUNT**-0.5)
    close(base.var(), 1.0, (2 / COUNT) ** 0.5)
    close(stats.skew(base, axis=None), 0.0, (6 / COUNT) ** 0.5)
    close(stats.kurtosis(base, axis=None), 0.0, (24 / COUNT) ** 0.5)
    assert stats.kstest(base.reshape(-1), "norm").pvalue > 1e-5


def test_normal_tails():
    """4,194,304 draws: beyond 4 standard deviations 133 are expected on each side."""
    rows, columns = 4096, 1024
    values = np.asarray(sample_normal(key_of(), jnp.arange(rows), columns))
    for sigma in (1, 2, 3, 4):
        p = stats.norm.sf(sigma)
        for tail in ((values > sigma).mean(), (values < -sigma).mean()):
            close(tail, p, (p / values.size) ** 0.5)
    assert 4.5 < abs(values).max() < 5.4


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_mask(rate):
    mask = np.asarray(jax.jit(draws.dropout_mask, static_argnums=(2, 3))(key_of(), jnp.arange(R), C, rate))
    assert set(np.unique(mask)) == {0.0, np.float32(1 / (1 - rate))}
    close((mask == 0).mean(), rate, (rate * (1 - rate) / COUNT) ** 0.5)
    close(mask.mean(dtype=np.float64), 1.0, (rate / (1 - rate) / COUNT) ** 0.5)


def test_dropout_of_nothing():
    np.testing.assert_array_equal(draws.dropout_mask(key_of(), jnp.arange(R), C, 0.0), 1.0)
