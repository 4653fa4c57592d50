"""A study from design to ledger: one program for eighteen cells, failures kept, resumed by running again."""

import dataclasses
import math

import pytest

from experiments.catalogue import load
from moe_jax.errors import Stopped
from moe_jax.studies import Ledger
from moe_jax.studies import run as runner
from moe_jax.studies.run import Experiment, cell_name, run_study, todo
from moe_jax.train import loop


@pytest.fixture(scope="module")
def smoke() -> Experiment:
    """Two seeds of the smoke preset: twelve runs."""
    experiment = load("noise_factorial:smoke")
    return dataclasses.replace(experiment, design=dataclasses.replace(experiment.design, seeds=(42, 43)))


@pytest.fixture(scope="module")
def finished(smoke, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    return workdir, run_study(smoke, workdir)


def rows(workdir):
    """What a study found, without the clocks."""
    return {run.key: (run.metrics, run.series, run.arrays) for run in Ledger.read(workdir).runs() if run.status == "finished"}


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


def test_a_stopped_study_ends_in_the_same_numbers(finished, smoke, tmp_path):
    """Stopped in the middle of the second cell, between checkpoints, and run again."""
    polls = iter(range(10_000))
    with pytest.raises(Stopped):
        run_study(smoke, tmp_path, stop=lambda: next(polls) >= 32)
    assert len(rows(tmp_path)) == 1
    again = run_study(smoke, tmp_path)
    assert again.done == 11
    assert rows(tmp_path) == rows(finished[0])


def test_a_failure_is_kept_and_not_repeated(smoke, tmp_path, monkeypatch):
    """A non-finite run is a failed row; the rest of the study finishes; it runs again only when asked."""
    design = dataclasses.replace(smoke.design, seeds=(42, 43), only=smoke.design.cells()[:2], comparisons=())
    small = dataclasses.replace(smoke, design=design)
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


def test_an_unforeseen_error_is_kept_and_raised(smoke, tmp_path, monkeypatch):
    """The ledger has a failed row that says what happened, and the run is tried again by the next call."""

    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(runner, "run", broken)
    with pytest.raises(MemoryError):
        run_study(smoke, tmp_path)
    ledger = Ledger.read(tmp_path)
    assert [failure.error for failure in ledger.failed()] == ["MemoryError: no room"]
    assert len(todo(ledger)) == 12


def test_two_structures_are_two_programs(smoke, tmp_path):
    """A change that alters the program (the gate's optimizer) compiles again; a change of a value does not."""

    def config(cell, seed):
        base = smoke.config(cell, seed)
        router = "frozen" if cell["balance_weight"] == 0.0 else "muon"
        return dataclasses.replace(base, updates=2, checkpoint_every=0, optimizer=dataclasses.replace(base.optimizer, router=router))

    design = dataclasses.replace(smoke.design, only=smoke.design.cells()[:4], comparisons=())
    outcome = run_study(dataclasses.replace(smoke, design=design, config=config), tmp_path)
    assert outcome.done == 8 and outcome.compiled["train"] == 2


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
