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

BETTER = ("lower", "higher", "")  # "": the metric is a description, not a goal


def cell_key(cell: Cell | CellKey) -> CellKey:
    """The hashable form of a cell; equal cells give equal keys whatever the order of their factors."""
    pairs = cell.items() if isinstance(cell, Mapping) else cell
    return tuple(sorted((str(name), level) for name, level in pairs))


def hint(name: object, known: Iterable[object]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them when none is near."""
    names = [str(k) for k in known]
    return nearest(str(name), names) or f" (known: {', '.join(names) or 'none'})"


@dataclasses.dataclass(frozen=True)
class Factor:
    """What a study varies: `levels` are JSON scalars, each different from the others (0 and 0.0 are the same level)."""

    name: str
    levels: tuple[Level, ...]
    label: str = ""  # how a report writes it; the name when empty

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "label", self.label or self.name)
        if not self.levels:
            raise ConfigError(f"factor {self.name!r} has no levels")
        for level in self.levels:
            if not isinstance(level, str | int | float | bool | None):
                raise ConfigError(f"factor {self.name!r}: level {level!r} is a {type(level).__name__}, not a JSON scalar")
            if isinstance(level, float) and not math.isfinite(level):
                raise ConfigError(f"factor {self.name!r}: level {level!r} is not finite")
        repeated = sorted({repr(x) for i, x in enumerate(self.levels) if x in self.levels[:i]})
        if repeated:
            raise ConfigError(f"factor {self.name!r} has {len(self.levels)} levels, but {', '.join(repeated)} is there twice")


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
        if self.better not in BETTER:
            raise ConfigError(f"metric {self.name!r}: better={self.better!r}{hint(self.better, BETTER[:2])}")
        if not 0 <= self.decimals <= 12:
            raise ConfigError(f"metric {self.name!r}: decimals={self.decimals} is outside 0..12")


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
        coefficients = [c for c, _ in terms]
        if len(terms) < 2:
            raise ConfigError(f"comparison {self.name!r} has {len(terms)} term(s); it needs at least 2 cells")
        if not all(math.isfinite(c) and c for c in coefficients):
            raise ConfigError(f"comparison {self.name!r}: coefficients {coefficients} must be finite and not zero")
        if abs(math.fsum(coefficients)) > 1e-9 * max(map(abs, coefficients)):
            raise ConfigError(f"comparison {self.name!r}: coefficients {coefficients} sum to {math.fsum(coefficients):g}, not 0")
        if len({cell for _, cell in terms}) < len(terms):
            raise ConfigError(f"comparison {self.name!r} names the same cell twice")


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
    if factor_a == factor_b:
        raise ConfigError(f"comparison {name!r}: {factor_a!r} cannot interact with itself")
    (a0, a1), (b0, b1) = levels_a, levels_b

    def at(a: Level, b: Level) -> CellKey:
        return cell_key({**(rest or {}), factor_a: a, factor_b: b})

    terms = ((1.0, at(a1, b1)), (-1.0, at(a0, b1)), (-1.0, at(a1, b0)), (1.0, at(a0, b0)))
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
        _check_names(self)
        _check_numbers(self)
        for cell in self.only or ():
            _check_cell(self, cell, "only")
        if self.only is not None and len(set(self.only)) < max(1, len(self.only)):
            raise ConfigError(f"design {self.name!r}: `only` lists {len(self.only)} cells, {len(set(self.only))} of them different")
        for comparison in self.comparisons:
            _check_comparison(self, comparison)

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
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise ConfigError(f"design {self.name!r} has no metric {name!r}{hint(name, (m.name for m in self.metrics))}")

    def to_json(self) -> dict[str, Any]:
        """The design as JSON values; `Design.from_json` gives it back, equal."""
        return config_tools.config_dict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Design:
        """The design that `to_json` wrote; ConfigError for a field it does not know or that is missing."""
        _check_fields(cls, data)
        given = dict(data)
        given["factors"] = tuple(_build(Factor, f) for f in data["factors"])
        given["metrics"] = tuple(_build(Metric, m) for m in data["metrics"])
        given["comparisons"] = tuple(_build(Comparison, c) for c in data["comparisons"])
        return cls(**given)

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON: two designs are the same study exactly when their digests are equal."""
        return config_tools.digest(self)


def differences(before: Design, after: Design, limit: int = 6) -> list[str]:
    """What differs between two designs, one short text per field ('settings.steps: was 100, now 200'), at most `limit` of them."""
    found = [_short(text) for text in config_tools.differences(_by_name(before.to_json()), _by_name(after.to_json()))]
    if not found and before.digest() != after.digest():
        return ["the same fields in another order, or 1 where there was 1.0"]
    return found if len(found) <= limit else [*found[:limit], f"and {len(found) - limit} more"]


def _short(text: str, width: int = 100) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _by_name(data: Any) -> Any:
    """Lists of named objects become objects, so that a difference names the factor or metric that changed."""
    if isinstance(data, dict):
        return {key: _by_name(value) for key, value in data.items()}
    if isinstance(data, list) and data and all(isinstance(v, dict) and "name" in v for v in data):
        return {v["name"]: {key: _by_name(value) for key, value in v.items() if key != "name"} for v in data}
    return data


def _check_names(design: Design) -> None:
    groups = {"factor": design.factors, "metric": design.metrics, "comparison": design.comparisons}
    for what, members in groups.items():
        names = [m.name for m in members]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(f"design {design.name!r}: {what} {', '.join(map(repr, twice))} is declared twice")
        if not names and what != "comparison":
            raise ConfigError(f"design {design.name!r} declares no {what}")
    if any(m.name == "seconds" for m in design.metrics):
        raise ConfigError(f"design {design.name!r}: every run records its seconds; declare no metric of that name")


def _check_numbers(design: Design) -> None:
    for seed in design.seeds:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"design {design.name!r}: seed {seed!r} is not an int")
    if len(set(design.seeds)) < len(design.seeds):
        raise ConfigError(f"design {design.name!r}: seeds {design.seeds} are not all different")
    if len(design.seeds) < 2:
        raise ConfigError(f"design {design.name!r} has {len(design.seeds)} seed(s); at least 2 are needed to see their spread")
    if not 0 < design.alpha < 1:
        raise ConfigError(f"design {design.name!r}: alpha={design.alpha} is outside (0, 1)")


def _check_cell(design: Design, cell: CellKey, where: str) -> None:
    levels = dict(cell)
    known = {f.name: f for f in design.factors}
    for name, level in cell:
        if name not in known:
            raise ConfigError(f"design {design.name!r}, {where}: no factor {name!r}{hint(name, known)}")
        if level not in known[name].levels:
            raise ConfigError(f"design {design.name!r}, {where}: {name} has no level {level!r}{hint(level, known[name].levels)}")
    absent = [name for name in known if name not in levels]
    if absent:
        raise ConfigError(f"design {design.name!r}, {where}: cell {levels} gives no level for {', '.join(absent)}")


def _check_comparison(design: Design, comparison: Comparison) -> None:
    where = f"comparison {comparison.name!r}"
    names = [m.name for m in design.metrics]
    if comparison.metric not in names:
        raise ConfigError(f"design {design.name!r}, {where}: no metric {comparison.metric!r}{hint(comparison.metric, names)}")
    planned = {cell_key(c) for c in design.cells()}
    for _, cell in comparison.terms:
        _check_cell(design, cell, where)
        if cell not in planned:
            raise ConfigError(f"design {design.name!r}, {where}: cell {dict(cell)} is not one of the {len(planned)} cells that run")


def _check_fields(cls: type, data: Mapping[str, Any]) -> None:
    fields = [f for f in dataclasses.fields(cls)]
    known = [f.name for f in fields]
    for name in data:
        if name not in known:
            raise ConfigError(f"{cls.__name__} has no field {name!r}{hint(name, known)}")
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    absent = [name for name in needed if name not in data]
    if absent:
        raise ConfigError(f"{cls.__name__} lacks {', '.join(absent)}")


def _build(cls: type, data: Mapping[str, Any]) -> Any:
    _check_fields(cls, data)
    return cls(**data)
