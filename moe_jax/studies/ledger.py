"""An append-only file, `ledger.jsonl`, that holds a study's design and every run of it, failures too.

The first line is the design with its digest; every other line is one run. A line is one write to a descriptor opened for
appending, then fsync, so a killed writer leaves at most one torn last line. Reading ignores that line; the next append closes it
and writes a `torn` row that names it, so nothing is ever rewritten and damage elsewhere is still seen.

Numbers are exact: JSON keeps the shortest text that reads back as the same float64. The metrics of a finished run are finite; a
run that ended in nan has failed. Elsewhere (metrics of failed runs, series, arrays) nan and infinities are the strings "nan",
"inf", "-inf" in the file and floats again when read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config_tools import config_dict
from moe_jax.errors import ConfigError, DataError
from moe_jax.files import append, write_atomic
from moe_jax.studies.design import Cell, CellKey, Design, cell_key, differences, hint, require, require_known

FILE_NAME = "ledger.jsonl"
SCHEMA = 1
STATUSES = ("finished", "failed")
RunKey = tuple[CellKey, int]  # cell and seed


class LedgerMissing(DataError):
    """There is no ledger in the folder."""


class LedgerDamaged(DataError):
    """A line of the ledger is not what was written; the message names the line."""


class StudyMismatch(ConfigError):
    """The folder holds another study; the message shows what differs."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of one cell with one seed: a line of the ledger."""

    cell: Cell
    seed: int
    status: str = "finished"  # "finished" | "failed"
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    series: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> [[step, value], ...]
    arrays: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # "load": [layer][expert] tokens or shares
    seconds: float = 0.0  # wall time of the run
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # versions, commit, device, ...
    error: str = ""  # why it failed; empty when finished

    def __post_init__(self) -> None:
        object.__setattr__(self, "cell", dict(self.cell))

    @property
    def key(self) -> RunKey:
        return cell_key(self.cell), self.seed


@dataclasses.dataclass(frozen=True)
class Ledger:
    """A ledger on disk and the design in its first line. Every question reads the file again, so an answer is never stale."""

    path: Path
    design: Design

    @classmethod
    def open(cls, workdir: str | os.PathLike[str], design: Design) -> Ledger:
        """The ledger of `design` in `workdir`, begun if there is none.

        Raises StudyMismatch when the folder holds another study, LedgerDamaged when its file cannot be read.
        """
        path = Path(workdir) / FILE_NAME
        if not path.exists():
            header = {"kind": "design", "schema": SCHEMA, "digest": design.digest(), "design": design.to_json()}
            write_atomic(path, _line(header))  # not appended to an empty file: a ledger never exists without its design
        found = cls.read(workdir).design
        if found.digest() != design.digest():
            changes = "; ".join(differences(found, design))
            raise StudyMismatch(
                f"{workdir} holds the study {found.name!r} (digest {found.digest()[:12]}), not this one ({design.digest()[:12]}): "
                f"{changes}. Use another workdir, or the design that began this one."
            )
        return cls(path, found)

    @classmethod
    def read(cls, workdir: str | os.PathLike[str]) -> Ledger:
        """The ledger in `workdir`, whatever its study is. Raises LedgerMissing or LedgerDamaged."""
        path = Path(workdir) / FILE_NAME
        require(path.exists(), f"no {FILE_NAME} in {workdir}: no study has begun there", LedgerMissing)
        return cls(path, _scan(path).design)

    def runs(self) -> tuple[Run, ...]:
        """Every run in the order of the file, failures and all."""
        return _scan(self.path).runs

    def torn_lines(self) -> tuple[int, ...]:
        """The line numbers (from 1) that a killed writer left half written; each is a run that will be missing."""
        return _scan(self.path).torn

    def finished(self) -> dict[RunKey, Run]:
        """The finished run of each (cell, seed) that has one."""
        return {run.key: run for run in self.runs() if run.status == "finished"}

    def failed(self) -> tuple[Run, ...]:
        """Every failed run, also those that a later run made good."""
        return tuple(run for run in self.runs() if run.status == "failed")

    def missing(self) -> tuple[tuple[dict[str, Any], int], ...]:
        """The (cell, seed) pairs that have no finished run, in the order in which the design runs them."""
        done = self.finished()
        return tuple((cell, seed) for cell, seed in self.design.runs() if (cell_key(cell), seed) not in done)

    def append(self, run: Run) -> None:
        """Writes one run and waits until it is on disk.

        Raises ValueError for a run that does not belong to the design, is not complete or is finished already: a study counts a
        run once.
        """
        line = _encode(self.design, run)
        scan = _scan(self.path)
        if run.status == "finished" and (where := scan.finished_at.get(run.key)):
            raise ValueError(f"{self.path}: {_name(run)} is finished already (line {where}); a study counts a run once")
        with open(self.path, "ab", buffering=0) as file:  # unbuffered: one write, so that a killed writer tears one line at most
            append(file, scan.healing + line)
            os.fsync(file.fileno())


def _name(run: Run) -> str:
    return f"{', '.join(f'{k}={v}' for k, v in run.cell.items())}, seed {run.seed}"


# ---------------------------------------------------------------- writing


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _encode(design: Design, run: Run) -> bytes:
    """One line of the file. Raises ValueError for a run that the design does not know or that lacks something."""
    _check_run(design, run)
    strict = run.status == "finished"
    row = {"kind": "run", "status": run.status, **{field.name: getattr(run, field.name) for field in dataclasses.fields(run)}}
    row["metrics"] = {name: _number(v, f"metric {name!r} of {_name(run)}", strict) for name, v in run.metrics.items()}
    row["series"] = {name: _numbers(v, f"series {name!r}") for name, v in run.series.items()}
    for name, points in row["series"].items():
        pairs = isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)
        require(pairs, f"series {name!r} is not a list of [step, value] pairs", ValueError)
    row["arrays"] = {name: _numbers(v, f"array {name!r}") for name, v in run.arrays.items()}
    row["seconds"] = _number(run.seconds, "seconds", strict=True)
    row["provenance"] = dict(run.provenance)
    try:
        return _line(row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the provenance of {_name(run)} must be JSON values: {error}") from error


def _check_run(design: Design, run: Run) -> None:
    name, planned = _name(run), {(cell_key(cell), seed) for cell, seed in design.runs()}
    require(run.key in planned, f"{name} is not one of the {len(planned)} runs of study {design.name!r}", ValueError)
    require_known(run.status, STATUSES, "status ", ValueError)
    failed, state = run.status == "failed", f"status {run.status!r} with error {run.error!r}"
    require(failed == bool(run.error), f"{name}: {state}; a failed run says why, a finished one has no error", ValueError)
    absent = [m.name for m in design.metrics if m.name not in run.metrics]
    if absent and not failed:
        hints = "; ".join(f"{metric!r}{hint(metric, run.metrics)}" for metric in absent)
        raise ValueError(f"{name} is finished but lacks {len(absent)} of {len(design.metrics)} metrics ({hints})")


def _number(value: Any, what: str, strict: bool = False) -> int | float | str:
    """A JSON number, or "nan", "inf", "-inf"; with `strict` ValueError for those."""
    value = value.item() if hasattr(value, "item") else value  # an array library's scalar
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is {value!r}, not a number")
    if strict and not math.isfinite(value):
        raise ValueError(f"{what} is {value}; a run that did not end in finite numbers is recorded as failed")
    return config_dict(value)


def _numbers(value: Any, what: str) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_numbers(v, what) for v in value]
    return _number(value, what)


# ---------------------------------------------------------------- reading


class _Scan(NamedTuple):
    """What one reading of the file found."""

    design: Design
    runs: tuple[Run, ...]
    finished_at: dict[RunKey, int]  # line of each finished run
    torn: tuple[int, ...]
    healing: bytes  # what the next append must write first


def _scan(path: Path) -> _Scan:
    *lines, rest = path.read_bytes().split(b"\n")
    lines += [rest] if rest else []  # what a killed writer left, or a whole line that lacks its end only
    require(lines, f"{path} is empty: its first line must hold the design", LedgerDamaged)
    design = _header(path, lines[0])
    runs: list[Run] = []
    finished_at: dict[RunKey, int] = {}
    unread: list[int] = []  # lines that do not parse and that no `torn` row has named yet
    torn: list[int] = []
    for number, text in enumerate(lines[1:], start=2):
        row = _parse(text)
        if row is None:
            unread.append(number)
        elif row.get("kind") == "torn":
            torn += row.get("lines", [])
            unread = [n for n in unread if n not in torn]
        else:
            run = _decode(path, number, design, row)
            if run.status == "finished" and (first := finished_at.setdefault(run.key, number)) != number:
                raise LedgerDamaged(f"{path}: lines {first} and {number} both finish {_name(run)}; a study counts a run once")
            runs.append(run)
    if unread != list(range(len(lines) + 1 - len(unread), len(lines) + 1)):  # only a tail can be a killed writer's
        raise LedgerDamaged(f"{path}: line {unread[0]} is not a JSON object; restore it from a copy, or delete that line to run it again")
    healing = (b"\n" if rest else b"") + (_line({"kind": "torn", "lines": unread}) if unread else b"")
    return _Scan(design, tuple(runs), finished_at, (*torn, *unread), healing)


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except ValueError:  # also UnicodeDecodeError
        return None
    return row if isinstance(row, dict) else None


def _header(path: Path, text: bytes) -> Design:
    row = _parse(text)
    if row is None or row.get("kind") != "design":
        raise LedgerDamaged(f"{path}: line 1 is not a study's design")
    schema, recorded = row.get("schema"), row.get("digest")
    require(schema == SCHEMA, f"{path}: written with schema {schema!r}; this program reads schema {SCHEMA}", LedgerDamaged)
    try:
        design = Design.from_json(row["design"])
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerDamaged(f"{path}: line 1 holds no usable design: {error}") from error
    found = design.digest()
    digests = f"{found[:12]} but line 1 records {str(recorded)[:12]}"
    require(found == recorded, f"{path}: the design has digest {digests}: it was edited after the study began", LedgerDamaged)
    return design


def _decode(path: Path, number: int, design: Design, row: dict[str, Any]) -> Run:
    kind, fields = row.get("kind"), {name: value for name, value in row.items() if name != "kind"}
    try:
        require(kind == "run", f"kind {kind!r} is not 'run'", ValueError)
        run = Run(**{**fields, **{name: _floats(fields[name]) for name in ("metrics", "series", "arrays")}})
        _check_run(design, run)
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerDamaged(f"{path}: line {number}: {error}") from error
    return run


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _floats(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_floats(v) for v in value]
    return float(value) if isinstance(value, str) else value  # "nan", "inf", "-inf"
