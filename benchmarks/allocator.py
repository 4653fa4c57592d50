"""One allocator setting for every benchmark: memory that is freed stays with the process, in huge pages.

On a CPU each call gets fresh buffers, and glibc gives large ones back to the system at once: the next call faults every page in again (a quarter of
the time of a small program). One arena that keeps what it has leaves none of those faults. glibc reads this at start-up, so a script starts itself again.
"""

import os
import sys

TUNABLES = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "arena_max=1", "mmap_max=0", "top_pad=268435456", "trim_threshold=17179869184")  # bytes: 256 MiB, 16 GiB
)


def restart_with_settings() -> None:
    """Replaces this process by the same command under TUNABLES; returns when it already runs so, or where there is no glibc."""
    if sys.platform == "linux" and os.environ.get("GLIBC_TUNABLES") != TUNABLES:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": TUNABLES})
