"""What a ledger's rows say about a design: values by metric, cell and seed, a summary per cell, and every declared comparison."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from moe_jax.studies import stats
from moe_jax.studies.design import Cell, CellKey, Design, Level, Metric, cell_key
from moe_jax.studies.ledger import Run, RunKey
from moe_jax.studies.stats import ByCell, Contrast, Summary

_TIME = "Wall time of one run, as its row of the ledger records it."
SECONDS = Metric("seconds", "Time", unit="s", better="", decimals=1, definition=_TIME)
MINUTES = Metric("seconds", "Time", unit="min", better="", definition=_TIME)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A design and all that its finished runs say; partial while runs are missing."""

    design: Design
    finished: Mapping[RunKey, Run]
    failed: tuple[Run, ...]  # every failed run, also those made good later
    missing: tuple[tuple[dict[str, Level], int], ...]
    time: Metric  # SECONDS, or MINUTES where most runs take two
    values: Mapping[str, ByCell]  # [metric][cell][seed]; `time` too, in its unit
    contrasts: Mapping[str, Contrast | None]  # by comparison; None while fewer than 2 seeds have all its cells

    @property
    def confidence(self) -> str:
        """The level of every interval, '95 %'."""
        return f"{100 * (1 - self.design.alpha):g} %"

    def summary(self, metric: Metric, cell: Cell) -> Summary | None:
        """Mean, spread and interval of a metric in a cell; None when no run of the cell has finished."""
        values = self.values.get(metric.name, {}).get(cell_key(cell), {})
        return stats.summary(values.values(), self.design.alpha) if values else None

    def runs_of(self, cell: Cell) -> list[Run]:
        """The finished runs of a cell, in the order of the seeds."""
        keys = [(cell_key(cell), seed) for seed in self.design.seeds]
        return [self.finished[key] for key in keys if key in self.finished]


def analyse(design: Design, runs: Iterable[Run]) -> Analysis:
    """Analyses the rows of a ledger; a finished run counts whatever failed before it."""
    runs = tuple(runs)
    finished = {run.key: run for run in runs if run.status == "finished"}
    time = MINUTES if finished and statistics.median(run.seconds for run in finished.values()) >= 120 else SECONDS
    values: dict[str, dict[CellKey, dict[int, float]]] = {}
    for cell, seed in design.runs():
        if (run := finished.get((cell_key(cell), seed))) is not None:
            for name, value in {**run.metrics, time.name: run.seconds / (60 if time is MINUTES else 1)}.items():
                values.setdefault(name, {}).setdefault(cell_key(cell), {})[seed] = float(value)
    return Analysis(
        design=design,
        finished=finished,
        failed=tuple(run for run in runs if run.status == "failed"),
        missing=tuple((cell, seed) for cell, seed in design.runs() if (cell_key(cell), seed) not in finished),
        time=time,
        values=values,
        contrasts=stats.contrasts(values, design.comparisons, design.alpha),
    )


# ---------------------------------------------------------------- words and numbers that tables, figures and findings share


def level_text(level: Any) -> str:
    """A level as a reader writes it: 0.1, on, off, none, muon."""
    return {None: "none", True: "on", False: "off"}[level] if level is None or isinstance(level, bool) else str(level)


def cell_text(design: Design, cell: Cell | CellKey, only: Iterable[str] | None = None) -> str:
    """A cell in words, 'noise_std 0.1, balance_weight 0.01', in the order of the factors; `only` limits which."""
    levels, wanted = dict(cell), None if only is None else set(only)
    return ", ".join(f"{f.label} {level_text(levels[f.name])}" for f in design.factors if wanted is None or f.name in wanted)


def number(value: float, decimals: int, sign: bool = False) -> str:
    """A number with the metric's decimals, or with two digits when those decimals would show a small value as zero."""
    if value != value:
        return "-"
    if value and abs(value) < 0.5 * 10.0**-decimals:
        return f"{value:{'+' if sign else ''}.2g}"
    return f"{value + 0.0:{'+' if sign and value else ''}.{decimals}f}"  # + 0.0 makes -0.0 plain


def p_text(p: float | None) -> str:
    """A p value with two digits, not below 0.0001; '-' when there is none."""
    if p is None or p != p:
        return "-"
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def p_words(p: float | None) -> str:
    """ "p = 0.012", "p < 0.0001" or "p = -"."""
    return f"p = {p_text(p)}".replace("= <", "< ")


def t_text(t: float) -> str:
    """A t value with three digits, two decimals at most."""
    return f"{t:.2f}" if abs(t) < 1 else f"{t:.3g}"


def interval_text(interval: tuple[float, float], decimals: int, sign: bool = False) -> str:
    """An interval in brackets, '[0.97, 1.34]'."""
    low, high = (number(x, decimals, sign) for x in interval)
    return f"[{low}, {high}]"


def heading_of(metric: Metric) -> str:
    """A metric's label with its unit, 'Time (min)'."""
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label
