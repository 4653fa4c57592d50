"""Checkpoints: any pytree of arrays saved by orbax, made durable, and verified byte by byte when it comes back.

    FOLDER/12/state/…        the leaves, by orbax (zarr in OCDBT; readable without this code)
    FOLDER/12/manifest.json  written last: sha256 of every file, shape and dtype of every leaf, config, data fingerprint
    FOLDER/.saving-12.ab…    a save that has not finished; swept by the next save
    FOLDER/12.damaged        a step that failed verification: set aside, never deleted

Orbax writes under `.saving-12…`; the manifest is added, everything is flushed to the disk, and one rename makes the step appear. So
a folder named by a number is whole, or has been damaged since. Orbax alone returns flipped bits without a word and casts to
whatever dtype is asked for; here both are refused. Its CheckpointManager is not used: its cached list of steps can name a step that
was never finished, it skips saves in silence, and the retention it adds is one loop.

With several processes, on a file system that all see, each writes and reads the shards of its own devices, and process 0 does the rest.
Orbax's Checkpointer is not used either: at its barriers, which are computations on all devices, the others would wait for ever for a
process whose disk is full. Here every stage ends when all have done it, and an error anywhere is raised everywhere. A save that was cut off
may go on for a moment in a process that outlives its job, so its folder has a name of its own and is no other save's.

Compression is off: it doubles the time (1.2 GB: about 3 s to save on two CPU cores, sha256 0.7 s of it) to save 12 % of the disk.
"""

import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import distributed
from moe_jax.config_tools import config_dict, differences, digest
from moe_jax.errors import CheckpointError, ConfigError, MoeJaxWarning
from moe_jax.files import sync_folder, write_atomic
from moe_jax.train.run_folder import some
from moe_jax.train.sources import sha256_of

SCHEMA = "moe_jax.checkpoint/1"
_MANIFEST, _STATE = "manifest.json", "state"
_SHOWN = 8  # differing leaves or fields that an error lists before it says "and N more"


class _Damaged(CheckpointError):
    """A step whose files are not those that were saved."""


class Checkpoints:
    """The checkpoints of one run in one folder, the newest `keep` of them.

    `config` is the run's config and `data_fingerprint` names the exact data (sources, tokenizer, split): a checkpoint made with
    others is refused. One job at a time may save (hold the run folder's lock); reading beside it is safe.

    Every process of a job calls each method, in one order and with the same arguments; all get the same answer or error.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Any, data_fingerprint: str, keep: int = 2):
        if keep < 1:
            raise ConfigError(f"checkpoints to keep must be at least 1, was given {keep}")
        self.folder = Path(folder).absolute()
        self._config = config_dict(config)
        self._data_fingerprint = data_fingerprint
        self._keep = keep

    def steps(self) -> list[int]:
        """The steps with a checkpoint here, oldest first. Whether each is intact is known once it is read."""
        return distributed.on_first(self._steps)

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def latest(self) -> int | None:
        """The newest step, or None in an empty folder."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any) -> None:
        """Writes `state` (any pytree of arrays); when this returns, the step is on the disk.

        A step that is already here is replaced whole. Afterwards only the newest `keep` remain. What is not a global array is taken from process 0.
        Raises CheckpointError, with the earlier steps untouched, when a later step exists or the disk refuses.
        """
        latest = self.latest()
        if latest is not None and step < latest:
            raise CheckpointError(f"cannot save step {step} in {self.folder}: step {latest} is already there")
        leaves = _leaves(state)
        saving = self.folder / distributed.share(f".saving-{step}.{secrets.token_hex(8)}")
        try:
            distributed.on_first(lambda: self._begin(saving, leaves))
            distributed.on_all(lambda: _orbax_save(saving / _STATE, leaves))
            distributed.on_first(lambda: self._finish(saving, step, leaves))
        except Exception as error:
            raise CheckpointError(distributed.on_first(lambda: self._abandon(saving, step, leaves, error))) from error
        distributed.on_first(self._prune)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, int]:
        """(state, step): the newest good checkpoint, or exactly `step`, as a tree like `abstract_state`.

        `abstract_state` holds arrays or ShapeDtypeStructs. A leaf with a sharding comes back in it, on whatever mesh; one without,
        or of an uncommitted array, comes back uncommitted on the default device, as a fresh `init` would give it.

        A damaged step is renamed to `<step>.damaged` with a warning, and the one before it is tried unless `step` was asked for.
        Raises CheckpointError when no good step is left, or the data fingerprint, a shape, a dtype or the tree differs;
        ConfigError when the config differs. Those are not damage: nothing is renamed.
        """
        found, manifest = distributed.on_first(lambda: self._choose(step))
        return self.load(found, manifest, abstract_state), found

    def _choose(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """The step to restore and its manifest; what is damaged is set aside."""
        steps = self._steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; it has {_list(steps) or 'none'}")
        damaged = []
        for candidate in [step] if step is not None else reversed(steps):
            try:
                manifest = self._manifest(candidate)
                return candidate, {name: said for name, said in manifest.items() if name != "files"}  # the others need not hear of those
            except _Damaged as error:
                damaged.append(self._set_aside(candidate, str(error)))
        raise CheckpointError("; ".join(damaged) or f"no checkpoint in {self.folder}")

    def manifest(self, step: int) -> dict[str, Any]:
        """What step `step` says of itself, after every one of its bytes was verified: config, data_fingerprint, leaves.

        Raises CheckpointError naming the file that is damaged.
        """
        return distributed.on_first(lambda: self._manifest(step))

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            return _verified_manifest(self.folder / str(step), step)
        except _Damaged as error:
            raise _Damaged(f"checkpoint step {step} in {self.folder} is damaged: {error}") from None

    def load(self, step: int, manifest: Mapping[str, Any], abstract_state: Any) -> Any:
        """As `restore` a step whose `manifest` was read a moment ago: its bytes are not hashed again, and nothing is renamed."""
        return distributed.on_all(lambda: self._load(step, manifest, abstract_state))

    def _begin(self, saving: Path, leaves: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        needed, free = self._room(leaves)
        if free < needed:  # orbax, too, would find out, and print pages
            raise OSError(28, "No space left on device")
        # orbax's other processes wait for process 0 to make it: 10 minutes if it failed
        (saving / _STATE / "array_metadatas").mkdir(parents=True)

    def _finish(self, saving: Path, step: int, leaves: Mapping[str, Any]) -> None:
        _orbax_finish(saving / _STATE)
        body = {
            "schema": SCHEMA,
            "step": step,
            "config": self._config,
            "config_digest": digest(self._config),
            "data_fingerprint": self._data_fingerprint,
            "leaves": {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves.items()},
            "files": _flush_and_hash(saving),  # for other machines' shards tensorstore has done the flushing
        }
        write_atomic(saving / _MANIFEST, json.dumps({"sha256": _body_hash(body), "body": body}) + "\n")
        self._publish(saving, step)

    def _publish(self, saving: Path, step: int) -> None:
        """One rename makes the step appear. A step that is being replaced waits under another name until then."""
        final, replaced = self.folder / str(step), self.folder / f".replaced-{step}"
        if final.exists():
            final.rename(replaced)
        saving.rename(final)
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _sweep(self) -> None:
        """Before a save: undoes a replacement that was cut off, and deletes what unfinished saves and removals have left."""
        for path in self.folder.glob(".replaced-*"):
            final = self.folder / path.name.removeprefix(".replaced-")
            if not final.exists():
                path.rename(final)
        for pattern in (".saving-*", ".replaced-*", ".deleting-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        for step in self._steps()[: -self._keep]:
            # Renamed first, so that a reader, or a kill in the middle, never sees half a step under its number.
            doomed = self.folder / f".deleting-{step}"
            (self.folder / str(step)).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _abandon(self, saving: Path, step: int, leaves: Mapping[str, Any], error: Exception) -> str:
        """Removes what a failed save has left; returns the line that says so."""
        shutil.rmtree(saving, ignore_errors=True)
        needed, free = self._room(leaves)
        kept = f"; earlier checkpoints are intact: {_list(self._steps())}" if self._steps() else ""
        return f"cannot save step {step} in {self.folder} ({needed:,} bytes needed, {free:,} free): {_first_line(error)}{kept}"

    def _room(self, leaves: Mapping[str, Any]) -> tuple[int, int]:
        """(bytes that the leaves take, bytes that are free here)"""
        free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
        return sum(leaf.nbytes for leaf in leaves.values()), free

    def _load(self, step: int, manifest: Mapping[str, Any], abstract_state: Any) -> Any:
        where = f"checkpoint step {step} in {self.folder}"
        changed = differences(manifest["config"], self._config)
        if changed:
            raise ConfigError(f"{where} was made with another config: {some(changed, _SHOWN)}")
        if manifest["data_fingerprint"] != self._data_fingerprint:
            raise CheckpointError(
                f"{where} was made with other data: fingerprint was {manifest['data_fingerprint']}, now {self._data_fingerprint}"
            )
        wanted = _leaves(abstract_state)
        unfit = _misfits(manifest["leaves"], wanted)
        if unfit:
            raise CheckpointError(f"{where} does not fit this state: {some(unfit, _SHOWN)}")
        try:
            leaves = _orbax_restore(self.folder / str(step) / _STATE, wanted)
        except Exception as error:
            raise CheckpointError(f"{where} was verified, but orbax cannot read it: {_first_line(error)}") from error
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[path] for path in wanted])

    def _set_aside(self, step: int, why: str) -> str:
        """Renames a damaged step, warns, and returns the line that says so."""
        names = (f"{step}.damaged" + (f".{n}" if n > 1 else "") for n in range(1, 1_000))
        aside = next(self.folder / name for name in names if not (self.folder / name).exists())
        try:
            (self.folder / str(step)).rename(aside)
            line = f"{why}; set aside as {aside.name}"
        except OSError as error:
            line = f"{why}; could not be set aside ({error.strerror})"
        warnings.warn(line, MoeJaxWarning, stacklevel=3)
        return line


def _leaves(tree: Any) -> dict[str, Any]:
    """{path: leaf} in tree order. Raises CheckpointError for a leaf that is not an array, or two leaves of one path."""
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "value"
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise CheckpointError(f"state leaf {path} is {type(leaf).__name__}, not an array: a checkpoint holds arrays")
        if path in leaves:
            raise CheckpointError(f"two leaves of the state are called {path}: a '/' inside a name is ambiguous")
        leaves[path] = leaf
    return leaves


def _misfits(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for every leaf whose presence, shape or dtype differs."""
    lines = [f"{path} is saved and not in the state" for path in saved if path not in wanted]
    for path, leaf in wanted.items():
        shape, dtype = saved.get(path, (None, None))
        if shape is None:
            lines.append(f"{path} is in the state and not saved")
        elif tuple(shape) != tuple(leaf.shape):
            lines.append(f"{path} has shape {tuple(shape)} saved and {tuple(leaf.shape)} in the state")
        elif dtype != str(leaf.dtype):
            lines.append(f"{path} has dtype {dtype} saved and {leaf.dtype} in the state")
    return lines


def _sharding(leaf: Any) -> Any:
    """Where the caller wants a leaf, or None for the default device, uncommitted (committed arrays would retrace a jitted step)."""
    if isinstance(leaf, jax.Array) and not getattr(leaf, "committed", True):
        return None
    return getattr(leaf, "sharding", None)


def _orbax(path: Path) -> tuple[Any, Any, Any]:
    """The library, a handler of trees to be closed, and the path as it wants it."""
    import orbax.checkpoint as ocp  # a quarter of a second, which commands that only read a config need not pay
    from etils import epath

    return ocp, ocp.PyTreeCheckpointHandler(use_compression=False), epath.Path(path)


def _orbax_save(path: Path, leaves: Mapping[str, Any]) -> None:
    """Writes this process's shards into the folder `path`."""
    ocp, handler, path = _orbax(path)
    with closing(handler):
        # Orbax refuses arrays without elements; their shape and dtype in the manifest say all there is.
        handler.save(path, args=ocp.args.PyTreeSave({name: _savable(leaf) for name, leaf in leaves.items() if leaf.size}))


def _savable(leaf: Any) -> Any:
    """The array as orbax takes it: one that each of several processes has for itself as numpy's, from process 0."""
    return np.asarray(leaf) if jax.process_count() > 1 and getattr(leaf, "is_fully_addressable", True) else leaf


def _orbax_finish(path: Path) -> None:
    """Joins what the processes have written to one database."""
    _, handler, path = _orbax(path)
    with closing(handler):
        handler.finalize(path)


def _orbax_restore(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays; of a sharded one, the shards of this process's devices are all that is read."""
    ocp, handler, path = _orbax(path)

    def how(leaf: Any) -> Any:
        sharding = _sharding(leaf)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype)

    arguments = {name: how(leaf) for name, leaf in wanted.items() if leaf.size}
    with closing(handler):
        read = handler.restore(path, args=ocp.args.PyTreeRestore(item=dict.fromkeys(arguments, 0), restore_args=arguments))
    return {name: _placed(read.get(name), leaf) for name, leaf in wanted.items()}


def _placed(value: Any, leaf: Any) -> Any:
    """What orbax read (None for an array without elements) as the kind of array, in the place, that the caller asked for."""
    if value is None:
        value = np.zeros(leaf.shape, leaf.dtype)
    if isinstance(leaf, np.ndarray | np.generic) or isinstance(value, jax.Array):
        return value
    sharding = _sharding(leaf)
    if sharding is not None and not sharding.is_fully_addressable:
        return jax.jit(jnp.array, out_shardings=sharding)(value)  # each process makes its part of what all have read
    value = jnp.array(value)
    return value if sharding is None else jax.device_put(value, sharding)


def _flush_and_hash(folder: Path) -> dict[str, str]:
    """{relative path: sha256} of every file under `folder`, each made durable on the way."""
    hashes = {}
    for parent, _, names in os.walk(folder):
        for path in sorted(Path(parent, name) for name in names):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            hashes[path.relative_to(folder).as_posix()] = sha256_of(path)
        sync_folder(parent)
    return hashes


def _verified_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The body of a step's manifest once it and all its files have the hashes they were saved with; raises _Damaged."""
    try:
        outer = json.loads((folder / _MANIFEST).read_bytes())
        body = outer["body"]
        intact = outer["sha256"] == _body_hash(body)
    except FileNotFoundError:
        raise _Damaged(f"{_MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _Damaged(f"{_MANIFEST} is not the JSON that was saved") from None
    if not intact:
        raise _Damaged(f"{_MANIFEST} does not have the sha256 it was saved with")
    if body["schema"] != SCHEMA:
        raise CheckpointError(f"{folder} was written as {body['schema']!r}, and this code reads {SCHEMA!r}: use the code that wrote it")
    if body["step"] != step:
        raise _Damaged(f"{_MANIFEST} is that of step {body['step']}")
    for name, saved in body["files"].items():
        try:
            found = sha256_of(folder / name)
        except PermissionError as error:
            raise CheckpointError(f"cannot read {folder / name}: {error.strerror}") from error
        except OSError as error:
            raise _Damaged(f"{name} cannot be read ({error.strerror})") from None
        if found != saved:
            raise _Damaged(f"{name} does not have the sha256 it was saved with")
    return body


def _body_hash(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
