"""The devices that a plan compiles for: a slice of TPUs through libtpu, GPUs that CPU devices stand in for, or what is attached.

Nothing of it needs the hardware. libtpu holds one lock on a machine, so that two plans compile one after the other.
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from moe_jax.errors import ConfigError, Unsupported, nearest
from moe_jax.plan.chips import CHIPS, Chip

# Slices that libtpu has described and compiled for; it knows others of these kinds.
KNOWN = "v4:4x4x4 v5e:4x4 v5e:8x8 v5e:16x16 v5p:2x2x2 v5p:4x4x4 v5p:8x8x4 v6e:4x4 v6e:8x8 v6e:16x16 tpu7x:4x4x4".split()
LOCK = f"moe_jax_plan.{os.getuid()}.lock"  # of one user: another may not open a file of the first in /tmp


@dataclasses.dataclass(frozen=True)
class Topology:
    """devices: what a mesh is built of. chip: their figures; None where the attached device is none that is known."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    platform: str  # that programs are traced for
    stand_in: bool = False  # CPU devices in the place of others: what the compiler says of memory is not theirs

    @property
    def size(self) -> int:
        return len(self.devices)


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """("v5e", (8, 8)) of v5e:8x8, ("h100", (8,)) of h100:8, ("attached", ()). Raises ConfigError, with the known names."""
    kind, _, shape = name.partition(":")
    known = f"known: {', '.join(KNOWN)}; GPUs: {', '.join(f'{chip.name}:N' for chip in CHIPS.values() if chip.platform == 'gpu')}; attached"
    if kind == "attached" and not shape:
        return kind, ()
    if kind not in CHIPS:
        raise ConfigError(f"unknown topology {name!r}{nearest(kind, [*CHIPS, 'attached'])}; {known}")
    dimensions = 1 if CHIPS[kind].platform == "gpu" else 2 if kind in ("v5e", "v6e") else 3
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != dimensions - 1:
        form = "x".join("48"[:1] * dimensions) if dimensions > 1 else "8"
        raise ConfigError(
            f"topology {name!r} needs {dimensions} size{'s' * (dimensions > 1)} after the colon, as in {kind}:{form}; {known}"
        )
    return kind, tuple(map(int, shape.split("x")))


def environment(name: str) -> dict[str, str]:
    """What must stand in the environment before jax looks for devices."""
    kind, shape = parse(name)
    if kind == "attached":
        return {}
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    quiet |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # a second plan waits at our lock with a word, where libtpu's own would end it
    if CHIPS[kind].platform == "tpu":
        return quiet
    return quiet | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={math.prod(shape)}".strip()}


def topology(name: str) -> Topology:
    """The devices of that name, abstract or attached. Raises ConfigError for a name that is not known, Unsupported where libtpu is missing."""
    kind, shape = parse(name)
    if kind == "attached":
        devices = jax.devices()
        return Topology(name, tuple(devices), _chip_of(devices), devices[0].platform)
    chip = CHIPS[kind]
    if chip.platform == "tpu":
        return Topology(name, tuple(_described(name).devices), chip, "tpu")
    devices = jax.devices("cpu")
    if len(devices) < math.prod(shape):
        raise ConfigError(
            f"topology {name} needs {math.prod(shape)} CPU devices to stand in, there are {len(devices)}: jax was asked for devices before; "
            f"start with XLA_FLAGS=--xla_force_host_platform_device_count={math.prod(shape)}"
        )
    return Topology(name, tuple(devices[: math.prod(shape)]), chip, "gpu", stand_in=True)


def _described(name: str) -> Any:
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise Unsupported(
            f"topology {name} needs libtpu, which is not installed: pip install 'moe-jax[plan]' (an extra of its own, since every jax process prints "
            "its warnings); GPUs need none (--topology=h100:8)"
        ) from None
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # libtpu's own error types
        why = str(error).splitlines()[0]
        raise ConfigError(f"libtpu does not know the topology {name!r} ({why}); known: {', '.join(KNOWN)}") from None


def _chip_of(devices: Sequence[Any]) -> Chip | None:
    kind = devices[0].device_kind.lower().replace("nvidia ", "").replace("tpu ", "")
    names = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}
    for known, name in [*names.items(), *((name, name) for name in CHIPS)]:
        if kind == known or kind.startswith(f"{known} "):
            return CHIPS[name]
    return None


@contextlib.contextmanager
def compiling_alone(say: Any = lambda text: None) -> Iterator[None]:
    """Holds the user's lock on compiling for TPUs; `say` gets a line when another plan has it, which is waited for."""
    path = Path(tempfile.gettempdir()) / LOCK
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another plan is compiling on this machine (process {file.read().strip() or 'unknown'}); waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield
