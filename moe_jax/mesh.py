"""The device mesh: which axes there are, how long each is, and which logical axis is laid over which. The only file that asks for devices.

N devices in all. Axes of a mesh, from the one whose neighbours are farthest apart: data, fsdp, expert, tensor.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.axes import Rules
from moe_jax.errors import ConfigError, nearest

AXES = ("data", "fsdp", "expert", "tensor")

# The batch over every axis but tensor, so that nothing is computed twice; experts over expert and tensor together, since one expert is too narrow to be
# cut; heads, widths and words over tensor; each parameter's model width over fsdp.
DEFAULT_RULES = Rules(
    (
        ("batch", ("data", "fsdp", "expert")),
        ("experts", ("expert", "tensor")),
        ("embed", "fsdp"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("mlp", "tensor"),
        ("vocab", "tensor"),
    )
)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes; their product must be the number of devices.

    slices: over how many slices (groups of devices that a slower network joins) the data axis goes; each holds data / slices of it. The other axes stay
    inside one slice.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"mesh axis {name} must be a whole number of at least 1, got {size!r}")
        if self.data % self.slices:
            raise ConfigError(
                f"the data axis of size {self.data} does not divide over {self.slices} slices; make data a multiple of slices"
            )

    @classmethod
    def parse(cls, text: str) -> "MeshSpec":
        """The spec that a text such as "data=2,expert=4" names. Raises ConfigError."""
        known, sizes = [field.name for field in dataclasses.fields(cls)], {}
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, size = part.partition("=")
            if name not in known:
                raise ConfigError(f"unknown mesh axis {name!r}{nearest(name, known)} in {text!r}; known: {', '.join(known)}")
            if name in sizes or not size.isdecimal():
                raise ConfigError(f"cannot read mesh {text!r} at {part!r}; write each axis once, as in data=2,expert=4")
            sizes[name] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items() if size > 1) or "one device"

    @property
    def size(self) -> int:
        return math.prod(getattr(self, name) for name in AXES)

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The Mesh over `devices` (default: all, of every process); raises ConfigError when the sizes do not multiply to their number."""
        devices = list(jax.devices() if devices is None else devices)
        if self.size != len(devices):
            raise ConfigError(
                f"mesh {self} needs {self.size} devices, there are {len(devices)}; change an axis so that the sizes multiply to that"
            )
        sizes = tuple(getattr(self, name) for name in AXES)
        # Auto, not jax's default Explicit: the code under jit lets the compiler place what no rule names.
        kinds = (AxisType.Auto,) * len(AXES)
        if self.slices == 1:
            try:
                return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
            except NotImplementedError as error:  # a slice's network is a torus, of which an axis must take whole dimensions
                raise ConfigError(f"mesh {self} does not fit the network between the devices: {error}") from error
        outer = tuple(self.slices if name == "data" else 1 for name in AXES)
        inner = tuple(size // parts for size, parts in zip(sizes, outer, strict=True))
        by_process = getattr(devices[0], "slice_index", None) is None  # only TPUs say which slice they are in; elsewhere a host is one
        try:
            grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, process_is_granule=by_process)
        except ValueError as error:
            raise ConfigError(f"mesh {self} does not fit the slices that there are: {error}") from error
        return Mesh(np.asarray(grid), AXES, axis_types=kinds)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one program's arrays lie on a mesh. rows: the axes over which its sequences are divided; tokens: those over which a flat [T, ...] is."""

    mesh: Mesh
    rules: Rules
    rows: tuple[str, ...]

    @classmethod
    def of(cls, mesh: Mesh, batch: int, rules: Rules = DEFAULT_RULES) -> "Layout":
        """The layout for batches of `batch` sequences: over all the batch's axes, or all but expert, where the sequences are then repeated.

        Raises ConfigError, with the numbers, where neither divides.
        """
        sizes = dict(mesh.shape)
        axes = tuple(axis for axis in rules.axes_of("batch") if sizes.get(axis, 1) > 1)
        fewer = tuple(axis for axis in axes if axis != "expert")
        for rows in (axes, fewer):
            if batch % math.prod(sizes[axis] for axis in rows) == 0:
                return cls(mesh, rules, rows)
        split = " x ".join(f"{axis}={sizes[axis]}" for axis in fewer)
        hint = "change batch_size, or eval_batch if that is it, or the mesh"
        raise ConfigError(f"a batch of {batch} sequences does not divide over the mesh axes {split}; {hint}")

    @property
    def tokens(self) -> tuple[str, ...]:
        return (*self.rows, *(axis for axis in ("tensor",) if self.size(axis) > 1 and axis not in self.rows))

    @property
    def all_axes(self) -> tuple[str, ...]:
        """The axes that one run is divided over, those of size 1 left out."""
        return tuple(axis for axis in AXES if self.size(axis) > 1)

    def size(self, *axes: str) -> int:
        return math.prod(dict(self.mesh.shape).get(axis, 1) for axis in axes)

    def spec(self, *axes: str | None, shape: tuple[int, ...] | None = None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes ("batch" is divided over `rows`); with its shape, refused where it does not divide."""
        rules = Rules((*((name, over) for name, over in self.rules.table if name != "batch"), ("batch", self.rows)))
        sizes = dict(self.mesh.shape)
        return rules.partition(tuple(axis or "" for axis in axes), shape or (0,) * len(axes), sizes)

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """x, laid out as its logical axes say."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*axes, shape=x.shape)))

    def gathered(self, params: Any, specs: Any) -> Any:
        """Parameters as a layer computes with them: whole along fsdp, over which they are stored in parts. A backward pass gathers them again."""
        if self.size("fsdp") == 1:
            return params
        rules = Rules(tuple((name, tuple(axis for axis in self.rules.axes_of(name) if axis != "fsdp")) for name, _ in self.rules.table))

        def gather(array, spec):
            whole = NamedSharding(self.mesh, rules.partition(spec.axes, spec.shape, dict(self.mesh.shape)))
            return jax.lax.with_sharding_constraint(array, whole)

        return jax.tree.map(gather, params, specs)

    def by_rows(self, function: Callable) -> Callable:
        """function(x [T, ...], *static) -> arrays [T, ...] as each device computes it on its own rows."""
        rows = PartitionSpec(self.tokens or None)
        return lambda x, *static: self.mapped(lambda x: function(x, *static), (rows,), rows)(x)

    def mapped(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` of each device's parts. What differs between devices is checked (check_vma): a sum that was forgotten is an error, not a wrong number."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)
