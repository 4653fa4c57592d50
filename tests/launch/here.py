"""`call`: a launch command in the process of the test, which has jax and many compiled programs already; one of its own takes seconds to begin.

What only a shell sees (signals, kills, tracebacks, the text of an exit) is in test_common.py and in the tests that start processes.
"""

import contextlib
import dataclasses
import io
import os
import runpy
import signal
import sys
import warnings
from unittest import mock

from absl import app, flags


@dataclasses.dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def call(module: str, *arguments: str, **environment: str) -> Done:
    """`python -m launch.MODULE ARGUMENTS`, with these variables of the environment besides the test's own. An unexpected error is raised."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with _no_flags(module), _handlers(), mock.patch.dict(os.environ, environment), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda *about: err.write(warnings.formatwarning(*about[:4]))  # pytest's own would record it
        with (
            mock.patch.object(sys, "argv", [f"launch.{module}", *arguments]),
            mock.patch.object(warnings, "formatwarning", warnings.formatwarning),
            mock.patch.object(app, "faulthandler", None),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                runpy.run_module(f"launch.{module}", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code
    return Done(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _no_flags(command: str):
    """Without the flags of other commands, which have the same names; afterwards with them, and without this command's. Libraries keep theirs."""
    others = _take_flags(lambda module: module.startswith("launch."))
    try:
        yield
    finally:
        _take_flags(lambda module: module.startswith("launch.") or module.endswith(f"launch{os.sep}{command}.py"))
        flags.FLAGS.unparse_flags()
        for module, flag in others:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


def _take_flags(of) -> list[tuple[str, flags.Flag]]:
    taken = [(module, flag) for module, listed in flags.FLAGS.flags_by_module_dict().items() if of(module) for flag in listed]
    for _, flag in taken:
        delattr(flags.FLAGS, flag.name)
    return taken


@contextlib.contextmanager
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
