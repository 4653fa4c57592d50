"""The tables of a study: the one of the first study made general, every number behind it, the contrasts, and what is fixed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from moe_jax import config_tools
from moe_jax.studies import stats
from moe_jax.studies.analysis import Analysis, analyse, cell_text, heading_of, interval_text, level_text, number, p_text, t_text
from moe_jax.studies.design import Cell, Comparison, Design, Metric, cell_key
from moe_jax.studies.document import Table, to_text
from moe_jax.studies.findings import verdict
from moe_jax.studies.ledger import Run


def console_table(design: Design, runs: Iterable[Run]) -> str:
    """The results and the contrasts as plain text for a terminal."""
    analysis = analyse(design, runs)
    tables = [results(analysis, brief=True)] + ([brief_contrasts(analysis)] if design.comparisons else [])
    return "\n\n".join(map(to_text, tables))


def results(analysis: Analysis, brief: bool = False) -> Table:
    """One row per cell: its levels, the headline metric with both deviations, the other metrics, time and n; `brief` has short headers."""
    design, first = analysis.design, analysis.design.metrics[0]
    others = [*design.metrics[1:], analysis.time]
    header = [f.label for f in design.factors] + [_column(m, brief) for m in (first, *others)] + ["n"]
    rows = []
    for cell in design.cells():
        values = [_spread(analysis, first, cell, population=True)] + [_spread(analysis, m, cell) for m in others]
        count = len(analysis.runs_of(cell))
        rows.append((*(level_text(cell[f.name]) for f in design.factors), *values, str(count)))
    note = "mean ± sample standard deviation over seeds; in brackets the population standard deviation, the ± of the first study."
    return Table("Results by cell", tuple(header), tuple(rows), words=len(design.factors), notes=(note,))


def contrasts(analysis: Analysis, metric: Metric) -> Table:
    """One row per declared comparison of one metric; the notes say how to read it."""
    header = ("effect", f"{analysis.confidence} interval", "t", "p", "Holm p", "exact p", "smallest resolvable", "n", "verdict")
    rows = [(c.name, *_contrast_row(analysis, c)) for c in analysis.design.comparisons if c.metric == metric.name]
    caption = f"Paired differences in {heading_of(metric)}"
    return Table(caption, ("comparison", *header), tuple(rows), last_words=1, notes=_contrast_notes(analysis.design))


def brief_contrasts(analysis: Analysis) -> Table:
    """Every comparison in one table with short headers and no notes, for a terminal; the metric is named where there are several."""
    comparisons = analysis.design.comparisons
    several = len({c.metric for c in comparisons}) > 1
    names = ("comparison", "metric") if several else ("comparison",)
    header = (*names, "effect", "interval", "t", "p", "Holm p", "exact p", "smallest", "n", "verdict")
    rows = [(c.name, *[c.metric] * several, *_contrast_row(analysis, c)) for c in comparisons]
    return Table("Contrasts, paired by seed", header, tuple(rows), words=len(names), last_words=1)


def every_number(analysis: Analysis) -> Table:
    """One row per metric and cell: n, mean, interval, both deviations, and the value of every seed."""
    design = analysis.design
    header = ["metric", "cell", "n", "mean", f"{analysis.confidence} interval", "sample sd", "population sd"]
    rows = []
    for metric in (*design.metrics, analysis.time):
        for cell in design.cells():
            if (found := analysis.summary(metric, cell)) is not None:
                mean, sd, population_sd = (number(x, metric.decimals) for x in (found.mean, found.sd, found.population_sd))
                numbers = (mean, interval_text(found.interval, metric.decimals), sd, population_sd)
                by_seed = analysis.values[metric.name][cell_key(cell)]
                each = (number(by_seed.get(seed, math.nan), metric.decimals) for seed in design.seeds)
                rows.append((heading_of(metric), cell_text(design, cell), str(found.n), *numbers, *each))
    return Table("Every metric, cell and seed", (*header, *(f"seed {seed}" for seed in design.seeds)), tuple(rows), words=2)


def evaluations(analysis: Analysis) -> Table:
    """One row per cell whose runs were evaluated several times: perplexity at the end, the best one, and the update of each seed's best."""
    design, rows = analysis.design, []
    for cell in design.cells():
        curves = [run.series.get("eval/loss", ()) for run in analysis.runs_of(cell)]
        curves = [curve for curve in curves if len(curve) > 1 and all(math.isfinite(loss) for _, loss in curve)]
        if curves:
            final, best = [curve[-1] for curve in curves], [min(curve, key=lambda point: point[1]) for curve in curves]
            spreads = (_plus_minus(stats.summary([math.exp(min(loss, 20.0)) for _, loss in points]), 2) for points in (final, best))
            updates = ", ".join(f"{int(step)}" for step, _ in best)
            rows.append((cell_text(design, cell), *spreads, updates, str(len(curves))))
    note = "exp of the evaluation loss, noise off; mean ± sample standard deviation over seeds. The best is chosen by these same windows, so it flatters."
    header = ("cell", "final perplexity", "best perplexity", "update of the best, by seed", "n")
    return Table("Final and best evaluation", header, tuple(rows), words=1, notes=(note,))


def settings(design: Design) -> Table:
    """What is fixed, one row per setting."""
    rows = [(name, _json_text(value)) for name, value in config_tools.flatten(design.settings).items()]
    return Table("What is fixed", ("setting", "value"), tuple(rows), words=2)


def asked(design: Design) -> Table:
    """What each comparison is, term by term."""
    rows = []
    for c in design.comparisons:
        terms = " ".join(f"{weight:+g} ({cell_text(design, cell)})" for weight, cell in c.terms)
        rows.append((c.name, c.family, c.metric, terms, c.question or "-"))
    return Table("What is compared", ("comparison", "family", "metric", "contrast", "question"), tuple(rows), words=5)


def measured(analysis: Analysis) -> Table:
    """What each metric is."""
    rows = [(heading_of(m), m.name, m.better or "-", m.definition or "-") for m in (*analysis.design.metrics, analysis.time)]
    return Table("What is measured", ("metric", "name in the ledger", "better", "definition"), tuple(rows), words=4)


def provenance(analysis: Analysis) -> Table:
    """What the finished runs ran on; a field with more than one value is shown with the number of runs of each."""
    seen: dict[str, Counter[str]] = {}
    for run in analysis.finished.values():
        for name, value in config_tools.flatten(run.provenance).items():
            seen.setdefault(name, Counter())[_json_text(value)] += 1
    rows = [(name, _counts_text(counts, len(analysis.finished))) for name, counts in seen.items()]
    return Table("What the runs ran on", ("field", "value"), tuple(rows), words=2)


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _column(metric: Metric, brief: bool) -> str:
    short = "time" if metric.name == "seconds" else metric.name
    return heading_of(dataclasses.replace(metric, label=short) if brief else metric)


def _spread(analysis: Analysis, metric: Metric, cell: Cell, population: bool = False) -> str:
    found = analysis.summary(metric, cell)
    if found is None:
        return "-"
    text = _plus_minus(found, metric.decimals)
    return f"{text} ({number(found.population_sd, metric.decimals)})" if population and found.n > 1 else text


def _plus_minus(found: stats.Summary, decimals: int) -> str:
    mean, sd = number(found.mean, decimals), number(found.sd, decimals)
    return mean if found.n == 1 else f"{mean} ± {sd}"


def _contrast_row(analysis: Analysis, comparison: Comparison) -> tuple[str, ...]:
    metric, found = analysis.design.metric(comparison.metric), analysis.contrasts[comparison.name]
    judged = verdict(analysis.design, comparison, found)
    if found is None:
        return (*["-"] * 7, str(len(stats.seeds_of(analysis.values.get(metric.name, {}), comparison))), judged)
    numbers = (number(found.mean, metric.decimals, sign=True), interval_text(found.interval, metric.decimals), t_text(found.t))
    ps = (p_text(found.p), p_text(found.holm_p), p_text(found.exact_p))
    return (*numbers, *ps, number(found.smallest, metric.decimals), str(found.n), judged)


def _contrast_notes(design: Design) -> tuple[str, ...]:
    n, sizes = len(design.seeds), Counter(c.family for c in design.comparisons)
    families = ", ".join(f"{name} ({size})" for name, size in sizes.items())
    return (
        "Each difference is formed within a seed, then tested over seeds: t and p are the paired t test's. "
        f"Verdicts use Holm p, corrected within each family: {families}. Intervals are not corrected.",
        f"Exact p tries all 2^{n} sign patterns and assumes no distribution; with {n} seeds it cannot be below "
        f"{stats.smallest_exact_p(n):.3g}, so a smaller p leans on the differences being normal.",
        "Smallest resolvable: the true effect that this n and this spread would find with 80 % probability at alpha divided by the "
        "size of the family, so whatever its other comparisons show. A smaller one is found less often.",
    )


def _counts_text(counts: Counter[str], runs: int) -> str:
    if len(counts) == 1 and counts.total() == runs:
        return next(iter(counts))
    parts = ", ".join(f"{text} ({count} runs)" for text, count in list(counts.items())[:4])
    more = f", and {len(counts) - 4} other values" if len(counts) > 4 else ""
    return f"{len(counts)} values: {parts}{more}" if len(counts) > 1 else parts
