"""Runs a command as one job of several processes on this machine, which find each other over loopback.

  python -m launch.local --processes=2 -- python -m launch.train --preset=tiny --steps=100 --workdir=runs/two
  python -m launch.local --processes=2 --devices_per_process=4 --max_restarts=3 -- python -m launch.train …

Process 0 is shown as if it ran alone. The others' stderr is shown with their number in front, and their stdout with --verbose, or its
last lines when one fails. When one dies, the others are ended; with --max_restarts the whole job starts again, and the command itself
goes on from its last checkpoint. SIGTERM, SIGUSR1 and Ctrl-C are handed to every process. No process outlives this one.

Exit codes: 0 when all end with 0, 75 when they stopped and can be resumed, else that of the process which failed first (128 + signal).
The codes 2, 3 and 4 (usage, data, checkpoint) are not restarted: they would come again.
"""

import collections
import contextlib
import ctypes
import dataclasses
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any

from absl import flags

from launch.common import run, tell
from moe_jax.errors import ConfigError

_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes.", lower_bound=1, required=True)
_DEVICES = flags.DEFINE_integer(
    "devices_per_process", None, "CPU devices of each process; none leaves JAX_PLATFORMS and XLA_FLAGS as they are.", lower_bound=1
)
_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 0, "How often the whole job is started again after one of its processes died.", lower_bound=0
)
_GRACE = flags.DEFINE_float("grace", 10.0, "Seconds between SIGTERM and SIGKILL for the processes left when one has died.", lower_bound=0.0)
_VERBOSE = flags.DEFINE_boolean("verbose", False, "Show the stdout of every process, not only of process 0.")

RESUMABLE = 75
FINAL = (2, 3, 4)  # usage, data, checkpoint: the same command would meet them again
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_NOISE = re.compile(rb"\[Gloo\] Rank|is connected to \d+ peer ranks")  # gloo greets on stdout, from several threads at once


def main(argv: list[str]) -> int:
    """Runs the job, and again while restarts are left; gives the exit code."""
    command = argv[1:]
    if not command:
        raise ConfigError("no command: write it after --, as in launch.local --processes=2 -- python -m launch.train …")
    if command[0] in ("python", "python3"):
        command[0] = sys.executable  # which has what launch.local has; the shell's python is another one where no environment is active
    for attempt in range(_RESTARTS.value + 1):
        if attempt:
            _say(f"restart {attempt} of {_RESTARTS.value}")
        job = Job(command, _PROCESSES.value, _DEVICES.value)
        code = job.wait()
        if code in (0, RESUMABLE, *FINAL) or job.asked_to_stop:
            break
    return code


def environment(base: Mapping[str, str], index: int, count: int, port: int, devices: int | None) -> dict[str, str]:
    """What process `index` of `count` is told: where to meet, its CPU devices if asked for, its share of the GPUs if they are listed."""
    own = dict(base, MOE_JAX_COORDINATOR=f"127.0.0.1:{port}", MOE_JAX_NUM_PROCESSES=str(count), MOE_JAX_PROCESS_ID=str(index))
    own.update(JAX_COORDINATOR_BIND_ADDRESS=f"127.0.0.1:{port}", PYTHONUNBUFFERED="1")
    if devices:
        own["XLA_FLAGS"] = f"{base.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
        own.setdefault("JAX_PLATFORMS", "cpu")
    gpus = [name for name in base.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if len(gpus) >= count:
        share = len(gpus) // count
        own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * share : (index + 1) * share])
    return own


def free_port() -> int:
    """A port of loopback that nobody uses, below those that the system hands out: one of these may be taken before process 0 has it."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port between 20000 and 32000")


def shell_code(code: int) -> int:
    """What a shell would show: 128 + the signal for a process that died of one."""
    return code if code >= 0 else 128 - code


# --- one start of the job -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Process:
    """A started process, how it ended, and the last lines it wrote that were not shown."""

    index: int
    popen: subprocess.Popen[Any]
    code: int | None = None
    unseen: collections.deque[bytes] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=20))


class Job:
    """`count` processes of one command; `wait()` shows their output, ends all when one dies, and gives the job's exit code."""

    def __init__(self, command: Sequence[str], count: int, devices: int | None) -> None:
        self.asked_to_stop = 0  # the last signal that was handed on
        self._failed: Process | None = None
        self._kill_at = float("inf")
        self._began, port = time.monotonic(), free_port()
        self._streams = selectors.DefaultSelector()
        self._unfinished: dict[int, bytes] = collections.defaultdict(bytes)  # of each stream, the line that has no end yet
        self._processes: list[Process] = []
        for number in _SIGNALS:
            signal.signal(number, self._hand_on)
        for index in range(count):
            self._start(command, index, environment(os.environ, index, count, port, devices))
        if self.asked_to_stop:
            self._signal(self.asked_to_stop)
        pids = ", ".join(str(process.popen.pid) for process in self._processes)
        _say(f"started {count} processes that meet at 127.0.0.1:{port} (pid {pids})")

    def wait(self) -> int:
        """0, 75, or the exit code of the process that failed first."""
        try:
            while any(process.code is None for process in self._processes):
                for key, _ in self._streams.select(timeout=0.1):
                    self._read(key)
                self._look()
            self._drain(self._processes)
        finally:
            self._signal(signal.SIGKILL)
        if self._failed:
            return shell_code(self._failed.code or 0)
        return RESUMABLE if any(process.code for process in self._processes) else 0

    def _start(self, command: Sequence[str], index: int, env: dict[str, str]) -> None:
        stderr = subprocess.PIPE if index else None  # process 0 keeps the terminal, for its progress line
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": stderr}
        try:  # each in its own session: a terminal's Ctrl-C comes through here, once
            popen = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_die_with(os.getpid()), **pipes)
        except OSError as error:
            self._signal(signal.SIGKILL)
            raise ConfigError(f"cannot start {command[0]}: {error.strerror}") from None
        process = Process(index, popen)
        self._processes.append(process)
        for stream, target in ((popen.stdout, sys.stdout), (popen.stderr, sys.stderr)):
            if stream:
                os.set_blocking(stream.fileno(), False)
                self._streams.register(stream, selectors.EVENT_READ, (process, target))

    def _look(self) -> None:
        """Notes who has ended; the first failure ends the others."""
        ended = [process for process in self._processes if process.code is None and process.popen.poll() is not None]
        for process in ended:
            process.code = process.popen.returncode
        well = (0, RESUMABLE, -self.asked_to_stop)
        # a process that jax aborted because another one died is not the one to blame
        failed = sorted((p for p in ended if p.code not in well), key=lambda p: (p.code == -signal.SIGABRT, p.index))
        if failed and not self._failed:
            self._blame(failed[0])
            self._signal(signal.SIGTERM)
            self._kill_at = time.monotonic() + _GRACE.value
        if time.monotonic() > self._kill_at:
            self._signal(signal.SIGKILL)

    def _blame(self, process: Process) -> None:
        self._drain([process])
        self._failed = process
        for line in process.unseen if process.index and not _VERBOSE.value else ():
            _write(sys.stderr, process, line)
        code, seconds = process.code or 0, time.monotonic() - self._began
        how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        left = sum(other.code is None for other in self._processes)
        _say(f"process {process.index} {how} after {seconds:.1f} s" + (f"; ending the other {left}" if left else ""))

    def _drain(self, processes: Sequence[Process]) -> None:
        for key in list(self._streams.get_map().values()):
            while key.data[0] in processes and self._read(key):
                pass

    def _read(self, key: selectors.SelectorKey) -> bool:
        """Shows the whole lines that a process has written; false when there is nothing to read."""
        try:
            chunk = os.read(key.fd, 1 << 16)
        except BlockingIOError:
            return False
        *lines, self._unfinished[key.fd] = (self._unfinished[key.fd] + chunk).split(b"\n")
        if not chunk:
            self._streams.unregister(key.fileobj)
            lines = [line for line in [self._unfinished.pop(key.fd)] if line]
        process, target = key.data
        for line in lines:
            self._show(process, target, line + b"\n")
        return bool(chunk)

    def _show(self, process: Process, target: IO[str], line: bytes) -> None:
        wanted = process.index == 0 or _VERBOSE.value or (target is sys.stderr and not self._failed)
        if wanted and not _NOISE.search(line):
            _write(target, process, line)
        else:
            process.unseen.append(line)

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        self.asked_to_stop = number
        self._signal(number)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.popen.poll() is None:
                os.killpg(process.popen.pid, number)


def _die_with(parent: int) -> Any:
    """For the child: the kernel kills it when launch.local is gone, however that went (Linux; elsewhere only an orderly end is covered)."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl is not None:
            prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    return prepare


def _write(target: Any, process: Process, line: bytes) -> None:
    target.buffer.write(b"[%d] %s" % (process.index, line) if process.index else line)
    target.flush()


def _say(text: str) -> None:
    tell(f"launch.local: {text}")


if __name__ == "__main__":
    run(main, positional=True, resumable=True)
