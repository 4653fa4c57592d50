"""Lanes: runs of one structure side by side, each in a thread and on a device of its own, through one compiled program and with the numbers it has alone.

The program is compiled once, for the device of the lane that needs it first, and its machine code is loaded on the other devices: every lane runs the very
instructions that a run by itself does, so the numbers are equal to the last bit. (One program over all devices, by shard_map over an axis of lanes, is compiled
by other passes: on XLA:CPU its first updates are off by a last bit in places, and it makes every lane wait for the slowest.) No lane waits for another one.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from moe_jax.errors import ConfigError, MoeJaxWarning, Stopped, Unsupported
from moe_jax.train.program import Program


class Lanes:
    """Room for `count` runs at a time of the structure that `program` was made for. With fewer devices than lanes, several lanes share each.

    Raises ConfigError for a count below 1, Unsupported for a program on a mesh and for several processes.
    """

    def __init__(self, program: Program, count: int):
        if count < 1:
            raise ConfigError(f"the number of lanes must be at least 1, got {count}")
        if jax.process_count() > 1:
            raise Unsupported(
                f"{count} lanes in a job of {jax.process_count()} processes: lanes are of one process; start one, or take 1 lane"
            )
        if program.model.mesh is not None:
            raise Unsupported(f"{count} lanes of a model on a mesh: lanes do not combine with other mesh axes yet; take 1 lane, or no mesh")
        self.program, self.count = program, count
        devices = jax.local_devices()
        self._devices = [devices[lane % len(devices)] for lane in range(count)]
        self._lock = threading.RLock()  # held while something is traced, compiled or loaded
        self._code: dict[Hashable, tuple | Exception] = {}  # function and shapes -> machine code, or why there is none
        self._loaded: dict[Hashable, Callable] = {}  # and device -> the function there
        self._halted = False

    def run(self, jobs: Sequence[Callable[[Program], Any]]) -> list[BaseException | None]:
        """Calls jobs[i] with the program of lane i, all at the same time; when all have ended, for each the error that it raised, or None.

        An exception that reaches the waiting thread (a second Ctrl-C) ends every job at its next update with Stopped, and is raised then.
        """
        if len(jobs) > self.count:
            raise ConfigError(f"{len(jobs)} runs at a time need as many lanes; there are {self.count}")
        errors: list[BaseException | None] = [None] * len(jobs)
        started: list[tuple[threading.Thread, threading.Event]] = []  # the event is set when the job has ended. Thread.join is of no use:
        self._halted = False  # in Python 3.11, one that a signal's exception ends takes a thread that still runs for an ended one

        def work(lane: int, ended: threading.Event) -> None:
            try:
                jobs[lane](_Lane(self, self._devices[lane]))
            except BaseException as error:
                errors[lane] = error
            finally:
                ended.set()

        try:
            for lane in range(len(jobs)):
                ended = threading.Event()
                thread = threading.Thread(target=work, args=(lane, ended), name=f"lane {lane}", daemon=True)
                started.append((thread, ended))
                thread.start()
            for _, ended in started:
                while not ended.wait(0.2):  # python handles signals in this thread, and wakes it for none that the system gave to another
                    pass
        except BaseException:
            self._halted = True
            for thread, ended in started:
                while not ended.wait(0.2) and thread.ident is not None:  # the exception may have come before it was started
                    pass
            raise
        return errors

    def init(self, device: Any, seed: jax.Array) -> Any:
        """A new state on the device."""
        with self._lock:  # two threads would compile it twice
            state = self.program.init(seed)
        return jax.device_put(state, device)

    def call(self, name: str, device: Any, *arguments: Any) -> Any:
        """What the program's function `name` gives on the device."""
        if self._halted:
            raise Stopped("stopped at once; the same command goes on from the last checkpoints")
        leaves, tree = jax.tree.flatten(arguments[1:])  # a structure has one kind of state and parameters
        what = (name, tree, *((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves))
        if (what, device) not in self._loaded:
            with self._lock:
                if (what, device) not in self._loaded:
                    self._loaded[what, device] = self._load(what, device, arguments)
        return self._loaded[what, device](*arguments)

    def _load(self, what: tuple, device: Any, arguments: tuple) -> Callable:
        function = getattr(self.program, "evaluate_step" if what[0] == "evaluate" else what[0])
        code = self._code.get(what)
        if isinstance(code, tuple):
            try:
                return _onto(device, *code)
            except Exception as error:
                self._code[what] = code = error
        if isinstance(code, Exception):  # another jax, or a backend that cannot; the numbers are the same
            text = f"{what[0]} is compiled again for {device}, onto which its machine code could not be copied: {str(code)[:200]}"
            warnings.warn(text, MoeJaxWarning, stacklevel=2)
        lowered = function.lower(*arguments)
        if code is not None or len(set(self._devices)) == 1:
            return lowered.compile()
        with _no_cache():
            compiled = lowered.compile()
        try:
            self._code[what] = serialize_executable.serialize(compiled)  # on a CPU, what has run cannot be serialised any more
        except Exception as error:
            self._code[what] = error
        return compiled


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Without jax's compilation cache on disk: on a CPU, what was read from there and is serialised again lacks functions when it runs."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it asks the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _onto(device: Any, code: bytes, inputs: Any, outputs: Any) -> Callable:
    """Serialised machine code, loaded on a device: what jax's deserialize_and_load does, which keeps to the device of the compilation.

    The bytes never leave this process. What is used of jax's inside is looked up here, where a jax without it is an error that the caller expects.
    """
    from jaxlib import xla_client

    class Moved(serialize_executable._JaxPjrtUnpickler):
        def persistent_load(self, pid):
            if pid[0] == "device":  # in shardings
                return device
            if pid[0] != "exec":
                return super().persistent_load(pid)
            options = xla_client.CompileOptions()
            options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))
            return device.client.deserialize_executable(pid[1], executable_devices=self.execution_devices, compile_options=options)

    unloaded, arguments, no_keywords = Moved(io.BytesIO(code), device.client, [device]).load()
    return jax.stages.Compiled(unloaded.load(), [], inputs.unflatten(arguments), outputs, no_kwargs=no_keywords)


class _Lane(Program):
    """Program's interface on one device, with the compiled functions that all lanes share."""

    def __init__(self, lanes: Lanes, device: Any):
        vars(self).update(vars(lanes.program))
        self._device = device
        self.init = lambda seed: lanes.init(device, seed)
        self.train = lambda *arguments: lanes.call("train", device, *arguments)
        self.evaluate_step = lambda *arguments: lanes.call("evaluate", device, *arguments)

    def put(self, params: dict[str, Any]) -> dict[str, Any]:
        return jax.device_put(params, self._device)
