"""Parameter paths: nested dicts flattened to names like `layers/experts/up`."""

from collections.abc import Mapping
from typing import Any

SEPARATOR = "/"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {path: leaf}, in sorted order of the paths."""
    flat = {}
    for name in sorted(tree):
        value, path = tree[name], f"{prefix}{SEPARATOR}{name}" if prefix else name
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of {path: leaf}; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(SEPARATOR)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
