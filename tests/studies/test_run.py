"""A study from design to ledger: one program for eighteen cells, failures kept, resumed by running again."""

import dataclasses
import math
import threading
from collections import Counter
from types import SimpleNamespace

import jax
import pytest

from experiments.catalogue import load
from moe_jax.errors import ConfigError, Stopped, Unsupported
from moe_jax.studies import Ledger, Metric, report
from moe_jax.studies import run as runner
from moe_jax.studies.run import Experiment, Runner, cell_name, run_study, todo
from moe_jax.train import loop


@pytest.fixture(scope="module")
def smoke() -> Experiment:
    """Two seeds of the smoke preset: twelve runs."""
    experiment = load("noise_factorial:smoke")
    return dataclasses.replace(experiment, design=dataclasses.replace(experiment.design, seeds=(42, 43)))


_programs, _make = {}, loop.RunConfig.program


def program_of(config, mesh=None):
    """`RunConfig.program`, and for equal structures the same one, so that studies that share them compile once."""
    key = config.structure(), mesh
    if key not in _programs:
        _programs[key] = _make(config, mesh)
    return _programs[key]


@pytest.fixture
def shared_programs(monkeypatch):
    monkeypatch.setattr(loop.RunConfig, "program", program_of)


@pytest.fixture(scope="module")
def finished(smoke, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.RunConfig, "program", program_of)
        return workdir, run_study(smoke, workdir)


def part_of(study, cells) -> Experiment:
    return dataclasses.replace(study, design=dataclasses.replace(study.design, only=cells, comparisons=()))


def rows(workdir, keys=None):
    """What a study found, of all runs or those with the keys, without the clocks."""
    runs = (run for run in Ledger.read(workdir).runs() if run.status == "finished")
    return {run.key: (run.metrics, run.series, run.arrays) for run in runs if keys is None or run.key in keys}


def test_one_program_serves_every_cell(finished, smoke):
    workdir, outcome = finished
    assert (outcome.done, outcome.failed) == (12, 0)
    assert outcome.compiled == {"train": 1, "evaluate": 1, "init": 1}
    found = rows(workdir)
    assert len(found) == 12 == len(smoke.design.runs())
    assert not list((workdir / "cells").glob("*/checkpoints"))


def test_cells_differ_where_they_should_and_are_paired_where_they_should(finished):
    """At one seed the first training loss is shared by all cells without noise; noise and balance change what follows."""
    workdir, _ = finished
    found = {(dict(key[0])["noise_std"], dict(key[0])["balance_weight"], key[1]): value for key, value in rows(workdir).items()}
    first = {cell: series["train/loss"][0][1] for cell, (_, series, _) in found.items()}
    assert first[0.0, 0.01, 42] == first[0.0, 0.0, 42] != first[0.0, 0.01, 43]
    assert first[0.5, 0.01, 42] != first[0.0, 0.01, 42]
    last = {cell: metrics["val_perplexity"] for cell, (metrics, _, _) in found.items()}
    assert len(set(last.values())) == 12
    for (noise, _, _), (metrics, _, _) in found.items():
        assert (metrics["val_perplexity_noisy"] == metrics["val_perplexity"]) == (noise == 0.0)


def test_nothing_to_do_when_all_is_done(finished, smoke):
    workdir, _ = finished
    before = (workdir / "ledger.jsonl").read_bytes()
    assert todo(Ledger.read(workdir)) == []
    assert run_study(smoke, workdir).done == 0
    assert (workdir / "ledger.jsonl").read_bytes() == before


def test_a_stopped_study_ends_in_the_same_numbers(finished, smoke, shared_programs, tmp_path):
    """Stopped in the middle of the second cell, which has noise, between checkpoints, and run again."""
    study, polls = part_of(smoke, smoke.design.cells()[1:3]), iter(range(10_000))
    with pytest.raises(Stopped):
        run_study(study, tmp_path, stop=lambda: next(polls) >= 32)
    assert len(rows(tmp_path)) == 1
    again = run_study(study, tmp_path)
    assert again.done == 3
    found = rows(tmp_path)
    assert len(found) == 4 and found == rows(finished[0], found)


def test_a_failure_is_kept_and_not_repeated(smoke, shared_programs, tmp_path, monkeypatch):
    """A non-finite run is a failed row; the rest of the study finishes; it runs again only when asked."""
    small = part_of(smoke, smoke.design.cells()[:2])
    real = loop.RunConfig.knobs

    def poisoned(self, update=0):
        knobs = real(self, update)
        bad = self.balance_weight == 0.0 and self.init_seed == 42
        return dataclasses.replace(knobs, noise=knobs.noise.scaled(math.nan)) if bad else knobs

    monkeypatch.setattr(loop.RunConfig, "knobs", poisoned)
    outcome = run_study(small, tmp_path)
    ledger = Ledger.read(tmp_path)
    assert (outcome.done, outcome.failed) == (3, 1)
    assert ledger.failed()[0].error.startswith("NonFinite: update 1 was refused")
    assert todo(ledger) == [] and len(todo(ledger, retry_failed=True)) == 1
    monkeypatch.setattr(loop.RunConfig, "knobs", real)
    assert run_study(small, tmp_path, retry_failed=True).done == 1
    ledger = Ledger.read(tmp_path)
    assert len(ledger.failed()) == 1 and not ledger.missing()


def test_an_unforeseen_error_is_kept_and_raised(smoke, tmp_path):
    """The ledger has a failed row that says what happened, and the run is tried again by the next call."""

    def broken(*_):
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        run_study(dataclasses.replace(smoke, runner=Runner(broken)), tmp_path)
    ledger = Ledger.read(tmp_path)
    assert [failure.error for failure in ledger.failed()] == ["MemoryError: no room"]
    assert len(todo(ledger)) == 12


@pytest.mark.slow
def test_two_structures_are_two_programs(smoke, tmp_path):
    """A change that alters the program (the gate's optimizer) compiles again; a change of a value does not."""

    def config(cell, seed):
        base = smoke.config(cell, seed)
        router = "frozen" if cell["balance_weight"] == 0.0 else "muon"
        return dataclasses.replace(base, updates=2, checkpoint_every=0, optimizer=dataclasses.replace(base.optimizer, router=router))

    design = dataclasses.replace(smoke.design, only=smoke.design.cells()[:4], comparisons=())
    outcome = run_study(dataclasses.replace(smoke, design=design, config=config), tmp_path)
    assert outcome.done == 8 and outcome.compiled["train"] == 2


def test_what_is_set_is_set_in_every_run_and_declared(smoke):
    changed = smoke.changed(["updates=5", "data.split=leaky", "model.num_layers = 2"])
    for before, after in zip(smoke.configs(), changed.configs(), strict=True):
        data, model = dataclasses.replace(before.data, split="leaky"), before.model.replace(num_layers=2)
        assert after == dataclasses.replace(before, updates=5, data=data, model=model)
    settings = changed.design.settings
    assert settings["updates"] == 5 and settings["split"] == settings["data"]["split"] == "leaky" and settings["model"]["num_layers"] == 2
    assert "updates=5, data.split=leaky" in changed.design.notes[-1]
    unlike = {name for name in settings if settings[name] != smoke.design.settings[name]}
    assert unlike == {"updates", "split", "data", "model"} and changed.design.digest() != smoke.design.digest()
    assert smoke.changed([]) is smoke
    for wrong, message in (
        ("init_seed=3", "init_seed=: the runs of noise_factorial:smoke differ in it"),
        ("updats=5", "did you mean 'updates'"),
    ):
        with pytest.raises(ConfigError, match=message):
            smoke.changed([wrong])


def test_names_of_cells_are_folder_names():
    assert cell_name({"noise_std": 0.1, "gate": "adam w/x"}, 42) == "noise_std-0.1_gate-adam-w-x_seed-42"
    assert runner.describe_devices() == "8 x cpu (cpu)"


def test_what_runs_share_is_prepared_before_each(smoke, tmp_path):
    """`prepare` sees the study's folder, programs and stop, and the run is the one that it returns."""
    seen = []

    def prepare(shop, config):
        seen.append((shop.folder, shop.stop(), shop.program(config) is shop.program(config), config.init_seed))
        return dataclasses.replace(config, updates=2, checkpoint_every=0)

    design = dataclasses.replace(smoke.design, only=smoke.design.cells()[:1], comparisons=())
    outcome = run_study(dataclasses.replace(smoke, design=design, prepare=prepare), tmp_path)
    assert seen == [(tmp_path, False, True, 42), (tmp_path, False, True, 43)]
    assert outcome.compiled["train"] == 1 and [len(series["train/loss"]) for _, series, _ in rows(tmp_path).values()] == [2, 2]


@pytest.mark.slow
def test_lanes_find_what_one_run_after_the_other_finds(finished, smoke, tmp_path):
    """Four at a time: the same numbers to the last bit, the same table, one program."""
    outcome = run_study(smoke, tmp_path, lanes=4)
    assert (outcome.done, outcome.failed) == (12, 0) and outcome.compiled == {"train": 1, "evaluate": 1, "init": 1}
    assert rows(tmp_path) == rows(finished[0])
    one, four = (Ledger.read(workdir) for workdir in (finished[0], tmp_path))
    assert [run.provenance for run in sorted(four.runs(), key=str)] == [run.provenance for run in sorted(one.runs(), key=str)]
    timeless = [[dataclasses.replace(run, seconds=1.0) for run in ledger.runs()] for ledger in (one, four)]
    assert report.console_table(one.design, timeless[0]) == report.console_table(four.design, timeless[1])
    assert not list((tmp_path / "cells").glob("*/checkpoints"))


@pytest.mark.slow
def test_the_steps_of_an_earlier_launch_are_told_apart():
    told, steps, lock = [], Counter(), threading.Lock()
    progress = SimpleNamespace(update=lambda *arguments: told.append(arguments))
    goes_on, begins = (runner._Part(progress, steps, lock, name) for name in ("goes on", "begins"))
    goes_on.update(41, None, 10)
    begins.update(1, None, 10)
    goes_on.update(42, None, 10)
    assert told == [(41, None, 10, 40), (42, None, 10, 0), (43, None, 10, 0)]  # steps of the study, metrics, tokens, steps done earlier


@pytest.mark.slow
def test_a_study_stopped_in_lanes_goes_on_with_another_number(finished, smoke, tmp_path, monkeypatch):
    """Stopped while five run and again while two do; the rest one after the other. Each time what was under way goes on."""
    study = part_of(smoke, smoke.design.cells()[:4])
    for lanes, after in ((5, 60), (2, 40)):
        polls = iter(range(10_000))
        with pytest.raises(Stopped, match="stopped at update"):
            run_study(study, tmp_path, stop=lambda polls=polls, after=after: next(polls) >= after, lanes=lanes)
        assert list((tmp_path / "cells").glob("*/checkpoints/[0-9]*"))
    left = len(todo(Ledger.read(tmp_path)))
    monkeypatch.setattr(loop.RunConfig, "program", program_of)
    assert run_study(study, tmp_path).done == left > 0
    found = rows(tmp_path)
    assert len(found) == 8 and found == rows(finished[0], found)


@pytest.mark.slow
def test_in_lanes_a_failure_is_its_own_and_an_unforeseen_error_comes_at_the_end(finished, smoke, tmp_path, monkeypatch):
    """Of three at a time one meets a non-finite value and one a fault: the third is finished and the fault is raised."""
    design = dataclasses.replace(smoke.design, only=smoke.design.cells()[:3], comparisons=())
    real = loop.RunConfig.knobs

    def poisoned(self, update=0):
        knobs = real(self, update)
        bad = self.noise.startswith("router_logits=additive:0.0") and self.balance_weight > 0
        return dataclasses.replace(knobs, noise=knobs.noise.scaled(math.nan)) if bad else knobs  # type: ignore[union-attr]

    def broken(config, *arguments):
        if config.balance_weight == 0.0:
            raise MemoryError("no room")
        return loop.run(config, *arguments)

    monkeypatch.setattr(loop.RunConfig, "knobs", poisoned)
    with pytest.raises(MemoryError):
        run_study(dataclasses.replace(smoke, design=design, runner=Runner(broken)), tmp_path, lanes=3)
    found = Ledger.read(tmp_path).runs()
    assert sorted((row.status, row.error.split(":")[0]) for row in found) == [
        ("failed", "MemoryError"),
        ("failed", "NonFinite"),
        ("finished", ""),
    ]
    third = {row.key: row.metrics for row in found if row.status == "finished"}
    assert third == {key: metrics for key, (metrics, *_) in rows(finished[0]).items() if key in third}


@pytest.mark.slow
def test_runs_of_two_structures_are_not_mixed(smoke, tmp_path):
    """Cells alternate between two programs; three lanes take those of one together, in the order of the design, after each was prepared."""
    prepared = []

    def config(cell, seed):
        base = smoke.config(cell, seed)
        router = "frozen" if cell["balance_weight"] == 0.0 else "muon"
        return dataclasses.replace(base, updates=2, checkpoint_every=0, optimizer=dataclasses.replace(base.optimizer, router=router))

    def prepare(shop, config):
        prepared.append((config.optimizer.router, config.init_seed))
        return config

    design = dataclasses.replace(smoke.design, only=smoke.design.cells()[:4], comparisons=())
    outcome = run_study(dataclasses.replace(smoke, design=design, config=config, prepare=prepare), tmp_path, lanes=3)
    assert outcome.done == 8 and outcome.compiled == {"train": 2, "evaluate": 2, "init": 2}
    assert [router for router, _ in prepared] == ["muon"] * 4 + ["frozen"] * 4


def test_lanes_that_cannot_be_are_refused(smoke, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="lanes must be at least 1, got 0"):
        run_study(smoke, tmp_path, lanes=0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(Unsupported, match="2 lanes in a job of 2 processes"):
        run_study(smoke, tmp_path, lanes=2)


def measuring(smoke, measure):
    """The smoke study, of which nothing is trained."""
    design = dataclasses.replace(smoke.design, metrics=(Metric("found"),), comparisons=())
    return dataclasses.replace(smoke, design=design, measure=measure)


def test_a_study_may_measure_instead_of_train(smoke, tmp_path, capsys):
    """Rows with arrays, what is made once, two folders; nothing is compiled or trained, each run is one of the progress, and done is done."""
    made = []

    def measure(shop, config, cell, seed):
        start = shop.once("start", lambda: made.append(seed) or 10.0)
        assert (shop.folder, shop.study) == (tmp_path / "shared", tmp_path / "own")
        return {"found": start + cell["noise_std"], "beside": 1.0}, {"by_layer": [seed, 2.0]}

    experiment = measuring(smoke, measure)
    outcome = run_study(experiment, tmp_path / "own", shared=tmp_path / "shared", lanes=3)
    assert (outcome.done, outcome.failed, outcome.compiled.total()) == (12, 0, 0) and made == [42]
    told = capsys.readouterr().err
    assert told.startswith("noise_factorial:smoke 1/12 (8 %): ") and "\nnoise_factorial:smoke 12/12 (100 %): " in told, told
    for (cell, seed), (metrics, series, arrays) in rows(tmp_path / "own").items():
        assert metrics["found"] == 10.0 + dict(cell)["noise_std"] and series == {} and arrays == {"by_layer": [seed, 2.0]}
    assert run_study(experiment, tmp_path / "own").done == 0 and report.build(tmp_path / "own").markdown.exists()


def test_a_measurement_that_is_not_finite_is_a_failed_row_and_a_stop_comes_between_two(smoke, tmp_path):
    experiment = measuring(smoke, lambda shop, config, cell, seed: ({"found": math.nan if cell["noise_std"] else 1.0}, {}))
    outcome = run_study(experiment, tmp_path)
    assert (outcome.done, outcome.failed) == (4, 8)
    assert Ledger.read(tmp_path).failed()[0].error.startswith("NonFinite: what was measured is not finite: found")
    polls = iter(range(100))
    again = measuring(smoke, lambda *_: ({"found": 1.0}, {}))
    with pytest.raises(Stopped, match="between two runs"):
        run_study(again, tmp_path / "stopped", stop=lambda: next(polls) >= 5)
    assert len(rows(tmp_path / "stopped")) == 5 and run_study(again, tmp_path / "stopped").done == 7


def test_a_last_evaluation_that_is_not_finite_is_a_failed_row(smoke, tmp_path):
    """As of noise in the evaluation alone, which no update meets. What the study does not ask for may be anything."""

    def run(config, *_):
        return loop.Result({"found": math.nan if config.init_seed == 42 else 1.0, "beside": math.nan}, {}, [], 1.0)

    design = dataclasses.replace(smoke.design, metrics=(Metric("found"),), only=smoke.design.cells()[:1], comparisons=())
    study = dataclasses.replace(smoke, design=design, runner=Runner(run))
    outcome = run_study(study, tmp_path)
    assert (outcome.done, outcome.failed) == (1, 1) and todo(Ledger.read(tmp_path)) == []
    assert Ledger.read(tmp_path).failed()[0].error.startswith("NonFinite: what was measured is not finite: found;")
    assert run_study(study, tmp_path, retry_failed=True).failed == 1


def test_measuring_is_refused_in_several_processes(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(Unsupported, match="measures in one process, and there are 2"):
        run_study(measuring(smoke, lambda *_: ({}, {})), tmp_path)
