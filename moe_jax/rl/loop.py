"""One run of reinforcement learning: sample, reward, log-probabilities as they are, updates; with evaluations, checkpoints and progress.

The loop owns files and clocks; what is computed is in program.py, what is rewarded in tasks.py. B answers of a step, T positions of a prompt and its answer.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import paths
from moe_jax.distributed import on_all
from moe_jax.errors import ConfigError
from moe_jax.generate import Generated
from moe_jax.keys import Draw
from moe_jax.noise import Noise
from moe_jax.replay import empty_trace
from moe_jax.rl import grpo, rewards
from moe_jax.rl.config import RLConfig
from moe_jax.rl.program import EXTREME, RLProgram, Scored
from moe_jax.rl.replay import mismatch, recorded, replayed
from moe_jax.rl.tasks import Problem, Task
from moe_jax.routing import RoutingTrace
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.loop import AnyProcess, Recorder, Result, check_finite, ratio, start_parameters, stopped
from moe_jax.train.state import TrainState
from moe_jax.train.writers import MetricsWriter, Progress

Batch = dict[str, Any]  # arrays of a step's B answers on the host; of routes, [L, B, T, K]


def run(
    config: RLConfig,
    program: RLProgram,
    task: Task,
    folder: Path | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains and evaluates. With a folder: metrics.jsonl there, a row an update, checkpoints if `checkpoint_every`, and a resume from the newest of them.

    The same config, killed anywhere and run again, ends in the same bits, in the middle of a step's updates too. Raises NonFinite before an update that a
    reward, loss or gradient would spoil, and Stopped, after a checkpoint, when `stop()` turns true.
    """
    if task.vocab_size > config.model.vocab_size:
        raise ConfigError(f"the task {config.task} has {task.vocab_size} ids, the model's vocab_size is {config.model.vocab_size}")
    if len(getattr(task, config.eval_split)) < config.eval_problems:
        raise ConfigError(
            f"{config.task} has {len(getattr(task, config.eval_split))} {config.eval_split} problems, eval_problems={config.eval_problems}"
        )
    began = time.monotonic()
    with nullcontext() if folder is None else on_all(lambda: MetricsWriter(folder)) as writer:
        loop = _Loop(config, program, task)
        checkpoints = (
            None if folder is None or not config.checkpoint_every else Checkpoints(folder / "checkpoints", config, task.fingerprint)
        )
        start = loop.restore(checkpoints)
        recorder = Recorder(writer, start, 1, None)
        loop.train(start, recorder, checkpoints, progress, stop)
    return Result(_headline(recorder.rows), recorder.series(), [], time.monotonic() - began)


class _Loop:
    """The state of one run: the policy, the answers that it is being updated on, the reference."""

    def __init__(self, config: RLConfig, program: RLProgram, task: Task):
        self.config, self.program, self.task = config, program, task
        self.state: TrainState = program.init(jnp.uint32(config.init_seed))
        self.reference: dict[str, Any] | None = None
        if config.start:
            start = start_parameters(config.start, program)
            self.state = dataclasses.replace(self.state, params=start)
            if config.replay == "reference" or config.policy.kl_weight:
                self.reference = jax.tree.map(jnp.copy, start)  # the state's own are donated to its updates
        self.batch: Batch = _empty(config)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def restore(self, checkpoints: Checkpoints | None) -> int:
        """The updates done."""
        if checkpoints is None or checkpoints.latest() is None:
            return 0
        found, done = checkpoints.restore(self._saved())
        self.batch = jax.device_get(found.pop("batch"))
        self.state = TrainState(**found)
        return done

    def _saved(self) -> dict[str, Any]:
        return {**{field.name: getattr(self.state, field.name) for field in dataclasses.fields(self.state)}, "batch": self.batch}

    def train(self, start: int, recorder: Recorder, checkpoints: Checkpoints | None, progress: Progress | None, stop) -> None:
        stop = AnyProcess(stop)
        config, names = self.config, [*paths.flatten(self.program.model.specs), "the loss"]
        for done in range(start, config.updates):
            step, part = divmod(done, config.mini_batches)
            row = {}
            if part == 0:
                if step % config.eval_every == 0:
                    recorder.add(done, self.evaluate(step), always=True)
                self.batch, row = self.collect(step)
            row |= self.update(step, part, names)
            recorder.add(done + 1, row, always=True)
            if progress is not None:
                shown = {name: row[name] for name in ("reward/mean", "policy/entropy", "optimizer/gradient_norm") if name in row}
                progress.update(done + 1, shown, self.batch["tokens"].size // config.mini_batches)
            halt = stop() and done + 1 < config.updates  # every process asks, so that all stop after the same update
            saving = checkpoints is not None and (halt or done + 1 == config.updates or (done + 1) % config.checkpoint_every == 0)
            if checkpoints is not None and saving:
                if recorder.writer is not None:
                    on_all(recorder.writer.flush)  # no checkpoint is ahead of its metrics
                checkpoints.save(done + 1, self._saved())
            if halt:
                raise stopped(done + 1, config.updates, saving)
        recorder.add(config.updates, self.evaluate(config.steps), always=True)

    def collect(self, step: int) -> tuple[Batch, dict[str, float]]:
        """A step's answers with all that its updates need, and what is known before them."""
        config = self.config
        problems = self.problems(step)
        noise, began = config.noise_of(step), time.monotonic()
        host, cut = self.answers(
            problems, "rollout", noise, step, _seed(config.sample_seed, "train", step), config.temperature, config.top_p
        )
        sampled = time.monotonic()
        given, right = self.rewards(problems, host)
        scored = time.monotonic()
        advantages = jax.vmap(functools.partial(grpo.group_advantages, normalise=config.policy.normalise))(
            jnp.asarray(given.reshape(-1, config.samples))
        )
        place = np.arange(config.length)
        mask = (place >= host.prompt_lengths[:, None] - 1) & (place < host.lengths[:, None] - 1)
        sampler = np.concatenate([host.log_probs[:, 1:], np.zeros_like(host.log_probs[:, :1])], axis=1)
        batch: Batch = {
            "tokens": host.tokens,
            "mask": mask.astype(np.float32),
            "sampler": sampler,
            "advantage": np.asarray(advantages).reshape(-1),
        }
        trace, reference = host.trace, None
        if self.reference is not None:
            reference, _ = self.score(self.reference, host, None, None, step)
            batch["reference"] = reference.log_probs
        source = {"rollout": trace, "reference": reference.trace if reference else None}.get(config.replay)
        source = None if source is None else recorded(source, host.lengths)
        old, counts = self.score(self.state.params, host, noise, source, step)
        batch["old"] = old.log_probs
        if config.replay:
            used: Any = recorded(old.trace, host.lengths) if config.replay == "self" else source  # type: ignore[arg-type]
            batch["routes"] = replayed(jax.tree.map(np.asarray, used), config.replay_what).trace
        row = self.described(batch, host, given, right, old, counts, trace) | {"answers/cut_prompts": cut}
        times = {"sample": sampled - began, "reward": scored - sampled, "score": time.monotonic() - scored}
        return batch, row | {f"seconds/{name}": value for name, value in times.items()}

    def described(
        self, batch: Batch, host: Generated, given, right, old: Scored, counts: dict, trace: RoutingTrace | None
    ) -> dict[str, float]:
        """The metrics of a step's answers."""
        mask = batch["mask"] > 0
        change = np.where(mask, batch["old"] - batch["sampler"], 0).astype(np.float64)
        groups = given.reshape(-1, self.config.samples)
        response = host.lengths - host.prompt_lengths
        tokens = max(1, int(mask.sum()))
        row = {
            "reward/mean": float(given.mean()),
            "reward/right": float(right.mean()),
            "reward/mixed_groups": float((groups.std(-1) > 0).mean()),
            "answers/length": float(response.mean()),
            "answers/unfinished": float((~host.stopped).mean()),
            "sampler/kl": float(
                (np.exp(change) - change - 1).sum() / tokens
            ),  # k3 of the trainer's to the sampler's, on the sampler's tokens
            "sampler/log_ratio_abs": float(np.abs(change).sum() / tokens),
            "sampler/extreme": float((np.abs(change) > EXTREME).sum() / tokens),
            "policy/entropy_before": float(np.where(mask, old.entropy, 0).sum() / tokens),
        }
        if old.router_entropy is not None:
            row["router/entropy"] = float(np.where(mask, old.router_entropy, 0).sum() / tokens)
            row |= {name: ratio(value) for name, value in jax.device_get(mismatch(trace, old.trace, mask)).items()}  # type: ignore[arg-type]
        # the update's own counts, in the same row, are replay/…
        return row | {name.replace("replay/", "score/"): ratio(value) for name, value in counts.items() if value[1]}

    def update(self, step: int, part: int, names: list[str]) -> dict[str, float]:
        """One mini-batch's update; its metrics."""
        config, rows, began = self.config, self.config.rows, time.monotonic()
        first = part * config.accumulation * rows
        cut = slice(first, first + config.accumulation * rows)
        batch: Batch = {
            name: value[cut].reshape(config.accumulation, rows, *value.shape[1:]) for name, value in self.batch.items() if name != "routes"
        }
        counts = jax.vmap(functools.partial(grpo.count, reduction=config.policy.reduction))(self.batch["mask"][cut])
        batch["divisor"] = np.full(config.accumulation, max(1.0, float(counts.sum())) / config.accumulation, np.float32)
        at = step if config.shared_draws else step * config.mini_batches + part
        firsts = first + rows * np.arange(config.accumulation, dtype=np.int32)
        batch["draw"] = np.full_like(firsts, at), firsts
        if not config.policy.importance_cap:
            del batch["sampler"]
        if config.replay:
            routes = jax.tree.map(lambda x: x[:, cut] if x.ndim > 1 else x, self.batch["routes"])
            batch["replay"] = replayed(routes, config.replay_what).micro_batches(config.accumulation)
        noise = config.noise_of(step)
        knobs = config.knobs(None if noise is None else noise.in_phase("train"))
        self.state, metrics, flags = self.program.train(self.state, self.program.place(batch, rows, 1), knobs)
        host, bad = jax.device_get(({name: value for name, value in metrics.items() if name != "router/load"}, flags))
        check_finite(step * config.mini_batches + part + 1, names, bad)
        kept = {
            name: ratio(value)
            for name, value in host.items()
            if value[1] and name.startswith(("policy/", "optimizer/", "replay/", "router/flips"))
        }
        return kept | {"loss": ratio(host["loss"]), "seconds/update": time.monotonic() - began}

    def score(
        self, params: dict[str, Any], host: Generated, noise: Noise | None, routes: RoutingTrace | None, step: int
    ) -> tuple[Scored, dict[str, Any]]:
        """The pass before the updates over all answers, `rows` at a time, on the host; and its counts."""
        found = []
        acting = None if noise is None else noise.in_phase("old_logprob")
        for first in range(0, len(host.tokens), self.config.rows):
            cut = slice(first, first + self.config.rows)
            replay = None
            if routes is not None:
                replay = replayed(jax.tree.map(lambda x, cut=cut: x[:, cut] if x.ndim > 1 else x, routes), self.config.replay_what)
            draw = self._draw(step, "old_logprob", first)
            tokens = self._placed(host.tokens[cut])
            found.append(jax.device_get(self.program.score(params, tokens, acting, draw, replay)))
        counts = jax.tree.map(lambda *parts: sum(parts), *(one.replay for one in found))
        return joined([dataclasses.replace(one, replay={}) for one in found]), counts

    def answers(
        self,
        problems: list[Problem],
        phase: str,
        noise: Noise | None,
        step: int,
        seed: int,
        temperature: float,
        top_p: float,
        first: int = 0,
        routes: bool = True,
    ) -> tuple[Generated, float]:
        """An answer to each problem, on the host; the share of prompts that were too long and lost their beginning.

        Answers are sampled `at_once` at a time, which no token depends on. first: the number of the first problem, by which draws are made.
        """
        config, task, width = self.config, self.task, self.config.prompt_tokens
        prompts = [task.encode(problem.prompt) for problem in problems]
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: min(len(prompt), width)] = prompt[-width:]
        lengths = np.array([min(len(prompt), width) for prompt in prompts], np.int32)
        how = (np.float32(temperature), np.float32(top_p), np.array(task.stop, np.int32), np.uint32(seed))
        acting = None if noise is None else noise.in_phase(phase)
        found = []
        for begin in range(0, len(prompts), config.at_once):
            part = slice(begin, begin + config.at_once)
            arrays = (self._placed(tokens[part]), self._placed(lengths[part]))
            answers = self.program.sample(self.state.params, *arrays, acting, self._draw(step, phase, first + begin), how)
            found.append(jax.device_get(answers if routes else dataclasses.replace(answers, trace=None)))
        return joined(found), float(np.mean([len(prompt) > width for prompt in prompts]))

    def rewards(self, problems: list[Problem], host: Generated) -> tuple[np.ndarray, np.ndarray]:
        """(reward, whether right) of each answer."""
        config = self.config
        right = np.array(
            [
                self.task.score(problem, tokens[begin:end])
                for problem, tokens, begin, end in zip(problems, host.tokens, host.prompt_lengths, host.lengths, strict=True)
            ],
            np.float32,
        )
        penalty = np.zeros_like(right)
        if config.overlong_from:
            # DAPO's soft overlong punishment, arXiv 2503.14476, equation 13
            over = (host.lengths - host.prompt_lengths - config.overlong_from) / (config.response_tokens - config.overlong_from)
            penalty = -np.clip(over, 0, 1).astype(np.float32)
        return rewards.checked(right + penalty), right

    def problems(self, step: int) -> list[Problem]:
        """Those of a step, each as often as it is answered: a function of (data_seed, step), no problem twice before all were seen."""
        config, count = self.config, len(self.task.train)
        numbers = []
        for index in range(step * config.prompts, (step + 1) * config.prompts):
            epoch, place = divmod(index, count)
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng([config.data_seed, epoch]).permutation(count)
            numbers.append(int(self._order[1][place]))
        return [problem for number in numbers for problem in [self.task.train[number]] * config.samples]

    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy on held-out problems: greedy and sampled, with the noise off and, where it acts in evaluation, on."""
        config = self.config
        noise = config.noise_of(step)
        acting = None if noise is None else noise.in_phase("eval")
        noisy = acting is not None and any(np.asarray(scale).any() for scale in acting.scales.values())
        row: dict[str, float] = {}
        for name, used in (("", None if acting is None else acting.scaled(0.0)), *((("_noisy", acting),) if noisy else ())):
            row[f"eval/greedy{name}"], _ = self._accuracy(used, step, "greedy", 0.0, 1.0)
            found = [
                self._accuracy(used, step, f"eval{index}", config.eval_temperature, config.eval_top_p)
                for index in range(config.eval_samples)
            ]
            if found:
                row[f"eval/sampled{name}"], row[f"eval/length{name}"] = (float(np.mean(values)) for values in zip(*found, strict=True))
        return row if noisy else row | {f"{name}_noisy": value for name, value in row.items()}

    def _accuracy(self, noise: Noise | None, step: int, what: str, temperature: float, top_p: float) -> tuple[float, float]:
        """(share of right answers, mean length)."""
        config = self.config
        problems = getattr(self.task, config.eval_split)
        right, lengths = [], []
        seed = _seed(config.sample_seed, what, step)
        for first in range(0, config.eval_problems, config.at_once):
            some_problems = [problems[index] for index in range(first, min(first + config.at_once, config.eval_problems))]
            asked = some_problems + [some_problems[-1]] * (config.at_once - len(some_problems))
            host, _ = self.answers(asked, "eval", noise, step, seed, temperature, top_p, first, routes=False)
            right += self.rewards(asked, host)[1][: len(some_problems)].tolist()
            lengths += (host.lengths - host.prompt_lengths)[: len(some_problems)].tolist()
        return float(np.mean(right)), float(np.mean(lengths))

    def _draw(self, step: int, phase: str, row: int) -> Draw:
        return Draw(np.uint32(self.config.noise_seed), np.uint32(step), phase, np.uint32(row))  # type: ignore[arg-type]

    def _placed(self, rows: Any) -> Any:
        return self.program.place({"rows": rows}, len(rows))["rows"]


def joined(parts: list[Any]) -> Any:
    """Answers, or what was scored, of several calls as one."""
    traces = [part.trace for part in parts]
    whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(dataclasses.replace(part, trace=None) for part in parts))
    if traces[0] is None:
        return whole
    ids, weights = (np.concatenate([getattr(trace, name) for trace in traces], axis=1) for name in ("ids", "weights"))
    return dataclasses.replace(whole, trace=RoutingTrace(ids, weights, traces[0].layer_index))


def _empty(config: RLConfig) -> Batch:
    """A batch of the shapes that `collect` makes, for a checkpoint to be read into."""
    rows, each = config.answers, (config.answers, config.length)
    batch: Batch = {"tokens": np.zeros(each, np.int32), "advantage": np.zeros(rows, np.float32)}
    batch |= {name: np.zeros(each, np.float32) for name in ("mask", "sampler", "old")}
    if config.replay == "reference" or config.policy.kl_weight:
        batch["reference"] = np.zeros(each, np.float32)
    if config.replay:
        model = config.model
        weights = config.replay_what == "ids+weights"
        batch["routes"] = empty_trace(model.moe_layers, model.num_experts, model.experts_per_token, *each, weights=weights)
    return batch


def _seed(*parts: Any) -> int:
    """A 32-bit seed from a seed, a purpose and a step."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "little")


def _headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The run's metrics: accuracies before and after, and what the last tenth of the updates looked like."""
    evaluations = [row for row in rows if "eval/greedy" in row]
    first, last = evaluations[0], evaluations[-1]
    found = {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}
    found |= {f"start_{name.removeprefix('eval/')}": value for name, value in first.items() if name.startswith("eval/")}
    for name in ("greedy", "sampled", "greedy_noisy", "sampled_noisy"):
        if name in found:
            found[f"gain_{name}"] = found[name] - found[f"start_{name}"]
    series: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            series.setdefault(name, []).append(value)
    for name, values in series.items():
        if not name.startswith(("eval/", "step", "seconds/")):
            found[name.replace("/", "_")] = float(np.mean(values[-max(1, len(values) // 10) :]))
    return found
