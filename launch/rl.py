"""Reinforcement learning under noise: the runs of some arms of a study, or what is left of them, and their accuracy before and after.

  python -m launch.rl --experiment=e7b:mini --arms=clean --seeds=1
  python -m launch.rl --experiment=e7b:mini --arms="as described,replay rollout" --models=moe,dense --seeds=3
  python -m launch.study --experiment=e7b:mini --workdir=runs/e7b_mini

The runs are those of the study and go into its ledger, so that launch.study does the others in the same --workdir; the same command again does nothing. Prints
for each run the accuracy on held-out problems at each evaluation, greedy and sampled, with the noise off and on, and the minutes that it took. A warm policy is
trained first where it is not there yet. Exit codes: 0 done, 1 a run failed, 2 usage or config, 3 data, 4 checkpoint, 75 stopped and resumable.
"""

import sys
from pathlib import Path

from absl import flags

from launch.common import Hosts, MeshFlag, StopRequests, define_set, run
from moe_jax.errors import ConfigError, nearest

_EXPERIMENT = flags.DEFINE_string("experiment", "e7b:mini", "Which study: NAME:PRESET, e.g. e7b:mini.")
_ARMS = flags.DEFINE_list("arms", ["clean"], "Which arms, comma-separated, or all.")
_MODELS = flags.DEFINE_list("models", ["moe"], "Which models, comma-separated, or all.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "How many of the study's seeds, from its first on.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "The study's folder; none means runs/ and the experiment's name.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what would run; write nothing.")
_MESH, _HOSTS = MeshFlag(), Hosts()
_SET = define_set()
_CURVES = ("eval/greedy", "eval/sampled", "eval/greedy_noisy", "eval/sampled_noisy")


def main(argv: list[str]) -> int:
    """Runs the arms and prints their curves."""
    from experiments.catalogue import load

    _MESH.check()
    experiment = load(_EXPERIMENT.value).changed(_SET.value)
    factors = {factor.name: factor.levels for factor in experiment.design.factors}
    if set(factors) != {"model", "arm"}:
        raise ConfigError(f"{experiment.name} is no study of models and arms, it has {', '.join(factors)}; run it with launch.study")
    arms, models = _some("arm", _ARMS.value, factors["arm"]), _some("model", _MODELS.value, factors["model"])
    seeds = experiment.design.seeds[: _SEEDS.value]
    if _SEEDS.value > len(seeds):
        raise ConfigError(f"{experiment.name} has {len(seeds)} seeds, --seeds={_SEEDS.value}")

    def only(cell, seed: int) -> bool:
        return cell["arm"] in arms and cell["model"] in models and seed in seeds

    chosen = [(cell, seed) for cell, seed in experiment.design.runs() if only(cell, seed)]
    if not chosen:
        raise ConfigError(f"no run of {experiment.name} is of {', '.join(models)} with {', '.join(arms)}: that model has no such arm")
    if _DRY_RUN.value:
        from launch.preview import preview

        print(preview(experiment))
        print("\nof these: " + "; ".join(f"{cell['model']}, {cell['arm']}, seed {seed}" for cell, seed in chosen))
        return 0
    _HOSTS.start()
    return _run(experiment, Path(_WORKDIR.value or f"runs/{experiment.name.replace(':', '_')}"), only, chosen)


def _some(what: str, given: list[str], known) -> list[str]:
    if given == ["all"]:
        return list(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"no {what} {name!r}{nearest(name, known)}; known: {', '.join(map(str, known))}")
    return given


def _run(experiment, workdir: Path, only, chosen) -> int:
    from moe_jax.distributed import first
    from moe_jax.studies import Ledger
    from moe_jax.studies.design import cell_key
    from moe_jax.studies.run import describe_devices, run_study
    from moe_jax.train.run_folder import RunFolder

    with RunFolder(workdir) as folder, StopRequests() as stop:
        Ledger.open(workdir, experiment.design)
        folder.start({"experiment": experiment.name, "design": experiment.design}, sys.argv, describe_devices())
        run_study(experiment, workdir, stop=lambda: bool(stop()), mesh=_MESH.build(), only=only)
    ledger = Ledger.read(workdir)
    finished, failed = ledger.finished(), {run.key: run for run in ledger.failed()}
    keys = [(cell_key(cell), seed) for cell, seed in chosen]
    for key in keys if first() else ():
        if key in finished:
            _print(finished[key], experiment.config(finished[key].cell, finished[key].seed).mini_batches)
        elif key in failed:
            print(f"\n{failed[key].cell['model']}, {failed[key].cell['arm']}, seed {failed[key].seed}: {failed[key].error}")
    return int(any(key not in finished for key in keys))


def _print(found, per_step: int) -> None:
    """The accuracies of one run by step, and the gain."""
    print(f"\n{found.cell['model']}, {found.cell['arm']}, seed {found.seed}: {found.seconds / 60:.1f} minutes")
    curves = {name: dict(map(tuple, found.series[name])) for name in _CURVES if name in found.series}
    print("step    " + "".join(f"{name.removeprefix('eval/').replace('_', ', '):>16}" for name in curves))
    for update in sorted(next(iter(curves.values()))):
        print(f"{int(update) // per_step:<8}" + "".join(f"{curve[update]:>16.3f}" for curve in curves.values()))
    gains = {name: list(curve.values())[-1] - list(curve.values())[0] for name, curve in curves.items()}
    print("gain    " + "".join(f"{gain:>+16.3f}" for gain in gains.values()))


if __name__ == "__main__":
    run(main, resumable=True)
