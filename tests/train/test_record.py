"""Routes to the disk and back: those of the very batches, in order, with the draws that training makes."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.errors import ConfigError, TraceError
from moe_jax.keys import Draw
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.trace_store import TraceReader
from moe_jax.train.data import DataConfig, build
from moe_jax.train.record import Routes, record

CONFIG = ModelConfig.preset("tiny", num_layers=2, d_model=16, d_expert=16, dropout=0.5)
DATA = DataConfig(source="synthetic", tokenizer="bytes", seq_len=16, batch_size=4, accumulation=2, eval_windows=10)


@pytest.fixture(scope="module")
def data():
    return build(DATA, 3)


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return model.init(0)


@pytest.fixture(scope="module")
def chosen(model, params):
    """(tokens, noise, draw) -> what the model chooses, by itself."""
    jitted = jax.jit(lambda tokens, noise, draw: model.features(params, tokens, noise, draw, capture=("trace",)).trace)

    def of(tokens, noise=None, draw=None):
        return jitted(tokens, None if noise is None else CONFIG.resolve(noise), draw)

    return of


@pytest.fixture(scope="module")
def folder(model, params, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("routes") / "train"
    record(model, params, data, place, 3)
    return place


def test_the_routes_of_the_training_batches(folder, chosen, data):
    """Each step is what the model chooses on the rows of that step, micro-batch after micro-batch, without dropout."""
    reader = TraceReader(folder)
    assert reader.steps == (0, 1, 2) and reader.info.source == "reference" and reader.info.data_fingerprint == data.fingerprint
    for step in reader.steps:
        micro = data.batch(step)["tokens"]
        trace = reader.read(step, micro.reshape(8, 16))
        each = [chosen(tokens) for tokens in micro]
        np.testing.assert_array_equal(trace.ids, np.concatenate([found.ids for found in each], 1))
        np.testing.assert_allclose(trace.weights, np.concatenate([found.weights for found in each], 1), rtol=1e-5)


def test_ids_without_an_embedding_are_refused(data, tmp_path):
    small = Model(CONFIG.replace(vocab_size=100))
    with pytest.raises(ConfigError, match="the tokenizer bytes has 257 ids, the model's vocab_size is 100"):
        record(small, small.init(0), data, tmp_path / "r", 1)
    assert not (tmp_path / "r").exists()


def test_noise_makes_the_draws_of_the_update(folder, model, params, chosen, data, tmp_path):
    """Recorded under a training noise they are the routes of that step's draw; noise of another phase does nothing."""
    noise = NoiseSpec.parse("router_logits=additive:0.5:phases=train")
    record(model, params, data, tmp_path / "noisy", 2, noise=noise, weights=False, noise_seed=7)
    reader = TraceReader(tmp_path / "noisy")
    found = reader.read(1)
    assert reader.info.source == "noisy"  # a reference is a clean pass's
    tokens = data.batch(1)["tokens"]
    second = chosen(tokens[1], noise, Draw(np.uint32(7), 1, "train", 4))
    np.testing.assert_array_equal(found.ids[:, 4:], second.ids)
    assert found.weights is None and (found.ids != TraceReader(folder).read(1).ids).any()
    record(model, params, data, tmp_path / "other", 1, noise=NoiseSpec.parse("router_logits=additive:0.5:phases=eval"))
    other = TraceReader(tmp_path / "other")
    assert other.info.source == "reference"
    np.testing.assert_array_equal(other.read(0).ids, TraceReader(folder).read(0).ids)


def test_the_validation_batches_in_their_order(model, params, chosen, data, tmp_path):
    """Ten windows, four at a time, the last batch filled up; the draws are those of an evaluation."""
    noise = NoiseSpec.parse("router_logits=additive:0.5:phases=eval")
    record(model, params, data, tmp_path / "v", 99, noise=noise, split="validation", eval_batch=4)
    reader = TraceReader(tmp_path / "v")
    assert reader.steps == (0, 1, 2)
    for index, batch in enumerate(data.validation_batches(4)):
        now = chosen(batch["tokens"], noise, Draw(np.uint32(0), 0, "eval", 4 * index))
        np.testing.assert_array_equal(reader.read(index, batch["tokens"]).ids, now.ids)


def test_a_recording_that_was_cut_off_is_made_whole(folder, model, params, data, tmp_path, monkeypatch):
    """Stopped by an error after one step it is refused by readers; recorded again it holds the same bits as one that was not stopped."""
    calls = iter(range(9))
    batch = type(data).batch
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(
            type(data), "batch", lambda self, step: batch(self, step) if next(calls) < 1 else (_ for _ in ()).throw(MemoryError())
        )
        record(model, params, data, tmp_path / "r", 3)
    with pytest.raises(TraceError, match="still being written"):
        TraceReader(tmp_path / "r")
    record(model, params, data, tmp_path / "r", 3)
    for step in range(3):
        np.testing.assert_array_equal(TraceReader(tmp_path / "r").read(step).ids, TraceReader(folder).read(step).ids)


def test_beside_the_batches_in_micro_batches(folder, data):
    """Every batch gets the routes of its own number, from where a resumed run begins, cut like the batch."""
    routes, reader = Routes(folder, CONFIG, 8, 16, "ids+weights"), TraceReader(folder)
    found = list(routes.beside(data.batches(1), 1, 3))
    assert [batch["tokens"].tolist() for batch in found] == [data.batch(step)["tokens"].tolist() for step in (1, 2)]
    for step, batch in zip((1, 2), found, strict=True):
        trace, replay = reader.read(step), batch["replay"]
        assert replay.what == "ids+weights" and replay.trace.ids.shape == (2, 2, 4, 16, 2)
        np.testing.assert_array_equal(np.concatenate(list(replay.trace.ids), 1), trace.ids)
        np.testing.assert_array_equal(np.concatenate(list(replay.trace.weights), 1), trace.weights)
    assert Routes(folder, CONFIG, 8, 16).of(0, data.batch(0)["tokens"].reshape(8, 16)).trace.weights is None
    assert list(routes.beside(data.batches(3), 3, 3)) == []


@pytest.mark.parametrize(
    "changes, what",
    [
        (dict(num_experts=8), "4 experts.* 8"),
        (dict(num_layers=3), "0, 1.*layers.*0, 1, 2"),
        (dict(experts_per_token=1), "2 experts per token.* 1"),
        (dict(d_expert=24), "model hash"),
    ],
)
def test_routes_of_another_model_are_refused_with_both_numbers(folder, changes, what):
    with pytest.raises(TraceError, match=what):
        Routes(folder, CONFIG.replace(**changes), 8, 16)


def test_routes_of_another_text_or_too_few(folder, data):
    with pytest.raises(TraceError, match="16 positions.* 12"):
        Routes(folder, CONFIG, 8, 12)
    routes = Routes(folder, CONFIG, 8, 16)
    with pytest.raises(TraceError, match="no routes of step 3, and the run replays 5 steps"):
        next(routes.beside(data.batches(0), 0, 5))
    with pytest.raises(TraceError, match="these routes belong to other tokens"):
        next(routes.beside(build(DATA, 4).batches(0), 0, 3))


def test_another_trace_in_the_folder_is_refused(folder, model, params, data):
    with pytest.raises(TraceError, match="holds another trace.*source"):
        record(model, params, data, folder, 3, source="self")


def test_no_router_and_unknown_splits_are_refused(model, params, data, tmp_path):
    with pytest.raises(ConfigError, match="got split 'test'"):
        record(model, params, data, tmp_path / "x", 1, split="test")
    dense = Model(dataclasses.replace(CONFIG, num_experts=0))
    with pytest.raises(ConfigError, match="a model that has a router"):
        record(dense, dense.init(0), data, tmp_path / "x", 1)
    assert not (tmp_path / "x").exists()
