"""launch.rl as a command: what it says of a run that cannot be done again."""

from experiments.catalogue import load
from moe_jax.studies import Ledger
from moe_jax.studies.ledger import Run
from tests.launch.here import call


def test_a_run_that_was_refused_says_why(tmp_path):
    """It is not tried again, and the exit code is that of a failure."""
    experiment = load("e7b:smoke")
    seed = experiment.design.seeds[0]
    ledger = Ledger.open(tmp_path, experiment.design)
    ledger.append(Run({"model": "moe", "arm": "clean"}, seed, "failed", error="NonFinite: update 3 was refused"))
    done = call("rl", "--experiment=e7b:smoke", f"--workdir={tmp_path}")
    assert done.returncode == 1 and f"moe, clean, seed {seed}: NonFinite: update 3 was refused" in done.stdout, done.stderr
