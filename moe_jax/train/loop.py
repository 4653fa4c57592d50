"""One run: batches through the train step with progress, metrics drained one step late, checkpoints, and an evaluation at the end.

The loop owns files and clocks; what is computed is in step.py.
"""

import dataclasses
import math
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import paths
from moe_jax.config_tools import config_dict
from moe_jax.errors import ConfigError, NonFinite, Stopped
from moe_jax.model import ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.data import Data, DataConfig
from moe_jax.train.program import Program, off
from moe_jax.train.state import Knobs, TrainState
from moe_jax.train.step import Objective
from moe_jax.train.writers import MetricsWriter, Progress, read_metrics

Series = dict[str, list[list[float]]]  # name -> [[step, value], ...]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of one run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: Objective = Objective()
    updates: int = 100
    noise: str = ""  # a NoiseSpec in its grammar, e.g. router_logits=additive:0.1:phases=train
    balance_weight: float = 0.01
    z_weight: float = 0.0
    init_seed: int = 0
    data_seed: int = 0
    noise_seed: int = 0  # of noise and dropout
    eval_every: int = 0  # updates between evaluations; 0: once, at the end
    eval_batch: int = 32  # windows at a time
    loss_windows: int | None = None  # an evaluation's loss is over the first so many windows; None: all. Expert usage is over all
    log_every: int = 1  # updates between rows of metrics.jsonl
    checkpoint_every: int = 0  # updates between checkpoints, and one at the end; 0: none

    def __post_init__(self):
        for field, least in (("updates", 1), ("eval_every", 0), ("eval_batch", 1), ("log_every", 1), ("checkpoint_every", 0)):
            if getattr(self, field) < least:
                raise ConfigError(f"{field} must be at least {least}, got {getattr(self, field)}")
        for field in ("balance_weight", "z_weight"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be finite and not negative, got {getattr(self, field)}")
        for field in ("init_seed", "data_seed", "noise_seed"):
            if not 0 <= getattr(self, field) < 1 << 32:
                raise ConfigError(f"{field} must be from 0 to 2**32 - 1, got {getattr(self, field)}")
        if self.data.seq_len > self.model.max_seq_len:
            raise ConfigError(f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}")
        if self.loss_windows is not None and (self.loss_windows < 1 or self.loss_windows % self.eval_batch):
            raise ConfigError(f"loss_windows={self.loss_windows} must be a positive multiple of eval_batch={self.eval_batch}")
        NoiseSpec.parse(self.noise).resolve(self.model.num_layers)

    def knobs(self) -> Knobs:
        """The values that the compiled program takes."""
        spec = NoiseSpec.parse(self.noise)
        noise = spec.resolve(self.model.num_layers) if spec.sites else None
        return Knobs(noise, jnp.uint32(self.noise_seed), jnp.float32(self.balance_weight), jnp.float32(self.z_weight))

    def program(self) -> Program:
        return Program(self.model, self.optimizer, self.objective)

    def structure(self) -> tuple:
        """What a program depends on: runs with equal structures share one compilation."""
        noise = self.knobs().noise
        shape = (self.data.accumulation, self.data.batch_size, self.data.seq_len, self.eval_batch)
        return self.model, self.optimizer, self.objective, shape, None if noise is None else noise.structure


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run found."""

    metrics: dict[str, float]
    series: Series
    load: list[list[float]]  # [layer][expert] share of the evaluation's assignments
    seconds: float  # of this process, training and evaluation, compilation included


def check_vocabulary(config: RunConfig, data: Data) -> None:
    """Raises ConfigError when the tokenizer makes ids that the model has no embedding for."""
    if data.corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer} has {data.corpus.tokenizer.vocab_size} ids, the model's vocab_size is {config.model.vocab_size}"
        )


def run(
    config: RunConfig,
    program: Program,
    data: Data,
    folder: Path | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains and evaluates. With a folder: metrics.jsonl there, checkpoints there if `checkpoint_every`, and a resume from the newest of
    them.

    The same config, killed anywhere and run again, ends in the same bits. Raises NonFinite before an update that a loss or gradient would
    spoil, and Stopped, after a checkpoint, when `stop()` turns true.
    """
    check_vocabulary(config, data)
    began = time.monotonic()
    checkpoints = None
    if folder is not None and config.checkpoint_every:
        checkpoints = Checkpoints(folder / "checkpoints", config, data.fingerprint)
    state, start = _start(config, program, checkpoints)
    recorder = _Recorder(folder, start, config.log_every)
    try:
        state = _train(config, program, data, state, start, checkpoints, recorder, progress, stop)
        _evaluate(config, program, data, state, config.updates, recorder)
    finally:
        recorder.close()
    metrics = _headline(config, recorder)
    return Result(metrics, recorder.series(), recorder.load, time.monotonic() - began)


def _start(config: RunConfig, program: Program, checkpoints: Checkpoints | None) -> tuple[TrainState, int]:
    state = program.init(jnp.uint32(config.init_seed))
    if checkpoints is None or checkpoints.latest() is None:
        return state, 0
    state, _, step = checkpoints.restore(state)
    return state, step


def _train(config, program, data, state, start, checkpoints, recorder, progress, stop) -> TrainState:
    names = [*paths.flatten(program.model.specs), "the loss"]
    knobs, tokens = config.knobs(), config.data.accumulation * config.data.batch_size * config.data.seq_len
    batches = data.batches(start)
    pending = None  # the step whose numbers are still on the device: it is read after the next one has been dispatched
    try:
        for update in range(start, config.updates):
            state, metrics, flags = program.train(state, next(batches), knobs)
            _drain(pending, recorder, progress, names, tokens)
            pending = (update + 1, metrics, flags)
            done, stopping = update + 1, stop()
            saving = checkpoints is not None and (stopping or done == config.updates or done % config.checkpoint_every == 0)
            evaluating = config.eval_every and done % config.eval_every == 0 and done < config.updates
            if saving or evaluating or stopping:
                _drain(pending, recorder, progress, names, tokens)  # raises before a state that was not checked is saved
                pending = None
            if evaluating:
                _evaluate(config, program, data, state, done, recorder)
            if checkpoints is not None and saving:
                recorder.flush()
                checkpoints.save(done, state)
            if stopping and done < config.updates:
                where = f"saved; the same command goes on from update {done}" if saving else "not saved: checkpoint_every is 0"
                raise Stopped(f"stopped at update {done} of {config.updates}, {where}")
        _drain(pending, recorder, progress, names, tokens)
    finally:
        batches.close()
    return state


def _drain(pending, recorder: "_Recorder", progress: Progress | None, names, tokens: int) -> None:
    """Brings one step's numbers to the host, checks and records them."""
    if pending is None:
        return
    done, metrics, flags = pending
    host, bad = jax.device_get((metrics, flags))
    if bad.any():
        where = [name for name, flag in zip(names, bad, strict=True) if flag]
        more = f" and {len(where) - 4} more" if len(where) > 4 else ""
        raise NonFinite(
            f"update {done} was refused: not finite in the gradient of {', '.join(where[:4])}{more}; the parameters of update {done - 1} are intact "
            "(lower the learning rate or the noise, or look at the batch)"
        )
    row = {name: _ratio(value) for name, value in host.items() if name != "router/load"}
    recorder.add(done, {f"train/{name}" if "/" not in name else name: value for name, value in row.items()})
    if progress is not None:
        progress.update(done, {"loss": row["loss"]}, tokens)


def _ratio(pair) -> float:
    return float(np.float64(pair[0]) / np.float64(pair[1]))


def _evaluate(config: RunConfig, program: Program, data: Data, state: TrainState, done: int, recorder: "_Recorder") -> None:
    """Loss with the noise off and, where the spec has noise in evaluation, on; expert usage with it off."""
    knobs, batches = config.knobs(), list(data.validation_batches(config.eval_batch))
    counted = len(batches) if config.loss_windows is None else config.loss_windows // config.eval_batch
    sums = program.evaluate(state.params, batches[:counted], off(knobs))
    row = {"eval/loss": _ratio(sums["loss"]), "eval/accuracy": _ratio(sums["accuracy"])}
    if counted < len(batches):
        rest = program.evaluate(state.params, batches[counted:], off(knobs))
        sums = jax.tree.map(np.add, sums, rest)
    if knobs.noise is not None and knobs.noise.in_phase("eval") is not None:
        noisy = any(np.asarray(scale).any() for scale in knobs.noise.scales.values())
        row["eval/loss_noisy"] = _ratio(program.evaluate(state.params, batches[:counted], knobs)["loss"]) if noisy else row["eval/loss"]
    if "router/load" in sums:
        load = sums["router/load"]
        by_layer = np.asarray(load.std(-1) / load.mean(-1))
        pooled = sums["router/residual_load"].sum(0)
        row |= {
            "eval/usage_cv_routed": float(by_layer.mean()),
            "eval/usage_cv_routed_max": float(by_layer.max()),
            "eval/usage_cv_routed_pooled": float(load.sum(0).std() / load.sum(0).mean()),
            "eval/usage_cv_seed": float(pooled.std() / pooled.mean()),
            "eval/dead_experts": float((load == 0).sum()),
        }
        recorder.load = (load / load.sum(-1, keepdims=True)).tolist()
    recorder.add(done, row, always=True)


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats, cut at exp(20) as in the seed study."""
    return math.exp(min(loss, 20.0))


def _headline(config: RunConfig, recorder: "_Recorder") -> dict[str, float]:
    """The run's metrics: those of the last evaluation, the best perplexity among evaluations, and the training loss near the end."""
    evaluations = [row for row in recorder.rows if "eval/loss" in row]
    last = evaluations[-1]
    losses = [row["train/loss"] for row in recorder.rows if "train/loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    metrics = {
        name.replace("eval/", "val_", 1) if "usage" not in name else name.split("/")[1]: v for name, v in last.items() if name != "step"
    }
    metrics["val_perplexity"] = perplexity(last["eval/loss"])
    metrics["val_perplexity_best"] = min(perplexity(row["eval/loss"]) for row in evaluations)
    if "eval/loss_noisy" in last:
        metrics["val_perplexity_noisy"] = perplexity(last["eval/loss_noisy"])
    return metrics | {"train_loss_end": sum(tail) / len(tail)}


def peak_memory_gb() -> float:
    """Peak memory in GB (1e9 bytes): of the accelerator where it tells, otherwise of this process since it started."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


class _Recorder:
    """The rows of a run: in memory, and in metrics.jsonl when there is a folder; a resumed run starts from the rows it had."""

    def __init__(self, folder: Path | None, start: int, every: int):
        self._writer, self._every = None, every
        self.rows: list[dict[str, Any]] = []
        self.load: list[list[float]] = []
        if folder is not None:
            self._writer = MetricsWriter(folder)
            self._writer.truncate_to(start)
            self.rows = read_metrics(self._writer.path)

    def add(self, step: int, values: Mapping[str, float], always: bool = False) -> None:
        if not (always or step % self._every == 0 or step == 1):
            return
        if self.rows and self.rows[-1] == {"step": step, **values}:
            return  # a run killed after its last evaluation makes it again
        self.rows.append({"step": step, **values})
        if self._writer is not None:
            self._writer.write(step, values)

    def series(self) -> Series:
        found: Series = {}
        for row in self.rows:
            for name, value in row.items():
                if name != "step":
                    found.setdefault(name, []).append([row["step"], value])
        return found

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def provenance(config: RunConfig, data: Data) -> dict[str, Any]:
    """What ran, for a ledger: device, jax version, data fingerprint and seeds."""
    device = jax.devices()[0]
    seeds = {name: getattr(config, name) for name in ("init_seed", "data_seed", "noise_seed")}
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "platform": device.platform,
        "data": data.fingerprint,
        **config_dict(seeds),
    }
