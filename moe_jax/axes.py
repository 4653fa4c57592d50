"""What a parameter is, said once: its shape, the names of its axes, its role, and how it starts.

From a `ParamSpec` come the initial value, the sharding, the optimizer's label and dimension numbers, the freeze and the parameter count.

Axis letters used in the library:
B batch, S sequence, T = B*S tokens, D model width, E experts, K experts chosen per token, F expert width, L layers, H heads, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.errors import ConfigError, check_known

# What a parameter is for. The optimizer, the freezes and the noise are chosen by role, never by a substring of a path or by ndim.
ROLES = ("embedding", "head", "norm", "bias", "hidden", "expert", "router", "selection_bias")

# Axes along which a stack of parameters repeats the same matrix: batch axes of everything that treats a parameter as a matrix.
STACK_AXES = ("layers", "experts")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The declaration of one parameter.

    shape: sizes of the axes. axes: their logical names, same length. role: one of `ROLES`.
    init: "normal" (standard deviation `scale`), "ones" or "zeros". dtype: of the stored parameter.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: str
    init: str = "normal"
    scale: float = 0.02
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ConfigError(f"a parameter of shape {self.shape} needs {len(self.shape)} axis names, got {self.axes}")
        check_known("role", self.role, ROLES)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def stacked(self, count: int) -> "ParamSpec":
        """The same parameter for `count` layers, with a leading layer axis."""
        return dataclasses.replace(self, shape=(count, *self.shape), axes=("layers", *self.axes))

    def initial(self, key: jax.Array) -> jax.Array:
        """The starting value, drawn from `key`; float32 draws, cast to `dtype`."""
        if self.init == "normal":
            return (self.scale * jax.random.normal(key, self.shape, jnp.float32)).astype(self.dtype)
        if self.init == "ones":
            return jnp.ones(self.shape, self.dtype)
        if self.init == "zeros":
            return jnp.zeros(self.shape, self.dtype)
        raise ConfigError(f"unknown initialiser {self.init!r}; known: normal, ones, zeros")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axis, or axes together, each logical axis is laid over; a logical axis that is not named is replicated."""

    table: tuple[tuple[str, str | tuple[str, ...]], ...] = ()

    def axes_of(self, axis: str) -> tuple[str, ...]:
        """The mesh axes of a logical one."""
        found = dict(self.table).get(axis, ())
        return (found,) if isinstance(found, str) else found

    def partition(self, axes: tuple[str, ...], shape: tuple[int, ...], mesh_shape: Mapping[str, int]) -> PartitionSpec:
        """The PartitionSpec of an array with logical `axes`; refuses a mesh axis used twice and a size that does not divide.

        Mesh axes of size 1 are left out.
        """
        used, parts = {}, []
        for axis, size in zip(axes, shape, strict=True):
            over = tuple(name for name in self.axes_of(axis) if mesh_shape.get(name, 1) > 1)
            for name in over:
                if name in used:
                    raise ConfigError(f"logical axes {used[name]!r} and {axis!r} both map to mesh axis {name!r}; change one rule")
                used[name] = axis
            count = math.prod(mesh_shape[name] for name in over)
            if size % count:
                names = " x ".join(f"{name}={mesh_shape[name]}" for name in over)
                raise ConfigError(
                    f"axis {axis!r} of size {size} does not divide over the mesh axes {names}; choose mesh sizes that divide it"
                )
            parts.append(over[0] if len(over) == 1 else over or None)
        return PartitionSpec(*parts)
