"""Where the damage of noise comes from: experts that the routers choose otherwise, or plain error in what they and the rest compute.

  python -m launch.sensitivity --model=runs/quick --noise=all=relative:0.05 --workdir=runs/quick_sensitivity
  python -m launch.sensitivity --model=small --data=wiki --noise=router_gemm=relative:0.05 --seeds=16 --workdir=runs/router_only

Runs the validation windows clean and then noisy in every way: {routers choose, clean experts replayed, clean experts and weights replayed} x {clean, noisy}
router x experts x attention x rest, as far as --noise names their sites, each with the same draws; and the noisy pass's experts in the clean model. Writes
report.html, report.md, report.json and figures into the workdir and prints the table of damages. The same command gives the same bits.

--model is a run folder of launch.train, its checkpoints, whatever else launch.convert --from takes, or a preset, whose parameters are then fresh. A run folder
brings its own text.
Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint or trace.
"""

import sys
from pathlib import Path

from absl import flags

from launch.common import MeshFlag, apply_overrides, define_set, run
from moe_jax.errors import ConfigError

_MODEL = flags.DEFINE_string("model", None, "A run folder, a Hugging Face folder, smollm2_135m, or a preset, e.g. quick.", required=True)
_NOISE = flags.DEFINE_string(
    "noise", None, "SITE=KIND:SCALE[:passes=…][:layers=…], comma-separated; SITE all, or none, is every matmul.", required=True
)
_DATA = flags.DEFINE_string("data", None, "Text, as for launch.train; none means that of the run, or wiki.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The report's folder. Needed unless --dry_run.")
_SEEDS = flags.DEFINE_integer("seeds", 8, "Noise seeds, from 0 on (--set first_seed=).", lower_bound=2)
_WINDOWS = flags.DEFINE_integer("windows", 64, "Validation windows.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", None, "Windows at a time; none means those of --replay, or 8.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer(
    "seq_len", None, "Tokens of a window; none means the run's, or 512, or the model's max_seq_len if less.", lower_bound=1
)
_PHASE = flags.DEFINE_enum("phase", "eval", ["rollout", "old_logprob", "train", "eval"], "Whose noise and draws.")
_REPLAY = flags.DEFINE_string(
    "replay", None, "Replay these routes (launch.record --split=validation) over the same windows, instead of the clean pass's."
)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the config and what would run; write nothing.")
_MESH = MeshFlag()
_SET = define_set()


def main(argv: list[str]) -> None:
    """Measures, reports, prints the table and the path."""
    from launch.sensitivity_run import acting_noise, describe, make_config, measure
    from moe_jax.train.saved import load_model

    _MESH.check()
    saved = load_model(_MODEL.value)
    given = {
        "noise": _NOISE.value,
        "seeds": _SEEDS.value,
        "windows": _WINDOWS.value,
        "batch": _BATCH.value,
        "phase": _PHASE.value,
        "replay": _REPLAY.value,
    }
    config = apply_overrides(make_config(saved, _MODEL.value, _DATA.value, _SEQ_LEN.value, given), _SET.value)
    if _DRY_RUN.value:
        print(describe(config, saved))
        return
    acting_noise(config, saved)  # what is wrong with the noise is said before there is a folder
    if not _WORKDIR.value:
        raise ConfigError("--workdir is needed: the folder that the report goes into")
    from moe_jax.model import Model
    from moe_jax.studies.document import to_text
    from moe_jax.studies.run import describe_devices
    from moe_jax.train.run_folder import RunFolder

    mesh = _MESH.build()
    Model(saved.config, mesh).layout(config.batch)  # refuses what does not divide over the mesh
    with RunFolder(Path(_WORKDIR.value)) as folder:
        folder.start(config, sys.argv, describe_devices())
        path, table = measure(config, saved, folder.path, mesh)
    print(f"{to_text(table)}\n\nreport: {path}")


if __name__ == "__main__":
    run(main)
