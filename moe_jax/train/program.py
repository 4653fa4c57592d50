"""The compiled programs of one structure: initialise, train, evaluate. Every cell of a study that differs only in values shares one Program."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.model import Model, ModelConfig
from moe_jax.optim.plan import OptimizerConfig, plan
from moe_jax.train import step as steps
from moe_jax.train.state import Knobs, TrainState


class Program:
    """The jitted functions for a model, an optimizer and an objective. `compiled` counts how often each was traced for a new structure.

    record: the train step returns the routes that it took, as metrics["trace"].
    """

    def __init__(
        self, model: ModelConfig, optimizer: OptimizerConfig, objective: steps.Objective, mesh: Mesh | None = None, record: bool = False
    ):
        self.model = Model(model, mesh)
        if "freeze_params" in objective.freeze:
            optimizer = dataclasses.replace(optimizer, router="frozen")
        self.plan = plan(self.model.specs, optimizer)
        self.compiled: Counter[str] = Counter()
        self.init: Callable[[jax.Array], TrainState] = self._jit("init", lambda seed: steps.init_state(self.model, self.plan, seed))
        # the state is donated: its buffers become the new state's, which saves the memory and, on a CPU, the page faults
        self.train = self._jit("train", steps.make_train_step(self.model, self.plan, objective, record), donate_argnums=0)
        self.evaluate_step = self._jit("evaluate", steps.make_evaluate_step(self.model))

    def _jit(self, name: str, function: Callable, **options: Any) -> Callable:
        def traced(*args):
            self.compiled[name] += 1
            return function(*args)

        return jax.jit(traced, **options)

    def evaluate(self, params, batches: Iterable[dict[str, np.ndarray]], knobs: Knobs) -> dict[str, Any]:
        """The sums of all batches' metrics, on the host: (sum, count) pairs as float64, loads as float64 arrays."""
        total, offset = None, 0
        for batch in batches:
            metrics = self.evaluate_step(params, {**batch, "row_offset": np.int32(offset)}, knobs)
            offset += batch["tokens"].shape[0]
            host = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), metrics)
            total = host if total is None else jax.tree.map(np.add, total, host)
        if total is None:
            raise ValueError("there are no evaluation batches")
        return total


def off(knobs: Knobs) -> Knobs:
    """The same program with every noise scale 0."""
    return knobs if knobs.noise is None else dataclasses.replace(knobs, noise=knobs.noise.scaled(0.0))
