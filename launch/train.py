"""Trains one model, or goes on with it: the same command again resumes from the newest checkpoint.

  python -m launch.train --preset=tiny --data=synthetic --steps=200 --workdir=runs/tiny
  python -m launch.train --preset=quick --data=wiki --steps=500 --noise=router_logits=additive:0.1 --workdir=runs/noisy
  python -m launch.train --preset=small --mesh=data=2,expert=4 --workdir=runs/eight
  python -m launch.train --start=runs/clean --replay=routes/clean --noise=matmuls=relative:0.05 --workdir=runs/held

Products are of float32 on a CPU and of bfloat16 on a GPU or TPU (--set model.dtypes.compute=float32), summed in float32.
Writes config.json, versions.json, command.txt, metrics.jsonl and checkpoints into the workdir and prints the final evaluation.
Exit codes: 0 done, 1 a loss or gradient was not finite, 2 usage or config, 3 data, 4 checkpoint or trace, 75 stopped and resumable.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from launch.common import Hosts, MeshFlag, StopRequests, apply_overrides, define_set, run

_PRESET = flags.DEFINE_string(
    "preset", None, "Model preset: tiny, quick, small, seed_79m, qwen3_tiny and larger ones. None means the model of --start, or quick."
)
_DATA = flags.DEFINE_string(
    "data",
    None,
    "Text: a name from launch.data --list, or a file (PATH, PATH.jsonl#FIELD, a folder of .txt). None means that of the run in --start, or wiki.",
)
_STEPS = flags.DEFINE_integer("steps", 200, "Updates.", lower_bound=1)
_NOISE = flags.DEFINE_string("noise", "", "SITE=KIND:SCALE[:phases=…][:layers=…], comma-separated, e.g. router_logits=additive:0.1.")
_SEED = flags.DEFINE_integer("seed", 0, "Initial weights, data order and draws; --set init_seed= and the like part them.", lower_bound=0)
_START = flags.DEFINE_string(
    "start", "", "A run folder, a Hugging Face folder or smollm2_135m, whose parameters are the first; the optimizer begins anew."
)
_REPLAY = flags.DEFINE_string(
    "replay", "", "Routes of launch.record to take instead of the routers' choice, those of the update's own batch."
)
_REPLAY_WHAT = flags.DEFINE_enum(
    "replay_what", "ids", ["ids", "ids+weights"], "What of them; with weights the router learns from its own losses alone."
)
_RECORD = flags.DEFINE_string("record", "", "A folder to record the routes of every update into.")
_AQN = flags.DEFINE_string(
    "aqn", "", "Falling noise on the norms: VARIANT:START:END:STAGES[:reach=…], e.g. qerl_code:1e-2:1e-4:10:reach=experts."
)
_FREEZE = flags.DEFINE_list(
    "freeze", [], "Of the routers: freeze_params, stop_gate_gradient, stop_aux_gradient, freeze_bias, comma-separated."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder. Needed unless --dry_run.")
_PROFILE = flags.DEFINE_integer("profile", 0, "Trace so many updates, after the first two, for xprof, into WORKDIR/profile.", lower_bound=0)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the config, the parameters and the optimizer table; write nothing.")
_MESH, _HOSTS = MeshFlag(), Hosts()
_SET = define_set()


def main(argv: list[str]) -> None:
    """Builds the config, then trains, or prints it."""
    from moe_jax.errors import ConfigError

    _HOSTS.start()
    config = make_config()
    if _DRY_RUN.value:
        _describe(config)
    elif not _WORKDIR.value:
        raise ConfigError("--workdir is needed: the folder that metrics and checkpoints go into")
    else:
        _train(config, Path(_WORKDIR.value))


def make_config():
    """The RunConfig that the flags name; fresh models compute in bfloat16 on an accelerator, unless --set says otherwise."""
    from moe_jax.model import DTypePolicy, ModelConfig
    from moe_jax.optim.plan import OptimizerConfig
    from moe_jax.platforms import platform
    from moe_jax.train.run_config import RunConfig
    from moe_jax.train.saved import load_model
    from moe_jax.train.step import Objective

    start = load_model(_START.value or _PRESET.value or "quick")
    model = ModelConfig.preset(_PRESET.value) if _PRESET.value else start.config
    if not _START.value and platform() != "cpu":
        model = model.replace(dtypes=DTypePolicy(model.dtypes.params, "bfloat16"))
    data = start.text(_DATA.value)
    steps = _STEPS.value
    optimizer = OptimizerConfig(warmup=steps // 20, total=steps)
    config = RunConfig(model=model, data=data, optimizer=optimizer, updates=steps, noise=_NOISE.value, checkpoint_every=max(1, steps // 10))
    routes = {"start": _START.value, "replay": _REPLAY.value, "replay_what": _REPLAY_WHAT.value, "record": _RECORD.value}
    config = dataclasses.replace(config, **routes, aqn=_AQN.value, objective=Objective(freeze=tuple(_FREEZE.value)))
    config = dataclasses.replace(config, init_seed=_SEED.value, data_seed=_SEED.value, noise_seed=_SEED.value)
    config = apply_overrides(config, _SET.value)
    if _START.value:
        start.check_words(config.data)
    return config


def _describe(config) -> None:
    import json

    from launch.preview import cost_lines, training_flops
    from moe_jax.config_tools import config_dict
    from moe_jax.train.run_config import parse_aqn

    program = config.program(_MESH.build())
    for sequences in (config.data.batch_size, config.eval_batch):
        program.part(sequences)  # refuses what does not divide over the mesh
    model = program.model
    print(json.dumps(config_dict(config), indent=2))
    print(program.plan.table())
    if config.aqn:
        stages = parse_aqn(config.aqn).stage_table(config.updates)
        print("sigma of AQN from update: " + ", ".join(f"{first} {sigma:.3g}" for first, sigma in stages))
    print(f"{model.parameter_count():,} parameters, {model.active_parameter_count():,} active per token")
    print("1 program for training, 1 for evaluation", *cost_lines(training_flops(config, model)), sep="\n")


def _train(config, workdir: Path) -> None:
    from moe_jax.distributed import first
    from moe_jax.studies.run import describe_devices
    from moe_jax.train.data import build
    from moe_jax.train.loop import run as train
    from moe_jax.train.run_folder import RunFolder
    from moe_jax.train.writers import Progress

    program = config.program(_MESH.build())
    with RunFolder(workdir) as folder, StopRequests() as stop, Progress(config.updates) as progress:
        folder.check_config(config)
        data = build(config.data, config.data_seed)
        for change in folder.start(config, sys.argv, describe_devices()):
            print(f"since the last launch: {change}", file=sys.stderr)
        result = train(config, program, data, workdir, progress, lambda: bool(stop()), _PROFILE.value)
    for name, value in sorted(result.metrics.items()) if first() else ():
        print(f"{name:<28}{value:.5g}")


if __name__ == "__main__":
    run(main, resumable=True)
