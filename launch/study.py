"""Runs a declared study, or what is left of it: the same command again goes on where it stopped, and does nothing when all is done.

  python -m launch.study --experiment=noise_factorial:quick --workdir=runs/quick
  python -m launch.study --experiment=noise_factorial:seed --dry_run
  python -m launch.study --experiment=noise_factorial:seed --lanes=8 --workdir=runs/seed

Prints the results, the paired contrasts and the report's path. --dry_run prints what would run, its size, schedule and cost, and writes
nothing. Exit codes: 0 done, 1 a run failed, 2 usage or config, 3 data, 4 checkpoint, 75 stopped and resumable.
"""

import sys
from pathlib import Path

from absl import flags

from launch.common import StopRequests, run
from moe_jax.errors import ConfigError

_EXPERIMENT = flags.DEFINE_string("experiment", None, "Which study: NAME:PRESET, e.g. noise_factorial:quick.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The study's folder: ledger, metrics, report. Needed unless --dry_run.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what would run and what it would cost; write nothing.")
_RETRY = flags.DEFINE_boolean("retry_failed", False, "Run again what met a non-finite value before.")
_LANES = flags.DEFINE_integer(
    "lanes",
    1,
    "How many runs go at a time, each on a device of its own (with fewer devices, several on each), with the same numbers as one after the other. "
    "A study that was stopped goes on with any number.",
    lower_bound=1,
)


def main(argv: list[str]) -> int:
    """Runs the study, builds the report, prints both."""
    from experiments.catalogue import load

    experiment = load(_EXPERIMENT.value)
    if _DRY_RUN.value:
        from launch.preview import preview

        print(preview(experiment))
        return 0
    if not _WORKDIR.value:
        raise ConfigError("--workdir is needed: the folder that the study's ledger and report go into")
    return _run(experiment, Path(_WORKDIR.value))


def _run(experiment, workdir: Path) -> int:
    from moe_jax.studies import Ledger, report
    from moe_jax.studies.run import describe_devices, run_study, todo
    from moe_jax.train.run_folder import RunFolder

    with RunFolder(workdir) as folder, StopRequests() as stop:
        ledger = Ledger.open(workdir, experiment.design)
        waiting = todo(ledger, _RETRY.value)
        if waiting:
            for change in folder.start({"experiment": experiment.name, "design": experiment.design}, sys.argv, describe_devices()):
                print(f"since the last launch: {change}", file=sys.stderr)
            print(
                f"{experiment.name}: {len(waiting)} of {len(experiment.design.runs())} runs to do on {describe_devices()}; {experiment.cost}"
            )
            outcome = run_study(experiment, workdir, stop=lambda: bool(stop()), retry_failed=_RETRY.value, lanes=_LANES.value)
            words = {"train": "training", "evaluate": "evaluation", "init": "initialisation"}
            programs = ", ".join(f"{outcome.compiled[name]} for {word}" for name, word in words.items())
            print(f"{outcome.done} runs finished, {outcome.failed} failed in {outcome.seconds:.0f} s; programs compiled: {programs}\n")
        else:
            print(f"{experiment.name}: nothing to do, all {len(experiment.design.runs())} runs are in the ledger")
        paths = report.build(workdir)
        ledger = Ledger.read(workdir)
    print(report.console_table(ledger.design, ledger.runs()))
    print(f"\nreport: {paths.html}")
    return 1 if ledger.missing() else 0


if __name__ == "__main__":
    run(main)
