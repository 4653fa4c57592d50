"""Eight CPU devices and no accelerator, set before jax is imported anywhere, for the commands that tests start too.

Tests compile far more than they run, so code is compiled unoptimised, and what one test (or an earlier session) compiled is read back by the next.
XLA_FLAGS=--xla_backend_optimization_level=0 takes the emitters that users get; a level that is given is left alone.
"""

import gc
import os
import platform
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in FLAGS:
    FLAGS += " --xla_backend_optimization_level=0"
    if platform.machine() in ("x86_64", "AMD64"):
        # Older emitters, in a third less time. They contract a * b + c within what was fused, so that a sum would depend on the program around it;
        # AVX has no instruction for that.
        FLAGS += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_max_isa=AVX"
os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Shapes and types in the signatures of pure functions are checked while tests run. Not of classes that jax takes apart and puts together with other things
# in the place of arrays, and so of no module that is mostly these.
CHECKED = ["products", "noise.draws", "noise.kinds"]
install_import_hook([f"moe_jax.{module}" for module in CHECKED], "beartype.beartype")

from tests import few_sizes  # noqa: E402

few_sizes.use(few_sizes.few)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """The tests of meshes would pass on one device without testing anything."""
    assert jax.device_count() == 8


@pytest.fixture(scope="module", autouse=True)
def room_for_code():
    """Compiled programs keep pieces of memory mapped, of which Linux gives a process 65,530; a compilation beyond that crashes it."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()
