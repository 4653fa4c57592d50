"""The statistics of a paired factorial: differences within a seed, their t interval and exact p, Holm, and what could have been seen.

Sources: the paired t test is Student (1908); the exact p is Fisher's randomisation test by sign flips (The Design of Experiments,
1935, section 21); Holm's step-down correction is Holm (1979), Scand. J. Statist. 6:65-70; power comes from the noncentral t.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, special

from moe_jax.studies.design import CellKey, Comparison, require

ByCell = Mapping[CellKey, Mapping[int, float]]  # values of one metric: [cell][seed]
EXACT_LIMIT = 22  # seeds; beyond it 2^n sign patterns no longer fit in memory and the exact p is nan
POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What n paired differences say. All numbers are in the metric's unit unless said otherwise."""

    n: int  # seeds
    mean: float
    sd: float  # sample standard deviation of the differences (ddof 1)
    se: float  # sd / sqrt(n)
    t: float  # mean / se; +-inf when every seed gives the same non-zero difference
    df: int  # n - 1
    p: float  # two-sided, from t
    interval: tuple[float, float]  # 1 - alpha t interval of the mean; not corrected for other comparisons
    exact_p: float  # two-sided, over all 2^n sign flips; never below 2 / 2^n; nan beyond EXACT_LIMIT seeds
    smallest_resolvable: float  # the true effect that this n and sd would detect with 80 % power at alpha, alone
    differences: tuple[float, ...]  # one per seed
    seeds: tuple[int, ...] = ()
    alpha: float = 0.05
    holm_p: float | None = None  # p corrected for the family that the comparison belongs to; None outside a family
    smallest_in_family: float | None = None  # the same at alpha / (size of the family): enough whatever the other members show
    name: str = ""
    metric: str = ""
    family: str = ""

    @property
    def resolved(self) -> bool:
        """Whether the effect differs from zero at alpha, by the Holm-corrected p when there is a family."""
        return (self.p if self.holm_p is None else self.holm_p) <= self.alpha

    @property
    def smallest(self) -> float:
        """The smallest resolvable effect: that of the family when there is one."""
        return self.smallest_resolvable if self.smallest_in_family is None else self.smallest_in_family


@dataclasses.dataclass(frozen=True)
class Summary:
    """The values of one cell, one per seed."""

    n: int
    mean: float
    sd: float  # sample standard deviation (ddof 1); nan for one value
    population_sd: float  # ddof 0: what the first study printed
    interval: tuple[float, float]  # t interval of the mean; nan for one value


def paired(a: Sequence[float], b: Sequence[float], seeds: Sequence[int] | None = None, alpha: float = 0.05) -> Contrast:
    """Compares a with b, both in the order of `seeds`: the effect is mean(a - b), positive when a is larger.

    Raises ValueError for different lengths, fewer than 2 pairs or values that are not finite.

    Example: `paired([130.86, 132.79, 130.51], [129.75, 131.55, 129.40])` has mean 1.153, sd 0.075, t 26.6.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"paired needs two sequences of the same length, one value per seed; got shapes {first.shape} and {second.shape}")
    return _of_differences(first - second, seeds, alpha)


def contrast(values: ByCell, comparison: Comparison, alpha: float = 0.05) -> Contrast:
    """Tests a declared comparison on values[cell][seed], over the seeds that every cell of the comparison has.

    Raises ValueError when fewer than 2 seeds have all the cells.
    """
    common = seeds_of(values, comparison)
    if len(common) < 2:
        counts = ", ".join(str(len(values.get(cell, {}))) for _, cell in comparison.terms)
        raise ValueError(f"comparison {comparison.name!r}: {len(common)} seed(s) have all its cells (per cell: {counts}); 2 are needed")
    per_seed = [math.fsum(c * values[cell][seed] for c, cell in comparison.terms) for seed in common]
    found = _of_differences(np.asarray(per_seed), common, alpha)
    return dataclasses.replace(found, name=comparison.name, metric=comparison.metric, family=comparison.family)


def contrasts(values: Mapping[str, ByCell], comparisons: Iterable[Comparison], alpha: float = 0.05) -> dict[str, Contrast | None]:
    """Every declared comparison on values[metric][cell][seed], with Holm's correction inside each family; None where seeds lack.

    A family keeps its declared size while runs are missing (an untested member counts as p = 1), so a partial study is not
    corrected less than the whole one.
    """
    declared = list(comparisons)
    found: dict[str, Contrast | None] = {}
    for c in declared:
        enough = len(seeds_of(values.get(c.metric, {}), c)) >= 2
        found[c.name] = contrast(values[c.metric], c, alpha) if enough else None
    for family in {c.family for c in declared}:
        names = [c.name for c in declared if c.family == family]
        corrected = holm([1.0 if (member := found[name]) is None else member.p for name in names])
        for name, p in zip(names, corrected, strict=True):
            if (member := found[name]) is not None:
                smallest = detectable(member.n, alpha / len(names)) * member.se
                found[name] = dataclasses.replace(member, holm_p=p, smallest_in_family=smallest)
    return found


def seeds_of(values: ByCell, comparison: Comparison) -> tuple[int, ...]:
    """The seeds, ascending, for which every cell of the comparison has a value."""
    return tuple(sorted(set.intersection(*(set(values.get(cell, {})) for _, cell in comparison.terms))))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p values, in the order given: the i-th smallest of m is multiplied by m - i + 1, then made monotone.

    Reject where the result is <= alpha: the chance of any false rejection in the family is at most alpha, whatever the dependence
    between the tests. Written out because scipy has only the false discovery rate. Raises ValueError for a p outside [0, 1].
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):  # a nan fails this too
        raise ValueError(f"holm needs a list of p values in [0, 1]; got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return tuple(map(float, adjusted))


def summary(values: Iterable[float], alpha: float = 0.05) -> Summary:
    """Mean, both standard deviations and the t interval of one cell. Raises ValueError for no values or values that are not finite."""
    x = np.asarray(list(values), np.float64)
    if x.size < 1 or not np.all(np.isfinite(x)):
        raise ValueError(f"summary needs at least 1 finite value; got {x.tolist()}")
    mean, sd = float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else math.nan
    half = t_quantile(x.size - 1, alpha) * sd / math.sqrt(x.size)
    return Summary(x.size, mean, sd, float(x.std()), (mean - half, mean + half))


def smallest_exact_p(n: int) -> float:
    """The smallest two-sided exact p that n pairs can give: 2 / 2^n, so .25 at n = 3 and below .05 only from n = 6 on."""
    return 2.0 ** (1 - n)


def t_quantile(df: int, alpha: float) -> float:
    """The two-sided critical value of Student's t: P(|t| > value) = alpha."""
    return float(special.stdtrit(df, 1 - alpha / 2))


# ---------------------------------------------------------------- the arithmetic; leading axes are independent repetitions


def t_test(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sample sd, t and two-sided p over the last axis. No spread: t is 0 for no difference at all, else infinite."""
    n = differences.shape[-1]
    mean, sd = differences.mean(-1), differences.std(-1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where((sd == 0) & (mean == 0), 0.0, mean / (sd / math.sqrt(n)))
    return mean, sd, t, 2 * special.stdtr(n - 1, -np.abs(t))


def sign_flip_p(differences: np.ndarray) -> np.ndarray:
    """Exact two-sided p over the last axis: the share of all 2^n sign patterns whose sum is at least as far from 0 as the one seen."""
    sums = np.zeros((*differences.shape[:-1], 1))
    for i in range(differences.shape[-1]):
        one = differences[..., i, None]
        sums = np.concatenate([sums + one, sums - one], axis=-1)
    seen = np.abs(differences.sum(-1, keepdims=True))
    rounding = 1e-12 * np.abs(differences).sum(-1, keepdims=True)  # a pattern that ties with the one seen must count
    return (np.abs(sums) >= seen - rounding).mean(-1)


@functools.cache
def detectable(n: int, alpha: float, power: float = POWER) -> float:
    """The true effect, in standard errors, that a two-sided paired t test of n pairs finds, sign and all, with probability `power`."""
    df, critical = n - 1, t_quantile(n - 1, alpha)

    def lacking(shift: float) -> float:
        return special.nctdtr(df, shift, critical) - (1 - power)

    high = critical + 1.0
    while lacking(high) > 0:
        high *= 2
    root: Any = optimize.brentq(lacking, 0.0, high, xtol=1e-9)
    return float(root)


def _of_differences(differences: np.ndarray, seeds: Sequence[int] | None, alpha: float) -> Contrast:
    n = differences.size
    values = differences.tolist()
    require(n >= 2, f"a paired comparison needs at least 2 seeds; got {n}", ValueError)
    require(np.all(np.isfinite(differences)), f"a paired comparison needs finite values; the differences are {values}", ValueError)
    require(seeds is None or len(seeds) == n, f"{n} pairs but {len(seeds or ())} seeds", ValueError)
    mean, sd, t, p = (float(x) for x in t_test(differences))
    se = sd / math.sqrt(n)
    half = t_quantile(n - 1, alpha) * se
    return Contrast(
        n=n,
        mean=mean,
        sd=sd,
        se=se,
        t=t,
        df=n - 1,
        p=p,
        interval=(mean - half, mean + half),
        exact_p=float(sign_flip_p(differences)) if n <= EXACT_LIMIT else math.nan,
        smallest_resolvable=detectable(n, alpha) * se,
        differences=tuple(values),
        seeds=tuple(seeds or ()),
        alpha=alpha,
    )
