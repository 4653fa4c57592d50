"""A study's report, built from its ledger alone: `report.md`, one self-contained `report.html`, `report.json` and the figures."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax import config_tools
from moe_jax.studies import document, figures, tables
from moe_jax.studies.analysis import Analysis, analyse, cell_text
from moe_jax.studies.document import Block, Bullets, Figure, Heading, Text
from moe_jax.studies.findings import findings, verdict
from moe_jax.studies.ledger import Ledger
from moe_jax.studies.tables import console_table

__all__ = ["Paths", "build", "console_table"]

NO_FIGURES = "Figures are left out: matplotlib is not installed (pip install 'moe-jax[report]'), then build the report again."


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
    analysis = analyse(ledger.design, ledger.runs())
    torn = ledger.torn_lines()
    title = ledger.design.name + (" (PARTIAL)" if analysis.missing else "")
    blocks = _blocks(analysis, torn)
    drawn = [block for block in blocks if isinstance(block, Figure)]
    folder = ledger.path.parent
    paths = Paths(
        folder / "report.md",
        folder / "report.html",
        folder / "report.json",
        tuple(folder / "figures" / f"{figure.name}.png" for figure in drawn),
    )
    for path, figure in zip(paths.figures, drawn, strict=True):
        _write(path, figure.png)
    _write(paths.markdown, document.to_markdown(title, blocks).encode())
    _write(paths.html, document.to_html(title, blocks).encode())
    _write(paths.json, (json.dumps(config_tools.config_dict(_as_json(analysis, torn)), indent=1) + "\n").encode())
    return paths


def _blocks(analysis: Analysis, torn: tuple[int, ...]) -> list[Block]:
    design = analysis.design
    draw = _artist()
    blocks: list[Block | None] = [*_state(analysis, torn), Text(f"Question: {design.question}"), split_text(design.settings)]
    blocks += [None if draw.works else Text(NO_FIGURES, "note")]
    stated = findings(analysis)
    if stated:
        blocks += [Heading("Findings"), Bullets(tuple(f.text for f in stated)), Text(f"Decided by the rule: {design.rule}")]
    blocks += [Heading("Results"), tables.results(analysis), draw(lambda: figures.cells_figure(analysis, design.metrics[0]))]
    if design.comparisons:
        compared = [m for m in design.metrics if any(c.metric == m.name for c in design.comparisons)]
        blocks += [Heading("Contrasts, paired by seed")]
        for metric in compared:
            blocks += [tables.contrasts(analysis, metric), draw(lambda m=metric: figures.differences_figure(analysis, m))]
    blocks += [Heading("Expert load and learning curves")] if draw.works else []
    blocks += [draw(lambda: figures.load_figure(analysis)), draw(lambda: figures.curves_figure(analysis))]
    blocks += [Heading("Every number"), tables.every_number(analysis), draw(lambda: figures.others_figure(analysis))]
    blocks += [Heading("The design"), *_declared(analysis)]
    return _without_empty_headings([block for block in blocks if block is not None])


def _state(analysis: Analysis, torn: tuple[int, ...]) -> list[Block]:
    design, total = analysis.design, len(analysis.design.runs())
    done, made_good = len(analysis.finished), sum(run.key in analysis.finished for run in analysis.failed)
    parts = [f"{done} of {total} runs finished, {len(analysis.missing)} missing"]
    parts += [
        f"{len(analysis.failed)} failed attempt(s), {made_good} of them made good by a later run" if analysis.failed else "none failed"
    ]
    parts += [f"{len(torn)} half-written line(s) ignored"] if torn else []
    state = "; ".join(parts) + "."
    if not analysis.missing:
        return [Text(state)]
    advice = "Every statistic below uses the seeds it has and says how many; run the study again to finish it."
    blocks: list[Block] = [Text(f"PARTIAL study: {state} {advice}", "warning")]
    if analysis.failed:
        blocks.append(Bullets(tuple(f"failed: {cell_text(design, run.cell)}, seed {run.seed}: {run.error}" for run in analysis.failed)))
    return blocks


def split_text(settings: Any) -> Text:
    """What the data split means for the numbers, from the setting named `split`."""
    named = {name.split(".")[-1]: value for name, value in config_tools.flatten(settings).items()}
    split = named.get("split")
    if split == "leaky":
        text = (
            "Data split: leaky. Windows overlap and are divided at random, so the validation text is also seen in training. These "
            "perplexities measure memory as well as modelling and must not be compared with those of a clean split."
        )
        return Text(text, "warning")
    if split == "clean":
        return Text("Data split: clean, by document; no validation text is seen in training.", "note")
    if split is None:
        return Text("Data split: the settings do not say how training and validation text were divided.", "warning")
    return Text(f"Data split: {split}.", "note")


def _declared(analysis: Analysis) -> list[Block]:
    design = analysis.design
    cells, seeds = len(design.cells()), ", ".join(map(str, design.seeds))
    varied = "; ".join(f"{f.label} in {{{', '.join(map(str, f.levels))}}}" for f in design.factors)
    blocks: list[Block] = [Text(f"Declared before it ran, with digest {design.digest()}: {varied}; {cells} cells, seeds {seeds}.")]
    blocks += [Text(f"Rule: {design.rule}"), Text(f"Error rate of each family of comparisons: {design.alpha:g}.")]
    blocks += [Bullets(design.notes)] if design.notes else []
    return [
        *blocks,
        *(t for t in (tables.settings(design), tables.asked(design), tables.measured(analysis), tables.provenance(analysis)) if t.rows),
    ]


def _without_empty_headings(blocks: list[Block]) -> list[Block]:
    after = [*blocks[1:], None]
    return [b for b, following in zip(blocks, after, strict=True) if not (isinstance(b, Heading) and isinstance(following, Heading | None))]


class _artist:
    """Calls drawing functions as long as matplotlib is there; gives None instead of a figure when it is not."""

    def __init__(self) -> None:
        try:
            import matplotlib  # noqa: F401  (an extra: the report goes on without it)

            self.works = True
        except ModuleNotFoundError:
            self.works = False

    def __call__(self, draw: Callable[[], Figure | None]) -> Figure | None:
        return draw() if self.works else None


def _as_json(analysis: Analysis, torn: tuple[int, ...]) -> dict[str, Any]:
    design = analysis.design
    cells = [
        {
            "cell": cell,
            "n": len(analysis.runs_of(cell)),
            "metrics": {m.name: analysis.summary(m, cell) for m in (*design.metrics, analysis.time)},
        }
        for cell in design.cells()
    ]
    comparisons = [
        {"name": c.name, "verdict": verdict(design, c, found), "resolved": bool(found and found.resolved), "contrast": found}
        for c in design.comparisons
        for found in [analysis.contrasts[c.name]]
    ]
    return {
        "digest": design.digest(),
        "design": design.to_json(),
        "state": {
            "runs": len(design.runs()),
            "finished": len(analysis.finished),
            "failed": len(analysis.failed),
            "missing": [{"cell": cell, "seed": seed} for cell, seed in analysis.missing],
            "torn_lines": list(torn),
            "partial": bool(analysis.missing),
        },
        "cells": cells,
        "comparisons": comparisons,
        "findings": [{"text": f.text, "comparison": f.contrast.name} for f in findings(analysis)],
    }


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    os.replace(beside, path)
