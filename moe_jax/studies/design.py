"""A study as it is declared before it runs: factors, seeds, metrics, comparisons and the rule that decides.

A design is plain data: it runs nothing and reads nothing. Its digest names it, so a ledger can refuse rows of another study.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from moe_jax import config_tools
from moe_jax.errors import ConfigError, nearest

Level = str | int | float | bool | None
Cell = Mapping[str, Level]  # one level for every factor
CellKey = tuple[tuple[str, Level], ...]  # a cell that can be a dictionary key: pairs in the order of the factors' names

BETTER = ("lower", "higher")


def cell_key(cell: Cell | CellKey) -> CellKey:
    """The hashable form of a cell; equal cells give equal keys whatever the order of their factors."""
    pairs = cell.items() if isinstance(cell, Mapping) else cell
    return tuple(sorted((str(name), level) for name, level in pairs))


def hint(name: object, known: Iterable[object]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them when none is near."""
    names = [str(k) for k in known]
    return nearest(str(name), names) or f" (known: {', '.join(names) or 'none'})"


def require(holds: object, message: str, error: type[Exception] = ConfigError) -> None:
    """Raises `error` with the message unless the condition holds."""
    if not holds:
        raise error(message)


def require_known(name: object, known: Iterable[object], what: str, error: type[Exception] = ConfigError) -> None:
    """Raises `error`, '<what> <name> (did you mean ...?)', unless the name is one of the known ones."""
    known = list(known)
    if name not in known:
        raise error(f"{what}{name!r}{hint(name, known)}")


@dataclasses.dataclass(frozen=True)
class Factor:
    """What a study varies: `levels` are JSON scalars, each different from the others (0 and 0.0 are the same level)."""

    name: str
    levels: tuple[Level, ...]
    label: str = ""  # how a report writes it; the name when empty

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "label", self.label or self.name)
        where = f"factor {self.name!r}"
        require(self.levels, f"{where} has no levels")
        for level in self.levels:
            scalar = isinstance(level, str | int | float | bool | None)
            require(scalar, f"{where}: level {level!r} is a {type(level).__name__}, not a JSON scalar")
            require(not isinstance(level, float) or math.isfinite(level), f"{where}: level {level!r} is not finite")
        repeated = sorted({repr(x) for i, x in enumerate(self.levels) if x in self.levels[:i]})
        require(not repeated, f"{where} has {len(self.levels)} levels, but {', '.join(repeated)} is there twice")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number per run: what it is called, its unit, which direction is better and how many decimals a table shows."""

    name: str
    label: str = ""  # how a report writes it; the name when empty
    unit: str = ""
    better: str = "lower"  # "lower" | "higher" | "" (a description, not a goal)
    decimals: int = 2
    definition: str = ""  # one sentence; the report prints it

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)
        if self.better:
            require_known(self.better, BETTER, f"metric {self.name!r}: better=")
        require(0 <= self.decimals <= 12, f"metric {self.name!r}: decimals={self.decimals} is outside 0..12")


USAGE_CV_ROUTED = Metric(
    "usage_cv_routed",
    "Expert usage CV, as routed",
    decimals=4,
    definition="Population std / mean of the tokens each expert received from the routing that was used; one value per layer, averaged.",
)
USAGE_CV_SEED = Metric(
    "usage_cv_seed",
    "Expert usage CV, seed's proxy",
    better="",
    decimals=4,
    definition="The first study's number, for comparison with it only: each router applied to its block's un-normalised input, "
    "counts pooled over the layers. It is not the imbalance of the routing that was used.",
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A declared contrast: sum of coefficient x cell for one metric, formed within each seed, then tested over seeds.

    The coefficients sum to zero, so that what is common to the cells of a seed cancels. Comparisons of one `family` share its
    error rate (Holm). Build with `difference` or `interaction`; write the terms out for anything else.
    """

    name: str
    question: str
    metric: str
    terms: tuple[tuple[float, CellKey], ...]
    family: str = "primary"

    def __post_init__(self) -> None:
        terms = tuple((float(c), cell_key(cell)) for c, cell in self.terms)
        object.__setattr__(self, "terms", terms)
        where, coefficients = f"comparison {self.name!r}", [c for c, _ in terms]
        require(len(terms) >= 2, f"{where} has {len(terms)} term(s); it needs at least 2 cells")
        require(all(math.isfinite(c) and c for c in coefficients), f"{where}: coefficients {coefficients} must be finite and not zero")
        total = math.fsum(coefficients)
        require(abs(total) <= 1e-9 * max(map(abs, coefficients)), f"{where}: coefficients {coefficients} sum to {total:g}, not 0")
        require(len({cell for _, cell in terms}) == len(terms), f"{where} names the same cell twice")


def difference(name: str, metric: str, of: Cell, minus: Cell, question: str = "", family: str = "primary") -> Comparison:
    """The comparison `of` - `minus`: positive when the metric is larger in the cell `of`."""
    return Comparison(name, question, metric, ((1.0, cell_key(of)), (-1.0, cell_key(minus))), family)


def interaction(
    name: str,
    metric: str,
    factor_a: str,
    levels_a: tuple[Level, Level],
    factor_b: str,
    levels_b: tuple[Level, Level],
    rest: Cell | None = None,
    question: str = "",
    family: str = "primary",
) -> Comparison:
    """How much the effect of a: a0 -> a1 grows when b goes b0 -> b1: (a1,b1) - (a0,b1) - (a1,b0) + (a0,b0); `rest` holds the others."""
    require(factor_a != factor_b, f"comparison {name!r}: {factor_a!r} cannot interact with itself")
    (a0, a1), (b0, b1) = levels_a, levels_b
    signs = ((1.0, a1, b1), (-1.0, a0, b1), (-1.0, a1, b0), (1.0, a0, b0))
    terms = tuple((sign, cell_key({**(rest or {}), factor_a: a, factor_b: b})) for sign, a, b in signs)
    return Comparison(name, question, metric, terms, family)


@dataclasses.dataclass(frozen=True)
class Design:
    """A whole study, declared. Every check happens here, so that a design which exists is one that can be analysed.

    Raises ConfigError (a ValueError) for duplicate names, fewer than 2 seeds, comparisons that name an unknown cell or metric,
    settings that are not JSON, and the like.
    """

    name: str
    question: str
    factors: tuple[Factor, ...]
    seeds: tuple[int, ...]  # the blocks: every cell runs once with every seed, and contrasts are formed within a seed
    metrics: tuple[Metric, ...]  # the first is the headline
    comparisons: tuple[Comparison, ...]
    rule: str  # in words: what result decides the question, and how
    alpha: float = 0.05  # error rate of each family of comparisons
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON values: whatever else is fixed
    only: tuple[CellKey, ...] | None = None  # the cells, when they are not the full product of the factors
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("factors", "seeds", "metrics", "comparisons", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.only is not None:
            object.__setattr__(self, "only", tuple(cell_key(c) for c in self.only))
        object.__setattr__(self, "settings", config_tools.config_dict(self.settings))
        _check_design(self)
        _check_cells(self)

    def cells(self) -> tuple[dict[str, Level], ...]:
        """The cells in order: as listed in `only`, else the product of the factors, the last factor changing fastest."""
        names = [f.name for f in self.factors]
        if self.only is not None:
            return tuple({name: dict(cell)[name] for name in names} for cell in self.only)
        return tuple(dict(zip(names, levels, strict=True)) for levels in itertools.product(*(f.levels for f in self.factors)))

    def runs(self) -> tuple[tuple[dict[str, Level], int], ...]:
        """Every (cell, seed), seed by seed: a study stopped early has whole blocks, and a machine that slows down slows all cells."""
        return tuple((cell, seed) for seed in self.seeds for cell in self.cells())

    def metric(self, name: str) -> Metric:
        """The metric of that name; ConfigError with the nearest name otherwise."""
        metrics = {m.name: m for m in self.metrics}
        require_known(name, metrics, f"design {self.name!r} has no metric ")
        return metrics[name]

    def to_json(self) -> dict[str, Any]:
        """The design as JSON values; `Design.from_json` gives it back, equal."""
        return config_tools.config_dict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Design:
        """The design that `to_json` wrote; ConfigError for a field it does not know or that is missing."""
        return config_tools.rebuild(cls, data, "the design")

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON: two designs are the same study exactly when their digests are equal."""
        return config_tools.digest(self)


def differences(before: Design, after: Design, limit: int = 6) -> list[str]:
    """What differs between two designs, one short text per field ('settings.steps: was 100, now 200'), at most `limit` of them."""
    texts = config_tools.differences(_by_name(before.to_json()), _by_name(after.to_json()))
    found = [text if len(text) <= 100 else text[:97] + "..." for text in texts]
    if not found and before.digest() != after.digest():
        return ["the same fields in another order, or 1 where there was 1.0"]
    return found if len(found) <= limit else [*found[:limit], f"and {len(found) - limit} more"]


def _by_name(data: Any) -> Any:
    """Lists of named objects become objects, so that a difference names the factor or metric that changed."""
    if isinstance(data, dict):
        return {key: _by_name(value) for key, value in data.items()}
    if isinstance(data, list) and data and all(isinstance(v, dict) and "name" in v for v in data):
        return {v["name"]: {key: _by_name(value) for key, value in v.items() if key != "name"} for v in data}
    return data


def _check_design(design: Design) -> None:
    where, seeds = f"design {design.name!r}", design.seeds
    for what, members in {"factor": design.factors, "metric": design.metrics, "comparison": design.comparisons}.items():
        names = [m.name for m in members]
        twice = sorted({repr(n) for n in names if names.count(n) > 1})
        require(not twice, f"{where}: {what} {', '.join(twice)} is declared twice")
        require(names or what == "comparison", f"{where} declares no {what}")
    own_time = any(m.name == "seconds" for m in design.metrics)
    require(not own_time, f"{where}: every run records its seconds; declare no metric of that name")
    for seed in seeds:
        require(isinstance(seed, int) and not isinstance(seed, bool), f"{where}: seed {seed!r} is not an int")
    require(len(set(seeds)) == len(seeds), f"{where}: seeds {seeds} are not all different")
    require(len(seeds) >= 2, f"{where} has {len(seeds)} seed(s); at least 2 are needed to see their spread")
    require(0 < design.alpha < 1, f"{where}: alpha={design.alpha} is outside (0, 1)")


def _check_cells(design: Design) -> None:
    """Checks every cell that the design names, in `only` and in its comparisons."""
    where = f"design {design.name!r}"
    for cell in design.only or ():
        _check_cell(design, cell, f"{where}, only")
    if design.only is not None:
        listed, different = len(design.only), len(set(design.only))
        require(0 < listed == different, f"{where}: `only` lists {listed} cells, {different} of them different")
    planned = {cell_key(cell) for cell in design.cells()}
    for comparison in design.comparisons:
        at = f"{where}, comparison {comparison.name!r}"
        require_known(comparison.metric, [m.name for m in design.metrics], f"{at}: no metric ")
        for _, cell in comparison.terms:
            _check_cell(design, cell, at)
            require(cell in planned, f"{at}: cell {dict(cell)} is not one of the {len(planned)} cells that run")


def _check_cell(design: Design, cell: CellKey, where: str) -> None:
    levels = {f.name: f.levels for f in design.factors}
    for name, level in cell:
        require_known(name, levels, f"{where}: no factor ")
        require_known(level, levels[name], f"{where}: {name} has no level ")
    absent = [name for name in levels if name not in dict(cell)]
    require(not absent, f"{where}: cell {dict(cell)} gives no level for {', '.join(absent)}")
