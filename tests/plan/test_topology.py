"""Names of topologies, what they need in the environment, and the lock that lets one plan compile at a time."""

import os
import subprocess
import sys
import threading
import time

import jax
import pytest

from moe_jax.errors import ConfigError, Unsupported
from moe_jax.plan import topology as module
from moe_jax.plan.topology import compiling_alone, environment, parse, topology


@pytest.mark.parametrize(
    "name, parsed",
    [("v5e:8x8", ("v5e", (8, 8))), ("v5p:4x4x4", ("v5p", (4, 4, 4))), ("h100:8", ("h100", (8,))), ("attached", ("attached", ()))],
)
def test_names(name, parsed):
    assert parse(name) == parsed


@pytest.mark.parametrize(
    "name, words",
    [
        ("v5litepod:8x8", "did you mean 'v5e'|unknown topology 'v5litepod:8x8'.*v5e:8x8"),
        ("v6:8x8", "did you mean 'v6e'"),
        ("v5e", "needs 2 sizes after the colon, as in v5e:4x4"),
        ("v5p:8x8", "needs 3 sizes after the colon, as in v5p:4x4x4"),
        ("v5e:0x8", "needs 2 sizes"),
        ("h100:", "needs 1 size after the colon, as in h100:8"),
        ("h100:2x4", "needs 1 size"),
        ("attached:8", "unknown topology 'attached:8'"),
    ],
)
def test_bad_names_are_refused_with_the_known_ones(name, words):
    with pytest.raises(ConfigError, match=words) as error:
        parse(name)
    assert "v5p:4x4x4" in str(error.value) and "\n" not in str(error.value)


def test_the_environment_makes_no_tpu_be_looked_for():
    assert environment("v5e:8x8")["JAX_PLATFORMS"] == "cpu" and environment("attached") == {}
    assert "device_count=64" in environment("h100:64")["XLA_FLAGS"]


def test_gpus_are_stood_in_for_by_the_cpu_devices_that_there_are():
    found = topology("h100:8")
    assert found.size == 8 and found.platform == "gpu" and found.stand_in and found.chip is not None and found.chip.name == "h100"
    with pytest.raises(ConfigError, match="needs 512 CPU devices to stand in, there are 8"):
        topology("h100:512")


def test_what_is_attached_has_no_figures_here():
    found = topology("attached")
    assert found.devices == tuple(jax.devices()) and found.chip is None and found.platform == "cpu"


def test_a_missing_libtpu_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(Unsupported, match=r"pip install 'moe-jax\[plan\]'"):
        topology("v5e:4x4")


def test_each_user_has_a_lock_of_his_own():
    """A file of another user in /tmp cannot be opened."""
    assert str(os.getuid()) in module.LOCK.split(".")


def test_a_second_plan_waits_for_the_first(monkeypatch, tmp_path):
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    code = (
        f"import time, tempfile; tempfile.gettempdir = lambda: {str(tmp_path)!r}\n"
        "from moe_jax.plan.topology import compiling_alone\n"
        "with compiling_alone():\n    print('in', flush=True); time.sleep(60)"
    )
    said: list[str] = []
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        threading.Timer(0.5, other.kill).start()
        began = time.monotonic()
        with compiling_alone(said.append):
            waited = time.monotonic() - began
    assert waited > 0.3 and said == [f"another plan is compiling on this machine (process {other.pid}); waiting for it"]
