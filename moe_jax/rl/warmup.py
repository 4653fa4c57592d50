"""Supervised training on worked answers, so that reinforcement learning begins with a policy that is sometimes right.

B demonstrations of an update, T positions of a prompt and its answer.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.errors import ConfigError, NonFinite, Stopped
from moe_jax.model import ModelConfig
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.rl.program import following
from moe_jax.rl.tasks import Task
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.loop import AnyProcess, start_parameters
from moe_jax.train.program import Program
from moe_jax.train.state import Knobs
from moe_jax.train.step import Objective
from moe_jax.train.writers import Progress


@dataclasses.dataclass(frozen=True)
class Stage:
    """Some updates with one optimizer and one kind of demonstrations."""

    optimizer: OptimizerConfig  # whose schedule is over the stage's own updates
    updates: int
    imperfect: bool = False  # demonstrations of one who leaves steps out and makes mistakes: `Task.demonstration`


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """Everything that decides the parameters that come out."""

    model: ModelConfig
    stages: tuple[Stage, ...]
    task: str = "chain_sum"
    batch_size: int = 128
    length: int = 28  # T; of longer demonstrations the end is cut off
    balance_weight: float = 0.01
    seed: int = 0  # of parameters, problems and demonstrations
    start: str = ""  # what the first stage begins with, as `load_model` finds it; "": fresh parameters

    def __post_init__(self):
        if not self.stages or min(self.batch_size, self.length, *(stage.updates for stage in self.stages)) < 1:
            raise ConfigError("a warm-up needs at least one stage, and batch_size, length and the updates of each stage of at least 1")

    @property
    def updates(self) -> int:
        return sum(stage.updates for stage in self.stages)


def warm_up(
    config: WarmUp,
    task: Task,
    folder: Path,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> None:
    """Trains and leaves the checkpoint in `folder`/checkpoints, one after each stage; finished stages are not done again.

    Raises NonFinite where an update would not be finite, Stopped between two updates when `stop()` turns true.
    """
    checkpoints = Checkpoints(folder / "checkpoints", config, task.fingerprint, keep=1)
    done, params, stop = 0, None, AnyProcess(stop)
    if config.start and checkpoints.latest() is None:
        params = start_parameters(config.start, Program(config.model, config.stages[0].optimizer, Objective(), mesh))
    for stage in config.stages:
        program = Program(config.model, stage.optimizer, Objective(), mesh)
        state = program.init(jnp.uint32(config.seed))
        if (checkpoints.latest() or 0) >= done + stage.updates:
            if checkpoints.latest() == done + stage.updates:
                params = checkpoints.restore(state)[0].params
            done += stage.updates
            continue
        state = state if params is None else dataclasses.replace(state, params=params)
        knobs = Knobs(None, jnp.uint32(config.seed), jnp.float32(config.balance_weight), jnp.float32(0))
        refused: Any = False
        for update in range(done, done + stage.updates):
            if stop():
                raise Stopped(f"stopped at update {update} of {config.updates} of the warm-up; the same command begins this stage again")
            batch = program.place(demonstrations(config, task, update, stage.imperfect), config.batch_size, 1)
            state, _, flags = program.train(state, batch, knobs)
            refused |= flags
            if progress is not None:
                progress.update(update + 1, {}, config.batch_size * config.length)
            if (update % 50 == 0 or update + 1 == done + stage.updates) and np.asarray(refused).any():  # asking waits for the device
                raise NonFinite(f"by update {update + 1} of the warm-up one was not finite; lower the learning rate")
        done, params = done + stage.updates, state.params
        checkpoints.save(done, state)


def demonstrations(config: WarmUp, task: Task, update: int, imperfect: bool) -> dict[str, Any]:
    """tokens, targets and weights [1, B, T]: the tokens of the answers count."""
    order = np.random.default_rng([config.seed, update])
    tokens, weights = (np.zeros((config.batch_size, config.length), kind) for kind in (np.int32, np.float32))
    for row, number in enumerate(order.integers(0, len(task.train), config.batch_size).tolist()):
        problem = task.train[number]
        prompt, answer = task.encode(problem.prompt), task.demonstration(problem, int(order.integers(1 << 32)), imperfect)
        both = [*prompt, *answer][: config.length]
        tokens[row, : len(both)] = both
        weights[row, len(prompt) - 1 : len(both) - 1] = 1
    return {"tokens": tokens[None], "targets": np.asarray(following(tokens))[None], "weights": weights[None]}
