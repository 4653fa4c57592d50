"""Runs a declared study: what its ledger lacks, cells of one structure through one compiled program, resumed by running again.

Above the rest of moe_jax.studies: this file imports jax.
"""

import dataclasses
import functools
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from moe_jax.errors import NonFinite, Stopped
from moe_jax.studies.design import Design
from moe_jax.studies.ledger import Ledger, Run
from moe_jax.train.data import Data, build, load_corpus
from moe_jax.train.loop import RunConfig, provenance, run
from moe_jax.train.program import Program
from moe_jax.train.writers import Progress

REFUSED = "NonFinite"  # begins the error of a run that would fail again in the same way


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A study: what is asked, and how each of its runs is configured."""

    name: str  # experiment:preset
    design: Design
    config: Callable[[Mapping[str, Any], int], RunConfig]  # (cell, seed) -> the run
    cost: str  # measured or expected cost, in words
    prepare: Callable[["Workshop", RunConfig], RunConfig] | None = (
        None  # called before a run: makes what runs share, once, and says where it is
    )

    def configs(self) -> list[RunConfig]:
        return [self.config(cell, seed) for cell, seed in self.design.runs()]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call of `run_study` did."""

    done: int  # runs finished by this call
    failed: int
    compiled: Counter[str]  # program -> how many were compiled, e.g. {"train": 1, "evaluate": 1, "init": 1}
    seconds: float


def todo(ledger: Ledger, retry_failed: bool = False) -> list[tuple[dict[str, Any], int]]:
    """The (cell, seed) pairs that have no finished row, without those that failed for a reason that would only repeat itself."""
    hopeless = set() if retry_failed else {run.key for run in ledger.failed() if run.error.startswith(REFUSED)}
    return [(cell, seed) for cell, seed in ledger.missing() if Run(cell, seed).key not in hopeless]


def run_study(
    experiment: Experiment,
    workdir: Path,
    stop: Callable[[], bool] = lambda: False,
    retry_failed: bool = False,
    keep_checkpoints: bool = False,
) -> Outcome:
    """Runs what is missing and appends each run to WORKDIR/ledger.jsonl as it ends.

    A run that meets a non-finite value is a failed row and the study goes on; any other error is a failed row and is raised. A killed
    study loses at most the updates since the last checkpoint of one run, and ends in the same numbers.
    """
    began = time.monotonic()
    ledger = Ledger.open(workdir, experiment.design)
    waiting = todo(ledger, retry_failed)
    shared = Workshop(workdir.absolute(), stop)
    failed = 0
    configs = [experiment.config(cell, seed) for cell, seed in waiting]
    with Progress(sum(config.updates for config in configs), label=experiment.name) as progress:
        base = 0
        for (cell, seed), config in zip(waiting, configs, strict=True):
            folder = workdir / "cells" / cell_name(cell, seed)
            config = experiment.prepare(shared, config) if experiment.prepare else config
            row, error = _one(experiment, config, cell, seed, folder, shared, _Part(progress, base), stop)
            ledger.append(row)
            if error is not None:
                raise error
            failed += row.status == "failed"
            base += config.updates
            if row.status == "finished" and not keep_checkpoints:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Outcome(len(waiting) - failed, failed, shared.compiled(), time.monotonic() - began)


def _one(experiment, config, cell, seed, folder, shared: "Workshop", progress, stop) -> tuple[Run, Exception | None]:
    """The run's row, and the error to raise once the row is in the ledger."""
    began = time.monotonic()
    data = shared.data(config)
    where = provenance(config, data)
    try:
        result = run(config, shared.program(config), data, folder, progress, stop)
    except Stopped:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        row = Run(cell, seed, "failed", seconds=time.monotonic() - began, provenance=where, error=text)
        return row, None if isinstance(error, NonFinite) else error
    wanted = [metric.name for metric in experiment.design.metrics]
    metrics = {name: value for name, value in result.metrics.items() if name in wanted}
    keep = ("train/loss", "eval/loss", "router/load_cv", "router/flips", "replay/set_overlap", "optimizer/gradient_norm")
    series = {name: values for name, values in result.series.items() if name in keep}
    arrays = {"load": result.load} if result.load else {}
    return Run(cell, seed, "finished", metrics, series, arrays, result.seconds, where), None


def cell_name(cell: Mapping[str, Any], seed: int) -> str:
    """A folder name for a run: noise_std-0.1_balance_weight-0.01_seed-42."""
    parts = [f"{name}-{level}" for name, level in cell.items()]
    return re.sub(r"[^A-Za-z0-9._-]", "-", "_".join([*parts, f"seed-{seed}"]))


class Workshop:
    """What the runs of a study have in common: its folder, when to stop, the text, and one program for each structure."""

    def __init__(self, folder: Path, stop: Callable[[], bool] = lambda: False):
        self.folder, self.stop = folder, stop
        self._programs: dict[tuple, Program] = {}
        corpus = functools.cache(load_corpus)
        self._data = functools.lru_cache(maxsize=1)(lambda data, seed: build(data, seed, corpus=corpus(data)))  # runs go seed by seed

    def program(self, config: RunConfig) -> Program:
        structure = config.structure()
        if structure not in self._programs:
            self._programs[structure] = config.program()
        return self._programs[structure]

    def data(self, config: RunConfig) -> Data:
        return self._data(config.data, config.data_seed)

    def compiled(self) -> Counter[str]:
        return sum((program.compiled for program in self._programs.values()), Counter())


@dataclasses.dataclass(frozen=True)
class _Part:
    """The progress of one run, which began after `base` updates, as a part of the study's."""

    progress: Progress
    base: int

    def update(self, step: int, metrics: Mapping[str, float] | None = None, tokens: int = 0) -> None:
        self.progress.update(self.base + step, metrics, tokens)


def describe_devices() -> str:
    """The devices in words, for a console line."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
