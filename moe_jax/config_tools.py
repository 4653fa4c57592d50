"""Configs as plain data: a frozen dataclass to a JSON dict, its dotted fields, its digest, what differs, and typed overrides."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from moe_jax.errors import ConfigError, closest, nearest

C = TypeVar("C")
_ABSENT = object()
_TRUE, _FALSE, _NONE = ("true", "1", "yes"), ("false", "0", "no"), ("none", "null")


# --- a config as JSON ---------------------------------------------------------------------------------------------------------


def config_dict(config: Any) -> Any:
    """A dataclass (or a mapping, sequence or scalar inside one) as what JSON can hold and give back unchanged.

    Dataclasses and mappings become dicts, tuples and ranges lists; a non-finite float becomes "nan", "inf"
    or "-inf", which strict JSON lacks. Raises ConfigError for anything else: a config must be readable without Python.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: config_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): config_dict(value) for key, value in config.items()}
    if config is None or isinstance(config, bool | int | str):
        return config
    if isinstance(config, float):
        return float(config) if math.isfinite(config) else str(float(config))
    if isinstance(config, list | tuple | range):
        return [config_dict(value) for value in config]
    raise ConfigError(f"a config may hold numbers, text, lists and groups of them, not {type(config).__name__}: {config!r}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config's leaves by dotted name, `{"model.top_k": 2}`; a list is one leaf, and so is an empty group."""
    config = config_dict(config)
    if not isinstance(config, dict) or (prefix and not config):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat.update(flatten(value, f"{prefix}.{name}" if prefix else name))
    return flat


def digest(config: Any) -> str:
    """sha256 of a config's canonical JSON: the same for the same fields and values in any order."""
    text = json.dumps(config_dict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any) -> list[str]:
    """One line, 'a.b: was 3, now 4', for every field that differs, in name order; empty when the configs are equal."""
    before, after = flatten(old), flatten(new)
    lines = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if _text(was) != _text(now) and not _same_number(was, now):
            lines.append(f"{name}: was {_text(was)}, now {_text(now)}")
    return lines


def rebuild(kind: Any, value: Any, where: str) -> Any:
    """The dataclass that `config_dict` made `value` of; a field that it lacks gets its default. Raises ConfigError naming fields that are unknown or needed."""
    if not dataclasses.is_dataclass(kind):
        of = (*typing.get_args(kind), Any)[0]  # of tuple[X, ...] the X
        return tuple(rebuild(of, part, where) for part in value) if isinstance(value, list) else value
    fields, kinds = dataclasses.fields(kind), typing.get_type_hints(kind)
    unknown = [name for name in value if name not in kinds]
    lacking = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING and f.name not in value]
    if unknown or lacking:
        wrong = f"has no {', '.join(unknown)} here{nearest(unknown[0], kinds)}" if unknown else f"lacks {', '.join(lacking)}"
        raise ConfigError(f"{where} was written by other code: {kind.__name__} {wrong}")  # type: ignore[union-attr]
    return kind(**{name: rebuild(kinds[name], part, where) for name, part in value.items()})  # type: ignore[operator]


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True)


def _same_number(a: Any, b: Any) -> bool:
    # 1 and 1.0 are the same setting; 1 and true are not.
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b)) and a == b


# --- overrides from the command line ------------------------------------------------------------------------------------------


def apply_overrides(config: C, overrides: Sequence[str]) -> C:
    """A copy of a nested frozen dataclass with 'a.b=c' settings applied; a later setting of a field wins.

    Text becomes the type the field declares: int, float (finite), bool, str, Literal, `X | None` ('none'), tuples as
    comma lists. All settings are applied together, so two fields that only fit each other can change at once.

    Raises ConfigError for an unknown field (with the nearest name and the known ones), a value of the wrong type, and a
    combination that the dataclass itself refuses.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not name:
            raise ConfigError(f"--set {override}: write it as field=value, for example --set {_example(config)}")
        _place(config, name, text, changes)
    return _replace(config, changes, list(overrides))


def _place(config: Any, name: str, text: str, changes: dict[str, Any]) -> None:
    """Walks to the group that holds field `name` and notes its parsed value in `changes`, nested as the config is."""
    *parents, last = name.split(".")
    group, at, prefix = config, changes, ""
    for part in parents:
        _check_known(config, group, part, prefix, name)
        group, prefix = getattr(group, part), f"{prefix}{part}."
        at = at.setdefault(part, {})
        if not dataclasses.is_dataclass(group) or at is None:
            now = None if at is None else config_dict(group)
            raise ConfigError(f"--set {name}={text}: '{prefix[:-1]}' is {_text(now)}, not a group of fields")
    _check_known(config, group, last, prefix, name)
    kind = typing.get_type_hints(type(group))[last]
    inner, optional = getattr(group, last), type(None) in typing.get_args(kind)
    if dataclasses.is_dataclass(inner) and not (optional and text.lower() in _NONE):
        raise ConfigError(f"--set {name}={text}: '{name}' is a group; set one of {_fields(inner, name + '.')}")
    at[last] = None if dataclasses.is_dataclass(inner) else parse(name, kind, text)


def _fields(group: Any, prefix: str) -> str:
    return ", ".join(prefix + field.name for field in dataclasses.fields(group) if field.init)


def _check_known(config: Any, group: Any, part: str, prefix: str, name: str) -> None:
    names = [field.name for field in dataclasses.fields(group) if field.init]
    if part not in names:
        close = closest(part, names)
        hint = f" (did you mean '{prefix}{close}'?)" if close else nearest(part, flatten(config))
        raise ConfigError(f"unknown config field '{name}'{hint}; known: {_fields(group, prefix)}")


def _replace(config: C, changes: Mapping[str, Any], overrides: list[str]) -> C:
    values = {}
    for name, value in changes.items():
        inner = getattr(config, name)
        values[name] = _replace(inner, value, overrides) if isinstance(value, dict) else value
    try:
        return dataclasses.replace(config, **values) if values else config  # type: ignore[type-var]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"--set {' '.join(overrides)}: {error}") from error


def _example(config: Any) -> str:
    leaves = flatten(config)
    name = next(iter(leaves), "field")
    return f"{name}={leaves.get(name, 'value')}"


# --- text to a declared type --------------------------------------------------------------------------------------------------


def parse(name: str, kind: Any, text: str) -> Any:
    """`text` as a value of the annotated type `kind`; raises ConfigError that says what was given to field `name` and what it needs."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(name, arguments, text)
    if origin is typing.Literal:
        return _choice(name, {str(choice): choice for choice in arguments}, text)
    if origin is tuple:
        return _tuple(name, arguments, text)
    if kind is bool:
        return _bool(name, text)
    if kind is int or kind is float:
        return _number(name, kind, text)
    if kind is str:
        return text
    raise ConfigError(f"--set {name}={text}: this field holds {_kind_text(kind)} and cannot be set on the command line")


def _kind_text(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _wrong(name: str, text: str, needed: str) -> ConfigError:
    return ConfigError(f"--set {name}={text}: needs {needed}, was given {text!r}")


def _union(name: str, kinds: Iterable[Any], text: str) -> Any:
    kinds = list(kinds)
    if type(None) in kinds and text.lower() in _NONE:
        return None
    # str takes any text, so it is tried last.
    rest = sorted((kind for kind in kinds if kind is not type(None)), key=lambda kind: kind is str)
    error = None
    for kind in rest:
        try:
            return parse(name, kind, text)
        except ConfigError as raised:
            error = error or raised
    assert error is not None
    if len(rest) == 1:
        raise ConfigError(f"{error}; or 'none'") if type(None) in kinds else error
    raise _wrong(name, text, " or ".join("none" if kind is type(None) else _kind_text(kind) for kind in kinds))


def _choice(name: str, choices: Mapping[str, Any], text: str) -> Any:
    if text in choices:
        return choices[text]
    raise ConfigError(f"--set {name}={text}: needs one of {', '.join(choices)}, was given {text!r}{nearest(text, choices)}")


def _tuple(name: str, kinds: Sequence[Any], text: str) -> tuple[Any, ...]:
    text = text[1:-1].strip() if text[:1] + text[-1:] in ("()", "[]") else text
    parts = [part.strip() for part in text.removesuffix(",").split(",")] if text else []
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(parts)
    if len(kinds) != len(parts):
        raise _wrong(name, text, f"{len(kinds)} values with commas between them")
    return tuple(parse(name, kind, part) for kind, part in zip(kinds, parts, strict=True))


def _bool(name: str, text: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise _wrong(name, text, "true or false")


def _number(name: str, kind: type[int] | type[float], text: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise _wrong(name, text, "a whole number" if kind is int else "a number") from None
    if kind is float and not math.isfinite(value):
        raise _wrong(name, text, "a finite number")
    return value
