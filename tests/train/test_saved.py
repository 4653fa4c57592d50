"""A model from a preset, a run's folder or its checkpoints: the same bits, and everything else is one clear line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from moe_jax.config_tools import config_dict, rebuild
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.model import Model, ModelConfig
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.train import checkpoint, saved
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.data import DataConfig, build
from moe_jax.train.loop import RunConfig, run
from moe_jax.train.saved import load_model
from moe_jax.train.sources import sha256_of
from moe_jax.train.step import Objective

CONFIG = RunConfig(
    model=ModelConfig.preset("tiny", num_layers=2, d_model=16, d_expert=16, dense_layers=(0,)),
    data=DataConfig(source="synthetic", tokenizer="bytes", seq_len=16, batch_size=4, eval_windows=4),
    optimizer=OptimizerConfig(warmup=1, total=4, betas=(0.8, 0.9), freeze_roles=("norm",)),
    objective=Objective(freeze=("freeze_params",)),
    updates=4,
    eval_batch=4,
    checkpoint_every=2,
)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with the checkpoints of updates 2 and 4, and the program that made it."""
    folder, program = tmp_path_factory.mktemp("trained"), CONFIG.program()
    run(CONFIG, program, build(CONFIG.data, 0), folder)
    return folder, program


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of that folder, to be damaged."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_run_comes_back_bit_for_bit(trained):
    folder, program = trained
    state, _ = Checkpoints(folder / "checkpoints", CONFIG, build(CONFIG.data, 0).fingerprint).restore(program.init(np.uint32(0)))
    for source in (folder, str(folder), folder / "checkpoints"):
        found = load_model(source)
        assert (found.config, found.run, found.step) == (CONFIG.model, CONFIG, 4)
        assert same(found.params, state.params)
        assert all(isinstance(leaf, jax.Array) and not leaf.committed for leaf in jax.tree.leaves(found.params))
    earlier = load_model(folder, step=2)
    assert earlier.step == 2 and not same(earlier.params, state.params)


def test_a_preset_has_the_fresh_parameters_of_seed_0():
    found = load_model("tiny")
    assert (found.config, found.run, found.step) == (ModelConfig.preset("tiny"), None, 0)
    assert same(found.params, Model(found.config).init(0))


def test_a_damaged_checkpoint_is_passed_over_and_left_as_it_is(copy, trained):
    file = next(path for path in (copy / "checkpoints" / "4" / "state").rglob("d/*") if path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint step 4 in .* is damaged: .*sha256"):
        found = load_model(copy)
    assert found.step == 2 and same(found.params, load_model(trained[0], step=2).params)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["2", "4"]
    with (
        pytest.warns(UserWarning, match="step 4 .* is damaged"),
        pytest.raises(CheckpointError, match="no intact checkpoint .* damaged: 4"),
    ):
        load_model(copy, step=4)


def test_every_byte_is_verified_once(copy, monkeypatch):
    """When the model is found, before its parameters are read; one that is lost in between is an error, and renamed by nobody."""
    hashed = []
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    found = load_model(copy)
    kept = sorted(path for path in (copy / "checkpoints" / "4").rglob("*") if path.is_file() and path.name != "manifest.json")
    assert sorted(hashed) == kept
    assert found.params and sorted(hashed) == kept
    again = load_model(copy)
    shutil.rmtree(copy / "checkpoints" / "4" / "state")
    with pytest.raises(CheckpointError, match="step 4 in .* was verified, but orbax cannot read it"):
        _ = again.params
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["2", "4"]


def test_every_field_of_a_config_comes_back():
    """Nested dataclasses, tuples, None and numbers, through JSON."""
    assert rebuild(RunConfig, json.loads(json.dumps(config_dict(CONFIG))), "") == CONFIG
    older = config_dict(CONFIG)
    del older["start"], older["model"]["remat"]
    assert rebuild(RunConfig, older, "") == CONFIG


def test_fields_of_other_code_are_named():
    newer = config_dict(CONFIG)
    newer["model"]["dtypes"]["sums"] = "float64"
    with pytest.raises(ConfigError, match="checkpoint 7 was written by other code: DTypePolicy has no sums here"):
        rebuild(RunConfig, newer, "checkpoint 7")


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("quik", ConfigError, "neither a folder nor a preset .did you mean 'quick'."),
        ("runs/nowhere", ConfigError, "no model 'runs/nowhere'"),
        (".", CheckpointError, "no checkpoint in .; it has none; give a run folder"),
    ],
)
def test_what_is_no_model_is_one_clear_line(source, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


def test_the_text_of_a_run_is_its_own_and_its_words_stay_what_they_mean(trained):
    found = load_model(trained[0])
    assert found.text(None) == found.text("synthetic") == CONFIG.data and found.text(None, 8) == CONFIG.data.replace(seq_len=8)
    assert found.text("wiki") == CONFIG.data.replace(source="wiki")  # bytes are bytes
    own = CONFIG.data.replace(tokenizer="bpe:300", max_documents=40)
    of_bpe = dataclasses.replace(found, run=dataclasses.replace(CONFIG, data=own))
    assert of_bpe.text(None) == of_bpe.text("synthetic", 16) == own
    assert of_bpe.check_words(own.replace(batch_size=2, max_tokens=9)).batch_size == 2
    with pytest.raises(
        ConfigError, match="bpe:300 of this run was trained on source=synthetic, and on source=wiki its ids would mean other"
    ):
        of_bpe.text("wiki")
    with pytest.raises(ConfigError, match="trained on max_documents=40, and on max_documents=None its ids would mean other words"):
        of_bpe.check_words(own.replace(max_documents=None))
    assert of_bpe.check_words(own.replace(source="wiki", tokenizer="bytes")).tokenizer == "bytes"  # said, so meant


def test_a_preset_has_a_text_that_fits_it():
    tiny = load_model("tiny")
    assert tiny.text("synthetic") == DataConfig("synthetic", "bytes", 64) and tiny.text(None, 16) == DataConfig("wiki", "bytes", 16)
    assert load_model("quick").text(None) == DataConfig("wiki", "bpe:2048", 128)
    own = dataclasses.replace(tiny, tokenizer="own/tokenizer.json")
    assert own.text(None).tokenizer == "own/tokenizer.json"


def test_a_run_does_not_begin_with_words_of_other_documents(tmp_path):
    """The loop itself refuses it, whoever made the config."""
    config = dataclasses.replace(
        CONFIG,
        model=CONFIG.model.replace(vocab_size=300),
        data=CONFIG.data.replace(tokenizer="bpe:300", max_documents=40),
        objective=Objective(),
        updates=1,
        checkpoint_every=1,
    )
    program = config.program()
    run(config, program, build(config.data, 0), tmp_path)
    again = dataclasses.replace(config, start=str(tmp_path))
    assert run(again, program, build(config.data, 0)).metrics
    other = dataclasses.replace(again, data=config.data.replace(max_documents=50))
    with pytest.raises(ConfigError, match="trained on max_documents=40, and on max_documents=50"):
        run(other, program, build(other.data, 0))


def test_a_step_that_is_not_there_is_refused_with_those_that_are(trained):
    with pytest.raises(CheckpointError, match="no checkpoint of step 3 .* it has 2, 4"):
        load_model(trained[0], step=3)


def test_parameters_of_another_layout_are_named(trained, monkeypatch):
    """The code declares other parameters than those that were saved."""
    wider = dataclasses.replace(CONFIG, model=CONFIG.model.replace(d_expert=24))
    monkeypatch.setattr(saved, "rebuild", lambda *_: wider)
    with pytest.raises(CheckpointError, match="does not have the parameters of its model in this code: .*feed_forward/down"):
        load_model(trained[0])
