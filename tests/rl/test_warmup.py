"""Supervised warm-up: it learns what the demonstrations say, stops and goes on, and its end is where reinforcement begins."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from moe_jax.errors import ConfigError, NonFinite, Stopped
from moe_jax.mesh import MeshSpec
from moe_jax.model import Model
from moe_jax.rl import loop
from moe_jax.rl.warmup import Stage, WarmUp, demonstrations, warm_up
from moe_jax.train.program import Program
from moe_jax.train.saved import load_model
from tests.rl.small import CONFIG, MODEL, OPTIMIZER, TASK, bits, program_of

WARM = WarmUp(
    MODEL,
    (Stage(replace(OPTIMIZER, adamw_learning_rate=0.02), 12), Stage(replace(OPTIMIZER, adamw_learning_rate=0.005), 6, imperfect=True)),
    task="chain_sum:terms=2",
    batch_size=8,
    length=12,
)


class Noted(list):
    def update(self, done, *_):
        self.append(done)


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """Every warm-up makes the programs of its stages; here equal ones are one, which compiles once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("moe_jax.rl.warmup.Program", functools.cache(Program))
        yield


@pytest.fixture(scope="module")
def warmed(tmp_path_factory):
    """The folder of a finished warm-up, and the updates that it reported."""
    folder, noted = tmp_path_factory.mktemp("warm"), Noted()
    warm_up(WARM, TASK, folder, noted)
    return folder, noted


@functools.cache
def loss_of():
    def loss(params, batch):
        total, metrics, _ = Model(MODEL).loss(params, batch["tokens"][0], batch["targets"][0], batch["weights"][0])
        return total / metrics["loss"][1]

    return jax.jit(loss)


def test_it_learns(warmed):
    """On demonstrations that it has not seen: from about log 18 = 2.9 nats a token (wide weights: more) down by at least 1."""
    folder, noted = warmed
    batch = demonstrations(WARM, TASK, 1000, False)
    found = load_model(folder)
    before, after = (float(loss_of()(params, batch)) for params in (Model(MODEL).init(0), found.params))
    assert after < before - 1 and after < 2.9, (before, after)
    assert noted == list(range(1, 19)) and found.step == 18 and found.config == MODEL


def test_demonstrations():
    """Prompt, worked answer and stop token; targets are the tokens that follow; weights stand where an answer's token is the target."""
    batch = demonstrations(WARM, TASK, 3, False)
    assert all(value.shape == (1, 8, 12) for value in batch.values())
    problems = {problem.prompt: problem for problem in TASK.train}
    for tokens, targets, weights in zip(*(batch[name][0] for name in ("tokens", "targets", "weights")), strict=True):
        prompt = TASK.decode(tokens[: tokens.tolist().index(TASK.encode("=")[0]) + 1])
        answer = [*TASK.encode(f"#### {problems[prompt].answer}"), TASK.stop[0]]
        begin, end = len(prompt), min(12, len(prompt) + len(answer))
        assert tokens[begin:end].tolist() == answer[: end - begin] and not tokens[end:].any()
        assert np.flatnonzero(weights).tolist() == list(range(begin - 1, end - 1)) and set(weights) <= {0.0, 1.0}
        assert np.array_equal(targets[:-1], tokens[1:]) and targets[-1] == 0
        assert TASK.score(problems[prompt], [*answer]) == 1


def test_demonstrations_are_a_function_of_seed_and_update():
    def text(config=WARM, update=3, imperfect=False):
        return demonstrations(config, TASK, update, imperfect)["tokens"].tobytes()

    assert text() == text() and len({text(), text(update=4), text(replace(WARM, seed=1)), text(imperfect=True)}) == 4


def test_a_finished_one_does_nothing_again(warmed):
    folder, _ = warmed
    (path,) = (folder / "checkpoints" / "18").glob("manifest.json")
    before, noted = path.stat().st_mtime_ns, Noted()
    warm_up(WARM, TASK, folder, noted, stop=lambda: True)
    assert not noted and path.stat().st_mtime_ns == before


@pytest.mark.parametrize("after, again", [(5, 0), (15, 12)])
def test_stopped_it_begins_the_stage_again_and_ends_in_the_same_bits(warmed, tmp_path, after, again):
    """In the first stage nothing is kept, in the second the first is."""
    noted = Noted()
    with pytest.raises(Stopped, match=f"stopped at update {after} of 18 of the warm-up; the same command begins this stage again"):
        warm_up(WARM, TASK, tmp_path, noted, stop=lambda: len(noted) == after)
    assert noted == list(range(1, after + 1))
    noted.clear()
    warm_up(WARM, TASK, tmp_path, noted)
    assert noted == list(range(again + 1, 19))
    assert bits(load_model(tmp_path).params) == bits(load_model(warmed[0]).params)


def test_a_run_begins_with_it(warmed):
    config = replace(CONFIG, start=str(warmed[0]), checkpoint_every=0)
    here = loop._Loop(config, program_of(config), TASK)
    assert bits(here.state.params) == bits(load_model(warmed[0]).params) and int(here.state.step) == 0 and here.reference is None
    other = replace(config, model=MODEL.replace(d_expert=16))
    with pytest.raises(ConfigError, match="another one than this run's: d_expert: was 8, now 16"):
        loop._Loop(other, other.program(), TASK)


def test_it_begins_with_another_model(warmed, tmp_path):
    """With a learning rate of 0 it ends where it began: at the end of the other."""
    one = replace(WARM, stages=(Stage(replace(OPTIMIZER, adamw_learning_rate=0.0), 1),), start=str(warmed[0]))
    warm_up(one, TASK, tmp_path)
    assert bits(load_model(tmp_path).params) == bits(load_model(warmed[0]).params)


def test_another_config_is_refused(warmed):
    with pytest.raises(ConfigError, match="balance_weight: was 0.01, now 0.1"):
        warm_up(replace(WARM, balance_weight=0.1), TASK, warmed[0])


def test_what_is_not_finite_ends_it(tmp_path):
    """A balance loss without bounds."""
    one = replace(WARM, stages=WARM.stages[:1], balance_weight=float("inf"))
    with pytest.raises(NonFinite, match="by update 1 of the warm-up one was not finite; lower the learning rate"):
        warm_up(one, TASK, tmp_path)


def test_what_is_not_finite_in_between_ends_it_too(tmp_path, monkeypatch):
    """The fourth of twelve updates alone: said at the end of the stage at the latest, before it is saved."""

    def spoilt(config, task, update, imperfect):
        batch = demonstrations(config, task, update, imperfect)
        return batch if update != 3 else batch | {"weights": batch["weights"] * np.float32(np.nan)}

    monkeypatch.setattr("moe_jax.rl.warmup.demonstrations", spoilt)
    with pytest.raises(NonFinite, match="by update 12 of the warm-up one was not finite"):
        warm_up(replace(WARM, stages=WARM.stages[:1]), TASK, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*/manifest.json"))


@pytest.mark.slow
def test_on_a_mesh_it_is_the_same(warmed, tmp_path):
    mesh = MeshSpec.parse("data=2,expert=2").build(jax.devices()[:4])
    warm_up(WARM, TASK, tmp_path, mesh=mesh)
    for one, other in zip(*(jax.tree.leaves(load_model(folder).params) for folder in (tmp_path, warmed[0])), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)  # 18 updates of Adam


@pytest.mark.parametrize("changes", [dict(stages=()), dict(batch_size=0), dict(length=0), dict(stages=(Stage(OPTIMIZER, 0),))])
def test_bad_warm_ups_are_one_clear_line(changes):
    with pytest.raises(
        ConfigError, match="a warm-up needs at least one stage, and batch_size, length and the updates of each stage of at least 1"
    ):
        replace(WARM, **changes)
