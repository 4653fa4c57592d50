"""A run on several processes: the answers, routes and numbers of one, and its checkpoint read by one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.rl import loop
from moe_jax.train.writers import read_metrics
from tests.rl.small import NOISY, TASK, program_of, saved

ROOT = Path(__file__).parents[2]
FLAGS = "--xla_backend_optimization_level=0"
SAME = 1e-5  # sums over devices have another order


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes, devices, mesh", [(2, 2, "data=2,expert=2"), (2, 1, "fsdp=2")])
def test_several_processes_are_one_run(processes, devices, mesh, tmp_path):
    job = [sys.executable, "-m", "launch.local", f"--processes={processes}", f"--devices_per_process={devices}", "--", sys.executable]
    command = [*job, "-m", "tests.rl.processes_job", f"--folder={tmp_path}/several", f"--mesh={mesh}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": FLAGS}, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr
    loop.run(NOISY, program_of(NOISY), TASK, tmp_path / "one")
    rows, wanted = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("several", "one"))
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if not name.startswith("seconds/"):
                assert row[name] == pytest.approx(other[name], rel=SAME, abs=SAME), (name, row["step"])
    assert any(row.get("optimizer/gradient_norm", 0) > 0.01 for row in rows), "nothing was learned, so nothing was compared"
    assert any(row.get("route/changed_experts", 0) > 0 for row in rows), "the noise changed no expert"
    one, several = (loop._Loop(NOISY, program_of(NOISY), TASK) for _ in range(2))
    assert one.restore(saved(tmp_path / "one", NOISY)) == several.restore(saved(tmp_path / "several", NOISY)) == NOISY.updates
    assert (one.batch["tokens"] == several.batch["tokens"]).all()
    for left, right in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(several.state.params), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
