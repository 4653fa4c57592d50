"""The compiled programs of one structure: initialise, train, evaluate. Every cell of a study that differs only in values shares one Program."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import paths
from moe_jax.distributed import on_all
from moe_jax.model import Model, ModelConfig
from moe_jax.optim.plan import OptimizerConfig, plan
from moe_jax.train import step as steps
from moe_jax.train.state import Knobs, TrainState


class Program:
    """The jitted functions for a model, an optimizer and an objective. `compiled` counts how often each was traced for a new structure.

    record: the train step returns the routes that it took, as metrics["trace"]. minimised: its loss, see `steps.make_train_step`.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        objective: steps.Objective,
        mesh: Mesh | None = None,
        record: bool = False,
        minimised: Callable[..., tuple] = steps.cross_entropy_of,
    ):
        self.model = Model(model, mesh)
        if "freeze_params" in objective.freeze:
            optimizer = dataclasses.replace(optimizer, router="frozen")
        self.plan = plan(self.model.specs, optimizer)
        self.compiled: Counter[str] = Counter()

        def init(seed):
            return steps.init_state(self.model, self.plan, seed)

        self.shardings = self._state_shardings(init)
        self.init: Callable[[jax.Array], TrainState] = self._jit("init", init, out_shardings=self.shardings)
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())  # what a host reads is on each
        placed = {} if mesh is None else {"out_shardings": (self.shardings, everywhere, everywhere)}
        # the state is donated: its buffers become the new state's, which saves the memory and, on a CPU, the page faults
        self.train = self._jit(
            "train", steps.make_train_step(self.model, self.plan, objective, record, minimised), donate_argnums=0, **placed
        )
        self.evaluate_step = self._jit("evaluate", steps.make_evaluate_step(self.model), out_shardings=everywhere)

    def _jit(self, name: str, function: Callable, **options: Any) -> Callable:
        def traced(*args):
            self.compiled[name] += 1
            return function(*args)

        jitted = jax.jit(traced, **options)
        return jitted if self.model.mesh is None or jax.process_count() == 1 else compiled_by_all(jitted)

    def _state_shardings(self, init: Callable) -> TrainState | None:
        """Where each leaf of the state lies: the optimizer's beside the parameter whose path and shape it has, anything else on every device."""
        mesh, where = self.model.mesh, self.model.shardings
        if mesh is None or where is None:
            return None
        specs = paths.flatten(self.model.specs)
        known = {path: (sharding, specs[path].shape) for path, sharding in paths.flatten(where).items()}

        def place(keys, leaf):
            names = jax.tree_util.keystr(keys, simple=True, separator="/")
            found = (sharding for path, (sharding, shape) in known.items() if f"/{names}".endswith(f"/{path}") and leaf.shape == shape)
            return next(found, NamedSharding(mesh, PartitionSpec()))

        return jax.tree_util.tree_map_with_path(place, jax.eval_shape(init, np.uint32(0)))

    def part(self, sequences: int) -> tuple[int, int]:
        """(index, count): of a batch cut into `count` equal parts, the one that lies on this process's devices."""
        layout = self.model.layout(sequences)
        if layout is None:
            return 0, 1
        where: Any = NamedSharding(layout.mesh, layout.spec("batch")).addressable_devices_indices_map((sequences,))
        slices = where.values()
        first, last = min(part.start or 0 for (part,) in slices), max(part.stop or sequences for (part,) in slices)
        return first // (last - first), sequences // (last - first)

    def place(self, batch: dict[str, Any], sequences: int, axis: int = 0) -> dict[str, Any]:
        """A batch of `sequences` on the mesh, from all of it or from this process's part; axis: the one that counts them (of routes, the next)."""
        layout = self.model.layout(sequences)
        if layout is None:
            return batch
        index, count = self.part(sequences)
        share = sequences // count

        def put(array, axis: int):
            if axis >= array.ndim:
                return jax.make_array_from_process_local_data(NamedSharding(layout.mesh, PartitionSpec()), array, array.shape)
            if array.shape[axis] != share:
                array = np.take(array, range(index * share, (index + 1) * share), axis)
            spec = PartitionSpec(*(None,) * axis, layout.rows or None)
            shape = (*array.shape[:axis], sequences, *array.shape[axis + 1 :])
            return jax.make_array_from_process_local_data(NamedSharding(layout.mesh, spec), array, shape)

        return {name: jax.tree.map(lambda x, at=axis + (name == "replay"): put(np.asarray(x), at), value) for name, value in batch.items()}

    def put(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters of the model, on the devices that this program runs on: where the model has them."""
        return params

    def evaluate(self, params, batches: Iterable[dict[str, Any]], knobs: Knobs, sequences: int | None = None) -> dict[str, Any]:
        """The sums of all batches' metrics, on the host: (sum, count) pairs as float64, loads as float64 arrays.

        sequences: how many a batch has over all processes, where these are parts of it.
        """
        total, offset = None, 0
        for batch in batches:
            count = sequences or len(batch["tokens"])
            metrics = self.evaluate_step(params, self.place({**batch, "row_offset": np.int32(offset)}, count), knobs)
            offset += count
            host = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), metrics)
            total = host if total is None else jax.tree.map(np.add, total, host)
        if total is None:
            raise ValueError("there are no evaluation batches")
        return total


def compiled_by_all(function: Any) -> Callable:
    """A jitted function that runs for the first time when every process has compiled it: gloo gives up on who comes to a collective 30 s late.

    Processes are that far apart when one of them reads from jax's compilation cache: on CPUs only process 0 has entries there.
    """
    compiled = False

    def run(*args):
        nonlocal compiled
        if not compiled:
            on_all(lambda: function.lower(*args).compile())
            compiled = True
        return function(*args)

    return run


def off(knobs: Knobs) -> Knobs:
    """The same program with every noise scale 0."""
    return knobs if knobs.noise is None else dataclasses.replace(knobs, noise=knobs.noise.scaled(0.0))
