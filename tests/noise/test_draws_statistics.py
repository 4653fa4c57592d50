"""The draws as a random source: a battery of checks with a stated false-alarm level, and weak generators that it catches.

Each check gives p-values: the probability that a true generator would be at least as far off. A check fails when one is below THRESHOLD. About 730
are looked at, so a true generator had a chance of at most 1 in 1,000 (OVERALL) of failing anything; seeds are fixed, so a test passes always or never.
Where a statistic is a mean of many terms, its p-value is that of the normal distribution.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe_jax import keys
from moe_jax.keys import PASSES, PHASES, Draw, mix
from moe_jax.noise import draws

OVERALL, NUMBERS = 1e-3, 750
THRESHOLD = OVERALL / NUMBERS
SIZE = 512
BASE: dict[str, Any] = dict(seed=11, step=5, phase="train", layer=3, site="router_logits", pass_="forward")
NEIGHBOURS = dict(seed=dict(seed=12), step=dict(step=6), layer=dict(layer=4), crossed=dict(seed=5, step=11), opposite=dict(seed=12, step=4))


class Source:
    """The draws of moe_jax at coordinates; what is monkeypatched in `draws` and `keys` when it is made counts."""

    def __init__(self):
        self._sample = {
            kind: jax.jit(lambda key, rows, columns, kind=kind: getattr(draws, kind)(key, rows, columns), static_argnums=2)
            for kind in ("bits", "uniform", "normal")
        }
        self._key = jax.jit(
            lambda seed, step, layer, phase, site, pass_: keys.stream(Draw(seed, step, phase).key(), layer, site, pass_),
            static_argnames=("phase", "site", "pass_"),
        )

    def __call__(self, kind: str, rows: int = SIZE, columns: int = SIZE, **changes) -> np.ndarray:
        at = {name: np.uint32(value & 0xFFFFFFFF) if isinstance(value, int) else value for name, value in (BASE | changes).items()}
        sample = np.asarray(self._sample[kind](self._key(**at), jnp.arange(rows), columns))
        return sample if kind == "bits" else sample.astype(np.float64)


class NumPy:
    """The control: NumPy's Philox in the same place, which a battery with a wrong statistic would fail."""

    def __call__(self, kind, rows=SIZE, columns=SIZE, **changes):
        words = [value if isinstance(value, int) else keys.name_word(value) for value in (BASE | changes).values()]
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([word & 0xFFFFFFFF for word in words])))
        if kind == "bits":
            return generator.integers(0, 2**32, (rows, columns), np.uint32)
        return generator.random((rows, columns)) if kind == "uniform" else generator.standard_normal((rows, columns))


# --- p-values ---------------------------------------------------------------------------------------------------------------------


def far(value, expected, standard_error) -> np.ndarray:
    """Two-sided, of a value that is normal with this mean and standard error."""
    return np.atleast_1d(2 * stats.norm.sf(abs((value - expected) / standard_error)))


def rare(count, distribution) -> float:
    """Two-sided, of a count that has this discrete distribution."""
    return min(1.0, 2 * min(distribution.cdf(count), distribution.sf(count - 1)))


def even(cells: np.ndarray, count: int) -> float:
    """Chi-squared of cell numbers 0 to count - 1 that should be equally likely."""
    return stats.chisquare(np.bincount(cells.reshape(-1), minlength=count)).pvalue


def unrelated(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Independent standard normals of one shape: the mean products of values and of centred squares are 0."""
    n = one.size
    return [*far((one * other).mean(), 0, n**-0.5), *far(((one**2 - 1) * (other**2 - 1)).mean(), 0, 2 * n**-0.5)]


# --- the battery: check(source) -> p-values by what they are of ---------------------------------------------------------------------


def moments(source):
    """Mean, variance, skew and kurtosis (as Hermite polynomials) of 1,048,576 normals, of two seeds."""
    for seed in (11, 2**31):
        x = source("normal", 1024, 1024, seed=seed)
        square = x * x
        hermite = (x, square - 1, x * (square - 3), square * (square - 6) + 3)  # orthogonal, of variance 1, 2, 6, 24
        yield (
            f"seed {seed}",
            [far(value.mean(), 0, (factor / x.size) ** 0.5)[0] for value, factor in zip(hermite, (1, 2, 6, 24), strict=True)],
        )


def tails(source):
    """4,194,304 normals: beyond 4 standard deviations 133 are expected on each side."""
    x = source("normal", 4096, 1024)
    for sigma in (1, 2, 3, 3.5, 4):
        expected = stats.binom(x.size, stats.norm.sf(sigma))
        yield f"{sigma} sigma", [rare((x > sigma).sum(), expected), rare((x < -sigma).sum(), expected)]


def kolmogorov_smirnov(source):
    """The distribution functions of values, of row and column means and of row and column sums of squares."""
    x = source("normal", 1024, 1024)
    yield "normal", [stats.kstest(x.reshape(-1), "norm").pvalue]
    yield "uniform", [stats.kstest(source("uniform", 1024, 1024).reshape(-1), "uniform").pvalue]
    for axis in (0, 1):
        yield f"means along {axis}", [stats.kstest(x.mean(axis) * 32, "norm").pvalue]
        yield f"squares along {axis}", [stats.kstest((x**2).sum(axis), stats.chi2(1024).cdf).pvalue]


def chi_square(source):
    """Uniforms in 4,096 bins, the low 12 bits of the words, and pairs of neighbours in 64 x 64 bins of their high and of their low bits."""
    yield "uniform", [even((source("uniform", 1024, 1024) * 4096).astype(np.int64), 4096)]
    words = source("bits", 1024, 1024)
    yield "low bits", [even((words & 4095).astype(np.int64), 4096)]
    for bits, cells in (("high", (words >> 26).astype(np.int64)), ("low", (words & 63).astype(np.int64))):
        yield f"{bits} bits of column pairs", [even(cells[:, ::2] * 64 + cells[:, 1::2], 4096)]
        yield f"{bits} bits of row pairs", [even(cells[::2] * 64 + cells[1::2], 4096)]


def fair_bits(source):
    """Each of the 32 bits is even, and no two agree more or less often than not: in one word, or in neighbours along a row or a column."""
    words = source("bits")
    signs = ((words[..., None] >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float32) * 2 - 1
    flat = signs.reshape(-1, 32)
    yield "each", far(flat.mean(0, dtype=np.float64), 0, words.size**-0.5)
    yield "pairs in a word", far((flat.T @ flat / words.size)[np.triu_indices(32, 1)], 0, words.size**-0.5)
    for axis, (one, other) in {"columns": (signs[:, 1:], signs[:, :-1]), "rows": (signs[1:], signs[:-1])}.items():
        yield f"the same bit in neighbouring {axis}", far((one * other).mean((0, 1), dtype=np.float64), 0, (one.size / 32) ** -0.5)


def lags(source):
    """Correlation of values and of squares along rows and along columns."""
    x = source("normal")
    for lag in (1, 2, 3, 8, 64):
        yield f"columns, lag {lag}", unrelated(x[:, lag:], x[:, :-lag])
        yield f"rows, lag {lag}", unrelated(x[lag:], x[:-lag])


def across(source):
    """The same coordinates in another stream: values, squares, and how many of the 32 bits differ. Then lag 1 along 64 streams."""
    others = [
        *NEIGHBOURS.values(),
        *(dict(seed=seed) for seed in (10, -11, 11 + 2**16, 11 ^ 2**31)),
        *(dict(step=step) for step in (4, 5 + 2**16)),
        *(dict(layer=layer) for layer in (-1, 2)),
        *(dict(phase=phase) for phase in PHASES if phase != BASE["phase"]),
        *(dict(site=site) for site in ("router_input", "router_gemm", "expert_up", "expert_gate", "attention_q", "lm_head")),
        *(dict(pass_=pass_) for pass_ in PASSES if pass_ != BASE["pass_"]),
    ]
    x, words = source("normal", 256), source("bits", 256)
    for changes in others:
        differ = np.bitwise_count(words ^ source("bits", 256, **changes)).mean()
        yield str(changes), [*unrelated(x, source("normal", 256, **changes)), *far(differ, 16, (8 / words.size) ** 0.5)]
    for name in ("seed", "step", "layer"):
        series = np.stack([source("normal", 64, 64, **{name: value}) for value in range(64)])
        yield f"64 of {name}", unrelated(series[1:], series[:-1])


def shifted(source):
    """No neighbouring stream is a moved copy: not a word-for-word one in any order, nor a correlated one at any of the 65,536 cyclic shifts."""
    words, x = source("bits"), source("normal", 256, 256)
    spectrum = np.fft.rfft2(x)
    shared = stats.poisson(words.size**2 / 2**32)  # 16
    for name, changes in NEIGHBOURS.items():
        yield f"{name}: shared words", [rare(np.isin(words, source("bits", **changes)).sum(), shared)]
        products = np.fft.irfft2(spectrum * np.fft.rfft2(source("normal", 256, 256, **changes)).conj(), x.shape)
        yield f"{name}: shifts", [min(1.0, x.size * far(abs(products).max(), 0, x.size**0.5)[0])]
    own = np.fft.irfft2(abs(spectrum) ** 2, x.shape).reshape(-1)[1:]
    yield "itself: shifts", [min(1.0, x.size * far(abs(own).max(), 0, x.size**0.5)[0])]


def repeats(source):
    """Among 4,194,304 words 2,048 pairs are equal; and where rows of two of 8 streams agree in one column, they part in the next."""
    words = np.sort(source("bits", 4096, 1024).reshape(-1))
    yield "equal words", [rare((words[1:] == words[:-1]).sum(), stats.poisson(words.size**2 / 2**33))]
    columns = np.concatenate([source("bits", 1 << 16, 2, layer=layer) for layer in range(8)])
    columns = columns[np.argsort(columns[:, 0])]
    met = columns[1:, 0] == columns[:-1, 0]
    yield "rows that meet", [rare(met.sum(), stats.poisson(len(columns) ** 2 / 2**33))]  # 32
    yield "and stay together", [rare((met & (columns[1:, 1] == columns[:-1, 1])).sum(), stats.poisson(len(columns) ** 2 / 2**65))]


CHECKS = {check.__name__: check for check in (moments, tails, kolmogorov_smirnov, chi_square, fair_bits, lags, across, shifted, repeats)}


def alarms(check: str, source) -> dict[str, float]:
    """The p-values below the threshold."""
    smallest = {label: float(np.min(found)) for label, found in CHECKS[check](source)}
    return {label: p for label, p in smallest.items() if p < THRESHOLD}


@pytest.fixture(scope="module")
def source():
    return Source()


@pytest.mark.parametrize("check", CHECKS)
def test_draws_pass(check, source):
    assert alarms(check, source) == {}


@pytest.mark.slow
def test_the_false_alarm_level_is_the_stated_one():
    """The control's p-values: as many as stated, none an alarm, and not crowded at 0 (or the level would be worse than it says)."""
    found = np.concatenate([np.ravel(p) for check in CHECKS.values() for _, p in check(NumPy())])
    assert 0.9 * NUMBERS < len(found) <= NUMBERS
    assert found.min() >= THRESHOLD
    for level in (0.001, 0.01, 0.1):
        assert rare((found < level).sum(), stats.binom(len(found), level)) > 1e-3, (level, (found < level).mean(), len(found))


# --- power: weak generators that must fail --------------------------------------------------------------------------------------------

slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # one weak generator of each kind is in every run


def _words(rows, columns, part):
    return rows.astype(jnp.uint32)[:, None], (part[0] + jnp.arange(columns, dtype=jnp.uint32))[None, :]


def _row_word(key, rows):
    return mix(mix(rows ^ key[0]) + key[1])


def without_the_last_mix(key, rows, columns, part=(0, 0)):
    r, c = _words(rows, columns, part)
    return (_row_word(key, r) + mix(c + jnp.uint32(0x9E3779B9))) ^ key[1]


def without_the_key_in_the_last_mix(key, rows, columns, part=(0, 0)):
    r, c = _words(rows, columns, part)
    return mix(_row_word(key, r) + mix(c + jnp.uint32(0x9E3779B9)))


def with_columns_that_count(key, rows, columns, part=(0, 0)):
    r, c = _words(rows, columns, part)
    return mix((_row_word(key, r) + c) ^ key[1])


def with_half_a_mix(key, rows, columns, part=(0, 0)):
    r, c = _words(rows, columns, part)
    word = (_row_word(key, r) + c) ^ key[1]
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    return word ^ (word >> 15)


def congruential(key, rows, columns, part=(0, 0)):
    r, c = _words(rows, columns, part)
    return mix(r ^ key[0]) + key[1] + (r * jnp.uint32(columns) + c) * jnp.uint32(1664525)


def with_a_loaded_bit(key, rows, columns, part=(0, 0)):
    r, c = _words(rows, columns, part)
    word = mix((_row_word(key, r) + mix(c)) ^ key[1])
    return jnp.where(mix(word + jnp.uint32(1)) < jnp.uint32(2**32 // 64), word | jnp.uint32(32), word)  # one bit, set 1/128 too often


@pytest.mark.parametrize(
    "bits, check",
    [
        (without_the_last_mix, "lags"),
        slow(without_the_last_mix, "fair_bits"),
        slow(without_the_last_mix, "shifted"),
        slow(without_the_key_in_the_last_mix, "repeats"),
        slow(with_columns_that_count, "repeats"),
        slow(with_half_a_mix, "chi_square"),
        slow(congruential, "chi_square"),
        slow(with_a_loaded_bit, "fair_bits"),
    ],
)
def test_weak_bits_fail(bits, check, monkeypatch):
    monkeypatch.setattr(draws, "bits", bits)
    assert alarms(check, Source())


def _word(value):
    return jnp.uint32(value & 0xFFFFFFFF) if isinstance(value, int) else jnp.asarray(value).astype(jnp.uint32)


@pytest.mark.parametrize(
    "fold, check",
    [
        (lambda key, value: key + _word(value), "shifted"),  # seed 5 step 11 is seed 11 step 5
        slow(
            lambda key, value: jnp.stack([key[0] ^ _word(value), key[1]]),
            "shifted",
        ),  # rows of one seed are rows of another
        slow(lambda key, value: mix(key * jnp.uint32(3) + (_word(value) & 0xFFFF)), "across"),  # half of the value
    ],
    ids=["sum", "one word", "16 bits"],
)
def test_weak_keys_fail(fold, check, monkeypatch):
    monkeypatch.setattr(keys, "fold", fold)
    assert alarms(check, Source())


@pytest.mark.parametrize(
    "distort, check",
    [
        (lambda x: x * 1.01, "moments"),
        slow(lambda x: x + 0.01, "kolmogorov_smirnov"),
        slow(lambda x: np.clip(x, -3.9, 3.9), "tails"),
        slow(lambda x: x + 0.05 * np.roll(x, 1, 1), "lags"),
        slow(lambda x: x + 0.05 * np.roll(x, (37, 200), (0, 1)), "shifted"),
    ],
)
def test_weak_normals_fail(distort, check):
    source = Source()
    assert alarms(check, lambda kind, *sizes, **at: distort(source(kind, *sizes, **at)) if kind == "normal" else source(kind, *sizes, **at))


@pytest.mark.slow
def test_twelve_uniforms_fail():
    """The sum of twelve uniforms, a popular normal, has too thin tails: its kurtosis is -0.1."""
    source = Source()

    def summed(kind, rows=SIZE, columns=SIZE, **at):
        return source("uniform", rows, 12 * columns, **at).reshape(rows, columns, 12).sum(-1) - 6

    assert alarms("moments", summed)
