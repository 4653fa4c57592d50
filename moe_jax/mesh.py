"""The device mesh: which axes there are, how long each is, and which logical axis is laid over which. The only file that asks for devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from moe_jax.axes import Rules
from moe_jax.errors import ConfigError

# Batch over data, experts over expert, heads and widths over tensor, parameters' model width over fsdp.
DEFAULT_RULES = Rules(
    (
        ("batch", "data"),
        ("experts", "expert"),
        ("embed", "fsdp"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("mlp", "tensor"),
        ("vocab", "tensor"),
    )
)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes; their product must be the number of devices used."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The Mesh over `devices` (default: all); raises when the sizes do not multiply to their number."""
        devices = list(jax.devices() if devices is None else devices)
        sizes = dataclasses.astuple(self)
        if math.prod(sizes) != len(devices):
            raise ConfigError(f"mesh {dataclasses.asdict(self)} needs {math.prod(sizes)} devices, there are {len(devices)}")
        names = tuple(field.name for field in dataclasses.fields(self))
        # Auto, not jax's default Explicit: the code under jit lets the compiler place what no rule names.
        return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)
