"""One run's folder: held by one process, or one job of several, at a time, and saying what ran (config, versions, commit, command).

RUN/lock              who holds the folder; held through flock, so the kernel frees it when that process dies
RUN/config.json       the resolved config, which a resume must match
RUN/versions.json     python, packages, machine, device and commit of the last launch, and of earlier ones that differed
RUN/command.txt       one line per launch

Of several processes, process 0 holds the lock and writes; what it meets is raised in all.
"""

import datetime
import fcntl
import functools
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
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from moe_jax import distributed
from moe_jax.config_tools import config_dict, differences
from moe_jax.errors import ConfigError
from moe_jax.files import read_object, write_atomic

SCHEMA = "moe_jax.run_folder/1"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy", "scipy")
HEARTBEAT_SECONDS = 15.0  # a holder touches its lock this often,
SILENCE_SECONDS = 60.0  # and a lock of another machine that was not touched for this long belongs to a dead process
_SHOWN_DIFFERENCES = 20


def some(items: Sequence[str], shown: int, separator: str = "; ") -> str:
    """The first `shown` items for an error message, and how many more there are."""
    more = [f"and {len(items) - shown} more"] if len(items) > shown else []
    return separator.join([*items[:shown], *more])


class Closing:
    """A class with a `close()`, for use in a `with`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()  # type: ignore[attr-defined]


class RunLock:
    """An exclusive lock on a file, taken on construction and freed by `close()` or by the death of the process.

    flock decides among processes under one kernel, containers included: whoever gets it is alone, so the lock of a dead process is
    taken over, whether its pid is free or was given to another process. Some network file systems keep flock to one machine, so a
    lock whose text names another machine counts as held until nobody has touched it for SILENCE_SECONDS.

    Raises ConfigError with the holder's pid, host and start.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = open(self.path, "a+b", buffering=0)
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        _held.add(self._file)
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="run folder heartbeat", daemon=True).start()

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)  # a holder that has only just got the lock needs a moment to write its name
            raise ConfigError(self._refusal(self._holder())) from None
        except OSError as error:
            raise ConfigError(f"cannot lock {self.path} ({error.strerror}): choose a folder whose file system has flock") from error
        holder = self._holder()
        silent = max(time.time() - os.fstat(self._file.fileno()).st_mtime, 0.0)
        if holder and holder.get("boot_id") != _boot_id() and silent < SILENCE_SECONDS:
            raise ConfigError(
                f"{self._refusal(holder)}, and gave a sign of life {silent:.0f} s ago; "
                f"if it is dead, wait {SILENCE_SECONDS - silent:.0f} s or delete {self.path}"
            )
        self._rewrite(json.dumps(_identity()) + "\n")

    def _refusal(self, holder: dict[str, Any]) -> str:
        if not holder:
            return f"{self.path.parent} is in use by a process that has not written its name to {self.path.name}"
        return f"{self.path.parent} is in use by pid {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"

    def _holder(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read(4096))
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _rewrite(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text.encode())

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with suppress(OSError, ValueError):  # a file system that is away for a moment must not end a run: the lock itself is flock's
                os.utime(self._file.fileno())

    def close(self) -> None:
        """Frees the lock. The file stays: deleting it would let two later processes lock two different files of one name."""
        if not self._file.closed:
            self._closed.set()
            self._rewrite("")
            self._file.close()


def _drop_inherited_locks() -> None:
    # A forked child shares its parent's flock and would keep it past the parent's death; closing the child's copy does not free it.
    for file in list(_held):
        file.close()


_held: "weakref.WeakSet[Any]" = weakref.WeakSet()  # the open lock files
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


# --- what ran -----------------------------------------------------------------------------------------------------------------


def versions(device: str | None = None) -> dict[str, Any]:
    """What a result may depend on besides the config: python, packages, machine, `device` (the caller's words) and commit."""
    packages: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **packages, "platform": platform.platform(), "device": device, **commit()}


def commit() -> dict[str, Any]:
    """`commit` and `dirty` (tracked files changed) of the checkout this code runs from; both None outside of one."""
    root = Path(__file__).resolve().parents[2]
    nothing: dict[str, Any] = {"commit": None, "dirty": None}
    if not (root / ".git").exists():
        return nothing
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # `status` must not write to a checkout that is only being read
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return nothing
    head = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), "(initial)")
    return nothing if head == "(initial)" else {"commit": head, "dirty": any(not line.startswith("#") for line in lines)}


class RunFolder(Closing):
    """A run's folder, created and locked on construction; close it, or use it in a `with`, to free the lock.

    Every process of a job calls each method but `close` alike. Raises ConfigError, in all, when the path cannot be a folder, another process or job
    holds it, or a newer version of this code wrote it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self._lock = Path(path).absolute(), None
        distributed.on_first(self._take)

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            schema = (self._read("versions.json") or {}).get("schema", SCHEMA)
            if schema != SCHEMA:
                raise ConfigError(f"{self.path} was written as {schema!r}, and this code reads {SCHEMA!r}: use the code that wrote it")
            self._lock = RunLock(self.path / "lock")
        except OSError as error:
            raise ConfigError(f"cannot use {self.path} as a run folder: {error.strerror}") from error

    def close(self) -> None:
        """Frees the lock; the files stay."""
        if self._lock is not None:
            self._lock.close()

    def config(self) -> dict[str, Any] | None:
        """The config in config.json, or None in a folder that has none yet."""
        return distributed.on_first(lambda: self._read("config.json"))

    def check_config(self, new: Any) -> None:
        """Raises ConfigError listing every field in which `new` differs from config.json (a folder without one accepts any config), or in which the
        processes of one job differ."""
        distributed.on_all(functools.partial(_check_alike, distributed.share(config_dict(new)), new))
        old = self.config()
        changed = [] if old is None else differences(old, new)
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another config ({len(changed)} fields differ): "
                f"{some(changed, _SHOWN_DIFFERENCES)}. Use its settings, or another folder"
            )

    def start(self, config: Any, command: Sequence[str], device: str | None = None) -> list[str]:
        """Checks `config` against the folder, then writes config.json, versions.json and a line of command.txt.

        Returns what changed since the last launch ('jax: was "0.10.2", now "0.12.0"'; empty the first time, and in all processes but 0): under other
        versions a resumed run need not give the same bits. Raises ConfigError as `check_config` does, and when the folder cannot be written.
        """
        self.check_config(config)
        changed = distributed.on_first(lambda: self._start(config, command, device))
        return changed if distributed.first() else []

    def _start(self, config: Any, command: Sequence[str], device: str | None) -> list[str]:
        try:
            if self._read("config.json") is None:
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
        try:
            return read_object(self.path / name, ConfigError)
        except ConfigError as error:
            raise ConfigError(f"{error}; restore it, or use another folder") from None


def _check_alike(of_first: dict[str, Any], config: Any) -> None:
    if unlike := differences(of_first, config):
        raise ConfigError(f"this process was started with other settings than process 0: {some(unlike, _SHOWN_DIFFERENCES)}")
