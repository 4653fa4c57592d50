"""The sentences of a report: each is produced from one tested contrast and carries its effect, interval, n and p."""

from __future__ import annotations

import dataclasses

from moe_jax.studies.analysis import Analysis, cell_text, interval_text, level_text, number, p_words, t_text
from moe_jax.studies.design import Comparison, Design, Metric
from moe_jax.studies.stats import Contrast

# The words of each shape of comparison: what is compared, what is asked, and what is said once it is resolved.
WORDS = {
    "difference": ("{change}{at}", "whether {subject} changes {metric}", "{subject} {raises} {metric} by {amount}{goodness}"),
    "interaction": (
        "{change}, at {here} against {there}",
        "whether the effect on {metric} of {change} differs between {here} and {there}",
        "The effect on {metric} of {change} is {higher} at {here} than at {there}, by {amount}",
    ),
    "contrast": ("contrast '{name}'", "whether the {subject} of {metric} differs from zero", "The {subject} of {metric} is {signed}"),
}


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
    metric, words = design.metric(comparison.metric), _words(design, comparison)
    _, question, answer = WORDS[shape(comparison)]
    unit, evidence = metric.unit and f" {metric.unit}", _evidence(design, found)
    if found.mean == 0 and found.sd == 0:
        return f"No difference at all: {question.format(**words)}: the difference is 0 in each of {found.n} seeds."
    signed = f"{number(found.mean, metric.decimals, sign=True)}{unit} {interval_text(found.interval, metric.decimals)}"
    if found.resolved:
        words["raises"], words["higher"] = ("raises", "higher") if found.mean > 0 else ("lowers", "lower")
        interval = found.interval if found.mean > 0 else (-found.interval[1], -found.interval[0])
        words["amount"] = f"{number(abs(found.mean), metric.decimals)}{unit} {interval_text(interval, metric.decimals)}"
        said = answer.format(**words, signed=signed, goodness=_goodness(metric, found.mean, ", which is "))
        return f"{said} ({evidence})."
    alone = ""
    if found.p <= found.alpha:
        size = sum(c.family == comparison.family for c in design.comparisons)
        alone = f"; alone it would be resolved ({p_words(found.p)}), as one of {size} comparisons it is not"
    return (
        f"Unresolved: {question.format(**words)}. The difference is {signed} ({evidence}{alone}); "
        f"the smallest effect this design could have seen is {number(found.smallest, metric.decimals)}{unit}."
    )


def verdict(design: Design, comparison: Comparison, found: Contrast | None) -> str:
    """The last column of a table: 'higher, worse' when resolved, 'unresolved', or that seeds are lacking."""
    if found is None:
        return "too few seeds"
    if not found.resolved:
        return "unresolved after Holm" if found.p <= found.alpha else "unresolved"
    goodness = _goodness(design.metric(comparison.metric), found.mean, ", ") if shape(comparison) == "difference" else ""
    return ("higher" if found.mean > 0 else "lower") + goodness


def subject(design: Design, comparison: Comparison) -> str:
    """What is compared, in words: 'noise_std 0.1 instead of 0.0 at balance_weight 0.01'; the name for a contrast of another shape."""
    return _words(design, comparison)["subject"]


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


def _words(design: Design, comparison: Comparison) -> dict[str, str]:
    """What fills the sentences: `change` is 'noise_std 0.1 instead of 0.0'; `at` or `here` and `there` say in which cells."""
    kind, cells = shape(comparison), [dict(cell) for _, cell in comparison.terms]
    words = {"name": comparison.name, "metric": design.metric(comparison.metric).label}
    if kind != "contrast":
        new, old, other = cells[0], cells[1], cells[-2]  # `other`: of an interaction, the new level elsewhere
        changed = [f for f in design.factors if new[f.name] != old[f.name]]
        words["change"] = " and ".join(f"{f.label} {level_text(new[f.name])} instead of {level_text(old[f.name])}" for f in changed)
        rest = cell_text(design, new, only=[name for name in new if new[name] == old[name]])
        words["at"] = rest and f" at {rest}"
        moved = [name for name in new if new[name] != other[name]]
        words |= {"here": cell_text(design, new, only=moved), "there": cell_text(design, other, only=moved)}
    return {**words, "subject": WORDS[kind][0].format(**words)}


def _evidence(design: Design, found: Contrast) -> str:
    seeds = f"n = {found.n}" if found.n == len(design.seeds) else f"n = {found.n} of {len(design.seeds)} seeds"
    p = p_words(found.p) if found.holm_p is None else f"Holm {p_words(found.holm_p)}"
    return f"{seeds}, t = {t_text(found.t)}, {p}"


def _goodness(metric: Metric, mean: float, before: str) -> str:
    """`before` and whether a change in this direction is better or worse; nothing for a metric that is no goal."""
    return before + ("worse" if (mean > 0) == (metric.better == "lower") else "better") if metric.better else ""
