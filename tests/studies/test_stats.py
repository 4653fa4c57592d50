"""The statistics against published numbers, scipy, hand-worked examples and simulations at their nominal levels."""

import math

import numpy as np
import pytest
import scipy.stats

from moe_jax.studies import contrast, contrasts, difference, holm, interaction, paired, summary
from moe_jax.studies.stats import detectable, sign_flip_p, smallest_exact_p, t_test

NULL = 20_000  # repetitions of a simulation under no effect


def _between(hits, repetitions, level):
    """Whether a count lies within the binomial bounds (1 in 10,000 outside) of its nominal level."""
    low, high = scipy.stats.binom.ppf([5e-5, 1 - 5e-5], repetitions, level)
    return low <= hits <= high


# ---------------------------------------------------------------- the first study's table


@pytest.mark.parametrize(("weight", "mean", "sd", "t"), [(0.01, 1.153, 0.075, 26.6), (0.0, 1.173, 0.265, 7.7)])
def test_seed_table_small_noise_costs_perplexity(seed_table, weight, mean, sd, t):
    found = paired(seed_table["ppl"][0.1, weight], seed_table["ppl"][0.0, weight], seeds=(42, 43, 44))
    assert (round(found.mean, 3), round(found.sd, 3)) == (mean, sd)
    assert found.t == pytest.approx(t, abs=0.05)
    assert found.n == 3 and found.df == 2 and found.resolved
    assert found.interval[0] > 0


def test_seed_table_differences_by_seed(seed_table):
    ppl = seed_table["ppl"]
    expected = {
        ((0.1, 0.01), (0.0, 0.01)): (1.11, 1.24, 1.11),
        ((0.1, 0.0), (0.0, 0.0)): (0.91, 1.44, 1.17),
        ((0.5, 0.01), (0.0, 0.01)): (14.80, 14.44, 13.17),
        ((0.5, 0.0), (0.0, 0.0)): (14.04, 12.63, 14.60),
        ((0.0, 0.0), (0.0, 0.01)): (1.24, -0.05, -0.27),
        ((0.1, 0.0), (0.1, 0.01)): (1.04, 0.15, -0.21),
        ((0.5, 0.0), (0.5, 0.01)): (0.48, -1.86, 1.16),
    }
    for (of, minus), differences in expected.items():
        assert paired(ppl[of], ppl[minus]).differences == pytest.approx(differences, abs=1e-9)


def test_seed_table_large_noise_costs_fourteen(seed_table):
    ppl = seed_table["ppl"]
    assert round(paired(ppl[0.5, 0.01], ppl[0.0, 0.01]).mean, 2) == 14.14
    assert round(paired(ppl[0.5, 0.0], ppl[0.0, 0.0]).mean, 2) == 13.76


@pytest.mark.parametrize(("noise", "mean", "sd"), [(0.0, 0.31, 0.82), (0.1, 0.33, 0.64), (0.5, -0.07, 1.58)])
def test_seed_table_load_balancing_effect_on_perplexity_is_unresolved(seed_table, noise, mean, sd):
    found = paired(seed_table["ppl"][noise, 0.0], seed_table["ppl"][noise, 0.01])
    assert (round(found.mean, 2), round(found.sd, 2)) == (mean, sd)
    assert not found.resolved
    assert found.interval[0] < 0 < found.interval[1]
    assert found.smallest_resolvable > 2 * abs(found.mean)


def test_seed_table_load_balancing_is_unresolved_in_the_declared_family_and_noise_is_not(seed_design, seed_table):
    values = {
        metric: {
            tuple(sorted({"noise_std": n, "balance_weight": w}.items())): dict(zip((42, 43, 44), column, strict=True))
            for (n, w), column in seed_table[key].items()
        }
        for metric, key in {"val_ppl": "ppl", "usage_cv_seed": "cv"}.items()
    }
    found = contrasts(values, seed_design.comparisons, 0.05)
    resolved = {name for name, c in found.items() if c is not None and c.resolved}
    assert resolved == {c.name for c in seed_design.comparisons if c.family in ("primary", "usage")}
    assert all(c is not None and c.holm_p is not None and c.holm_p >= c.p for c in found.values())


def test_seed_table_standard_deviations_as_published(seed_table):
    cells = [summary(values) for values in seed_table["ppl"].values()]
    # in the order (0, .01), (0, 0), (.1, .01), (.1, 0), (.5, .01), (.5, 0)
    assert [round(c.sd, 3) for c in cells] == [1.154, 1.247, 1.228, 1.330, 1.717, 0.666]
    assert [f"{c.population_sd:.2f}" for c in cells] == ["0.94", "1.02", "1.00", "1.09", "1.40", "0.54"]
    # the published 131.38 is that of the log's unrounded values; the table's two decimals give 131.387
    assert [round(c.mean, 2) for c in cells] == [130.23, 130.54, 131.39, 131.71, 144.37, 144.30]


def test_seed_table_exact_p_cannot_go_below_a_quarter(seed_table):
    found = paired(seed_table["ppl"][0.5, 0.01], seed_table["ppl"][0.0, 0.01])
    assert found.exact_p == 0.25 == smallest_exact_p(3)
    assert found.p < 0.01


# ---------------------------------------------------------------- against scipy and by hand


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_paired_equals_scipy(n):
    a, b = np.random.default_rng(n).normal(size=(2, n)) + np.array([[0.7], [0.0]])
    found, reference = paired(a, b, alpha=0.1), scipy.stats.ttest_rel(a, b)
    assert (found.t, found.p, found.df) == pytest.approx((reference.statistic, reference.pvalue, n - 1))
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.9)))
    permuted = scipy.stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=10_000)
    assert found.exact_p == pytest.approx(permuted.pvalue)


def test_exact_p_by_hand():
    # |sums| of the 8 sign patterns of (1, 2, 4): 7, 5, 3, 1 twice each; the one seen is 1 + 2 - 4, the smallest
    assert paired([1, 2, -4], [0, 0, 0]).exact_p == 1.0
    assert paired([1, -2, 4], [0, 0, 0]).exact_p == 0.75
    assert paired([-1, 2, 4], [0, 0, 0]).exact_p == 0.5
    # ties count although rounding moves the sums: .1 + .2 - .3 is not exactly 0
    assert paired([0.1, 0.2, -0.3], [0, 0, 0]).exact_p == 1.0


def test_no_spread():
    same = paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert same.t == math.inf and same.p == 0 and same.interval == (1, 1) and same.resolved and same.exact_p == 0.25
    assert paired([1.0, 2.0], [2.0, 3.0]).t == -math.inf
    nothing = paired([2.0, 3.0, 4.0], [2.0, 3.0, 4.0])
    assert nothing.t == 0 and nothing.p == 1 and nothing.exact_p == 1 and not nothing.resolved


def test_holm_by_hand():
    # sorted .01 x4, .013 x3, .03 x2, .04 x1 = .04, .039, .06, .04; then never falling: .04, .04, .06, .06
    assert holm([0.01, 0.04, 0.03, 0.013]) == pytest.approx((0.04, 0.06, 0.06, 0.04))
    assert holm([0.6, 0.7]) == (1.0, 1.0)
    assert holm([0.02]) == (0.02,)
    assert holm([]) == ()


def test_resolved_uses_the_corrected_p():
    values = {"y": {(("f", level),): {s: level + 0.1 * s * level for s in (1, 2, 3)} for level in (0, 1)}}
    values["y"][("f", 2),] = {1: 0.0, 2: 0.3, 3: -0.2}
    first = difference("first", "y", {"f": 1}, {"f": 0})
    others = [difference(f"o{i}", "y", {"f": 2}, {"f": 0}) for i in range(40)]
    alone, crowded = contrasts(values, [first])["first"], contrasts(values, [first, *others])["first"]
    assert alone is not None and alone.resolved and alone.holm_p == alone.p
    assert crowded is not None and crowded.p == alone.p and crowded.holm_p == pytest.approx(41 * alone.p)
    assert not crowded.resolved and paired([1.1, 1.2, 1.3], [0, 0, 0]).resolved
    assert crowded.smallest_in_family == pytest.approx(detectable(3, 0.05 / 41) * crowded.se)


def test_a_family_keeps_its_declared_size_while_runs_are_missing():
    values = {"y": {(("f", 0),): {1: 0.0, 2: 0.0, 3: 0.0}, (("f", 1),): {1: 1.0, 2: 1.1, 3: 1.2}, (("f", 2),): {1: 4.0}}}
    declared = [difference("a", "y", {"f": 1}, {"f": 0}), difference("b", "y", {"f": 2}, {"f": 0})]
    found = contrasts(values, declared)
    assert found["b"] is None
    assert found["a"] is not None and found["a"].holm_p == pytest.approx(2 * found["a"].p)


def test_contrast_is_paired_by_seed_over_the_seeds_that_all_cells_have():
    values = {(("f", 0),): {3: 1.0, 1: 10.0, 2: 20.0}, (("f", 1),): {1: 11.0, 2: 22.0, 4: 5.0}}
    found = contrast(values, difference("c", "y", {"f": 1}, {"f": 0}))
    assert found.seeds == (1, 2) and found.differences == (1.0, 2.0)
    with pytest.raises(ValueError, match=r"1 seed\(s\) have all its cells \(per cell: 1, 3\); 2 are needed"):
        contrast({**values, (("f", 1),): {1: 11.0}}, difference("c", "y", {"f": 1}, {"f": 0}))


def test_interaction_is_a_difference_of_differences():
    rng = np.random.default_rng(0)
    y = {(a, b): rng.normal(size=4) for a in (0, 1) for b in (0, 1)}
    values = {(("a", a), ("b", b)): dict(enumerate(column)) for (a, b), column in y.items()}
    found = contrast(values, interaction("i", "y", "a", (0, 1), "b", (0, 1)))
    assert found.differences == pytest.approx(tuple((y[1, 1] - y[0, 1]) - (y[1, 0] - y[0, 0])))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired([1, 2, 3], [1, 2]), r"got shapes \(3,\) and \(2,\)"),
        (lambda: paired([1], [1]), "at least 2 seeds; got 1"),
        (lambda: paired([1, math.nan], [1, 2]), "needs finite values"),
        (lambda: paired([1, 2], [1, 2], seeds=[1]), "2 pairs but 1 seeds"),
        (lambda: holm([0.5, 1.5]), r"in \[0, 1\]; got \[0.5, 1.5\]"),
        (lambda: holm([math.nan]), r"in \[0, 1\]"),
        (lambda: summary([]), "at least 1 finite value"),
        (lambda: summary([math.inf]), "at least 1 finite value"),
    ],
)
def test_what_cannot_be_tested_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_summary_of_one_value_has_no_spread():
    found = summary([3.0])
    assert (found.n, found.mean, found.population_sd) == (1, 3.0, 0.0) and math.isnan(found.sd) and math.isnan(found.interval[0])


# ---------------------------------------------------------------- simulations: what the p values promise


@pytest.mark.parametrize("n", [3, 5])
def test_false_positive_rate_of_the_paired_t_test_is_nominal(n):
    """Seeds differ much more than cells do; pairing removes that, and 5 % of the tests of no effect reject."""
    rng = np.random.default_rng(n)
    seeds = 10 * rng.normal(size=(NULL, n))
    a, b = (seeds + rng.normal(size=(NULL, n)) for _ in range(2))
    *_, p = t_test(a - b)
    assert _between((p <= 0.05).sum(), NULL, 0.05)
    assert _between((p <= 0.01).sum(), NULL, 0.01)


def test_false_positive_rate_of_the_exact_test_holds_without_normality():
    """Differences from a two-peaked, heavy-tailed law: the exact test keeps its level, the largest multiple of 2/2^n below alpha."""
    rng = np.random.default_rng(8)
    differences = rng.standard_t(2, size=(NULL, 8)) + rng.choice([-3.0, 3.0], size=(NULL, 8))
    attainable = math.floor(0.05 * 2**7) / 2**7
    assert _between((sign_flip_p(differences) <= 0.05).sum(), NULL, attainable)
    assert attainable <= 0.05


def test_family_wise_error_after_holm_is_at_most_nominal_and_uncorrected_is_not():
    """Six comparisons against one control share its noise; at least one false rejection happens in at most 5 % of the studies."""
    rng, repetitions, m = np.random.default_rng(1), 4_000, 6
    values = rng.normal(size=(repetitions, m + 1, 5))
    *_, p = t_test(values[:, 1:] - values[:, :1])
    any_rejected = sum(min(holm(row)) <= 0.05 for row in p)
    assert any_rejected <= scipy.stats.binom.ppf(1 - 5e-5, repetitions, 0.05)
    assert (p.min(1) <= 0.05).mean() > 0.12  # the error that the correction is there for


@pytest.mark.parametrize("n", [3, 4, 8])
def test_smallest_resolvable_effect_is_found_with_80_percent_probability(n):
    rng, sd = np.random.default_rng(n), 0.6
    effect = detectable(n, 0.05) * sd / math.sqrt(n)
    mean, _, _, p = t_test(rng.normal(effect, sd, size=(NULL, n)))
    assert _between(((p <= 0.05) & (mean > 0)).sum(), NULL, 0.8)
    found = paired([1.0, 2.0, 4.0], [0, 0, 0])
    assert found.smallest_resolvable == pytest.approx(detectable(3, 0.05) * found.se)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 12])
@pytest.mark.parametrize("n", [2, 3, 10, 22])
def test_smallest_resolvable_effect_against_the_noncentral_t_of_scipy(n, alpha):
    shift, critical = detectable(n, alpha), scipy.stats.t.ppf(1 - alpha / 2, n - 1)
    assert scipy.stats.nct.sf(critical, n - 1, shift) == pytest.approx(0.8, abs=1e-6)
