"""What a run writes while it runs: metrics.jsonl (the source of truth), TensorBoard files when installed, progress on the terminal.

Of several processes only process 0 writes and talks; the others make the same calls.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from moe_jax import distributed
from moe_jax.errors import MoeJaxError
from moe_jax.files import append
from moe_jax.train.run_folder import Closing

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter(Closing):
    """Appends one JSON line per step to FOLDER/metrics.jsonl, and the same numbers to FOLDER/tensorboard when tensorboardX is installed.

    Every line is one write to a file opened for appending, so a killed run leaves whole lines and at most one torn last one, which
    the next opening drops. Numbers come back bit for bit; nan and inf are the text "nan", "inf", "-inf", as strict JSON has no others.

    In other processes than 0 its calls do nothing. Raises MoeJaxError when the disk refuses a line; the lines before it stay whole.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.path = self.folder / "metrics.jsonl"
        self._file: Any = None
        self._summaries: Any = None  # opened at the first write, when it is known from which step the run goes on
        self._first_step: int | None = None
        if not distributed.first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._summary_writer = _summary_writer_class()
        self._file = open(self.path, "ab", buffering=0)
        self._file.truncate(sum(map(len, _whole_lines(self.path))))

    def truncate_to(self, step: int) -> None:
        """Drops every row after `step`, which a run that resumes from a checkpoint of `step` will write again.

        TensorBoard is told to forget the same steps. Raises MoeJaxError when a row that stays is not JSON.
        """
        if self._file is None:
            return
        lines = _whole_lines(self.path)
        late = (index for index, line in enumerate(lines) if _parse(line, self.path, index + 1)["step"] > step)
        kept = next(late, len(lines))
        self._file.truncate(sum(map(len, lines[:kept])))
        self._first_step = step + 1

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row {"step": step, **metrics}. Values are numbers, 0-d arrays or text; ints stay ints."""
        if self._file is None:
            return
        row = {"step": int(step), **{name: _plain(value) for name, value in metrics.items()}}
        strict = {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        line = (json.dumps(strict, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            append(self._file, line)
        except OSError as error:
            self._file.truncate(size)
            raise MoeJaxError(f"cannot write step {step} to {self.path} ({len(line)} bytes): {error.strerror}") from error
        if self._summary_writer is not None:
            self._summarise(row)

    def flush(self) -> None:
        """Makes every row so far durable; call it before a checkpoint, so that no checkpoint is ahead of its metrics."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._summaries is not None:
            self._summaries.flush()

    def close(self) -> None:
        """Flushes and closes both files; safe to call twice."""
        if self._file is not None and not self._file.closed:
            self.flush()
            self._file.close()
        if self._summaries is not None:
            self._summaries.close()
            self._summaries = None

    def _summarise(self, row: Mapping[str, Any]) -> None:
        if self._summaries is None:
            self._summaries = self._summary_writer(str(self.folder / "tensorboard"), purge_step=self._first_step)
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self._summaries.add_scalar(name, value, row["step"])


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; a torn last line, which a run may be writing or a kill has left, is skipped.

    Raises MoeJaxError naming the line when any other one is not a JSON row, and FileNotFoundError.
    """
    return [_parse(line, path, number) for number, line in enumerate(_whole_lines(path), start=1)]


def _whole_lines(path: str | os.PathLike[str]) -> list[bytes]:
    content = Path(path).read_bytes()
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _parse(line: bytes, path: str | os.PathLike[str], number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        row["step"] = int(row["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise MoeJaxError(f"{path} line {number} is not a row of metrics: {line[:60]!r}") from error
    return {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def _plain(value: Any) -> int | float | str:
    if isinstance(value, str | int):  # bool is an int
        return value
    item = value.item() if hasattr(value, "item") else value
    return item if isinstance(item, int) else float(item)


def _summary_writer_class() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter


def duration_text(seconds: float) -> str:
    """A duration for people: '8 s', '3 min 05 s', '2 h 07 min', '3 d 04 h'."""
    seconds = max(round(seconds), 0)
    for unit, size, smaller_unit, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // smaller:02d} {smaller_unit}"
    return f"{seconds} s"


def seconds_left(step: int, total: int, mark_step: int, mark_seconds: float) -> float | None:
    """The time until `total` at the pace since `mark_step`, which was `mark_seconds` ago; None before there is a pace.

    The mark is a step of this launch after the compiler is done, so neither a resume nor compilation distorts the estimate.
    """
    if step >= total:
        return 0.0
    if step <= mark_step or mark_seconds <= 0:
        return None
    return (total - step) * mark_seconds / (step - mark_step)


def pace_text(step: int, mark_step: int, mark_seconds: float, tokens: int = 0) -> str:
    """'1.9 steps/s', with '1,850 tokens/s' when `tokens` (since the mark) is given; '' before there is a pace."""
    if step <= mark_step or mark_seconds <= 0:
        return ""
    pace = (step - mark_step) / mark_seconds
    steps = f"{pace:.3g} steps/s" if pace >= 1 else f"{1 / pace:.3g} s/step"
    return f"{steps}, {tokens / mark_seconds:,.0f} tokens/s" if tokens else steps


def metrics_text(metrics: Mapping[str, float]) -> str:
    """'loss 3.142, router/load_cv 0.0210': four digits are enough to watch a run by; metrics.jsonl has all of them."""
    return ", ".join(f"{name} {value:#.4g}" for name, value in metrics.items())


class Progress(Closing):
    """How far a run is: a bar on a terminal, else one plain line every `every` seconds, at the first step and at the end; process 0's alone.

    `clock` is in seconds.
    """

    def __init__(
        self,
        total: int,
        label: str = "train",
        every: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._label, self._every = total, label, every
        self._stream, self._clock = stream or sys.stderr, clock
        self._began = clock()
        self._step, self._tokens = 0, 0
        self._mark: tuple[int, float] | None = None  # (step, time) of the first update: the first step holds the compilation
        self._last_line = -math.inf
        self._line = ""
        self._talks = distributed.first()
        self._bar = _bar(self._stream, label, total) if self._talks and self._stream.isatty() else None

    def update(self, step: int, metrics: Mapping[str, float] | None = None, tokens: int = 0, earlier: int = 0) -> None:
        """Step `step` is done, with the few metrics to show. Since the last update: `tokens` processed; `earlier` of the steps by an earlier launch."""
        now = self._clock()
        if self._mark is None:
            self._mark = (step, now)
        else:
            self._mark = (self._mark[0] + earlier, self._mark[1])
            self._tokens += tokens
        self._step = step
        self._line = self.text(metrics or {})
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, text=self._line)
        elif now - self._last_line >= self._every or step >= self._total:
            self._print(now)

    def text(self, metrics: Mapping[str, float]) -> str:
        """Metrics, pace, elapsed and left, without the parts that are not known yet."""
        now = self._clock()
        mark_step, mark_time = self._mark or (self._step, now)
        left = seconds_left(self._step, self._total, mark_step, now - mark_time)
        parts = [
            metrics_text(metrics),
            pace_text(self._step, mark_step, now - mark_time, self._tokens),
            f"{duration_text(now - self._began)} elapsed",
            "" if left is None else f"{duration_text(left)} left",
        ]
        return ", ".join(part for part in parts if part)

    def close(self) -> None:
        """Leaves the last state on the screen; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
        elif self._line:
            self._print(self._clock())

    def _print(self, now: float) -> None:
        percent = 100 * self._step / max(self._total, 1)
        if not self._talks:
            return
        self._stream.write(f"{self._label} {self._step}/{self._total} ({percent:.0f} %): {self._line}\n")
        self._stream.flush()
        self._last_line, self._line = now, ""


class Transfer:
    """How many bytes have been moved: a line every `every` seconds, process 0's alone; what takes less time says nothing."""

    def __init__(self, what: str, every: float = 5.0, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._what, self._every, self._stream, self._clock = what, every, stream or sys.stderr, clock
        self._last = clock()

    def __call__(self, done: int, total: int) -> None:
        if self._clock() - self._last >= self._every and distributed.first():
            self._last = self._clock()
            self._stream.write(f"{self._what} {done / 1e9:.2f} of {total / 1e9:.2f} GB ({done / total:.0%})\n")
            self._stream.flush()


def _bar(stream: TextIO, label: str, total: int) -> Any:
    """A rich progress bar with one task and a line of text. Rich comes with flax; without it None, and the plain lines do."""
    try:
        from rich import console, progress
    except ImportError:
        return None
    columns = (progress.BarColumn(bar_width=24), progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[text]}"))
    text = progress.TextColumn("{task.description}")
    bar = progress.Progress(text, *columns, console=console.Console(file=stream), refresh_per_second=4)
    bar.add_task(label, total=total, text="")
    bar.start()
    return bar
