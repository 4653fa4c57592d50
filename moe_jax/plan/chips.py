"""The accelerators that a plan knows, with the figures that their makers publish.

Each is one device as jax counts them: a chip, or half of one where libtpu shows two to a chip (v4, tpu7x). Sources: the system architecture pages of Google
Cloud TPU (links: half of the published two-way figure) and NVIDIA's data sheets of the SXM boards (dense rates).
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. `usable` is what XLA may fill of it, where compiling has said so: 15.75 of 16 GiB on a v5e."""

    name: str
    memory: float  # bytes of HBM
    flops: float  # per second, bfloat16, dense
    bandwidth: float  # of HBM, bytes per second
    links: float  # to its neighbours, all together, one way, bytes per second
    vector: (
        float  # float32 operations per second outside the matrix unit; for TPUs an estimate from lanes and clock, which nobody publishes
    )
    exact: float  # how many times slower a float32 product of full precision is: bfloat16 passes of a TPU, CUDA cores of a GPU
    platform: str = "tpu"
    usable: float = 0.984  # share of `memory` that a program may take

    @property
    def limit(self) -> float:
        """Bytes that a program may take."""
        return self.memory * self.usable


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 16 * GIB, 137.5e12, 614e9, 75e9, 2.2e12, 6),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 100e9, 6e12, 6),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 300e9, 14e12, 6),
        Chip("v6e", 32 * GIB, 918e12, 1640e9, 224e9, 12e12, 6),
        Chip("tpu7x", 96 * GIB, 1153e12, 3690e9, 300e9, 12e12, 6),
        Chip("h100", 80e9, 989e12, 3350e9, 450e9, 67e12, 15, "gpu", 0.92),
        Chip("h200", 141e9, 989e12, 4800e9, 450e9, 67e12, 15, "gpu", 0.92),
        Chip("b200", 180e9, 2250e12, 8000e9, 900e9, 75e12, 30, "gpu", 0.92),
    )
}
