"""The tables of a study: the one of the first study made general, every number behind it, the contrasts, and what is fixed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

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
    design = analysis.design
    level = f"{100 * (1 - design.alpha):g} % interval"
    header = ("comparison", "effect", level, "t", "p", "Holm p", "exact p", "smallest resolvable", "n", "verdict")
    rows = [(c.name, *_contrast_row(analysis, c)) for c in design.comparisons if c.metric == metric.name]
    caption = f"Paired differences in {heading_of(metric)}"
    return Table(caption, header, tuple(rows), last_words=1, notes=_contrast_notes(design))


def brief_contrasts(analysis: Analysis) -> Table:
    """Every comparison in one table with short headers and no notes, for a terminal."""
    header = ("comparison", "metric", "effect", "interval", "t", "p", "Holm p", "exact p", "smallest", "n", "verdict")
    rows = [(c.name, c.metric, *_contrast_row(analysis, c)) for c in analysis.design.comparisons]
    table = Table("Contrasts, paired by seed", header, tuple(rows), words=2, last_words=1)
    return _without(table, "metric") if len({c.metric for c in analysis.design.comparisons}) == 1 else table


def every_number(analysis: Analysis) -> Table:
    """One row per metric and cell: n, mean, interval, both deviations, and the value of every seed."""
    design = analysis.design
    header = ["metric", "cell", "n", "mean", f"{100 * (1 - design.alpha):g} % interval", "sample sd", "population sd"]
    rows = []
    for metric in (*design.metrics, analysis.time):
        for cell in design.cells():
            if (found := analysis.summary(metric, cell)) is None:
                continue
            d = metric.decimals
            numbers = (number(found.mean, d), interval_text(found.interval, d), number(found.sd, d), number(found.population_sd, d))
            rows.append((heading_of(metric), cell_text(design, cell), str(found.n), *numbers, *_per_seed(analysis, metric, cell)))
    seeds = tuple(f"seed {seed}" for seed in design.seeds)
    return Table("Every metric, cell and seed", (*header, *seeds), tuple(rows), words=2)


def settings(design: Design) -> Table:
    """What is fixed, one row per setting."""
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in config_tools.flatten(design.settings).items()]
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
    seen: dict[str, dict[str, int]] = {}
    for run in analysis.finished.values():
        for name, value in config_tools.flatten(dict(run.provenance)).items():
            counts = seen.setdefault(name, {})
            text = value if isinstance(value, str) else json.dumps(value)
            counts[text] = counts.get(text, 0) + 1
    rows = [(name, _values_text(counts, len(analysis.finished))) for name, counts in seen.items()]
    return Table("What the runs ran on", ("field", "value"), tuple(rows), words=2)


def _column(metric: Metric, brief: bool) -> str:
    short = "time" if metric.name == "seconds" else metric.name
    return heading_of(dataclasses.replace(metric, label=short) if brief else metric)


def _spread(analysis: Analysis, metric: Metric, cell: Cell, population: bool = False) -> str:
    found = analysis.summary(metric, cell)
    if found is None:
        return "-"
    text = number(found.mean, metric.decimals)
    if found.n > 1:
        text += f" ± {number(found.sd, metric.decimals)}" + (f" ({number(found.population_sd, metric.decimals)})" if population else "")
    return text


def _per_seed(analysis: Analysis, metric: Metric, cell: Cell) -> tuple[str, ...]:
    values = analysis.values.get(metric.name, {}).get(cell_key(cell), {})
    return tuple(number(values[seed], metric.decimals) if seed in values else "-" for seed in analysis.design.seeds)


def _contrast_row(analysis: Analysis, comparison: Comparison) -> tuple[str, ...]:
    metric, found = analysis.design.metric(comparison.metric), analysis.contrasts[comparison.name]
    judged = verdict(analysis.design, comparison, found)
    if found is None:
        return (*["-"] * 7, str(len(stats.seeds_of(analysis.values.get(metric.name, {}), comparison))), judged)
    smallest = found.smallest_resolvable if found.smallest_in_family is None else found.smallest_in_family
    numbers = (number(found.mean, metric.decimals, sign=True), interval_text(found.interval, metric.decimals), t_text(found.t))
    ps = (p_text(found.p), p_text(found.holm_p), p_text(found.exact_p))
    return (*numbers, *ps, number(smallest, metric.decimals), str(found.n), judged)


def _contrast_notes(design: Design) -> tuple[str, ...]:
    n, sizes = len(design.seeds), {}
    for comparison in design.comparisons:
        sizes[comparison.family] = sizes.get(comparison.family, 0) + 1
    families = ", ".join(f"{name} ({size})" for name, size in sizes.items())
    return (
        "Each difference is formed within a seed, then tested over seeds: t and p are the paired t test's. "
        f"Verdicts use Holm p, corrected within each family: {families}. Intervals are not corrected.",
        f"Exact p tries all 2^{n} sign patterns and assumes no distribution; with {n} seeds it cannot be below "
        f"{stats.smallest_exact_p(n):.3g}, so a smaller p leans on the differences being normal.",
        "Smallest resolvable: the true effect that this n and this spread would find with 80 % probability at alpha divided by the "
        "size of the family, so whatever its other comparisons show. A smaller one is found less often.",
    )


def _without(table: Table, column: str) -> Table:
    at = table.header.index(column)
    header, *rows = (row[:at] + row[at + 1 :] for row in (table.header, *table.rows))
    return dataclasses.replace(table, header=header, rows=tuple(rows), words=table.words - (at < table.words))


def _values_text(counts: dict[str, int], runs: int) -> str:
    if len(counts) == 1 and sum(counts.values()) == runs:
        return next(iter(counts))
    parts = [f"{text} ({count} runs)" for text, count in list(counts.items())[:4]]
    more = f", and {len(counts) - 4} other values" if len(counts) > 4 else ""
    return f"{len(counts)} values: " + ", ".join(parts) + more if len(counts) > 1 else parts[0]
