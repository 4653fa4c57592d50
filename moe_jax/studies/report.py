"""A study's report, built from its ledger alone: `report.md`, one self-contained `report.html`, `report.json` and the figures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax import config_tools
from moe_jax.files import write_atomic
from moe_jax.studies import document, figures, tables
from moe_jax.studies.analysis import Analysis, analyse, cell_text
from moe_jax.studies.document import Block, Bullets, Figure, Heading, Text
from moe_jax.studies.findings import findings, verdict
from moe_jax.studies.ledger import Ledger
from moe_jax.studies.tables import console_table

__all__ = ["Paths", "build", "console_table"]

NO_FIGURES = "Figures are left out: matplotlib is not installed (pip install 'moe-jax[report]'), then build the report again."
# What the setting named `split` means for the numbers: the kind of box, and its text.
SPLITS = {
    "leaky": (
        "warning",
        "Data split: leaky. Windows overlap and are divided at random, so the validation text is also seen in training. These "
        "perplexities measure memory as well as modelling and must not be compared with those of a clean split.",
    ),
    "clean": ("note", "Data split: clean, by document or problem; nothing that is evaluated on is in the text that these runs train on."),
    None: ("warning", "Data split: the settings do not say how training and validation text were divided."),
}


@dataclasses.dataclass(frozen=True)
class Paths:
    """The files that `build` wrote."""

    markdown: Path
    html: Path
    json: Path
    figures: tuple[Path, ...]


def build(workdir: str | os.PathLike[str]) -> Paths:
    """Writes the report of the study in `workdir` beside its ledger; the same ledger gives the same files.

    Raises LedgerMissing or LedgerDamaged. Without matplotlib it writes everything but the figures, and says so.
    """
    ledger = Ledger.read(workdir)
    analysis, torn = analyse(ledger.design, ledger.runs()), ledger.torn_lines()
    title = ledger.design.name + (" (PARTIAL)" if analysis.missing else "")
    blocks = _blocks(analysis, torn)
    numbers = ledger.path.with_name("report.json")
    write_atomic(numbers, json.dumps(config_tools.config_dict(_as_json(analysis, torn)), indent=1) + "\n")
    page, markdown, *figures = document.write(ledger.path.parent, "report", title, blocks)
    return Paths(markdown, page, numbers, tuple(figures))


def _blocks(analysis: Analysis, torn: tuple[int, ...]) -> list[Block]:
    design, metrics = analysis.design, analysis.design.metrics
    drawing = importlib.util.find_spec("matplotlib") is not None

    def drawn(draw: Callable[..., Figure | None], *what: Any) -> list[Block]:
        figure = draw(analysis, *what) if drawing else None
        return [figure] if figure else []

    blocks = [*_state(analysis, torn), Text(f"Question: {design.question}"), split_text(design.settings)]
    blocks += [] if drawing else [Text(NO_FIGURES, "note")]
    if stated := findings(analysis):
        blocks += [Heading("Findings"), Bullets(tuple(f.text for f in stated)), Text(f"Decided by the rule: {design.rule}")]
    blocks += [Heading("Results"), tables.results(analysis), *drawn(figures.cells_figure, metrics[0])]
    blocks += [Heading("Contrasts, paired by seed")] if design.comparisons else []
    for metric in metrics:
        if any(c.metric == metric.name for c in design.comparisons):
            blocks += [tables.contrasts(analysis, metric), *drawn(figures.differences_figure, metric)]
    evaluated = tables.evaluations(analysis)
    recorded = [*drawn(figures.load_figure), *drawn(figures.curves_figure), *([evaluated] if evaluated.rows else [])]
    blocks += [Heading("Expert load and learning curves"), *recorded] if recorded else []
    blocks += [Heading("Every number"), tables.every_number(analysis), *drawn(figures.others_figure)]
    return [*blocks, Heading("The design"), *_declared(analysis)]


def _state(analysis: Analysis, torn: tuple[int, ...]) -> list[Block]:
    done, failed, missing = len(analysis.finished), analysis.failed, len(analysis.missing)
    made_good = sum(run.key in analysis.finished for run in failed)
    state = f"{done} of {len(analysis.design.runs())} runs finished, {missing} missing; "
    state += f"{len(failed)} failed attempt(s), {made_good} of them made good by a later run" if failed else "none failed"
    state += f"; {len(torn)} half-written line(s) ignored." if torn else "."
    if not missing:
        return [Text(state)]
    advice = "Every statistic below uses the seeds it has and says how many; run the study again to finish it."
    errors = tuple(f"failed: {cell_text(analysis.design, run.cell)}, seed {run.seed}: {run.error}" for run in failed)
    return [Text(f"PARTIAL study: {state} {advice}", "warning"), *([Bullets(errors)] if errors else [])]


def split_text(settings: Any) -> Text:
    """What the data split means for the numbers, from the setting named `split`."""
    split = {name.split(".")[-1]: value for name, value in config_tools.flatten(settings).items()}.get("split")
    kind, text = SPLITS.get(split if split is None else str(split), ("note", f"Data split: {split}."))
    return Text(text, kind)


def _declared(analysis: Analysis) -> list[Block]:
    design = analysis.design
    seeds = ", ".join(map(str, design.seeds))
    varied = "; ".join(f"{f.label} in {{{', '.join(map(str, f.levels))}}}" for f in design.factors)
    kept = (tables.settings(design), tables.asked(design), tables.measured(analysis), tables.provenance(analysis))
    return [
        Text(f"Declared before it ran, with digest {design.digest()}: {varied}; {len(design.cells())} cells, seeds {seeds}."),
        Text(f"Rule: {design.rule}"),
        Text(f"Error rate of each family of comparisons: {design.alpha:g}."),
        *([Bullets(design.notes)] if design.notes else []),
        *(table for table in kept if table.rows),
    ]


def _as_json(analysis: Analysis, torn: tuple[int, ...]) -> dict[str, Any]:
    design, metrics = analysis.design, (*analysis.design.metrics, analysis.time)
    compared = [(c, analysis.contrasts[c.name]) for c in design.comparisons]
    return {
        "digest": design.digest(),
        "design": design.to_json(),
        "state": {
            "runs": len(design.runs()),
            "finished": len(analysis.finished),
            "failed": len(analysis.failed),
            "missing": [{"cell": cell, "seed": seed} for cell, seed in analysis.missing],
            "torn_lines": torn,
            "partial": bool(analysis.missing),
        },
        "cells": [
            {"cell": cell, "n": len(analysis.runs_of(cell)), "metrics": {m.name: analysis.summary(m, cell) for m in metrics}}
            for cell in design.cells()
        ],
        "comparisons": [
            {"name": c.name, "verdict": verdict(design, c, found), "resolved": bool(found and found.resolved), "contrast": found}
            for c, found in compared
        ],
        "findings": [{"text": f.text, "comparison": f.contrast.name} for f in findings(analysis)],
    }
