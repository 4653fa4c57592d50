"""A blocked dispatch with tiles of two sizes instead of sixteen, which take most of the time that a training program compiles.

For all tests but those of tests/dispatch, and the commands that tests start. What is computed does not depend on the sizes.
"""

from moe_jax.dispatch.tiles import Tiling

fit = Tiling.fit


def few(assignments: int, experts: int, unit: int | None = None, largest: int | None = None, share: float | None = None) -> Tiling:
    unit = fit(assignments, experts, unit, share=share).unit
    return fit(assignments, experts, unit, 2 * unit if largest is None else largest, share)


def use(function) -> None:
    """All tilings from now on are those of `few`, or, with `fit`, the users'."""
    Tiling.fit = function  # type: ignore[method-assign]
