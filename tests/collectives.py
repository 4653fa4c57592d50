"""The collectives of a compiled program, read from its HLO text."""

import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-start)?\(.*?op_name=\"([^\"]*)\"")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(text: str) -> list[tuple[str, list[tuple[int, ...]], str]]:
    """(kind, shapes of its results, name of the operation that it came from) of every collective in a compiled HLO text."""
    found = []
    for line in text.splitlines():
        match = _LINE.search(re.sub(r"/\*.*?\*/", "", line))
        if match:
            shapes = [tuple(map(int, filter(None, dims.split(",")))) for dims in _SHAPE.findall(match[1])]
            found.append((match[2], shapes, match[3]))
    return found


def counted(text: str, where: str, not_where: str = "\0", least: int = 1) -> Counter:
    """How often each kind occurs under a name that holds `where`; of all-reduces, which are joined, the arrays of at least `least` elements."""
    total: Counter = Counter()
    for kind, shapes, name in collectives(text):
        if re.search(where, name) and not re.search(not_where, name):
            large = sum(math.prod(shape) >= least for shape in shapes)
            total[kind] += large if kind == "all-reduce" else 1
    return +total
