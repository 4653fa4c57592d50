"""Runs a declared study: what its ledger lacks, cells of one structure through one compiled program, resumed by running again.

One run after the other, or several at a time in lanes, each on a device, with the same numbers.

Above the rest of moe_jax.studies: this file imports jax.
"""

import dataclasses
import functools
import math
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moe_jax.config_tools import apply_overrides, flatten
from moe_jax.distributed import on_all, on_first
from moe_jax.errors import ConfigError, NonFinite, Stopped, Unsupported
from moe_jax.studies.design import Design
from moe_jax.studies.ledger import Ledger, Run
from moe_jax.train.data import Data, build, load_corpus
from moe_jax.train.lanes import Lanes
from moe_jax.train.loop import Result, RunConfig, provenance, run
from moe_jax.train.program import Program
from moe_jax.train.writers import Progress

REFUSED = "NonFinite"  # begins the error of a run that would fail again in the same way


@dataclasses.dataclass(frozen=True)
class Runner:
    """How a study's runs are done."""

    run: Callable[..., Result] = run  # (config, program, data, folder, progress, stop)
    data: Callable[["Workshop", Any], Any] = lambda shop, config: shop.data(config)  # has a `fingerprint`
    series: tuple[str, ...] = ("train/loss", "eval/loss", "router/load_cv", "router/flips", "replay/set_overlap", "optimizer/gradient_norm")
    lanes: bool = True  # whether several may go at a time


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A study: what is asked, and how each of its runs is configured."""

    name: str  # experiment:preset
    design: Design
    config: Callable[[Mapping[str, Any], int], Any]  # (cell, seed) -> the run: a RunConfig, or what the runner takes
    cost: str  # measured or expected cost, in words
    prepare: Callable[["Workshop", Any], Any] | None = None  # called before a run: makes what runs share, once, and says where it is
    # of a study that trains nothing: the metrics, and perhaps arrays, of a cell and seed. Nothing else of such a run's config happens
    measure: Callable[["Workshop", RunConfig, Mapping[str, Any], int], tuple[Mapping[str, float], Mapping[str, Any]]] | None = None
    pages: Callable[[Path], Sequence[Path]] | None = None  # writes what goes beside the report, from the ledger; says which files
    launch: Mapping[str, str] = dataclasses.field(default_factory=dict)  # machine, in words -> the command that runs the study there
    runner: Runner = Runner()

    def configs(self) -> list[Any]:
        return [self.config(cell, seed) for cell, seed in self.design.runs()]

    def changed(self, overrides: Sequence[str]) -> "Experiment":
        """The study with 'a.b=c' set in the config of every run: another design, whose settings and notes say so.

        Raises ConfigError as `apply_overrides` does, and for a field in which the study's runs differ.
        """
        if not overrides:
            return self
        names = [override.partition("=")[0].strip() for override in overrides]
        runs = [flatten(config) for config in self.configs()]
        for name in names:
            if len({repr(run.get(name)) for run in runs}) > 1:
                raise ConfigError(f"--set {name}=: the runs of {self.name} differ in it, by their cell or seed; set what all of them share")
        new = [flatten(apply_overrides(config, overrides)) for config in self.configs()][0]
        note = f"Changed by --set: {', '.join(overrides)}. The words about this study's cost and size are those of the preset."
        settings = _restated(self.design.settings, {name: new[name] for name in names})
        design = dataclasses.replace(self.design, settings=settings, notes=(*self.design.notes, note))
        return dataclasses.replace(self, design=design, config=lambda cell, seed: apply_overrides(self.config(cell, seed), overrides))


def _restated(settings: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a design where they name one of the fields, with or without its group, with its value."""

    def restated(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _restated(value, values, f"{prefix}{name}.")
        return next((new for field, new in values.items() if f".{field}".endswith(f".{prefix}{name}")), value)

    return {name: restated(name, value) for name, value in settings.items()}


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
    lanes: int = 1,
    mesh: Mesh | None = None,
    shared: Path | None = None,
    only: Callable[[Mapping[str, Any], int], bool] = lambda cell, seed: True,
) -> Outcome:
    """Runs what is missing and appends each run to WORKDIR/ledger.jsonl as it ends.

    A run that meets a non-finite value is a failed row and the study goes on; any other error is a failed row and is raised. A killed
    study loses at most the updates since the last checkpoint of each run under way, and ends in the same numbers.

    lanes: how many runs of equal structure go at a time, on as many devices as there are; what they share is prepared one after the other before. An
    error is raised when the runs beside it have ended. Raises ConfigError below 1, Unsupported for several processes.
    mesh: the devices that every run is divided over. shared: the folder of what `prepare` makes, where several studies share it; None: the workdir.
    only: which (cell, seed) this call does.
    """
    if lanes < 1:
        raise ConfigError(f"lanes must be at least 1, got {lanes}")
    if lanes > 1 and not experiment.runner.lanes:
        raise Unsupported(f"the runs of {experiment.name} go one after the other; leave --lanes={lanes} out")
    if experiment.measure is not None:
        lanes = 1
        if jax.process_count() > 1:
            raise Unsupported(f"{experiment.name} measures in one process, and there are {jax.process_count()}; start it on one host")
    began = time.monotonic()
    ledger = on_all(lambda: Ledger.open(workdir, experiment.design))
    waiting = [pair for pair in todo(ledger, retry_failed) if only(*pair)]
    shop = Workshop((shared or workdir).absolute(), stop, lanes, mesh, workdir.absolute())
    jobs = [_Job(cell, seed, experiment.config(cell, seed)) for cell, seed in waiting]
    failed, lock = 0, threading.Lock()

    def work(job: _Job, part: "_Part", program: Program) -> None:
        nonlocal failed
        folder = workdir / "cells" / cell_name(job.cell, job.seed)
        row, error = _one(experiment, *job, folder, shop, program, part, stop)
        with lock:
            on_first(lambda: ledger.append(row))
            failed += row.status == "failed"
        if error is not None:
            raise error
        part.update(size(job))
        if row.status == "finished":
            on_first(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))

    def size(job: _Job) -> int:
        return job.config.updates if experiment.measure is None else 1

    with Progress(sum(map(size, jobs)), label=experiment.name) as progress:
        steps: Counter[str] = Counter()
        for group in _groups(jobs, lanes):
            prepared = [job._replace(config=experiment.prepare(shop, job.config)) if experiment.prepare else job for job in group]
            for alike in _groups(prepared, lanes):
                parts = [_Part(progress, steps, lock, cell_name(job.cell, job.seed)) for job in alike]
                shop.together(alike[0].config, [functools.partial(work, *both) for both in zip(alike, parts, strict=True)])
    return Outcome(len(waiting) - failed, failed, shop.compiled(), time.monotonic() - began)


class _Job(NamedTuple):
    cell: dict[str, Any]
    seed: int
    config: RunConfig


def _groups(jobs: list[_Job], size: int) -> list[list[_Job]]:
    """Jobs that go together: up to `size` of equal structure, in their order."""
    alike: dict[Any, list[_Job]] = {}
    for index, job in enumerate(jobs):
        alike.setdefault(index if size == 1 else job.config.structure(), []).append(job)
    return [some[first : first + size] for some in alike.values() for first in range(0, len(some), size)]


def _one(experiment, cell, seed, config, folder, shared: "Workshop", program, progress, stop) -> tuple[Run, Exception | None]:
    """The run's row, and the error to raise once the row is in the ledger."""
    began = time.monotonic()
    data = experiment.runner.data(shared, config)
    where = provenance(config, data)
    try:
        if experiment.measure is not None:
            return _measured(experiment, cell, seed, config, shared, where, stop), None
        result = experiment.runner.run(config, program, data, folder, progress, stop)
        wanted = [metric.name for metric in experiment.design.metrics]
        metrics = _finite({name: value for name, value in result.metrics.items() if name in wanted})
    except Stopped:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        row = Run(cell, seed, "failed", seconds=time.monotonic() - began, provenance=where, error=text)
        return row, None if isinstance(error, NonFinite) else error
    series = {name: values for name, values in result.series.items() if name in experiment.runner.series}
    arrays = {"load": result.load} if result.load else {}
    return Run(cell, seed, "finished", metrics, series, arrays, result.seconds, where), None


def _measured(experiment: Experiment, cell, seed, config, shop: "Workshop", where, stop) -> Run:
    """The row of a run that trains nothing."""
    if stop():
        raise Stopped("stopped between two runs; the same command goes on from there")
    began = time.monotonic()
    metrics, arrays = experiment.measure(shop, config, cell, seed)  # type: ignore[misc]
    return Run(cell, seed, "finished", _finite(metrics), {}, arrays, time.monotonic() - began, where)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a run. Raises NonFinite naming those that are not finite: a ledger takes them of no finished run."""
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise NonFinite(f"what was measured is not finite: {', '.join(wrong)}; lower the noise, or look at the checkpoint")
    return dict(metrics)


def cell_name(cell: Mapping[str, Any], seed: int) -> str:
    """A folder name for a run: noise_std-0.1_balance_weight-0.01_seed-42."""
    parts = [f"{name}-{level}" for name, level in cell.items()]
    return re.sub(r"[^A-Za-z0-9._-]", "-", "_".join([*parts, f"seed-{seed}"]))


class Workshop:
    """What the runs of a study have in common: folders, when to stop, the devices, the text, and one program for each structure.

    folder: for what is made once; study: the study's own, if that is another one.
    """

    def __init__(
        self, folder: Path, stop: Callable[[], bool] = lambda: False, lanes: int = 1, mesh: Mesh | None = None, study: Path | None = None
    ):
        self.folder, self.study, self.stop, self.mesh, self._count = folder, study or folder, stop, mesh, lanes
        self._programs: dict[tuple, Program] = {}
        self._made: dict[Hashable, Any] = {}
        self._lanes: dict[tuple, Lanes] = {}
        self._lock = threading.RLock()  # two lanes would both make what one makes for all
        corpus = functools.cache(load_corpus)
        # runs go seed by seed, and each of those under way has one
        self._data = functools.lru_cache(maxsize=lanes)(lambda data, seed: build(data, seed, corpus=corpus(data)))

    def program(self, config: RunConfig) -> Program:
        structure = config.structure()
        if structure not in self._programs:
            self._programs[structure] = config.program(self.mesh)
        return self._programs[structure]

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time that something of this name was asked for; kept until the study ends."""
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]

    def together(self, config: RunConfig, jobs: list[Callable[[Program], None]]) -> None:
        """Does jobs of the structure of `config`, all at a time; raises the first unforeseen error, or that the study was stopped, when all have ended."""
        program, structure = self.program(config), config.structure()
        if self._count == 1:
            return jobs[0](program)
        if structure not in self._lanes:
            self._lanes[structure] = Lanes(program, self._count)
        errors = [error for error in self._lanes[structure].run(jobs) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error

    def data(self, config: RunConfig) -> Data:
        with self._lock:
            return self._data(config.data, config.data_seed)

    def compiled(self) -> Counter[str]:
        return sum((program.compiled for program in self._programs.values()), Counter())


@dataclasses.dataclass(frozen=True)
class _Part:
    """The progress of one run as a part of the study's, which is the sum of all runs' `steps`."""

    progress: Progress
    steps: Counter[str]
    lock: threading.Lock
    name: str

    def update(self, step: int, metrics: Mapping[str, float] | None = None, tokens: int = 0) -> None:
        with self.lock:
            earlier = 0 if self.name in self.steps else step - 1  # a run that goes on begins after them
            before, self.steps[self.name] = self.steps.total(), step
            if self.steps.total() != before:  # the end of a run says again what its last step said
                self.progress.update(self.steps.total(), metrics, tokens, earlier)


def describe_devices() -> str:
    """The devices in words, for a console line."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
