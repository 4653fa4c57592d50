"""One run: batches through the train step with progress, metrics drained one step late, checkpoints, and an evaluation at the end.

The loop owns files and clocks; what is computed is in step.py.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import paths
from moe_jax.config_tools import differences, digest
from moe_jax.distributed import on_all
from moe_jax.errors import ConfigError, NonFinite, Stopped
from moe_jax.trace_store import TraceWriter
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.data import Data, DataConfig
from moe_jax.train.program import Program, off
from moe_jax.train.record import Routes, own_rows, trace_info
from moe_jax.train.run_config import RunConfig
from moe_jax.train.run_folder import some
from moe_jax.train.saved import load_model
from moe_jax.train.state import TrainState
from moe_jax.train.writers import MetricsWriter, Progress, Transfer, read_metrics

Series = dict[str, list[list[float]]]  # name -> [[step, value], ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run found."""

    metrics: dict[str, float]
    series: Series
    load: list[list[float]]  # [layer][expert] share of the evaluation's assignments
    seconds: float  # of this process, training and evaluation, compilation included


def run(
    config: RunConfig,
    program: Program,
    data: Data,
    folder: Path | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    profile: int = 0,
) -> Result:
    """Trains and evaluates. With a folder: metrics.jsonl there, checkpoints there if `checkpoint_every`, and a resume from the newest of
    them.

    profile: so many updates, after the first two, are traced for xprof into the folder's `profile`, by every process.
    The same config, killed anywhere and run again, ends in the same bits. Raises NonFinite before an update that a loss or gradient would
    spoil, and Stopped, after a checkpoint, when `stop()` turns true.
    """
    data.check_vocabulary(config.model.vocab_size)
    for sequences in (config.data.batch_size, config.eval_batch):
        program.part(sequences)  # refuses what does not divide over the mesh before anything is compiled
    if config.compare:
        _compared(config)  # and so what only an evaluation reads
    began = time.monotonic()
    checkpoints = None if folder is None or not config.checkpoint_every else Checkpoints(folder / "checkpoints", config, data.fingerprint)
    state, start = program.init(jnp.uint32(config.init_seed)), 0
    if checkpoints is not None and checkpoints.latest() is not None:
        state, start = checkpoints.restore(state)
    elif config.start:
        state = dataclasses.replace(state, params=start_parameters(config.start, program, config.data))
    metrics = nullcontext() if folder is None else on_all(lambda: MetricsWriter(folder))
    with metrics as writer, on_all(lambda: _routes_writer(config, data)) as routes:
        recorder = Recorder(writer, start, config.log_every, routes)
        with closing(_Profile(folder, start + 3, profile)) as trace:
            state = _train(config, program, data, state, start, checkpoints, recorder, progress, stop, trace)
        _evaluate(config, program, data, state, config.updates, recorder)
    return Result(_headline(recorder.rows), recorder.series(), recorder.load, time.monotonic() - began)


def start_parameters(start: str, program: Program, text: DataConfig | None = None) -> dict[str, Any]:
    """The parameters in the folder `start`, of the program's model, where it has them. text: what they are trained on further."""
    saved = load_model(start)
    if text is not None:
        saved.check_words(text)
    if changed := differences(saved.config.what(), program.model.config.what()):
        raise ConfigError(f"the model in {start} is another one than this run's: {some(changed, 8)}")
    return program.put(saved.load(program.model, Transfer("read")))


def _routes_writer(config: RunConfig, data: Data) -> Any:
    """Where the routes of the updates go, or a context without one."""
    if not config.record:
        return nullcontext()
    weights, rows = config.record_what == "ids+weights", config.data.accumulation * config.data.batch_size
    info = trace_info(config.model, data, rows, "self", weights, config=digest(config))
    return TraceWriter(config.record, info, (jax.process_index(), jax.process_count()))


def _train(config, program, data, state, start, checkpoints, recorder, progress, stop, trace) -> TrainState:
    names, knobs = [*paths.flatten(program.model.specs), "the loss"], functools.cache(config.knobs)
    rows, length = config.data.accumulation * config.data.batch_size, config.data.seq_len
    whole = bool(config.replay or config.record)  # routes are of whole batches; otherwise a process cuts its own windows alone
    batches = (data if whole else data.of_process(*program.part(config.data.batch_size))).batches(start)
    if config.replay:
        batches = Routes(config.replay, config.model, rows, length, config.replay_what).beside(batches, start, config.updates)
    drain = functools.partial(_drain, recorder, progress, names, rows * length)
    stopping = AnyProcess(stop)
    pending = None  # the step whose numbers are still on the device: it is read after the next one has been dispatched
    with closing(batches):
        for done in range(start + 1, config.updates + 1):
            batch = next(batches)
            trace.before(done, state)
            placed = program.place(batch, config.data.batch_size, 1)
            state, metrics, flags = program.train(state, placed, knobs(config.stage(done - 1)))
            drain(pending)
            pending, halt = (done, metrics, flags, batch["tokens"]), stopping()
            saving = checkpoints is not None and (halt or done == config.updates or done % config.checkpoint_every == 0)
            evaluating = config.eval_every and done % config.eval_every == 0 and done < config.updates
            if saving or evaluating or halt:
                drain(pending)  # raises before a state that was not checked is saved
                pending = None
            if evaluating:
                _evaluate(config, program, data, state, done, recorder)
            if checkpoints is not None and saving:
                for writer in filter(None, (recorder.writer, recorder.routes)):
                    on_all(writer.flush)  # no checkpoint is ahead of its metrics and routes
                checkpoints.save(done, state)
            if halt and done < config.updates:
                raise stopped(done, config.updates, saving)
        drain(pending)
    return state


class _Profile:
    """An xprof trace of a few updates; what was dispatched before its first or within it is waited for, so that it holds whole updates."""

    def __init__(self, folder: Path | None, first: int, count: int):
        self._folder, self._span, self._running = folder, range(first, first + count), False

    def before(self, update: int, state: TrainState) -> None:
        """Starts or ends the trace when `update` is the first of its updates, or the first after them."""
        inside = update in self._span and self._folder is not None
        if inside == self._running:
            return
        jax.block_until_ready(state)
        jax.profiler.start_trace(str(self._folder / "profile")) if inside else jax.profiler.stop_trace()  # type: ignore[operator]
        self._running = inside

    def close(self) -> None:
        """Ends a trace that a stopped or failed run, or its last update, has left open: what it holds is written."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class AnyProcess:
    """Whether any process was asked to stop; all learn it before the same update, one after it happened, without waiting for each other."""

    def __init__(self, stop: Callable[[], bool]):
        self._stop, self._asked = stop, None
        if jax.process_count() > 1:
            devices = np.asarray(jax.devices())
            self._each = NamedSharding(Mesh(devices, "all"), PartitionSpec("all"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(self._each.mesh, PartitionSpec()))

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return self._stop()
        before, mine = self._asked, np.full(jax.local_device_count(), self._stop())
        self._asked = self._any(jax.make_array_from_process_local_data(self._each, mine, (jax.device_count(),)))
        return before is not None and bool(before)


def _drain(recorder: "Recorder", progress: Progress | None, names: list[str], tokens: int, pending: tuple | None) -> None:
    """Brings one step's numbers to the host, checks and records them."""
    if pending is None:
        return
    done, metrics, flags, text = pending
    trace = metrics.pop("trace", None)
    host, bad = jax.device_get((metrics, flags))
    check_finite(done, names, bad)
    if recorder.routes is not None:
        recorder.routes.write(done - 1, *own_rows(trace, text.reshape(-1, text.shape[-1])))
    row = {name: ratio(value) for name, value in host.items() if name != "router/load" and value[1]}  # a count of 0: nothing to say
    recorder.add(done, {f"train/{name}" if "/" not in name else name: value for name, value in row.items()})
    if progress is not None:
        progress.update(done, {name: row[name] for name in ("loss", "router/load_cv", "router/flips") if name in row}, tokens)


def check_finite(update: int, names: list[str], bad: np.ndarray) -> None:
    """Raises NonFinite when a flag of the update's step is set; names: of what the flags are."""
    if bad.any():
        where = [name for name, flag in zip(names, bad, strict=True) if flag]
        raise NonFinite(
            f"update {update} was refused: not finite in the gradient of {some(where, 4, ', ')}; the parameters of update {update - 1} are intact "
            "(lower the learning rate or the noise, or look at the batch)"
        )


def stopped(done: int, updates: int, saved: bool) -> Stopped:
    """The error that ends a run after `done` of its updates."""
    where = f"saved; the same command goes on from update {done}" if saved else "not saved: checkpoint_every is 0"
    return Stopped(f"stopped at update {done} of {updates}, {where}")


def ratio(pair) -> float:
    """Of a (sum, count) pair on the host."""
    return float(np.float64(pair[0]) / np.float64(pair[1]))


def _evaluate(config: RunConfig, program: Program, data: Data, state: TrainState, done: int, recorder: "Recorder") -> None:
    """Loss with the noise off and, where the spec has noise in evaluation, on; expert usage with it off."""
    mine = data if config.compare else data.of_process(*program.part(config.eval_batch))
    knobs, batches = config.knobs(), list(mine.validation_batches(config.eval_batch))
    evaluate = functools.partial(program.evaluate, state.params, sequences=config.eval_batch)
    counted = len(batches) if config.loss_windows is None else config.loss_windows // config.eval_batch
    sums = evaluate(batches[:counted], off(knobs))
    row = {"eval/loss": ratio(sums["loss"]), "eval/accuracy": ratio(sums["accuracy"])}
    if counted < len(batches):
        rest = evaluate(batches[counted:], off(knobs))
        sums = jax.tree.map(np.add, sums, rest)
    acting = None if knobs.noise is None else knobs.noise.in_phase("eval")
    if acting is not None:
        noisy = any(np.asarray(scale).any() for scale in acting.scales.values())
        row["eval/loss_noisy"] = ratio(evaluate(batches[:counted], knobs)["loss"]) if noisy else row["eval/loss"]
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
    if config.compare:
        routes = _compared(config)
        along = [{**batch, "replay": routes.of(index, batch["tokens"])} for index, batch in enumerate(batches)]
        row["eval/reference_overlap"] = ratio(evaluate(along, off(knobs))["replay/set_overlap"])
    recorder.add(done, row, always=True)


def _compared(config: RunConfig) -> Routes:
    return Routes(config.compare, config.model, config.eval_batch, config.data.seq_len)


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats, cut at exp(20) as in the seed study."""
    return math.exp(min(loss, 20.0))


def _headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The run's metrics: those of the last evaluation, the best perplexity among evaluations, and the training loss near the end."""
    evaluations = [row for row in rows if "eval/loss" in row]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    last = {name.removeprefix("eval/"): value for name, value in evaluations[-1].items() if name != "step"}
    metrics = {name if "usage" in name else f"val_{name}": value for name, value in last.items()}
    metrics["val_perplexity"] = perplexity(last["loss"])
    metrics["val_perplexity_best"] = min(perplexity(row["eval/loss"]) for row in evaluations)
    if "loss_noisy" in last:
        metrics["val_perplexity_noisy"] = perplexity(last["loss_noisy"])
    tail = losses[-max(1, len(losses) // 10) :]
    return metrics | ({"train_loss_end": sum(tail) / len(tail)} if tail else {})  # none when metrics.jsonl of a finished run is gone


class Recorder:
    """The rows of a run: in memory, and in metrics.jsonl when there is a folder; a resumed run starts from the rows it had."""

    def __init__(self, writer: MetricsWriter | None, start: int, every: int, routes: TraceWriter | None):
        self.writer, self.routes, self._every = writer, routes, every
        self.rows: list[dict[str, Any]] = []
        self.load: list[list[float]] = []
        if writer is not None:
            writer.truncate_to(start)
            self.rows = [row for row in read_metrics(writer.path) if row["step"] <= start]

    def add(self, step: int, values: Mapping[str, float], always: bool = False) -> None:
        if not (always or step % self._every == 0 or step == 1):
            return
        if self.rows and self.rows[-1] == {"step": step, **values}:
            return  # a run killed after its last evaluation makes it again
        self.rows.append({"step": step, **values})
        if self.writer is not None:
            self.writer.write(step, values)

    def series(self) -> Series:
        found: Series = {}
        for row in self.rows:
            for name, value in row.items():
                if name != "step":
                    found.setdefault(name, []).append([row["step"], value])
        return found


def provenance(config: RunConfig, data: Data) -> dict[str, Any]:
    """What ran, for a ledger: device, jax version, data fingerprint and seeds."""
    device = jax.devices()[0]
    seeds = {name: getattr(config, name) for name in ("init_seed", "data_seed", "noise_seed")}
    return {"jax": jax.__version__, "device": device.device_kind, "platform": device.platform, "data": data.fingerprint, **seeds}
