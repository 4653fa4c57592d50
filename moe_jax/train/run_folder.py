"""One run's folder: held by one process at a time, and saying what ran (config, versions, commit, command).

RUN/lock              who holds the folder; held through flock, so the kernel frees it when that process dies
RUN/config.json       the resolved config, which a resume must match
RUN/versions.json     python, packages, machine, device and commit of the last launch, and of earlier ones that differed
RUN/command.txt       one line per launch
"""

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.config_tools import config_dict, differences
from moe_jax.errors import ConfigError

SCHEMA = "moe_jax.run_folder/1"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy", "scipy")
HEARTBEAT_SECONDS = 15.0  # a holder touches its lock this often,
SILENCE_SECONDS = 60.0  # and a lock of another machine that was not touched for this long belongs to a dead process
_SHOWN_DIFFERENCES = 20


# --- files --------------------------------------------------------------------------------------------------------------------


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file by `text`; a reader, or a crash at any moment, finds the old or the new content and nothing between."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Makes the names in a folder durable: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the lock -----------------------------------------------------------------------------------------------------------------


class RunLock:
    """An exclusive lock on a file, taken on construction and freed by `close()` or by the death of the process.

    flock decides among processes under one kernel, containers included: whoever gets it is alone, so the lock of a dead process is
    taken over, whether its pid is free or was given to another process. Some network file systems keep flock to one machine, so a
    lock whose text names another machine counts as held until nobody has touched it for SILENCE_SECONDS.

    Raises ConfigError with the holder's pid, host and start.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise
        _held.add(self)
        self._closed = threading.Event()
        threading.Thread(target=self._beat, args=(self._descriptor,), name="run folder heartbeat", daemon=True).start()

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)  # a holder that has only just got the lock needs a moment to write its name
            raise ConfigError(self._refusal(_read_holder(descriptor))) from None
        except OSError as error:
            raise ConfigError(f"cannot lock {self.path} ({error.strerror}): choose a folder whose file system has flock") from error
        holder = _read_holder(descriptor)
        silent = max(time.time() - os.fstat(descriptor).st_mtime, 0.0)
        if holder and holder.get("boot_id") != _boot_id() and silent < SILENCE_SECONDS:
            raise ConfigError(
                f"{self._refusal(holder)}, and gave a sign of life {silent:.0f} s ago; "
                f"if it is dead, wait {SILENCE_SECONDS - silent:.0f} s or delete {self.path}"
            )
        _rewrite(descriptor, json.dumps(_identity()) + "\n")

    def _refusal(self, holder: dict[str, Any]) -> str:
        if not holder:
            return f"{self.path.parent} is in use by a process that has not written its name to {self.path.name}"
        return f"{self.path.parent} is in use by pid {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"

    def _beat(self, descriptor: int) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(descriptor)
            except OSError:
                pass  # a file system that is away for a moment must not end a run: the lock itself is flock's

    def close(self) -> None:
        """Frees the lock. The file stays: deleting it would let two later processes lock two different files of one name."""
        if self._descriptor is not None:
            self._closed.set()
            _rewrite(self._descriptor, "")
            self._abandon()

    def _abandon(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _drop_inherited_locks() -> None:
    # A forked child shares its parent's flock and would keep it past the parent's death; closing the child's copy does not free it.
    for lock in list(_held):
        lock._abandon()


_held: "weakref.WeakSet[RunLock]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_drop_inherited_locks)


def _identity() -> dict[str, Any]:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "boot_id": _boot_id()}


def _boot_id() -> str:
    """Names one running kernel: equal in all containers of a machine, new after a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _rewrite(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


# --- what ran -----------------------------------------------------------------------------------------------------------------


def versions(device: str | None = None) -> dict[str, Any]:
    """What a result may depend on besides the config: python, packages, machine, `device` (the caller's words) and commit."""
    packages = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages, "platform": platform.platform(), "device": device, **commit()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """`commit` and `dirty` (tracked files changed) of the checkout this code runs from; both None outside of one."""
    root = Path(__file__).resolve().parents[2]
    nothing: dict[str, Any] = {"commit": None, "dirty": None}
    if not (root / ".git").exists():
        return nothing
    head, status = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return nothing if head is None else {"commit": head, "dirty": None if status is None else bool(status)}


def _git(root: Path, *arguments: str) -> str | None:
    # GIT_OPTIONAL_LOCKS: `status` must not write to a checkout that is only being read.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- the folder ---------------------------------------------------------------------------------------------------------------


class RunFolder:
    """A run's folder, created and locked on construction; close it, or use it in a `with`, to free the lock.

    Raises ConfigError when the path cannot be a folder, another process holds it, or a newer version of this code wrote it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.path / "lock")
        except OSError as error:
            raise ConfigError(f"cannot use {self.path} as a run folder: {error.strerror}") from error
        try:
            schema = (self._read("versions.json") or {}).get("schema", SCHEMA)
            if schema != SCHEMA:
                raise ConfigError(f"{self.path} was written as {schema!r}, and this code reads {SCHEMA!r}: use the code that wrote it")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the lock; the files stay."""
        self._lock.close()

    def config(self) -> dict[str, Any] | None:
        """The config in config.json, or None in a folder that has none yet."""
        return self._read("config.json")

    def check_config(self, new: Any) -> None:
        """Raises ConfigError listing every field in which `new` differs from config.json; a folder without one accepts any config."""
        old = self.config()
        changed = [] if old is None else differences(old, new)
        if changed:
            more = f"; and {len(changed) - _SHOWN_DIFFERENCES} more" if len(changed) > _SHOWN_DIFFERENCES else ""
            raise ConfigError(
                f"{self.path} holds a run with another config ({len(changed)} fields differ): "
                f"{'; '.join(changed[:_SHOWN_DIFFERENCES])}{more}. Use its settings, or another folder"
            )

    def start(self, config: Any, command: Sequence[str], device: str | None = None) -> list[str]:
        """Checks `config` against the folder, then writes config.json, versions.json and a line of command.txt.

        Returns what changed since the last launch ('jax: was "0.10.2", now "0.12.0"'; empty the first time): under other versions a
        resumed run need not give the same bits. Raises ConfigError as `check_config` does, and when the folder cannot be written.
        """
        self.check_config(config)
        try:
            if self.config() is None:
                self._write("config.json", config_dict(config))
            changed = self._write_versions(versions(device))
            with open(self.path / "command.txt", "a", encoding="utf-8") as file:
                file.write(f"{_identity()['since']}  {shlex.join(command)}\n")
        except OSError as error:
            raise ConfigError(f"cannot write to the run folder {self.path}: {error.strerror}") from error
        return changed

    def _write_versions(self, now: dict[str, Any]) -> list[str]:
        last = self._read("versions.json") or {}
        earlier = last.pop("earlier", [])
        last.pop("schema", None)
        changed = differences(last, now) if last else []
        if not last or changed:
            self._write("versions.json", {"schema": SCHEMA, **now, "earlier": earlier + ([last] if changed else [])})
        return changed

    def _write(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}; restore it, or use another folder") from error
        if not isinstance(value, dict):
            raise ConfigError(f"cannot read {path}: it holds {type(value).__name__}, not the object this code writes")
        return value
