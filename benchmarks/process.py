"""The settings of a process that every benchmark runs under; both are read at start-up, so a script starts itself again.

Memory: what is freed stays with the process, in huge pages. On a CPU each call gets fresh buffers, and glibc gives large ones back to the system at once:
the next call faults every page in again (a quarter of the time of a small program). One arena that keeps what it has leaves none of those faults.
Vectors: XLA uses half the width of an AVX-512 unit unless told; draws of noise, all arithmetic, gain most (3 % of a noisy step, nothing on a clean one).
"""

import os
import sys

TUNABLES = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "arena_max=1", "mmap_max=0", "top_pad=268435456", "trim_threshold=17179869184")  # bytes: 256 MiB, 16 GiB
)
WIDE_VECTORS = "--xla_cpu_prefer_vector_width=512"


def restart_with_settings() -> None:
    """Replaces this process by the same command under both settings; returns when it already runs so, or where there is no glibc."""
    flags = os.environ.get("XLA_FLAGS", "")
    if sys.platform == "linux" and (os.environ.get("GLIBC_TUNABLES") != TUNABLES or WIDE_VECTORS not in flags):
        settings = {"GLIBC_TUNABLES": TUNABLES, "XLA_FLAGS": f"{flags} {WIDE_VECTORS}".strip()}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def described() -> str:
    """The settings that this process runs under, for a benchmark's first line."""
    return " ".join(f"{name}={os.environ.get(name)}" for name in ("GLIBC_TUNABLES", "XLA_FLAGS"))
