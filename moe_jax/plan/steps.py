"""The real steps of a run, compiled on abstract arrays: what trains, evaluates, records and samples, as launch.train, .record and .generate run it.

B sequences of a batch over all devices, S sequence length.
"""

import dataclasses
import functools
import json
import math
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config_tools import digest
from moe_jax.errors import check_known
from moe_jax.files import write_atomic
from moe_jax.generate import Sampler, State
from moe_jax.keys import Draw
from moe_jax.model.cache import Cache
from moe_jax.plan.hlo import Totals, collectives
from moe_jax.platforms import tracing_for
from moe_jax.train.program import Program
from moe_jax.train.record import recorder
from moe_jax.train.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step. Bytes are of one device; of a step that does not fit, only `refused` is known."""

    step: str
    arguments: int = 0  # of them, `donated` become results
    donated: int = 0
    results: int = 0
    temporaries: int = 0  # buffers for them; some lie where arguments that were used lay before
    most: int = 0  # bytes in use at once, by the compiler's account; 0 where it gives none
    seconds: float = 0.0  # that compiling took
    always: Totals = dataclasses.field(default_factory=dict)
    overflowing: Totals = dataclasses.field(default_factory=dict)
    refused: str = ""  # the compiler's own words
    beside: int = 0  # of the run's state, what this step neither reads nor writes

    @property
    def peak(self) -> int:
        """Bytes in use at once; where the compiler gives no account: arguments, results that are not in their place, and all temporaries."""
        return self.beside + (self.most or self.arguments + self.results - self.donated + self.temporaries)


def compile_step(step: str, config: RunConfig, mesh: Mesh, platform: str, cache: Path | None = None) -> Compiled:
    """Compiles a step of the run for the mesh's devices. Raises ConfigError for what cannot be laid out on the mesh.

    cache: a folder in which what the compiler said of a program is looked up, by the program's text, devices and versions, and kept.
    """
    began = time.monotonic()
    with tracing_for(platform):
        lowered, beside = lower(step, config, mesh), shapes_of(config)(config, mesh).beside(step)
        known = None if cache is None else cache / f"{_digest(lowered.as_text(), mesh)}.json"
        if known is not None and known.exists():
            return dataclasses.replace(Compiled(**json.loads(known.read_text()), step=step), beside=beside)
        try:
            found = _measured(step, lowered.compile(), mesh.devices.flat[0].platform)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = Compiled(step, refused=_memory_words(str(error)))
    found = dataclasses.replace(found, beside=beside, seconds=time.monotonic() - began)
    if known is not None:
        write_atomic(known, json.dumps({name: value for name, value in vars(found).items() if name != "step"}))
    return found


def _measured(step: str, compiled: Any, platform: str) -> Compiled:
    memory = compiled.memory_analysis()
    most = int(getattr(memory, "peak_memory_in_bytes", 0)) if platform == "tpu" else 0  # a CPU's leaves the temporaries out
    sizes = (memory.argument_size_in_bytes, memory.alias_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return Compiled(step, *sizes, most, 0.0, *collectives(compiled.as_text()))


def _digest(text: str, mesh: Mesh) -> str:
    """Of everything that decides what the compiler says."""
    devices = mesh.devices.flat
    libraries = ["jax", "jaxlib", *(["libtpu"] if find_spec("libtpu") else [])]
    return digest([text, [str(device) for device in devices], [version(name) for name in libraries]])[:32]


def _memory_words(error: str) -> str:
    """Of the compiler's message, what it needed and what there is."""
    sentence = next(
        (part for part in error.replace("\\n", "\n").splitlines() if "memory" in part.lower() and "G" in part), error.splitlines()[0]
    )
    return sentence.strip()[:300]


def shapes_of(config: RunConfig) -> "type[Shapes]":
    """The steps of a run; a kind of run with others names its own."""
    return getattr(config, "shapes", Shapes)


def lower(step: str, config: RunConfig, mesh: Mesh) -> Any:
    """The step lowered, not compiled: its text says what is computed. Call it under `tracing_for` the mesh's platform."""
    shapes = shapes_of(config)
    check_known("step", step, shapes.steps)
    return getattr(shapes(config, mesh), step)()


class Shapes:
    """The steps of a run that trains, and the abstract arguments of each, where a run would have them."""

    steps: tuple[str, ...] = ("train", "evaluate", "record", "prefill", "sample")
    among_training: tuple[str, ...] = ("evaluate",)  # steps that a run takes while the optimizer's state lies there too

    def __init__(self, config: RunConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.program: Program = config.program(mesh)
        self.model = self.program.model

    @staticmethod
    def batches(config: RunConfig) -> str:
        """What the steps other than train take at once, in words."""
        return f"evaluation, recording and sampling: {config.eval_batch} sequences"

    def beside(self, step: str) -> int:
        """Bytes of one device: of the run's state, what the step has no part in."""
        return self._bytes(self._state) - self._bytes(self._state.params) if step in self.among_training else 0

    @functools.cached_property
    def _state(self) -> Any:
        return jax.tree.map(self._at, jax.eval_shape(self.program.init, np.uint32(0)), self.program.shardings)

    def _bytes(self, tree: Any) -> int:
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def train(self) -> Any:
        batch = jax.tree.map(lambda leaf: self._tokens(leaf.shape, 1, leaf.dtype), self.config.train_batch())
        return self.program.train.lower(self._state, batch, self._knobs())

    def evaluate(self) -> Any:
        shape = (self.config.eval_batch, self.config.data.seq_len)
        batch = {"tokens": self._tokens(shape), "targets": self._tokens(shape), "weight": self._tokens(shape, dtype=jnp.float32)}
        return self.program.evaluate_step.lower(self.model.abstract(), batch | {"row_offset": np.int32(0)}, self._knobs())

    def record(self) -> Any:
        noise, tokens = self._knobs().noise, self._tokens((self.config.eval_batch, self.config.data.seq_len))
        return recorder(self.model).lower(self.model.abstract(), tokens, noise, draw_of("eval"))

    def prefill(self) -> Any:
        rows, length = self.config.eval_batch, self.config.data.seq_len
        arguments = (self._tokens((rows, length)), self._tokens((rows,)), self._cache(fresh=True))
        return self._sampler.prefill.lower(self.model.abstract(), *arguments, self._knobs().noise, draw_of("rollout"), any_sampling())

    def sample(self) -> Any:
        rows = self._tokens((self.config.eval_batch,))
        state = State(self._cache(fresh=False), rows, rows, self._tokens(rows.shape, dtype=jnp.bool_))
        return self._sampler.step.lower(self.model.abstract(), state, self._knobs().noise, draw_of("rollout"), any_sampling())

    @functools.cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.model, trace=bool(self.model.config.moe_layers))

    def _knobs(self) -> Any:
        return jax.tree.map(lambda leaf: self._at(leaf, NamedSharding(self.mesh, PartitionSpec())), jax.eval_shape(self.config.knobs))

    def _at(self, leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def _tokens(self, shape: tuple[int, ...], axis: int = 0, dtype: Any = jnp.int32) -> Any:
        """Of a batch whose sequences `axis` counts; on every device what has no such axis."""
        if axis >= len(shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))
        layout: Any = self.model.layout(shape[axis])
        spec = PartitionSpec(*(None,) * axis, layout.rows or None)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _cache(self, fresh: bool) -> Cache:
        rows, length = self.config.eval_batch, self.config.data.seq_len
        made = jax.eval_shape(lambda: self.model.cache(rows, length))
        layout: Any = self.model.layout(rows)
        where = NamedSharding(self.mesh, layout.spec(None, "batch", None, "kv_heads", None, shape=made.keys.shape))
        return dataclasses.replace(jax.tree.map(lambda leaf: self._at(leaf, where), made), fresh=fresh)


def draw_of(phase: str) -> Draw:
    """A draw of noise in a phase."""
    return Draw(seed=np.uint32(0), step=np.uint32(0), phase=phase, row_offset=np.uint32(0))  # type: ignore[arg-type]


def any_sampling() -> tuple[Any, ...]:
    """Temperature, top_p, stop tokens and seed of a Sampler."""
    return np.float32(1), np.float32(1), np.zeros(1, np.int32), np.uint32(0)
