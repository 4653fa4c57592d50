"""A run from end to end: killed anywhere it ends in the same bits, what it cannot do it refuses, and no problem or seed is used twice."""

import dataclasses
import functools
import itertools
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.errors import CheckpointError, ConfigError, NonFinite, Stopped
from moe_jax.mesh import MeshSpec
from moe_jax.rl import loop, tasks
from moe_jax.rl.config import RLConfig
from moe_jax.rl.grpo import Policy
from moe_jax.rl.problems import Task
from moe_jax.routing import RoutingTrace
from moe_jax.train.saved import load_model
from moe_jax.train.writers import read_metrics
from tests.rl.small import CONFIG, NOISY, TASK, bits, program_of, replace, rows_of, saved

ROOT = Path(__file__).parents[2]


def of_file(folder) -> list[dict]:
    """The rows of metrics.jsonl without what a clock said."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("seconds/")} for row in rows]


def end_of(config, folder) -> tuple[list[bytes], list[dict]]:
    """What a finished run leaves: every bit of its last checkpoint (parameters, optimizer, the step's answers), and its metrics."""
    here = loop._Loop(config, program_of(config), TASK)
    assert here.restore(saved(folder, config)) == config.updates == int(here.state.step)
    return bits((here.state, here.batch)), of_file(folder)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(config, folder, result) of a run that nothing stopped, by the routes that it replays."""

    @functools.cache
    def of(replay):
        config, folder = replace(NOISY, replay=replay), tmp_path_factory.mktemp("unbroken")
        return config, folder, loop.run(config, program_of(config), TASK, folder)

    return of


# ------------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("replay, stops", [pytest.param("", (1, 4), marks=pytest.mark.slow), ("rollout", (1, 2, 3, 4, 5))])
def test_stopped_after_some_updates_it_ends_in_the_same_bits(unbroken, tmp_path, replay, stops):
    """Six updates, three to a step: a run that begins after the third begins with a step, any other in the middle of a step's mini-batches."""
    config, folder, whole = unbroken(replay)
    for before, update in itertools.pairwise((0, *stops)):
        polls = iter(range(before + 1, 7))
        with pytest.raises(Stopped, match=rf"stopped at update {update} of 6, saved; the same command goes on from update {update}$"):
            loop.run(config, program_of(config), TASK, tmp_path, stop=lambda polls=polls, last=update: next(polls) >= last)
    resumed = loop.run(config, program_of(config), TASK, tmp_path)
    assert rows_of(resumed) == rows_of(whole)
    assert {name: value for name, value in resumed.metrics.items() if "seconds" not in name} == {
        name: value for name, value in whole.metrics.items() if "seconds" not in name
    }
    assert end_of(config, tmp_path) == end_of(config, folder)


def test_the_rows_of_a_run(unbroken):
    """Evaluations before steps 0 and 1 and at the end; what was sampled stands in the first row of its step; an update in each."""
    config, folder, result = unbroken("")
    assert [step for step, _ in result.series["eval/greedy"]] == [0, 3, 6]
    assert [step for step, _ in result.series["reward/mean"]] == [1, 4]
    assert [step for step, _ in result.series["optimizer/gradient_norm"]] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for values in rows_of(result).values() for _, value in values)
    assert result.metrics["gain_greedy"] == result.metrics["greedy"] - result.metrics["start_greedy"]
    assert -1 <= result.series["reward/mean"][0][1] < 0 and result.series["reward/mixed_groups"][0][1] > 0
    assert any(value > 0 for _, value in result.series["optimizer/gradient_norm"])


def test_both_counts_of_replayed_routes_are_in_the_rows(unbroken):
    """Of the pass before the updates over all of a step's answers (score/), and of each update over its own (replay/), which add up to them."""
    _, folder, _ = unbroken("rollout")
    rows = [row for row in of_file(folder) if "loss" in row]
    assert ["score/live_rows" in row for row in rows] == [True, False, False] * 2
    for first in (0, 3):
        parts = [row["replay/live_rows"] for row in rows[first : first + 3]]
        assert rows[first]["score/live_rows"] == pytest.approx(np.mean(parts)) and len({*parts}) > 1
        assert 0 < rows[first]["score/set_overlap"] < 1


def test_an_unsaved_run_says_so():
    config = replace(NOISY, checkpoint_every=0)
    with pytest.raises(Stopped, match="stopped at update 1 of 6, not saved: checkpoint_every is 0"):
        loop.run(config, program_of(config), TASK, stop=lambda: True)


def test_a_checkpoint_loads_as_a_model_and_as_a_start(unbroken):
    config, folder, _ = unbroken("")
    here = loop._Loop(config, program_of(config), TASK)
    here.restore(saved(folder, config))
    found = load_model(folder)
    assert found.config == config.model and found.step == 6
    assert bits(found.params) == bits(here.state.params) and found.tokenizer is None
    again = loop._Loop(replace(config, start=str(folder), replay="reference"), program_of(config), TASK)
    assert bits(again.state.params) == bits(again.reference) == bits(here.state.params)


def test_a_checkpoint_names_the_tokenizer_of_its_run(tmp_path):
    config = replace(CONFIG, tokenizer="words/tokenizer.json")
    here = loop._Loop(config, program_of(config), TASK)
    saved(tmp_path, config).save(1, here._saved())
    assert load_model(tmp_path).tokenizer == "words/tokenizer.json"


def test_a_checkpoint_of_another_config_or_task_is_refused(unbroken):
    config, folder, _ = unbroken("")
    with pytest.raises(ConfigError, match="sample_seed: was 0, now 1"):
        loop.run(replace(config, sample_seed=1), program_of(config), TASK, folder)
    with pytest.raises(CheckpointError, match="data"):
        loop.run(config, program_of(config), replace(TASK, fingerprint="another"), folder)


CHILD = """
import os, signal, sys
from pathlib import Path
from tests.rl.small import *
from moe_jax.rl import loop

class Said:
    "Writes down the updates; ends itself without a word after `last`, before that update is saved."
    def update(self, done, *_):
        print(done, flush=True)
        if done == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

config = eval(sys.argv[1])
loop.run(config, program_of(config), TASK, Path(sys.argv[2]), Said())
print("end", flush=True)
"""


def child(config: str, folder: Path, last: int = -1) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, config, str(folder), str(last)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_in_the_middle_of_a_step_it_ends_in_the_same_bits(unbroken, tmp_path):
    """SIGKILL after the fifth update, which is in metrics.jsonl and in no checkpoint; another process goes on."""
    config, folder, _ = unbroken("rollout")
    text = "replace(CONFIG, noise='matmuls=relative:0.05:phases=rollout', replay='rollout')"
    with child(text, tmp_path, 5) as process:
        out, errors = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL and out.split() == ["1", "2", "3", "4", "5"], errors
    assert saved(tmp_path, config).latest() == 4 and of_file(tmp_path)[-1]["step"] == 5
    loop.run(config, program_of(config), TASK, tmp_path)
    assert end_of(config, tmp_path) == end_of(config, folder)


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_in_the_same_bits(tmp_path):
    """In 90 updates, checkpoints at every second: each process does 1 to 5 of them, and is killed somewhere in the time of about one."""
    text = "replace(CONFIG, noise='matmuls=relative:0.05:phases=rollout', replay='rollout', steps=30, checkpoint_every=2)"
    config = eval(text)
    random_numbers, before, kills = random.Random(0), 0, []
    for _ in range(10):
        with child(text, tmp_path / "killed") as process:
            assert process.stdout is not None
            for _ in range(random_numbers.randint(1, 5)):
                reached = process.stdout.readline()
            time.sleep(random_numbers.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            reached = [reached, *process.stdout.read().split()][-1].strip()
        assert process.returncode == -signal.SIGKILL and reached.isdecimal(), reached
        kills.append(int(reached))
        assert kills[-1] > before
        before = saved(tmp_path / "killed", config).latest() or 0
    print("\nkilled after updates", *kills)
    loop.run(config, program_of(config), TASK, tmp_path / "killed")
    loop.run(config, program_of(config), TASK, tmp_path / "whole")
    assert end_of(config, tmp_path / "killed") == end_of(config, tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------------------ on a mesh


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,expert=2"])
def test_a_mesh_runs_the_same_steps(mesh):
    """Sampling, scoring, replay and updates on four devices: the same answers, and numbers to float tolerance."""
    noise = "router_logits=additive:0.3:phases=rollout"
    config = replace(
        CONFIG, noise=noise, replay="rollout", replay_what="ids+weights", steps=1, mini_batches=1, accumulation=3, eval_every=9
    )
    config = replace(config, model=config.model.replace(num_layers=1, dense_layers=(), dispatch=None))
    built = MeshSpec.parse(mesh).build(jax.devices()[:4])
    alone, spread = (rows_of(loop.run(config, config.program(where), TASK)) for where in (None, built))
    assert alone.keys() == spread.keys()
    for name in alone:
        exact = name.startswith(("reward/", "answers/", "eval/", "route/", "replay/"))
        for (step, one), (other_step, other) in zip(alone[name], spread[name], strict=True):
            assert step == other_step and other == pytest.approx(one, rel=0 if exact else 1e-3, abs=0 if exact else 1e-5), name


# ------------------------------------------------------------------------------------------------------------------ what an update is given


class Given(Exception):
    """The batch of an update, instead of the update."""


@pytest.mark.parametrize(
    "reduction, divisors",
    [
        # answers of 1 … 5 tokens and one of none, then the same again: the mini-batches have 1+2+3 = 6, 4+5+0 = 9, 6 and 9 tokens; 3, 2, 3 and 2 answers
        ("token_mean", [6, 9, 6, 9]),
        ("sequence_mean", [3, 2, 3, 2]),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_what_an_update_is_given(reduction, divisors, shared):
    """Its own answers in parts, what their sum is divided by (a part's gradient is a third of the update's), the number of its first row and its draw."""
    config = replace(CONFIG, mini_batches=4, accumulation=3, policy=Policy(reduction=reduction), shared_draws=shared, replay="rollout")
    here = loop_on(config, TASK)
    rows = np.arange(12, dtype=np.float32)
    each = np.broadcast_to(rows[:, None], (12, 12))
    mask = (np.arange(12) < np.array([1, 2, 3, 4, 5, 0] * 2)[:, None]).astype(np.float32)
    ids = np.broadcast_to(np.arange(12, dtype=np.uint8)[None, :, None, None], (1, 12, 12, 2))
    routes = RoutingTrace(ids, None, np.array([1], np.int32))
    here.batch = {"tokens": each.astype(np.int32), "mask": mask, "sampler": each, "old": each, "advantage": rows, "routes": routes}
    here.state = None

    class Program:
        train = None

        def place(self, batch, rows, axis):
            assert (rows, axis) == (1, 1)
            raise Given(batch)

    here.program = Program()
    for part in range(4):
        with pytest.raises(Given) as caught:
            here.update(2, part, [])
        (given,) = caught.value.args
        firsts = [3 * part, 3 * part + 1, 3 * part + 2]
        assert set(given) == {"tokens", "mask", "old", "advantage", "divisor", "draw", "replay"}  # the sampler's are not used
        assert given["advantage"].tolist() == [[first] for first in firsts]
        assert given["tokens"].shape == (3, 1, 12) and given["old"][:, 0, 0].tolist() == firsts
        assert given["replay"].trace.ids[:, 0, 0, 0, 0].tolist() == firsts and given["replay"].trace.ids.shape == (3, 1, 1, 12, 2)
        np.testing.assert_allclose(given["divisor"], [divisors[part] / 3] * 3, rtol=1e-6)
        steps, numbers = given["draw"]
        assert numbers.tolist() == firsts and steps.tolist() == [2 if shared else 4 * 2 + part] * 3
    here.config = replace(config, policy=Policy(importance_cap=2.0))
    with pytest.raises(Given) as caught:
        here.update(0, 0, [])
    assert caught.value.args[0]["sampler"][:, 0, 0].tolist() == [0, 1, 2]
    here.batch["mask"] = np.zeros_like(mask)  # nothing to learn: no division by 0
    with pytest.raises(Given) as caught:
        here.update(0, 0, [])
    assert (caught.value.args[0]["divisor"] > 0).all()


# ------------------------------------------------------------------------------------------------------------------ what cannot go on


def test_a_reward_that_is_no_number_ends_the_run_before_the_update(monkeypatch):
    """One answer of the second step scores NaN: the parameters are those after the first."""
    config = replace(NOISY, checkpoint_every=0, eval_every=9)
    program = program_of(config)
    scores, real, updates = [], Task.score, []

    def score(self, problem, ids):
        scores.append(real(self, problem, ids))
        return math.nan if len(scores) == 3 * 12 + 5 else scores[-1]  # greedy, sampled, and a step of 12 answers before

    monkeypatch.setattr(Task, "score", score)
    with pytest.raises(NonFinite, match=r"1 of 12 rewards are not finite, the first at \[4\]: nan") as caught:
        loop.run(config, program, TASK, progress=Noted(updates))
    assert updates == [1, 2, 3] and "\n" not in str(caught.value)


class Noted:
    def __init__(self, updates: list):
        self.updates = updates

    def update(self, done, *_):
        self.updates.append(done)


def test_groups_of_equal_rewards_teach_nothing():
    """All answers are wrong and none is penalised: no gradient, finite metrics, and the same parameters, bit for bit."""
    config = replace(NOISY, overlong_from=0, checkpoint_every=0, eval_every=9)
    here = loop._Loop(config, program_of(config), TASK)
    before = bits(here.state.params)
    for step in range(2):
        here.batch, row = here.collect(step)
        assert row["reward/mean"] == row["reward/mixed_groups"] == 0 and not here.batch["advantage"].any()
        for part in range(3):
            row |= here.update(step, part, [""] * 99)
            assert row["optimizer/gradient_norm"] == 0 and row["loss"] == 0
        assert all(math.isfinite(value) for value in row.values())
    assert bits(here.state.params) == before


@dataclasses.dataclass(frozen=True)
class Poisoned(RLConfig):
    """Noise without bounds in the updates alone."""

    def knobs(self, noise):
        return super().knobs(None if noise is None else noise.scaled(math.nan))


def test_a_gradient_that_is_not_finite_is_refused():
    """The message names the update and leaves; the parameters stay."""
    values = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    config = Poisoned(**values | {"noise": "router_logits=additive:0.1:phases=train", "checkpoint_every": 0})
    here = loop._Loop(config, program_of(config), TASK)
    before = bits(here.state.params)
    here.batch, _ = here.collect(0)
    names = [*loop.paths.flatten(here.program.model.specs), "the loss"]
    with pytest.raises(
        NonFinite, match=r"update 2 was refused: not finite in the gradient of embedding.*; the parameters of update 1 are intact"
    ):
        here.update(0, 1, names)
    assert bits(here.state.params) == before
    with pytest.raises(NonFinite, match="update 1 was refused"):
        loop.run(config, program_of(config), TASK)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(eval_problems=516), r"chain_sum:terms=2 has 512 test problems, eval_problems=516"),
        (dict(eval_problems=516, eval_split="tune"), r"chain_sum:terms=2 has 512 tune problems, eval_problems=516"),
        (dict(model=CONFIG.model.replace(vocab_size=17)), "the task chain_sum:terms=2 has 18 ids, the model's vocab_size is 17"),
    ],
)
def test_a_task_that_does_not_fit_is_one_line(changes, message):
    config = replace(CONFIG, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        loop.run(config, program_of(config), TASK)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------ problems and seeds


def loop_on(config, task):
    """A loop that only asks for problems: no parameters are made."""
    here = object.__new__(loop._Loop)
    here.config, here.task, here._order = config, task, (-1, np.zeros(0, np.int64))
    return here


def test_no_problem_comes_twice_before_all_came_once():
    """Ten problems, four to a step, so that epochs begin inside steps; each as often as it is answered, answers of one problem together."""
    config = replace(CONFIG, prompts=4, samples=3, mini_batches=1)
    task = replace(TASK, train=TASK.train[:10])

    def asked(config, steps, here=None):
        here = here or loop_on(config, task)
        found = [[problem.prompt for problem in here.problems(step)] for step in steps]
        assert all(one[place] == one[place - place % 3] for one in found for place in range(12)) and all(len(one) == 12 for one in found)
        return [prompt for one in found for prompt in one[::3]]

    order = asked(config, range(10))
    every = sorted(problem.prompt for problem in task.train)
    epochs = [order[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == every for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    here = loop_on(config, task)  # a function of the step: whichever was asked for before
    assert asked(config, reversed(range(10)), here) == [prompt for step in reversed(range(10)) for prompt in order[4 * step : 4 * step + 4]]
    assert asked(replace(config, sample_seed=9, init_seed=9), range(10)) == order
    assert asked(replace(config, data_seed=1), range(10)) != order


def test_no_two_samplings_share_their_randomness(monkeypatch):
    """Seeds and first rows of every step's answers and of every evaluation's, in two chunks, greedy and twice sampled: all differ, also between runs."""
    config, seeds, real = replace(CONFIG, eval_problems=24, eval_samples=2), [], loop._Loop.answers

    def answers(self, problems, phase, noise, step, seed, temperature, top_p, first=0, **how):
        seeds.append((seed, first))
        return real(self, problems, phase, noise, step, seed, temperature, top_p, first, **how)

    monkeypatch.setattr(loop._Loop, "answers", answers)
    for sample_seed in (0, 1):
        here = loop._Loop(replace(config, sample_seed=sample_seed), program_of(config), TASK)
        for step in range(2):
            here.evaluate(step)
            here.collect(step)
    assert len(seeds) == len(set(seeds)) == 2 * 2 * (2 * 3 + 1)


def test_evaluation_counts_each_problem_once(monkeypatch):
    """Five problems of which three are answered rightly: 0.6, although twelve are sampled at a time; and the first five of the split are asked."""
    config = replace(CONFIG, eval_problems=5, eval_split="tune")
    here = loop._Loop(config, program_of(config), TASK)
    asked = []

    def rewards(problems, host):
        asked.extend(problem.prompt for problem in problems[:5])
        assert len(problems) == 12
        right = np.array([1, 0, 1, 0, 1, *[0] * 7], np.float32)
        return right - 0.25, right  # the penalty is no part of accuracy

    monkeypatch.setattr(here, "rewards", rewards)
    row = here.evaluate(0)
    assert row["eval/greedy"] == row["eval/sampled"] == row["eval/greedy_noisy"] == pytest.approx(0.6)
    assert asked == [problem.prompt for problem in TASK.tune[:5]] * 2


def test_noise_in_evaluation_is_reported_beside_none():
    """Greedy lengths: with the noise off those of no noise at all; with it on, others."""
    noise = "matmuls=relative:1.0:phases=eval"
    clean, noisy = (loop._Loop(config, program_of(config), TASK).evaluate(0) for config in (CONFIG, replace(CONFIG, noise=noise)))
    assert {name for name in clean if name.endswith("_noisy")} == {f"{name}_noisy" for name in clean if not name.endswith("_noisy")}
    assert all(clean[f"{name}_noisy"] == value for name, value in clean.items() if not name.endswith("_noisy"))
    assert noisy["eval/length"] == clean["eval/length"] != noisy["eval/length_noisy"]


def test_no_number_depends_on_how_many_answers_are_sampled_at_a_time():
    """A whole run with noise, 4 of 12 answers at a time; of its 9 held-out problems the last one is in a chunk that is filled up."""
    config = replace(
        CONFIG, noise="matmuls=relative:0.5:phases=rollout+eval", replay="rollout", steps=1, eval_problems=9, checkpoint_every=0
    )
    whole, parts = (loop.run(one, program_of(one), TASK) for one in (config, replace(config, sample_rows=4)))
    for name, values in rows_of(whole).items():
        np.testing.assert_allclose(rows_of(parts)[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert whole.metrics["length_noisy"] != whole.metrics["length"]


def test_long_prompts_lose_their_beginning():
    """Of `29+29=` in a room of three, `29=` remains, and the share of such prompts is a metric."""
    config = replace(CONFIG, prompt_tokens=3, eval_problems=12)
    here = loop._Loop(config, program_of(config), TASK)
    problems = [tasks.Problem("29+29=", "58"), tasks.Problem("3=", "3")] * 6
    found, cut = here.answers(problems, "eval", None, 0, 0, 0.0, 1.0)
    assert cut == 0.5 and found.prompt_lengths.tolist() == [3, 2] * 6
    assert np.asarray(found.tokens)[0, :3].tolist() == TASK.encode("29=") and np.asarray(found.tokens)[1, :2].tolist() == TASK.encode("3=")


def test_the_penalty_on_long_answers():
    """From 2 of 6 tokens on: 0 at 2, -1/4 at 3, -1 at 6; the right answer gets 1 besides; accuracy does not know of it."""
    config = replace(CONFIG, overlong_from=2)
    here = loop_on(config, TASK)
    answer = TASK.encode("#### 5") + [TASK.stop[0]]
    tokens = np.zeros((3, 14), np.int32)
    tokens[0, 6:13], tokens[1, 6:9], tokens[2, 6:8] = answer, 5, 5

    class Host:
        prompt_lengths, lengths = np.array([6, 6, 6]), np.array([13, 9, 8])

    Host.tokens = tokens
    rewards, right = here.rewards([tasks.Problem("2+3=", "5")] * 3, Host)
    assert right.tolist() == [1, 0, 0] and rewards.tolist() == [0, -0.25, 0]
