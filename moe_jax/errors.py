"""The errors that end a run with one line and an exit code instead of a traceback, and the nearest known name for a typo.

Codes: 0 done, 1 anything unforeseen or a non-finite value, 2 usage or config, 3 data, 4 checkpoint or trace, 75 stopped and resumable.
"""

import difflib
from collections.abc import Collection, Iterable
from typing import Any


class MoeJaxError(Exception):
    """An error whose message is one line that a user can act on; `exit_code` is what the command returns to the shell."""

    exit_code = 1


class ConfigError(MoeJaxError, ValueError):
    """A flag, a config field or a run folder that cannot be used as given."""

    exit_code = 2


class Unsupported(ConfigError, NotImplementedError):
    """Something that is named and understood, and cannot be done (yet, or here); the message says why."""


class DataError(MoeJaxError):
    """A corpus or tokenizer that is missing, corrupt or too small."""

    exit_code = 3


class CheckpointError(MoeJaxError):
    """A checkpoint that is missing, damaged or does not fit."""

    exit_code = 4


class TraceError(MoeJaxError):
    """A routing trace that cannot be read, is damaged or incomplete, or does not fit."""

    exit_code = 4


class Stopped(MoeJaxError):
    """The run was asked to stop and did so cleanly: the same command resumes it. 75 is EX_TEMPFAIL, which schedulers requeue."""

    exit_code = 75


class NonFinite(MoeJaxError):
    """The loss or a gradient was not finite, and the update was refused.

    Exit code 1, not 75: the same command would meet the same value, so a scheduler must not requeue it.
    """

    exit_code = 1


class MoeJaxWarning(UserWarning):
    """Something a user should know while the run goes on; commands print it as one line."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to `name`, or None when none is close. Case is ignored; 'top_k' finds 'model.top_k'."""
    folded = {other.lower(): other for other in sorted(set(known))}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    if not close:
        close = [other for other in folded if "." in other and other.split(".")[-1] == name.lower().split(".")[-1]][:1]
    return folded[close[0]] if close else None


def nearest(name: str, known: Iterable[str]) -> str:
    """The text " (did you mean 'x'?)" for the closest known name, or "" when none is close: made to end a message."""
    close = closest(name, known)
    return f" (did you mean '{close}'?)" if close else ""


def check_known(what: str, value: Any, known: Collection[Any]) -> None:
    """Raises ConfigError, with the nearest name and all names, where `value` is none of `known`; None and "" among these are taken and not listed."""
    if value not in known:
        names = [name for name in known if name]
        raise ConfigError(f"unknown {what} {value!r}{nearest(str(value), names)}; known: {', '.join(names)}")
