"""The settings of a process that every benchmark runs under; both are read at start-up, so a script starts itself again.

Memory: what is freed stays with the process, in huge pages. On a CPU each call gets fresh buffers, and glibc gives large ones back to the system at once:
the next call faults every page in again (a quarter of the time of a small program). One arena that keeps what it has leaves none of those faults.
With several CPU devices in one process glibc seldom finds the room that it freed; jemalloc does, and is taken where it is (apt install libjemalloc2, or
JEMALLOC=PATH; JEMALLOC=no leaves it), told to reuse room however much larger it is than what is asked for (lg_extent_max_active_fit): by default it may ask
the system for more instead (a fifth more memory for the step of benchmarks/step.py).
Vectors: XLA uses half the width of an AVX-512 unit unless told; draws of noise, all arithmetic, gain most (3 % of a noisy step, nothing on a clean one).
"""

import ctypes.util
import os
import sys

TUNABLES = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "arena_max=1", "mmap_max=0", "top_pad=268435456", "trim_threshold=17179869184")  # bytes: 256 MiB, 16 GiB
)
KEEPING = "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0,narenas:1,thp:always,lg_extent_max_active_fit:63"
WIDE_VECTORS = "--xla_cpu_prefer_vector_width=512"


def jemalloc() -> str | None:
    """The library's name or path, where there is one that may be taken."""
    asked = os.environ.get("JEMALLOC") or ctypes.util.find_library("jemalloc")
    return None if asked == "no" else asked


def restart_with_settings() -> None:
    """Replaces this process by the same command under both settings; returns when it already runs so, or where there is no glibc."""
    flags, library = os.environ.get("XLA_FLAGS", ""), jemalloc()
    memory = {"LD_PRELOAD": library, "MALLOC_CONF": KEEPING} if library else {"GLIBC_TUNABLES": TUNABLES}
    if sys.platform == "linux" and (any(os.environ.get(name) != value for name, value in memory.items()) or WIDE_VECTORS not in flags):
        settings = {**memory, "XLA_FLAGS": f"{flags} {WIDE_VECTORS}".strip()}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def described() -> str:
    """The settings that this process runs under, for a benchmark's first line."""
    names = ("LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES", "XLA_FLAGS")
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
