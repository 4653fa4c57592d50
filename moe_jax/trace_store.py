"""Routing traces on disk: zarr3 arrays through tensorstore, complete step by step, every byte under a checksum, and no pickle.

    FOLDER/trace.json    what was recorded (TraceInfo) and in how many parts; written first, never changed
    FOLDER/ids/          zarr3 array [step, layer, row, position, slot]; its file c.STEP.0.PART.0.0 is one part's rows of one step
    FOLDER/weights/, logits/, tokens/    likewise, where recorded; tokens [step, row, position] prove that a replay reads the same text
    FOLDER/part-0.jsonl  a line for each complete step with the sha256 of its files, appended once they are on the disk
    FOLDER/part-0.json   the part's manifest, written last: sha256 of the lines, of trace.json and of the arrays' metadata

A part is the rows that one process holds. Its line makes a step exist: a writer killed at any moment leaves whole steps. A step written again with
other values is taken back first. Each text is sealed by a sha256, and the first line names the header and the metadata that the others belong to.
L MoE layers, B rows (sequences) of one step, S positions, K experts per token, E experts.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.config_tools import config_dict, differences
from moe_jax.errors import TraceError
from moe_jax.files import append, sync_folder, write_atomic
from moe_jax.model import ModelConfig
from moe_jax.replay import check_shape, check_trace
from moe_jax.routing import MOST_EXPERTS, RoutingTrace, trace_dtype, unrecorded
from moe_jax.train.run_folder import Closing, some
from moe_jax.train.sources import sha256_of

SCHEMA = "moe_jax.routing_trace/1"
SOURCES = ("self", "rollout", "reference", "noisy")
_HEADER = "trace.json"


@dataclasses.dataclass(frozen=True)
class TraceInfo:
    """What a trace is of. Raises TraceError for numbers that no model has."""

    model_hash: str  # ModelConfig.routing_hash()
    layers: tuple[int, ...]  # absolute numbers of the MoE layers
    num_experts: int
    top_k: int
    batch: int  # B: the rows of one step, all micro-batches and all parts together
    length: int  # S
    data_fingerprint: str = ""
    source: str = "self"  # SOURCES: of the pass before with the same parameters, of sampling, of a clean pass, of one with noise
    weights: bool = False
    logits: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # plain JSON: which checkpoint, noise, seeds

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        ordered = list(self.layers) == sorted(set(self.layers)) and min(self.layers, default=-1) >= 0
        sizes = 1 <= self.top_k <= self.num_experts <= MOST_EXPERTS and min(self.batch, self.length) > 0
        if not (ordered and sizes and self.source in SOURCES):
            raise TraceError(f"no trace is of this (layers count up, top_k <= experts <= {MOST_EXPERTS}, source one of {SOURCES}): {self}")

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids."""
        return np.dtype(trace_dtype(self.num_experts))

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the ids of one token take, before compression."""
        return len(self.layers) * self.top_k * self.dtype.itemsize

    @property
    def arrays(self) -> dict[str, tuple[dict[str, int], np.dtype]]:
        """{array: ({axis: size} of one step, dtype)}."""
        rows, whole, floats = {"row": self.batch, "position": self.length}, np.dtype("uint32"), np.dtype("float32")
        routes, scores = ({"layer": len(self.layers), **rows, **last} for last in ({"slot": self.top_k}, {"expert": self.num_experts}))
        arrays = {"ids": (routes, self.dtype), "weights": (routes, floats), "logits": (scores, floats), "tokens": (rows, whole)}
        return {name: array for name, array in arrays.items() if getattr(self, name, True)}


class TraceWriter(Closing):
    """Writes one part (index, count) of a trace in the background: the rows [index·B/count, (index+1)·B/count) of every step.

    A folder with a trace of the same info goes on, finished or not. An error of a step appears at the next call, once, and that call does nothing
    else. `close`, or leaving a `with` without an exception, finishes the part. Raises TraceError when the folder cannot be written, holds another
    trace or a damaged one, or another process writes this part.
    """

    def __init__(self, folder: str | os.PathLike[str], info: TraceInfo, part: tuple[int, int] = (0, 1)):
        self.folder, self.info, (index, count) = Path(folder).absolute(), info, part
        if not 0 <= index < count or info.batch % count:
            raise TraceError(f"part {index} of {count} of a trace of {info.batch} rows: parts are equal and counted from 0")
        _refuse_file(self.folder)
        self._rows = info.batch // count
        self._shapes = {array: tuple({**axes, "row": self._rows}.values()) for array, (axes, _) in info.arrays.items()}
        self._record = record = _Record(self.folder, info, index)
        self._pending, self._pool = list[Future[None]](), ThreadPoolExecutor(1, "trace writer")
        try:
            header = {"parts": count, "info": config_dict(info)}
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / _HEADER).exists():
                write_atomic(self.folder / _HEADER, _seal(header))
            if changed := differences(_header(self.folder), header):
                raise TraceError(f"{self.folder} holds another trace: {some(changed, 8)}. Use another folder, or the same settings")
            self._stores = {name: _store(self.folder, info, count, name, create=True) for name in self._shapes}
            with ExitStack() as undo:
                self._file = undo.enter_context(open(record.path, "ab", buffering=0))
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                record.load()
                record.manifest.unlink(missing_ok=True)  # it is being written again
                if not record.files:
                    names = (_HEADER, *(f"{name}/zarr.json" for name in self._stores))
                    self._append({"files": {name: sha256_of(self.folder / name) for name in names}})
                sync_folder(self.folder)
                undo.pop_all()
        except (OSError, ValueError) as error:
            raise self._failure("the header", error) from error

    def write(self, step: int, trace: RoutingTrace, tokens: Any = None, logits: Any = None) -> None:
        """Queues one step (four may wait): this part's rows of `trace` [L, rows, S, K], of the input `tokens` [rows, S] and of `logits` [L, rows, S, E].

        Arrays of numpy are copied; those of jax come to the host in the background: do not donate them. A step that is there with the same bits is
        left as it is. Raises TraceError: here for shapes, at the next call for ids out of range or repeated in a row and for a disk that refuses.
        """
        self._surface(3)
        check_shape(trace, self.info.layers, self.info.num_experts, self.info.top_k, self._rows, self.info.length)
        given = {"ids": trace.ids, "weights": trace.weights if self.info.weights else None, "logits": logits, "tokens": tokens}
        arrays = {name: value if isinstance(value, jax.Array) else np.array(value) for name, value in given.items() if value is not None}
        shapes = {"tokens": self._shapes["tokens"], **{name: value.shape for name, value in arrays.items()}}
        if shapes != self._shapes:
            raise TraceError(f"step {step} has arrays of shape {shapes}, and this part records {self._shapes}")
        self._pending.append(self._pool.submit(self._save, int(step), arrays, trace.layer_index))

    def flush(self) -> None:
        """Returns when every step given so far is on the disk; raises TraceError as `write` does."""
        self._surface(0)

    def close(self) -> None:
        """Writes what is queued, then the manifest, which makes this part a finished one. An error leaves it unfinished."""
        try:
            if not self._file.closed:
                self.flush()
                files = {**self._record.files, self._record.path.name: sha256_of(self._record.path)}
                write_atomic(self._record.manifest, _seal({"files": files, "steps": len(self._record.steps)}))
        except OSError as error:
            raise self._failure("the manifest", error) from error
        finally:
            self._drop()

    def __exit__(self, kind: Any, *_: object) -> None:
        (self._drop if kind else self.close)()

    def _drop(self) -> None:
        self._pool.shutdown()  # once what is queued is written
        self._file.close()

    def _surface(self, waiting: int) -> None:
        if self._file.closed:
            raise TraceError(f"this writer of {self.folder} is closed; open another one to go on")
        while self._pending and (len(self._pending) > waiting or self._pending[0].done()):
            self._pending.pop(0).result()

    def _append(self, body: dict[str, Any]) -> None:
        """Makes one line durable, in place of what a kill or a full disk has left of another."""
        self._file.truncate(self._record.end)
        append(self._file, _seal(body).encode())
        os.fsync(self._file.fileno())
        self._record.refresh()

    def _save(self, step: int, arrays: dict[str, Any], layers: Any) -> None:
        import tensorstore as ts

        info, record, first = self.info, self._record, self._record.index * self._rows
        try:
            values = {name: np.ascontiguousarray(value, info.arrays[name][1]) for name, value in arrays.items()}
            if "tokens" in values and (np.asarray(arrays["tokens"]) != values["tokens"]).any():
                raise TraceError(f"its tokens are not whole numbers from 0 to {2**32 - 1}")
            check_trace(RoutingTrace(values["ids"], None, layers), info.layers, info.num_experts, info.top_k, self._rows, info.length)
            views = {name: self._stores[name][step][ts.d["row"][first : first + self._rows]] for name in values}
            if step in record.steps:
                record.check(step, values)
                if all(views[name].read().result().tobytes() == values[name].tobytes() for name in values):
                    return
                self._append({"step": step, "objects": None})
            for written in [views[name].write(value) for name, value in values.items()]:
                written.result()
            self._append({"step": step, "objects": {name: sha256_of(self.folder / record.file(name, step)) for name in values}})
        except Exception as error:
            raise self._failure(f"step {step}", error) from error

    def _failure(self, what: str, error: Exception) -> TraceError:
        needed = sum(int(np.prod(shape)) * self.info.arrays[name][1].itemsize for name, shape in self._shapes.items())
        why = "another process writes it" if isinstance(error, BlockingIOError) else getattr(error, "strerror", None) or error
        return TraceError(f"cannot write {what} of {self.folder} (a step needs {needed:,} bytes): {why}")


class TraceReader:
    """Reads a trace step by step, each verified on the way; memory is one step, however long the trace is, and the sha256 of every file.

    partial: a trace whose writer is still at work, or was killed, will do; its complete steps are there, and `steps` grows.
    Raises TraceError for what is no trace, was written by a newer version, is unfinished, or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], partial: bool = False):
        self.folder = Path(folder).absolute()
        header = _header(self.folder)
        self.info = TraceInfo(**header["info"])
        self._records = [_Record(self.folder, self.info, index) for index in range(header["parts"])]
        unfinished = [record.manifest.name for record in self._records if not record.load()]
        if unfinished and not partial:
            state = f"{len(self.steps)} complete steps, no {some(unfinished, 8, ', ')}; finish the recording, or read with TraceReader(partial=True)"
            raise TraceError(f"{self.folder} is still being written (or its writer was killed): {state}")

    @property
    def steps(self) -> tuple[int, ...]:
        """The complete steps, in order: those that every part has written by now."""
        for record in self._records:
            record.refresh()
        return tuple(sorted(set.intersection(*(set(record.steps) for record in self._records))))

    def read(self, step: int, tokens: Any = None) -> RoutingTrace:
        """The routes of one step, numpy arrays [L, B, S, K]; weights None where none were recorded.

        tokens: [B, S], the input to replay them on. Raises TraceError when it is not the recorded one, and for a step that is missing or damaged.
        """
        found = self._load(step, ["ids", *(["weights"] if self.info.weights else []), *([] if tokens is None else ["tokens"])])
        if tokens is not None:
            self._compare(step, found["tokens"], np.asarray(tokens))
        return RoutingTrace(found["ids"], found.get("weights"), np.asarray(self.info.layers, np.int32))

    def logits(self, step: int) -> np.ndarray:
        """The router's logits of one step, float32 [L, B, S, E]."""
        return self._load(step, ["logits"])["logits"]

    def check(self, model_hash: str, layers: Sequence[int], num_experts: int, top_k: int, batch: int = 0, length: int = 0) -> None:
        """Raises TraceError with every number in which the trace differs from the model and the text (when given) that it is meant for."""
        names = ("experts", "experts per token", "as MoE layers", "rows", "positions", "as model hash")
        info, theirs = self.info, (num_experts, top_k, tuple(layers), batch, length, model_hash)
        ours = (info.num_experts, info.top_k, info.layers, info.batch, info.length, info.model_hash)
        unlike = [f"recorded with {a} {n}, the model has {b}" for n, a, b in zip(names, ours, theirs, strict=True) if b and a != b]
        if unlike:
            raise TraceError(f"{self.folder} does not fit: {'; '.join(unlike)}")

    def verify(self) -> int:
        """Reads and checks everything, a step at a time; the number of steps. Raises TraceError at the first damage."""
        return sum(bool(self._load(step, self._records[0].steps[step])) for step in self.steps)

    def _load(self, step: int, names: Iterable[str]) -> dict[str, np.ndarray]:
        for record in self._records:
            record.check(step, names)
        try:
            return {name: _store(self.folder, self.info, len(self._records), name)[step].read().result() for name in names}
        except ValueError as error:
            raise TraceError(f"step {step} of {self.folder} is damaged: {error}") from None

    def _compare(self, step: int, was: np.ndarray, now: np.ndarray) -> None:
        where, why = f"step {step} of {self.folder}", "the text or the data order differ, so these routes belong to other tokens"
        if was.shape != now.shape:
            raise TraceError(f"{where} was recorded on tokens of shape {was.shape}, and here they are {now.shape}: {why}")
        for row, position in np.argwhere(was != now)[:1].tolist():
            values = f"{was[row, position]} when recorded and {now[row, position]} here ({(was != now).sum()} of {was.size} differ)"
            raise TraceError(f"{where}: the token at row {row}, position {position} was {values}: {why}")


def write_trace(path: str | os.PathLike[str], trace: RoutingTrace, *, model_hash: str, num_experts: int, tokens: Any = None, **info: Any):
    """Writes the routes of one batch as step 0 of a trace, with other fields of TraceInfo in `info`; raises TraceError as TraceWriter does."""
    if np.ndim(trace.ids) != 4:
        raise TraceError(f"a trace's ids are [layers, rows, positions, experts per token], got shape {np.shape(trace.ids)}")
    layers, (_, batch, length, top_k) = tuple(np.asarray(trace.layer_index).tolist()), np.shape(trace.ids)
    of = TraceInfo(model_hash, layers, num_experts, top_k, batch, length, weights=trace.weights is not None, **info)
    with TraceWriter(path, of) as writer:
        writer.write(0, trace, tokens)


def read_trace(path: str | os.PathLike[str], model: ModelConfig | None = None) -> RoutingTrace:
    """What `write_trace` wrote, in numpy arrays; raises TraceError as TraceReader does, for several steps, and as `check` for another `model`."""
    reader = TraceReader(path)
    if model is not None:
        reader.check(model.routing_hash(), model.moe_layers, model.num_experts, model.experts_per_token)
    if len(reader.steps) != 1:
        raise TraceError(f"{path} holds {len(reader.steps)} steps: read one of them with TraceReader(path).read(step)")
    return reader.read(reader.steps[0])


class _Record:
    """The lines of one part, read as they come: an opening (the files that they belong to), then one for each step."""

    def __init__(self, folder: Path, info: TraceInfo, index: int):
        self.folder, self.info, self.index = folder, info, index
        self.path, self.manifest = folder / f"part-{index}.jsonl", folder / f"part-{index}.json"
        self.files: dict[str, str] = {}  # of the opening: {path: sha256}
        self.steps: dict[int, dict[str, str]] = {}  # {complete step: {array: sha256 of its file}}
        self.end = 0  # of the last whole line

    def load(self) -> bool:
        """Reads all lines; whether the part is finished, and then they are those of its manifest. Raises TraceError for damage."""
        finished = self.manifest.exists()
        if finished:
            _check_files(self.folder, _unseal(self.manifest.read_bytes(), self.manifest)["files"])
        self.refresh()
        return finished

    def refresh(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.end)
            for line in file:
                if line[-1:] != b"\n" and not _is_sealed(line[:-1] + b"\n"):
                    return  # cut off by a kill, or still being written
                body = _unseal(line, f"{self.path} (the line at byte {self.end})")
                if not self.files:
                    self.files = _check_files(self.folder, body["files"])
                elif body["objects"]:
                    self.steps[body["step"]] = body["objects"]
                else:
                    del self.steps[body["step"]]
                self.end += len(line)

    def file(self, name: str, step: int) -> str:
        return f"{name}/c.{step}." + ".".join(str(self.index) if axis == "row" else "0" for axis in self.info.arrays[name][0])

    def check(self, step: int, names: Iterable[str]) -> None:
        """Raises TraceError when a step is not there, or the files of these of its arrays are not what was recorded."""
        self.refresh()
        if step not in self.steps:
            span = f"{len(self.steps)} complete steps, {min(self.steps, default='none')} to {max(self.steps, default='none')}"
            raise TraceError(f"there is no step {step} in {self.path}: it has {span}")
        if lacking := set(names) - set(self.steps[step]):
            raise TraceError(f"step {step} of {self.folder} was recorded without {', '.join(lacking)}")
        _check_files(self.folder, {self.file(name, step): self.steps[step][name] for name in names}, f"step {step} of ")


def _seal(body: dict[str, Any] | str) -> str:
    text = body if isinstance(body, str) else json.dumps(body, allow_nan=False)
    return f'{{"schema": "{SCHEMA}", "sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "body": {text}}}\n'


def _is_sealed(raw: bytes) -> bool:
    return _seal(raw[len(_seal("")) - 2 : -2].decode("latin-1")).encode() == raw


def _unseal(raw: bytes, where: str | Path) -> dict[str, Any]:
    """What was sealed; TraceError, naming `where`, for any other bytes and for another version of the format."""
    schema = raw.partition(b'"schema": "')[2].partition(b'"')[0].decode("latin-1")
    if schema not in ("", SCHEMA):
        raise TraceError(f"{where} was written as {schema!r}, and this code reads {SCHEMA!r}: use the code that wrote it")
    if not _is_sealed(raw):
        raise TraceError(f"{where} is damaged: it does not have the sha256 it was written with")
    return json.loads(raw)["body"]


def _check_files(folder: Path, files: dict[str, str], what: str = "") -> dict[str, str]:
    for name, sha in files.items():
        with suppress(OSError):
            if sha256_of(folder / name) == sha:
                continue
        raise TraceError(f"{what}{folder} is damaged: {name} is gone, cannot be read, or does not have the sha256 it was written with")
    return files


def _refuse_file(path: Path) -> None:
    if path.suffix in (".pkl", ".pickle", ".npz", ".npy", ".pt", ".pth", ".bin", ".json") or path.is_file():
        how = "Pickles run code when they are read, so none is read here: load it where it was made and save its arrays with write_trace"
        raise TraceError(f"{path} is a {path.suffix or 'plain'} file, and a routing trace is a folder with {_HEADER}. {how}")


def _header(folder: Path) -> dict[str, Any]:
    _refuse_file(folder)
    try:
        return _unseal((folder / _HEADER).read_bytes(), folder / _HEADER)
    except OSError as error:
        raise TraceError(f"{folder} is no routing trace, which is a folder with {_HEADER}: {error.strerror}") from None


def _store(folder: Path, info: TraceInfo, parts: int, name: str, create: bool = False) -> Any:
    """One array, opened: a file per step and part, in which each layer has its own checksum and can be read alone."""
    import tensorstore as ts  # a tenth of a second, which commands that only read a config need not pay

    axes, dtype = info.arrays[name]
    chunk = [1, *{**axes, "row": info.batch // parts}.values()]
    # floats would take twice the time to save a tenth of the space
    packed = [{"name": "zstd", "configuration": {"level": 1}}] if dtype.kind == "u" else []
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *packed, {"name": "crc32c"}]
    inner = {"chunk_shape": [1, 1, *chunk[2:]] if "layer" in axes else chunk, "codecs": codecs}
    metadata = {"shape": [10**9, *axes.values()], "dimension_names": ["step", *axes], "data_type": dtype.name}  # steps take no space
    metadata["fill_value"] = unrecorded(dtype) if dtype.kind == "u" else 0.0
    metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    # "." keeps all files of an array in one folder, whose names tensorstore makes durable; it does not for folders in between
    metadata["chunk_key_encoding"] = {"name": "default", "configuration": {"separator": "."}}
    metadata["codecs"] = [{"name": "sharding_indexed", "configuration": inner}]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / name}/", "file_io_sync": True}, "metadata": metadata}
    # a step without one route is stored too, and a file that is gone does not read as "not recorded"
    spec |= {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, create=create).result()
