"""What every command shares: `run(main)` turns errors into one line and an exit code, `--help` into a manual, signals into a clean stop.

A command is a module whose docstring is its manual, absl flags, `def main(argv)`, and at the end
`if __name__ == "__main__": run(main)`.
"""

import errno
import inspect
import math
import os
import re
import select
import shutil
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

from absl import app, flags

from moe_jax.config_tools import apply_overrides as apply_overrides
from moe_jax.errors import ConfigError, MoeJaxError, MoeJaxWarning, Stopped, closest, nearest

_HELP = ("--help", "-help", "--h", "-h", "--?", "-?", "--helpshort")
# what a disk, or who rules it, refuses, and would again; not what may pass (EIO, ESTALE, EMFILE): after those a job is started again
_DISK = "EACCES EDQUOT EFBIG EISDIR ENAMETOOLONG ENOSPC ENOTDIR EPERM EROFS".split()
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm warns by whichever the job asked for, often SIGUSR1


def run(main: Callable[[list[str]], int | None], positional: bool = False, resumable: bool = False) -> None:
    """Parses the flags, calls `main(argv)` and exits: 0, the error's own code after one line on stderr (2 where memory runs out or a disk refuses),
    141 without a word when nobody reads what it prints any more, or 1 after a traceback.

    `argv` is the program's name, and the arguments that are no flags when the command takes any (`positional`); else those are
    refused. SIGTERM, SIGUSR1 and Ctrl-C exit with 75 where a command is `resumable`, which means: the same command goes on from the last
    checkpoint. One that has none exits with 128 + the signal's number, and begins anew.
    """
    warnings.formatwarning = _one_line_warning
    try:
        app.run(
            lambda argv: _exit_code(main, argv, _stop_now if resumable else _end_now), flags_parser=lambda argv: _parse(argv, positional)
        )
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        sys.exit(128 + signal.SIGPIPE)


def define_set() -> flags.FlagHolder[Any]:
    """The flag --set of a command that has a config; its value goes to `apply_overrides(config, holder.value)`."""
    text = "Sets one field of the config by its dotted name, as in --set model.num_layers=4; an unknown name is refused, with those that there are."
    return flags.DEFINE_multi_string("set", [], text)


class Hosts:
    """Defines --coordinator, --num_processes, --process_id and --connect_timeout; main calls `start()`, which joins the job, first of all."""

    def __init__(self) -> None:
        where = "host:port of process 0, for a job of several processes. launch.local, SLURM, GKE and TPU pods announce it by themselves."
        self._coordinator = flags.DEFINE_string("coordinator", None, where)
        self._count = flags.DEFINE_integer(
            "num_processes", None, "How many processes the job has; refused when it is not what a scheduler says."
        )
        self._index = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0. Process 0 talks and writes.")
        patience = "Seconds that processes wait for each other at the start; more where hosts start minutes apart."
        self._timeout = flags.DEFINE_float("connect_timeout", 20.0, patience, lower_bound=1.0)

    def start(self) -> Any:
        """Joins the job; gives moe_jax.distributed.Found, which process 0 of several prints on stderr."""
        from moe_jax import distributed

        found = distributed.initialize(self._coordinator.value, self._count.value, self._index.value, self._timeout.value)
        if found.count > 1 and found.index == 0:
            tell(str(found))
        return found


class MeshFlag:
    """Defines --mesh, for a command that runs a model on many devices; `build()` gives the mesh that it names, once the devices are known."""

    def __init__(self) -> None:
        text = "How devices are divided, e.g. data=2,expert=4 (data, fsdp, expert, tensor). Default: one device; data over all of several processes."
        self._text = flags.DEFINE_string("mesh", "", text)

    @property
    def given(self) -> bool:
        return bool(self._text.value)

    def check(self) -> Any:
        """The MeshSpec, or None; looks for no devices. Raises ConfigError for what is none."""
        from moe_jax.mesh import MeshSpec

        return MeshSpec.parse(self._text.value) if self.given else None

    def build(self) -> Any:
        """The Mesh, or None for one device. Raises ConfigError when it does not have the number of devices that there are."""
        import jax

        from moe_jax.mesh import MeshSpec

        if spec := self.check():
            return spec.build()
        return MeshSpec(data=jax.device_count()).build() if jax.process_count() > 1 else None


# --- errors and exit codes ----------------------------------------------------------------------------------------------------


def _exit_code(main: Callable[[list[str]], int | None], argv: list[str], at_signal: Callable[[int, FrameType | None], None]) -> int | None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, at_signal)
    try:
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            at_signal(signal.SIGINT, None)
    except MoeJaxError as error:
        _say("stopped" if isinstance(error, Stopped | _Ended) else "error", str(error))
        return _leave(error.exit_code)
    except Exception as error:
        if _out_of_memory(error):
            why = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            _say(
                "error", f"not enough memory ({why}); a smaller batch, --set model.remat=full, or a mesh of more devices needs less on each"
            )
            return _leave(ConfigError.exit_code)
        if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _DISK:
            _say("error", f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))
            return _leave(ConfigError.exit_code)
        if _process() is None:
            raise
        traceback.print_exc()
        return _leave(1)


def _out_of_memory(error: Exception) -> bool:
    """Whether the machine's or the device's memory ran out; jax has no class of its own for the latter."""
    text = str(error).lower()
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or of_jax and ("out of memory" in text or "resource_exhausted" in text)


def _nobody_reads() -> bool:
    """Whether what reads the standard output has gone, as `head` has after its lines; if so, the rest goes nowhere, and no error at exit says so."""
    output = select.poll()
    output.register(sys.stdout, 0)  # errors alone
    gone = bool(output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def tell(line: str) -> None:
    """Writes a line to stderr in one piece. print() writes its end by itself, and another process of the job may write to the same terminal in between."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _stop_now(number: int, _: FrameType | None) -> None:
    raise Stopped(f"{signal.Signals(number).name}; the same command goes on from the last checkpoint")


class _Ended(MoeJaxError):
    """A signal's end of a command that keeps nothing to go on from."""


def _end_now(number: int, _: FrameType | None) -> None:
    error = _Ended(f"{signal.Signals(number).name}; the same command begins anew")
    error.exit_code = 128 + number
    raise error


def _say(kind: str, message: str) -> None:
    sys.stdout.flush()
    index = _process()
    who = "" if index is None else f" (process {index})"
    tell(f"{kind}{who}: {message}")


def _process() -> int | None:
    """Which process of several this is; None when alone."""
    distributed = sys.modules.get("moe_jax.distributed")  # only a command that joined a job has it
    _, index, count = distributed._job() if distributed else (None, 0, 1)
    return index if count > 1 else None


def _leave(code: int) -> int:
    """The exit code when all processes end together; else this one ends at once, and the others notice.

    jax's orderly way out waits for every process: one that failed by itself would wait for those that wait for it.
    """
    if _process() is not None:
        from moe_jax import distributed

        try:
            distributed._job()[0].wait_at_barrier("leaving", 5_000)
        except RuntimeError:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def listed(items: Iterable[str]) -> str:
    """'a, b and c'."""
    items = list(items)
    return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)


_default_format = warnings.formatwarning


def _one_line_warning(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    if issubclass(category, MoeJaxWarning):
        return f"warning: {message}\n"
    return _default_format(message, category, filename, lineno, line)


class StopRequests:
    """In a `with` block the first SIGTERM, SIGUSR1 or Ctrl-C only takes note, so that a loop can save and stop between two steps.

    Calling the object gives the signal's name, or "" while nobody asked. A second signal raises Stopped at once.
    """

    def __init__(self) -> None:
        self._reason = ""
        self._before: dict[int, Any] = {}

    def __call__(self) -> str:
        return self._reason

    def __enter__(self) -> "StopRequests":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._reason:
            _stop_now(number, frame)
        self._reason = signal.Signals(number).name
        # os.write: print may be what the signal interrupted, and it must not be entered twice.
        os.write(2, f"\n{self._reason}: stopping after this step; once more stops at once\n".encode())


# --- flags --------------------------------------------------------------------------------------------------------------------


_PYTHONS_WORDS = {
    "invalid literal for int() with base 10:": "needs a whole number, was given",
    "could not convert string to float:": "needs a number, was given",
}


def _parse(argv: Sequence[str], positional: bool) -> list[str]:
    ours = list(argv[1 : argv.index("--")] if "--" in argv else argv[1:])
    if any(argument in _HELP for argument in ours):
        print(manual(), flush=True)
        sys.exit(0)
    try:
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1 and not positional:
            raise ConfigError(_stray(rest[1]))
        _check_finite()
    except (flags.Error, ConfigError) as error:
        _say("error", f"{_flag_message(error)}. --help lists the flags")
        sys.exit(ConfigError.exit_code)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS["verbosity"].value = -1  # warnings; absl would go on to show what libraries log for their own developers
        flags.FLAGS["verbosity"].using_default_value = False
    return rest


def _check_finite() -> None:
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"flag --{name}={value}: needs a finite number")


def _stray(argument: str) -> str:
    name = argument.split("=")[0]
    flag = closest(name, flags.FLAGS)
    if flag is None or "=" not in argument:
        return f"unexpected argument '{argument}': this command takes flags only, written --name=value"
    return f"unexpected argument '{argument}' (did you mean '--{argument.replace(name, flag, 1)}'?)"


def _flag_message(error: Exception) -> str:
    if isinstance(error, flags.UnrecognizedFlagError):
        name = str(getattr(error, "flagname", ""))
        if "." in name and "set" in flags.FLAGS:
            return f"unknown flag --{name}; a field of the config is set by --set {name}=value"
        hint = nearest(name, flags.FLAGS).replace("'", "'--", 1)
        return f"unknown flag --{name}{hint}"
    message = " ".join(str(error).split()).rstrip(".").removeprefix("ERROR:: ")
    for pythons, ours in _PYTHONS_WORDS.items():
        message = message.replace(pythons, ours)
    if message.endswith("must have a value other than None"):
        return f"flag --{message.split('--')[1].split('=')[0]} is required"
    return message


# --- the manual ---------------------------------------------------------------------------------------------------------------


def manual() -> str:
    """The text of --help: how the command is called, its module's docstring, and its flags with their types and defaults."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    command = f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"
    width = min(max(shutil.get_terminal_size().columns, 60), 100)
    own, shared = _flags_of_command()
    parts = [f"{command} [--flag=value ...]", inspect.cleandoc(main.__doc__ or ""), _flag_list("Flags", own, width)]
    parts.append(_flag_list("Flags of every such command", shared, width))
    return "\n\n".join(part for part in parts if part)


def _flags_of_command() -> tuple[list[flags.Flag], list[flags.Flag]]:
    """The flags of the module that was started, and those it shares with other commands; libraries' flags are neither."""
    by_module = flags.FLAGS.flags_by_module_dict()
    own = by_module.get(sys.argv[0], [])
    shared = [flag for module, listed in by_module.items() if module.startswith("launch.") for flag in listed]
    return own, [flag for flag in shared if flag not in own]


def _flag_list(title: str, listed: Sequence[flags.Flag], width: int) -> str:
    if not listed:
        return ""
    return "\n".join([f"{title}:", *(_flag_text(flag, width) for flag in listed)])


def _flag_text(flag: flags.Flag, width: int) -> str:
    kind = flag.flag_type()
    head = f"  --[no]{flag.name}" if kind == "bool" else f"  --{flag.name}={_value_name(flag, kind)}"
    required = any("other than None" in validator.message for validator in flag.validators)
    notes = "required" if required else "may be repeated" if kind.startswith("multi") else f"default: {_default(flag)}"
    words = re.sub(r"^<[^>]*>: |;\s+repeat this option to specify a list of values$", "", (flag.help or "").strip())  # absl's additions
    text = textwrap.fill(f"{words} ({notes})", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"{head}\n{text}"


def _value_name(flag: flags.Flag, kind: str) -> str:
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        return "|".join(choices)
    return {"int": "INTEGER", "float": "NUMBER", "comma separated list of strings": "A,B,..."}.get(kind, "TEXT")


def _default(flag: flags.Flag) -> str:
    if flag.default is None:
        return "none"
    return str(flag.default_as_str).strip("'") if flag.default_as_str not in ("", "''") else "empty"
