"""A run from end to end on synthetic text: it learns, it resumes to the same bits, it stops as it says."""

import dataclasses
import json
import math

import numpy as np
import pytest

from moe_jax.errors import CheckpointError, ConfigError, NonFinite, Stopped, TraceError
from moe_jax.model import ModelConfig
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.trace_store import TraceReader
from moe_jax.train import loop
from moe_jax.train.data import DataConfig, build
from moe_jax.train.loop import RunConfig, run
from moe_jax.train.record import record
from moe_jax.train.saved import load_model

CONFIG = RunConfig(
    model=ModelConfig.preset("tiny", num_layers=1, d_model=16, d_expert=16, dropout=0.1),
    data=DataConfig(source="synthetic", tokenizer="bytes", seq_len=16, batch_size=4, eval_windows=12),
    optimizer=OptimizerConfig(warmup=1, total=12),
    updates=12,
    noise="router_logits=additive:0.3:phases=train+eval",
    eval_every=6,
    eval_batch=4,
    checkpoint_every=4,
)


@pytest.fixture(scope="module")
def data():
    return build(CONFIG.data, CONFIG.data_seed)


@pytest.fixture(scope="module")
def program():
    return CONFIG.program()


@pytest.fixture(scope="module")
def unbroken(program, data, tmp_path_factory):
    return run(CONFIG, program, data, tmp_path_factory.mktemp("unbroken"))


def test_it_learns_and_reports(unbroken, program):
    losses = [value for _, value in unbroken.series["train/loss"]]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.05
    metrics = unbroken.metrics
    assert metrics["val_perplexity"] == pytest.approx(math.exp(metrics["val_loss"]))
    assert metrics["val_perplexity_best"] <= metrics["val_perplexity"]
    assert metrics["val_perplexity_noisy"] != metrics["val_perplexity"]
    assert metrics["usage_cv_routed"] != metrics["usage_cv_seed"]
    assert np.asarray(unbroken.load).shape == (1, 4) and np.allclose(np.sum(unbroken.load, axis=1), 1)
    assert [step for step, _ in unbroken.series["eval/loss"]] == [6, 12]
    assert program.compiled == {"init": 1, "train": 1, "evaluate": 1}


@pytest.mark.parametrize("after", [7, *(pytest.param(after, marks=pytest.mark.slow) for after in (1, 4, 11))])
def test_a_stopped_run_goes_on_to_the_same_bits(unbroken, program, data, tmp_path, after):
    """Stopped after `after` updates and run again: every loss, metric and load is that of the run that was not stopped."""
    polls = iter(range(100))
    with pytest.raises(Stopped, match=f"stopped at update {after} of 12, saved"):
        run(CONFIG, program, data, tmp_path, stop=lambda: next(polls) >= after - 1)
    resumed = run(CONFIG, program, data, tmp_path)
    assert resumed.series == unbroken.series
    assert resumed.metrics == unbroken.metrics
    assert resumed.load == unbroken.load
    assert program.compiled["train"] == 1


def test_a_run_killed_after_its_last_evaluation_records_it_once(unbroken, program, data, tmp_path):
    """Everything was written but the ledger's row: run again, the curves are those of the run that was not killed."""
    run(CONFIG, program, data, tmp_path)
    again = run(CONFIG, program, data, tmp_path)
    assert again.series == unbroken.series and again.metrics == unbroken.metrics and again.load == unbroken.load
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/loss" in row] == [6, 12]


def test_a_finished_run_without_its_metrics_is_evaluated_again(unbroken, program, data, tmp_path):
    run(CONFIG, program, data, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    lost = {"train_loss_end", "val_perplexity_best"}  # of the updates and the evaluation whose rows are gone
    again = run(CONFIG, program, data, tmp_path).metrics
    assert "train_loss_end" not in again
    assert {name: again[name] for name in again.keys() - lost} == {name: unbroken.metrics[name] for name in unbroken.metrics.keys() - lost}


def test_a_lost_checkpoint_step_falls_back(unbroken, program, data, tmp_path):
    """The newest checkpoint is damaged: the one before it is used, and the end is the same."""
    polls = iter(range(100))
    with pytest.raises(Stopped):
        run(CONFIG, program, data, tmp_path, stop=lambda: next(polls) >= 9)
    newest = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())
    manifest = tmp_path / "checkpoints" / str(newest) / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.warns(UserWarning, match=f"step {newest}"):
        resumed = run(CONFIG, program, data, tmp_path)
    assert resumed.metrics == unbroken.metrics and resumed.series == unbroken.series


def test_a_checkpoint_of_another_config_or_text_is_refused(program, data, tmp_path):
    run(dataclasses.replace(CONFIG, updates=4), program, data, tmp_path)
    with pytest.raises(ConfigError, match="balance_weight"):
        run(dataclasses.replace(CONFIG, updates=4, balance_weight=0.5), program, data, tmp_path)
    with pytest.raises(CheckpointError, match="data"):
        run(dataclasses.replace(CONFIG, updates=4), program, build(CONFIG.data, 1), tmp_path)


def test_a_non_finite_gradient_stops_the_run_and_keeps_the_checkpoint(program, data, tmp_path):
    """An infinite noise scale, as an array, makes the loss nan: the run names the leaf, and the last checkpoint stands."""
    with pytest.raises(Stopped):
        polls = iter(range(100))
        run(CONFIG, program, data, tmp_path, stop=lambda: next(polls) >= 3)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    class Poisoned(RunConfig):
        def knobs(self, update=0):
            knobs = super().knobs(update)
            return dataclasses.replace(knobs, noise=knobs.noise.scaled(math.nan))

    values = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    with pytest.raises(NonFinite, match=r"update 5 was refused: not finite in the gradient of embedding.*and \d+ more"):
        run(Poisoned(**values), program, data, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_metrics_file_has_a_row_for_every_update(program, data, tmp_path):
    result = run(dataclasses.replace(CONFIG, updates=3, eval_every=0, checkpoint_every=0), program, data, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]
    assert rows[-1]["eval/loss"] == result.metrics["val_loss"]
    health = (
        "router/load_cv",
        "router/entropy",
        "router/margin",
        "router/logit_mean",
        "optimizer/gradient_norm",
        "optimizer/expert_update_rms_max",
    )
    assert all(name in rows[0] for name in health)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(updates=0), "updates must be at least 1"),
        (dict(balance_weight=-1.0), "balance_weight must be finite and not negative"),
        (dict(balance_weight=math.nan), "balance_weight must be finite"),
        (dict(noise="router_logit=additive:0.1"), "did you mean 'router_logits'"),
        (dict(noise="router_logits=additive:0.1:layers=5"), r"layers \[5\], the model has layers 0 to 0"),
        (dict(loss_windows=5), "multiple of eval_batch=4"),
        (dict(init_seed=-1), "init_seed must be from 0"),
        (dict(data=dataclasses.replace(CONFIG.data, seq_len=512)), "exceeds model.max_seq_len=64"),
    ],
)
def test_bad_configs_are_one_clear_line(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        dataclasses.replace(CONFIG, **change)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_too_large_for_the_model_is_refused(data):
    small = dataclasses.replace(CONFIG, model=CONFIG.model.replace(vocab_size=100))
    with pytest.raises(ConfigError, match="has 257 ids, the model's vocab_size is 100"):
        run(small, small.program(), data)


def test_perplexity_is_cut_like_the_seeds():
    assert loop.perplexity(1.0) == pytest.approx(math.e)
    assert loop.perplexity(50.0) == math.exp(20.0)


# --- where a run begins, what it replays and records, AQN ---------------------------------------------------------------------------

SECOND = dataclasses.replace(CONFIG, model=CONFIG.model.replace(dropout=0.0), eval_every=0)


@pytest.fixture(scope="module")
def second():
    """The programs of runs that begin where another ended: by structure, as a study keeps them."""
    programs = {}

    def of(config):
        return programs.setdefault(config.structure(), config.program())

    return of


@pytest.fixture(scope="module")
def first(second, data, tmp_path_factory):
    """A finished run without dropout, whose every update's routes were recorded."""
    folder = tmp_path_factory.mktemp("first")
    config = dataclasses.replace(SECOND, record=str(folder / "routes"), record_what="ids+weights")
    return folder, run(config, second(config), data, folder)


def test_a_run_begins_with_the_parameters_of_another(first, second, data, tmp_path):
    """Its first loss is that of those parameters; its optimizer is fresh; its own checkpoint wins over `start` in a resume."""
    folder, _ = first
    config = dataclasses.replace(SECOND, start=str(folder), updates=3, checkpoint_every=2, noise="")
    result = run(config, second(config), data, tmp_path)
    params = load_model(folder).params
    program = second(config)
    state = dataclasses.replace(program.init(np.uint32(0)), params=params)
    _, metrics, _ = program.train(state, next(data.batches()), config.knobs())
    assert result.series["train/loss"][0][1] == pytest.approx(float(metrics["loss"][0] / metrics["loss"][1]), rel=1e-6)
    fresh = dataclasses.replace(config, start="", updates=1, checkpoint_every=0)
    assert run(fresh, program, data).series["train/loss"][0][1] > result.series["train/loss"][0][1] + 0.05
    assert int(load_model(tmp_path).step) == 3 and run(config, program, data, tmp_path).metrics == result.metrics


def test_another_model_is_refused_with_what_differs(first, data):
    config = dataclasses.replace(SECOND, start=str(first[0]), model=SECOND.model.replace(d_expert=24, renormalise=False))
    with pytest.raises(ConfigError, match=r"another one than this run's: d_expert: was 16, now 24; renormalise: was true, now false"):
        run(config, config.program(), data)


def test_a_replayed_run_is_the_recorded_one(first, second, data):
    """The same run with its own routes replayed: every loss to the bit, no live rows; and recorded steps say which text they are of."""
    folder, result = first
    config = dataclasses.replace(SECOND, replay=str(folder / "routes"), checkpoint_every=0)
    again = run(config, second(config), data)
    assert again.series["train/loss"] == result.series["train/loss"]
    assert {value for _, value in again.series["replay/live_rows"]} == {0.0}
    assert {value for _, value in again.series["replay/set_overlap"]} == {1.0}
    reader = TraceReader(folder / "routes")
    assert reader.steps == tuple(range(12)) and reader.info.source == "self" and reader.info.weights
    with pytest.raises(TraceError, match="other tokens"):
        run(config, second(config), build(CONFIG.data, 1))
    with pytest.raises(TraceError, match="no routes of step 12"):
        longer = dataclasses.replace(config, updates=13, optimizer=dataclasses.replace(config.optimizer, total=12))
        run(longer, second(config), data)


@pytest.mark.slow
def test_a_replay_of_other_routes_is_another_run(first, second, data, tmp_path):
    """Routes of the model before training, held for a whole run: other losses, and the routers drift from what they are made to do."""
    program = second(SECOND)
    record(program.model, program.init(np.uint32(5)).params, data, tmp_path / "r", 12)
    held = []
    for what in ("ids", "ids+weights"):
        config = dataclasses.replace(SECOND, replay=str(tmp_path / "r"), replay_what=what, checkpoint_every=0)
        held.append(run(config, second(config), data).series)
        assert held[-1]["train/loss"] != first[1].series["train/loss"]
        assert all(value < 1 for _, value in held[-1]["replay/set_overlap"])
    assert held[0]["train/loss"] != held[1]["train/loss"]


def test_a_stopped_run_goes_on_recording(first, second, data, tmp_path):
    """Stopped between two checkpoints: the trace is unfinished, and whole, with the same bits, once the run has gone on."""
    config = dataclasses.replace(SECOND, record=str(tmp_path / "routes"), record_what="ids+weights")
    polls = iter(range(100))
    with pytest.raises(Stopped):
        run(config, second(config), data, tmp_path, stop=lambda: next(polls) >= 5)
    with pytest.raises(TraceError, match="still being written"):
        TraceReader(tmp_path / "routes")
    assert TraceReader(tmp_path / "routes", partial=True).steps == tuple(range(6))
    run(config, second(config), data, tmp_path)
    one, other = TraceReader(tmp_path / "routes"), TraceReader(first[0] / "routes")
    assert one.steps == tuple(range(12))
    for step in one.steps:
        np.testing.assert_array_equal(one.read(step).ids, other.read(step).ids)
        np.testing.assert_array_equal(one.read(step).weights, other.read(step).weights)


@pytest.mark.slow
def test_micro_batches_are_recorded_and_replayed_in_their_order(tmp_path):
    base = dataclasses.replace(SECOND, updates=2, checkpoint_every=0, data=SECOND.data.replace(accumulation=2))
    text = build(base.data, 0)
    recorded = dataclasses.replace(base, record=str(tmp_path / "r"))
    replayed = dataclasses.replace(base, replay=str(tmp_path / "r"))
    losses = [run(config, config.program(), text).series["train/loss"] for config in (recorded, replayed)]
    assert losses[0] == losses[1]
    assert TraceReader(tmp_path / "r").read(1, text.batch(1)["tokens"].reshape(8, 16)).ids.shape == (1, 8, 16, 2)


def test_a_comparison_that_cannot_be_is_refused_before_the_first_update(first, second, data, tmp_path):
    for folder, message in ((tmp_path / "none", "none"), (first[0] / "routes", "routes")):  # the second are of batches of another size
        config = dataclasses.replace(SECOND, compare=str(folder), eval_batch=6, checkpoint_every=0)
        with pytest.raises(TraceError, match=message):
            run(config, second(config), data, tmp_path)
        assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_evaluation_beside_reference_routes(first, second, data, tmp_path):
    """The parameters that the routes were recorded with choose all of them again; others do not."""
    folder, _ = first
    saved = load_model(folder)
    record(second(SECOND).model, saved.params, data, tmp_path / "v", 99, split="validation", eval_batch=4)
    at_rest = dataclasses.replace(SECOND.optimizer, learning_rate=0.0, adamw_learning_rate=0.0)
    base = dataclasses.replace(SECOND, compare=str(tmp_path / "v"), updates=1, checkpoint_every=0, noise="")
    still = dataclasses.replace(base, start=str(folder), optimizer=at_rest)
    assert run(still, second(still), data).metrics["val_reference_overlap"] == 1.0
    assert 0.2 < run(base, second(base), data).metrics["val_reference_overlap"] < 0.99


def test_aqn_changes_from_stage_to_stage_in_one_program(second, data):
    """The first stage is the run without AQN; later ones are not; nothing is compiled again, and evaluation has no AQN."""
    base = dataclasses.replace(SECOND, checkpoint_every=0, noise="", aqn="qerl_code:0.5:0.1:3")
    plain = dataclasses.replace(base, aqn="")
    program = second(base)
    found = {name: run(config, second(config), data) for name, config in (("aqn", base), ("plain", plain))}
    assert program.compiled == {"init": 1, "train": 1, "evaluate": 1}
    losses = [found[name].series["train/loss"] for name in ("aqn", "plain")]
    same = [math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(*losses, strict=True)]
    assert same == [True] * 4 + [False] * 8
    assert "val_perplexity_noisy" not in found["aqn"].metrics


def test_no_checkpoint_is_ahead_of_the_routes(second, data, tmp_path, monkeypatch):
    """Before each save the routes of all updates so far are brought to the disk, so a kill after it loses none."""
    order = []
    flush, save = loop.TraceWriter.flush, loop.Checkpoints.save
    monkeypatch.setattr(loop.TraceWriter, "flush", lambda self: (flush(self), order.append(TraceReader(self.folder, partial=True).steps)))
    monkeypatch.setattr(loop.Checkpoints, "save", lambda self, step, *rest: (order.append(step), save(self, step, *rest)))
    config = dataclasses.replace(SECOND, record=str(tmp_path / "routes"))
    run(config, second(config), data, tmp_path)
    assert order[:6] == [tuple(range(4)), 4, tuple(range(8)), 8, tuple(range(12)), 12]


@pytest.mark.slow
def test_a_profile_reads_like_the_model(program, data, tmp_path):
    """One update, traced: the names of the model's parts are in what xprof reads."""
    run(dataclasses.replace(CONFIG, updates=4, checkpoint_every=0), program, data, tmp_path, profile=1)
    (trace,) = tmp_path.glob("profile/**/*.xplane.pb")
    for name in (b"/attention/", b"moe/dispatch", b"optimizer/orthogonalise", b"jvp(head)"):
        assert name in trace.read_bytes(), name
