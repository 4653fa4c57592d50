"""Routes on the way to and from the disk: recorded by a forward pass of chosen parameters, and read ahead of the training that replays them.

B sequences in a step (all micro-batches), S sequence length, L MoE layers.
"""

import functools
import itertools
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.distributed import on_all
from moe_jax.errors import ConfigError, TraceError
from moe_jax.keys import Draw
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.replay import Replay
from moe_jax.routing import RoutingTrace
from moe_jax.trace_store import TraceInfo, TraceReader, TraceWriter
from moe_jax.train.data import Data
from moe_jax.train.program import compiled_by_all


def trace_info(model: ModelConfig, data: Data, rows: int, source: str, weights: bool, **extra: Any) -> TraceInfo:
    """What a trace of this model over this text says of itself; rows: sequences in one step."""
    numbers = (model.routing_hash(), model.moe_layers, model.num_experts, model.experts_per_token, rows, data.config.seq_len)
    return TraceInfo(*numbers, data.fingerprint, source, weights, extra=extra)


def source_of(model: ModelConfig, noise: NoiseSpec | None, split: str) -> str:
    """What routes recorded over train or validation are: "reference" of a clean pass, "noisy" where the noise acts in that phase."""
    acting = None if noise is None else model.resolve(noise).in_phase("train" if split == "train" else "eval")
    return "reference" if acting is None else "noisy"


def record(
    model: Model,
    params: dict[str, Any],
    data: Data,
    folder: str | Path,
    steps: int,
    source: str | None = None,
    noise: NoiseSpec | None = None,
    weights: bool = True,
    split: str = "train",
    noise_seed: int = 0,
    eval_batch: int | None = None,
) -> None:
    """Writes the routes that the model takes over the batches of `steps` updates, or over the first `steps` validation batches of `eval_batch` windows.

    A forward pass without dropout on the tokens that training (phase "train") or evaluation ("eval") reads, noise with the draws that they make.
    A recording that was cut off is made again from its beginning; steps that are there with the same bits are left as they are. Of several
    processes each writes its rows. source: of TraceInfo; None: that of `source_of`.
    Raises ConfigError (no router, unknown split, more ids than embeddings), TraceError (another trace in the folder, or a disk that refuses).
    """
    if split not in ("train", "validation") or not model.config.moe_layers:
        raise ConfigError(f"routes are recorded over train or validation, of a model that has a router; got split {split!r}")
    data.check_vocabulary(model.config.vocab_size)
    training = split == "train"
    rows = data.config.accumulation * data.config.batch_size if training else eval_batch or data.config.batch_size
    batches = map(data.batch, range(steps)) if training else itertools.islice(data.validation_batches(rows), steps)
    extra = {"split": split, "noise": repr(noise or ""), "noise_seed": noise_seed}
    source, part = source or source_of(model.config, noise, split), (jax.process_index(), jax.process_count())
    info = trace_info(model.config, data, rows, source, weights, **extra)
    with on_all(lambda: TraceWriter(folder, info, part)) as writer:
        for step, batch in enumerate(batches):
            tokens = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
            seed = jnp.uint32(noise_seed)
            draw = Draw(seed, step, "train") if training else Draw(seed, 0, "eval", step * rows)
            writer.write(step, *own_rows(recorder(model)(params, tokens, noise, draw), tokens))


@functools.lru_cache(maxsize=4)
def recorder(model: Model) -> Callable[..., Any]:
    """The compiled pass (params, tokens, noise, draw) -> RoutingTrace."""
    everywhere = None if model.mesh is None else NamedSharding(model.mesh, PartitionSpec())  # of several processes each writes rows of it
    forward = jax.jit(
        lambda params, tokens, noise, draw: model.features(params, tokens, noise, draw, capture=("trace",)).trace, out_shardings=everywhere
    )
    return forward if jax.process_count() == 1 else compiled_by_all(forward)


def own_rows(trace: Any, text: np.ndarray) -> tuple[RoutingTrace, np.ndarray]:
    """The routes and the text of the rows that this process writes."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return trace, text
    if len(text) % count:
        raise ConfigError(f"{len(text)} sequences do not divide among {count} processes, each of which records its part of the routes")
    rows = slice(index * (len(text) // count), (index + 1) * (len(text) // count))
    host = jax.device_get(trace)
    return RoutingTrace(host.ids[:, rows], None if host.weights is None else host.weights[:, rows], host.layer_index), text[rows]


class Routes:
    """Recorded routes that are replayed on the text of a run. Raises TraceError when they are another model's, or of batches of another size."""

    def __init__(self, folder: str | Path, model: ModelConfig, rows: int, length: int, what: str = "ids"):
        self.reader, self.what = TraceReader(folder), what
        self.reader.check(model.routing_hash(), model.moe_layers, model.num_experts, model.experts_per_token, rows, length)

    def of(self, step: int, tokens: np.ndarray) -> Replay:
        """The routes of one step; raises TraceError when they were recorded on other tokens than these [B, S]."""
        trace = self.reader.read(step, tokens)
        return Replay(trace if self.what == "ids+weights" else RoutingTrace(trace.ids, None, trace.layer_index), self.what)

    def beside(self, batches: Generator[dict[str, Any]], start: int, updates: int) -> Generator[dict[str, Any]]:
        """The batches of the updates start … updates - 1 with their routes, read and verified while the one before is trained on."""
        lacking = sorted(set(range(start, updates)) - set(self.reader.steps))
        if lacking:
            raise TraceError(
                f"{self.reader.folder} has no routes of step {lacking[0]}, and the run replays {updates} steps; record that many"
            )

        def ready(step: int, batch: dict[str, Any]) -> dict[str, Any]:
            count, _, length = batch["tokens"].shape
            return {**batch, "replay": self.of(step, batch["tokens"].reshape(-1, length)).micro_batches(count)}

        with closing(batches), ThreadPoolExecutor(1, "trace reader") as pool:
            ahead = []
            for step in range(start, updates):
                ahead.append(pool.submit(ready, step, next(batches)))
                if len(ahead) > 1:
                    yield ahead.pop(0).result()
            yield from (last.result() for last in ahead)
