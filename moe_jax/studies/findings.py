"""The sentences of a report: each is produced from one tested contrast and carries its effect, interval, n and p."""

from __future__ import annotations

import dataclasses

from moe_jax.studies.analysis import Analysis, cell_text, interval_text, level_text, number, p_text, t_text
from moe_jax.studies.design import CellKey, Comparison, Design, Metric
from moe_jax.studies.stats import Contrast


@dataclasses.dataclass(frozen=True)
class Finding:
    """One sentence and the contrast that it states."""

    text: str
    contrast: Contrast


def findings(analysis: Analysis) -> list[Finding]:
    """One finding for each comparison that could be tested, resolved ones first, in the order of declaration."""
    tested = [(c, found) for c in analysis.design.comparisons if (found := analysis.contrasts[c.name]) is not None]
    ordered = sorted(tested, key=lambda pair: not pair[1].resolved)
    return [Finding(sentence(analysis.design, comparison, found), found) for comparison, found in ordered]


def sentence(design: Design, comparison: Comparison, found: Contrast) -> str:
    """What a contrast says, in words: an effect with its interval, or that the design cannot resolve it and what it could have seen."""
    metric = design.metric(comparison.metric)
    if found.mean == 0 and found.sd == 0:
        return f"No difference at all: {_question(design, comparison, metric)}: the difference is 0 in each of {found.n} seeds."
    return _resolved(design, comparison, metric, found) if found.resolved else _unresolved(design, comparison, metric, found)


def verdict(design: Design, comparison: Comparison, found: Contrast | None) -> str:
    """The last column of a table: 'higher, worse' when resolved, 'unresolved', or that seeds are lacking."""
    if found is None:
        return "too few seeds"
    if not found.resolved:
        return "unresolved after Holm" if found.p <= found.alpha else "unresolved"
    metric = design.metric(comparison.metric)
    goodness = _goodness(metric, found.mean) if shape(comparison) == "difference" else ""
    return ("higher" if found.mean > 0 else "lower") + (f", {goodness}" if goodness else "")


def subject(design: Design, comparison: Comparison) -> str:
    """What is compared, in words: 'noise_std 0.1 instead of 0.0 at balance_weight 0.01'; the name for a contrast of another shape."""
    cells = [cell for _, cell in comparison.terms]
    if shape(comparison) == "difference":
        rest = _shared(design, cells[:2])
        return _change(design, cells[0], cells[1]) + (f" at {rest}" if rest else "")
    if shape(comparison) == "interaction":
        here, there = _places(design, comparison)
        return f"{_change(design, cells[0], cells[1])}, at {here} against {there}"
    return f"contrast '{comparison.name}'"


def shape(comparison: Comparison) -> str:
    """'difference' (of two cells), 'interaction' (2 x 2, as design.interaction writes it) or 'contrast' (any other)."""
    coefficients = [c for c, _ in comparison.terms]
    if coefficients == [1.0, -1.0]:
        return "difference"
    if coefficients != [1.0, -1.0, -1.0, 1.0]:
        return "contrast"
    a1b1, a0b1, a1b0, a0b0 = (dict(cell) for _, cell in comparison.terms)
    a, b = ({n for n in a1b1 if a1b1[n] != other[n]} for other in (a0b1, a1b0))
    crossed = {**a1b1, **{n: a0b1[n] for n in a}, **{n: a1b0[n] for n in b}}
    return "interaction" if not a & b and a0b0 == crossed else "contrast"


def _resolved(design: Design, comparison: Comparison, metric: Metric, found: Contrast) -> str:
    up, what = found.mean > 0, subject(design, comparison)
    interval = found.interval if up else (-found.interval[1], -found.interval[0])
    amount = f"{_with_unit(abs(found.mean), metric)} {interval_text(interval, metric.decimals)}"
    evidence = _evidence(design, found)
    if shape(comparison) == "difference":
        goodness = _goodness(metric, found.mean)
        return f"{what} {'raises' if up else 'lowers'} {metric.label} by {amount}{goodness and ', which is ' + goodness} ({evidence})."
    if shape(comparison) == "interaction":
        here, there = _places(design, comparison)
        effect = f"The effect on {metric.label} of {_change(design, comparison.terms[0][1], comparison.terms[1][1])}"
        return f"{effect} is {'higher' if up else 'lower'} at {here} than at {there}, by {amount} ({evidence})."
    return f"The {what} of {metric.label} is {_signed(metric, found)} ({evidence})."


def _unresolved(design: Design, comparison: Comparison, metric: Metric, found: Contrast) -> str:
    smallest = found.smallest_resolvable if found.smallest_in_family is None else found.smallest_in_family
    alone = ""
    if found.p <= found.alpha:
        size = sum(c.family == comparison.family for c in design.comparisons)
        alone = f"; alone it would be resolved (p = {p_text(found.p)}), as one of {size} comparisons it is not"
    return (
        f"Unresolved: {_question(design, comparison, metric)}. The difference is {_signed(metric, found)} "
        f"({_evidence(design, found)}{alone}); the smallest effect this design could have seen is {_with_unit(smallest, metric)}."
    )


def _question(design: Design, comparison: Comparison, metric: Metric) -> str:
    if shape(comparison) == "difference":
        return f"whether {subject(design, comparison)} changes {metric.label}"
    if shape(comparison) == "interaction":
        here, there = _places(design, comparison)
        change = _change(design, comparison.terms[0][1], comparison.terms[1][1])
        return f"whether the effect on {metric.label} of {change} differs between {here} and {there}"
    return f"whether the {subject(design, comparison)} of {metric.label} differs from zero"


def _evidence(design: Design, found: Contrast) -> str:
    seeds = f"n = {found.n}" if found.n == len(design.seeds) else f"n = {found.n} of {len(design.seeds)} seeds"
    p = f"p = {p_text(found.p)}" if found.holm_p is None else f"Holm p = {p_text(found.holm_p)}"
    return f"{seeds}, t = {t_text(found.t)}, {p.replace('= <', '< ')}"


def _goodness(metric: Metric, mean: float) -> str:
    return "" if not metric.better else "worse" if (mean > 0) == (metric.better == "lower") else "better"


def _with_unit(value: float, metric: Metric) -> str:
    return number(value, metric.decimals) + (f" {metric.unit}" if metric.unit else "")


def _signed(metric: Metric, found: Contrast) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{number(found.mean, metric.decimals, sign=True)}{unit} {interval_text(found.interval, metric.decimals)}"


def _change(design: Design, of: CellKey, minus: CellKey) -> str:
    new, old = dict(of), dict(minus)
    changed = [f for f in design.factors if new[f.name] != old[f.name]]
    return " and ".join(f"{f.label} {level_text(new[f.name])} instead of {level_text(old[f.name])}" for f in changed)


def _shared(design: Design, cells: list[CellKey]) -> str:
    first = dict(cells[0])
    return cell_text(design, first, only=[n for n in first if all(dict(cell)[n] == first[n] for cell in cells)])


def _places(design: Design, comparison: Comparison) -> tuple[str, str]:
    """Where an interaction compares the effect: ('balance_weight 0.0', 'balance_weight 0.01')."""
    here, there = dict(comparison.terms[0][1]), dict(comparison.terms[2][1])
    changed = [n for n in here if here[n] != there[n]]
    return cell_text(design, here, only=changed), cell_text(design, there, only=changed)
