"""Inside a shard_map: over which mesh axes a value differs from device to device, and sums over them.

Outside of one no value differs over any axis: each function then returns what it was given and leaves nothing in the program.
"""

from typing import Any

import jax


def varying(x: Any) -> frozenset[str]:
    """The mesh axes over which x may differ between devices, as shard_map's check of types keeps account of them."""
    kind: Any = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # jax before 0.10.2, and since


def vary_like(x: Any, *others: Any) -> Any:
    """The tree x marked as varying wherever anything in `others` varies: what a loop's carry needs before the loop puts such values into it."""
    axes = frozenset[str]().union(*(varying(leaf) for leaf in jax.tree.leaves(others)))

    def mark(leaf):
        missing = tuple(sorted(axes - varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, x)


def total(x: Any, like: Any) -> Any:
    """The sum of x over the axes over which it varies and `like` does not: a gradient, whole where its parameter is the same on several devices."""
    axes = tuple(sorted(varying(x) - varying(like)))
    return jax.lax.psum(x, axes) if axes else x
