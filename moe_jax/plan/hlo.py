"""The collectives of a compiled program, read from its HLO text: how often each kind runs, and how many bytes of result a device gets.

What stands in a loop's body counts as often as the loop goes round, where the compiler says how often. What stands in a branch that only an overflowing
buffer takes (named scope "fallback") is counted by itself.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
FALLBACK = "/fallback/"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
_INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")

Totals = Mapping[str, tuple[float, float]]  # kind -> (how often, bytes)


def collectives(text: str) -> tuple[Totals, Totals]:
    """(what always runs, what runs only where a buffer overflows): kind -> (times, bytes of results in all), on each device."""
    found: tuple[dict, dict] = (defaultdict(lambda: (0.0, 0.0)), defaultdict(lambda: (0.0, 0.0)))
    for count, lines in executions(text):
        for line in lines:
            if match := _INSTRUCTION.search(line):
                totals = found[FALLBACK in line]
                often, size = totals[match[2]]
                totals[match[2]] = often + count, size + count * _size(match[1], match[2], match[3] is not None)
    return dict(found[0]), dict(found[1])


def executions(text: str) -> list[tuple[float, list[str]]]:
    """How often each computation runs, and its lines."""
    computations, entry = _computations(text)
    times: Counter[str] = Counter()
    _visit(computations, entry, 1.0, times)
    return [(count, computations[name]) for name, count in times.items()]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> the lines of each computation, and the name of the one that runs first."""
    found: dict[str, list[str]] = {}
    name, entry = "", ""
    for raw in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", raw)
        if head := _HEAD.match(line):
            name = head[1]
            found[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name and line.startswith(" "):
            found[name].append(line)
    return found, entry


def _visit(computations: Mapping[str, list[str]], name: str, count: float, times: Counter) -> None:
    times[name] += count  # type: ignore[assignment]
    for line in computations.get(name, ()):
        trips = _trips(line, computations) if " while(" in line else 1.0
        for one, several in _CALLED.findall(line):
            for called in [one] if one else [part.strip().lstrip("%") for part in several.split(",")]:
                if called in computations:
                    _visit(computations, called, count * trips, times)


def _trips(line: str, computations: Mapping[str, list[str]]) -> float:
    """How often a loop goes round: as the compiler says, or the constant that its condition compares a counter with; 1 where neither is there."""
    if known := _TRIPS.search(line):
        return float(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    limits = (
        {int(n) for row in computations.get(condition[1], ()) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", row)}
        if condition
        else set()
    )
    return float(limits.pop()) if len(limits) == 1 else 1.0


def _size(result: str, kind: str, started: bool) -> float:
    """Bytes of a collective's results; of one that is only started the tuple holds its operands and scalars of its own too: the larger half."""
    both = started and kind != "all-reduce"  # which gives its results alone
    shapes = [(name, dims) for name, dims in _SHAPE.findall(result) if dims or not both]
    sizes = [_BYTES.get(name, 0) * math.prod(map(int, filter(None, dims.split(",")))) for name, dims in shapes]
    half = len(sizes) // 2 if both else 0
    return max(sum(sizes[:half]), sum(sizes[half:]))
