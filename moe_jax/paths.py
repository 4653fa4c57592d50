"""Parameter paths: nested dicts flattened to names like `layers/experts/up`, and rules that must cover every one of them."""

import fnmatch
from collections.abc import Mapping, Sequence
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


def assign(paths: Sequence[str], rules: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The value of the first rule (glob pattern, value) that matches each path.

    Raises ValueError that lists the paths no rule covers, and the rules that matched nothing (a misspelt rule is silent otherwise).
    """
    chosen, unused = {}, {pattern for pattern, _ in rules}
    for path in paths:
        for pattern, value in rules:
            if fnmatch.fnmatchcase(path, pattern):
                chosen[path] = value
                unused.discard(pattern)
                break
    missing = [path for path in paths if path not in chosen]
    if missing or unused:
        raise ValueError(
            f"rules leave {len(missing)} of {len(paths)} paths uncovered {missing[:5]}; patterns that match nothing: {sorted(unused)}"
        )
    return chosen
