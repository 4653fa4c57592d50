"""launch.plan as a command: what it prints and writes, its exit codes, bad input in one line."""

import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.plan_run import Request, command
from moe_jax.config_tools import apply_overrides
from moe_jax.mesh import MeshSpec
from moe_jax.model import ModelConfig
from moe_jax.plan.costs import preset_run
from tests.launch.here import call

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def plan(tmp_path):
    """The command, with nothing in its cache of plans."""
    return lambda *flags: call("plan", *flags, MOE_JAX_CACHE=str(tmp_path / "cache"))


def started(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, which has as many CPU devices as the topology has chips."""
    argv = [sys.executable, "-m", "launch.plan", *flags]
    return subprocess.run(argv, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_a_plan_of_gpus(plan, tmp_path):
    """The text has every part, the page and the JSON file are there."""
    done = plan(
        "--preset=tiny", "--topology=h100:4", "--mesh=expert=4", "--noise=all=relative:0.05", "--remat=full", f"--workdir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "FITS",
        "Memory model of train",
        "Noise adds: train",
        "Collectives",
        "Roofline",
        "chip-hours",
        "launch.train --preset=tiny --mesh=expert=4",
    ):
        assert part in done.stdout
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["fits"] and facts["mesh"]["expert"] == 4 and facts["clean"]["train"]["collectives"]["all-gather"][0] > 0
    assert facts["config"]["model"]["remat"] == "full" and (tmp_path / "plan.html").read_text().startswith("<!doctype html>")


def test_a_dry_run_compiles_nothing_and_says_why():
    done = started("--preset=qwen3_30b_a3b", "--topology=h100:64", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "meshes" in done.stdout and "traffic with remat=" in done.stdout and "compiling" not in done.stderr


@pytest.mark.parametrize("mesh", [MeshSpec(data=4), MeshSpec()])
def test_the_command_is_one_that_a_shell_reads_as_it_is_meant(mesh):
    """A list is a value of one --set, and the settings make the model that was planned. A mesh of one device, which none names, is left out."""
    config = preset_run("tiny", 4)
    config = dataclasses.replace(config, model=config.model.replace(dense_layers=(0, 1)))
    plan = SimpleNamespace(config=config, mesh=mesh, noise="")
    argv = shlex.split(command(plan, Request("h100:4", "tiny", None, "", None, None, None, "", None)))
    sets = [value for flag, value in itertools.pairwise(argv) if flag == "--set"]
    assert all(word.startswith("--") or before == "--set" for before, word in itertools.pairwise(argv[2:]))
    start = dataclasses.replace(config, model=ModelConfig.preset("tiny"))
    assert apply_overrides(start, sets).model == config.model
    assert [MeshSpec.parse(word.partition("=")[2]) for word in argv if word.startswith("--mesh")] == [mesh] * (mesh.size > 1)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset=tiny", "--topology=v9:4x4"], "unknown topology 'v9:4x4'"),
        (["--preset=tiny", "--topology=h100:8", "--mesh=expert=4"], "mesh expert=4 has 4 devices, topology h100:8 has 8"),
        (["--preset=tiny", "--topology=h100:8", "--mesh=expert=4", "--dry_run"], "mesh expert=4 has 4 devices, topology h100:8 has 8"),
        (["--preset=tiny", "--topology=h100:4", "--mesh=exprt=4"], "did you mean 'expert'"),
        (["--experiment=e7b:mini", "--topology=h100:8", "--seq=64"], "leave --seq out"),
        (["--preset=tiny", "--topology=h100:4", "--seq=65"], "--seq=65 is longer than the 64 positions of tiny"),
        (["--preset=tiny", "--topology=h100:4", "--steps=trian"], "unknown step trian"),
        (["--preset=tiny", "--topology=h100:4", "--noise=routr=relative:1"], "router"),
        (["--preset=tniy", "--topology=h100:4"], "did you mean 'tiny'"),
        (["--topology=h100:4"], "name one of --preset and --experiment"),
    ],
)
def test_bad_input_is_one_line(plan, flags, words):
    done = plan(*flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1 and "Traceback" not in done.stderr


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_a_tpu_topology_says_how_to_get_it(plan):
    done = plan("--preset=tiny", "--topology=v5e:4x4")
    assert done.returncode == 2 and "pip install 'moe-jax[plan]'" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")
def test_a_small_model_compiles_for_a_slice_of_tpus(tmp_path):
    flags = ("--preset=qwen3_tiny", "--topology=v5e:2x2", "--mesh=expert=4", "--noise=all=relative:0.05", "--steps=all")
    done = started(*flags, MOE_JAX_CACHE=str(tmp_path))
    assert done.returncode == 0 and "FITS" in done.stdout, done.stderr
    assert "train +" in done.stdout and "+0 collectives" in done.stdout
