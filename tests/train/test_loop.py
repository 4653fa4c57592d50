"""A run from end to end on synthetic text: it learns, it resumes to the same bits, it stops as it says."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from moe_jax.errors import CheckpointError, ConfigError, NonFinite, Stopped
from moe_jax.model import ModelConfig
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.train import loop
from moe_jax.train.data import DataConfig, build
from moe_jax.train.loop import RunConfig, run

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


@pytest.mark.parametrize("after", [1, 4, 7, 11])
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
        def knobs(self):
            knobs = super().knobs()
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


def test_without_noise_in_evaluation_there_is_no_noisy_perplexity(data):
    config = dataclasses.replace(CONFIG, noise="router_logits=additive:0.3:phases=train", updates=1, eval_every=0)
    assert "val_perplexity_noisy" not in run(config, config.program(), data).metrics


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
    assert loop.peak_memory_gb() > 0 and jax.devices()
