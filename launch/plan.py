"""What a run needs on hardware that is not here: its real steps compiled for named chips, with and without noise, and what they fit, send and cost.

  python -m launch.plan --preset=qwen3_30b_a3b --topology=v5e:8x8 --seq=4096
  python -m launch.plan --preset=qwen3_30b_a3b --topology=v5p:4x4x4 --noise=all=relative:0.05 --workdir=plans/v5p
  python -m launch.plan --experiment=qwen3_30b.e7b_matrix:full --topology=v6e:16x16
  python -m launch.plan --preset=olmoe_1b_7b --topology=h100:8 --mesh=fsdp=2,expert=4

Nothing is allocated. TPU slices need the extra `plan` (libtpu) and are compiled for as they are; GPUs are stood in for by CPU devices, which gives their
collectives, and the memory model their memory; `attached` takes the devices of this machine. Without --mesh every mesh that divides is judged by a memory
model and a roofline, and the best is compiled. Prints the plan, and writes plan.html, plan.txt and plan.json into the workdir.
Exit codes: 0 the step fits, 1 it does not, 2 usage or config.
"""

import os
import sys
from pathlib import Path

from absl import flags

from launch.common import apply_overrides, define_set, run
from moe_jax.errors import ConfigError

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:8x8, v5p:4x4x4, v6e:16x16, … ; h100:8, h200:64, … ; or attached.", required=True)
_PRESET = flags.DEFINE_string("preset", None, "A model preset, e.g. qwen3_30b_a3b; trained on a sequence for each device in an update.")
_EXPERIMENT = flags.DEFINE_string("experiment", None, "A study, NAME:PRESET, instead: the step of its runs, and the cost of all of them.")
_MESH = flags.DEFINE_string("mesh", "", "How devices are divided, e.g. fsdp=8,expert=8. Default: the best of a search.")
_BATCH = flags.DEFINE_integer("batch", None, "Sequences of a batch over all devices; none means one for each device.", lower_bound=1)
_SEQ = flags.DEFINE_integer(
    "seq", None, "Tokens of a sequence; none means 4096, or the model's positions if fewer, or the study's.", lower_bound=1
)
_REMAT = flags.DEFINE_enum(
    "remat", None, ["none", "dots", "full"], "What a backward pass computes again; none given means the least that fits."
)
_NOISE = flags.DEFINE_string("noise", "", "SITE=KIND:SCALE[:passes=…], comma-separated; SITE all is every matmul.")
_STEPS = flags.DEFINE_list(
    "steps",
    ["train"],
    "Which steps to compile: train, evaluate, record, prefill, sample (of reinforcement learning train, score, sample), comma-separated, or all.",
)
_UPDATES = flags.DEFINE_integer("updates", None, "Updates of a run, for its cost; none means 1000, or the study's.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "A folder for plan.html, plan.txt and plan.json.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Judge the meshes by the models alone; compile nothing, write nothing.")
_SET = define_set()


def main(argv: list[str]) -> int:
    """Plans, prints, writes."""
    from moe_jax.plan.topology import environment

    os.environ.update(environment(_TOPOLOGY.value))  # before anything asks jax for devices
    from launch.plan_run import Request, describe, make, write
    from moe_jax.plan.steps import shapes_of

    if bool(_PRESET.value) == bool(_EXPERIMENT.value):
        raise ConfigError("name one of --preset and --experiment: what is to be planned")
    request = Request(
        _TOPOLOGY.value, _PRESET.value, _EXPERIMENT.value, _MESH.value, _BATCH.value, _SEQ.value, _REMAT.value, _NOISE.value, _UPDATES.value
    )
    config, topology, runs = make(request, lambda config: apply_overrides(config, _SET.value))
    known = shapes_of(config).steps
    steps = known if _STEPS.value == ["all"] else tuple(_STEPS.value)
    unknown = [step for step in steps if step not in known]
    if unknown or not steps:
        raise ConfigError(f"unknown step {', '.join(unknown) or 'none'}; known: {', '.join(known)}, all")
    if _DRY_RUN.value:
        print(describe(config, topology, request))
        return 0
    return write(config, topology, request, runs, steps, Path(_WORKDIR.value) if _WORKDIR.value else None, sys.argv)


if __name__ == "__main__":
    run(main)
