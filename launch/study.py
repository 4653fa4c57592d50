"""Runs a declared study, or what is left of it: the same command again goes on where it stopped, and does nothing when all is done.

  python -m launch.study --experiment=noise_factorial:quick --workdir=runs/quick
  python -m launch.study --experiment=noise_factorial:seed --dry_run
  python -m launch.study --experiment=noise_factorial:seed --lanes=8 --workdir=runs/seed
  python -m launch.study --experiment=noise_factorial:quick --set optimizer.router=frozen --workdir=runs/frozen
  python -m launch.study --experiment=qwen3_30b:mini --workdir=runs/qwen3_mini
  python -m launch.study --experiment=qwen3_30b.sensitivity:full --mesh=fsdp=8 --workdir=runs/sensitivity

Prints the results, the paired contrasts and the report's path. A module of several studies runs them one after the other, each into a folder of its own name in
the workdir, where they share a checkpoint; NAME.STUDY:PRESET is one of them. --dry_run prints what would run, its size, schedule and cost, and writes
nothing. Exit codes: 0 done, 1 a run failed, 2 usage or config, 3 data, 4 checkpoint, 75 stopped and resumable.
"""

import os
import sys
from pathlib import Path

from absl import flags

from launch.common import Hosts, MeshFlag, StopRequests, define_set, run
from moe_jax.errors import ConfigError

_EXPERIMENT = flags.DEFINE_string("experiment", None, "Which study: NAME:PRESET, e.g. noise_factorial:quick.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The study's folder: ledger, metrics, report. Needed unless --dry_run.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what would run and what it would cost; write nothing.")
_RETRY = flags.DEFINE_boolean("retry_failed", False, "Run again what met a non-finite value before.")
_LANES = flags.DEFINE_integer(
    "lanes",
    1,
    "How many runs go at a time, each on a device of its own (on a CPU there are made as many as lanes; with fewer devices, several on each), with the "
    "same numbers as one after the other. A study that was stopped goes on with any number. As many lanes as cores make small models 1.6 times as fast.",
    lower_bound=1,
)
_MESH, _HOSTS = MeshFlag(), Hosts()
_SET = define_set()


def main(argv: list[str]) -> int:
    """Runs the studies, builds their reports, prints both."""
    from experiments.catalogue import load_all

    def declared() -> dict:
        return {name: experiment.changed(_SET.value) for name, experiment in load_all(_EXPERIMENT.value).items()}

    if _MESH.check() and _LANES.value > 1:
        raise ConfigError(
            f"--mesh divides each run over devices and --lanes={_LANES.value} gives each run a device of its own: leave one out"
        )
    if _DRY_RUN.value:
        from launch.preview import preview

        print("\n\n".join(preview(experiment) for experiment in declared().values()))
        return 0
    _device_per_lane(_LANES.value)
    _HOSTS.start()
    experiments = declared()
    if not _WORKDIR.value:
        raise ConfigError("--workdir is needed: the folder that the study's ledger and report go into")
    folder, mesh = Path(_WORKDIR.value), _MESH.build()
    return max([_run(experiment, folder / name, folder, mesh) for name, experiment in experiments.items()])


def _device_per_lane(lanes: int) -> None:
    """On a CPU each lane gets a device, with which its small products run beside those of the others; XLA_FLAGS, if they say how many, have the last word."""
    import jax

    if lanes > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", lanes)


def _run(experiment, workdir: Path, shared: Path, mesh) -> int:
    from moe_jax.distributed import first, on_first
    from moe_jax.studies import Ledger, report
    from moe_jax.studies.run import describe_devices, run_study, todo
    from moe_jax.train.run_folder import RunFolder

    def say(text: str, file=None) -> None:
        if first():
            print(text, file=file or sys.stdout)

    with RunFolder(workdir) as folder, StopRequests() as stop:
        ledger = Ledger.open(workdir, experiment.design)
        waiting = todo(ledger, _RETRY.value)
        if waiting:
            for change in folder.start({"experiment": experiment.name, "design": experiment.design}, sys.argv, describe_devices()):
                say(f"since the last launch: {change}", sys.stderr)
            say(
                f"{experiment.name}: {len(waiting)} of {len(experiment.design.runs())} runs to do on {describe_devices()}; {experiment.cost}"
            )
            outcome = run_study(
                experiment,
                workdir,
                stop=lambda: bool(stop()),
                retry_failed=_RETRY.value,
                lanes=_LANES.value,
                mesh=mesh,
                shared=shared,
            )
            words = {"train": "training", "evaluate": "evaluation", "init": "initialisation", "sample": "sampling", "score": "scoring"}
            programs = ", ".join(f"{outcome.compiled[name]} for {word}" for name, word in words.items() if outcome.compiled[name])
            compiled = f"; programs compiled: {programs}" if programs else ""  # a study that measures counts none
            say(f"{outcome.done} runs finished, {outcome.failed} failed in {outcome.seconds:.0f} s{compiled}\n")
        else:
            refused = len(ledger.missing())
            why = f"{refused} runs met a value that is not finite; --retry_failed runs them again"
            say(f"{experiment.name}: nothing to do, {why if refused else f'all {len(experiment.design.runs())} runs are in the ledger'}")
        on_first(lambda: _report(experiment, workdir, report))
        return 1 if Ledger.read(workdir).missing() else 0


def _report(experiment, workdir: Path, report) -> None:
    """Writes the report and the study's own pages; prints the tables and the paths."""
    from moe_jax.studies import Ledger

    paths = report.build(workdir)
    pages = experiment.pages(workdir) if experiment.pages else ()
    ledger = Ledger.read(workdir)
    print(report.console_table(ledger.design, ledger.runs()))
    print("\n".join(["", f"report: {paths.html}", *(f"        {page}" for page in pages if page.suffix == ".html"), ""]))


if __name__ == "__main__":
    run(main, resumable=True)
