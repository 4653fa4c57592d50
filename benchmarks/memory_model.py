"""The memory model of a plan beside the compiler's own figure, for training steps on slices of TPUs that are not here.

  python -m benchmarks.memory_model            (needs the extra `plan`; half an hour on two cores)
  python -m benchmarks.memory_model 0 1 2      (some of the points)

Prints for each (preset, slice, mesh, recomputation) what the model says, what the compiler allocates, and the error. Lines are flushed as they come.
"""

import dataclasses
import os
import sys

from moe_jax.plan.topology import environment

POINTS = (
    ("seed_79m", "v5e:2x2", "data=4", "none", None),
    ("seed_79m", "v5e:2x2", "fsdp=4", "dots", None),
    ("seed_79m", "v5e:2x2", "expert=4", "full", "all_to_all"),
    ("seed_79m", "v5e:4x4", "data=4,expert=4", "none", "all_to_all"),
    ("olmoe_1b_7b", "v5p:2x2x2", "fsdp=8", "full", None),
    ("olmoe_1b_7b", "v5p:2x2x2", "expert=8", "full", "all_to_all"),
    ("olmoe_1b_7b", "v5p:2x2x2", "fsdp=2,expert=4", "dots", "all_to_all"),
    ("olmoe_1b_7b", "v6e:4x4", "fsdp=4,expert=4", "full", "all_gather"),
    ("qwen3_30b_a3b", "v5p:4x4x4", "fsdp=4,expert=16", "full", "all_to_all"),
    ("qwen3_30b_a3b", "v5p:4x4x4", "fsdp=16,expert=4", "dots", "all_to_all"),
    ("qwen3_30b_a3b", "v6e:8x8", "fsdp=8,expert=8", "full", "all_to_all"),
    ("qwen3_30b_a3b", "v5e:16x16", "fsdp=16,expert=16", "full", "all_to_all"),
)


def main() -> None:
    """Compiles the points and prints the table."""
    os.environ.update(environment("v5e:8x8"))
    from moe_jax.mesh import MeshSpec
    from moe_jax.plan.costs import preset_run
    from moe_jax.plan.memory import estimate
    from moe_jax.plan.steps import compile_step
    from moe_jax.plan.topology import compiling_alone, topology

    print(f"{'preset':<14} {'slice':<10} {'mesh':<18} {'remat':<5} {'exchange':<11} {'model GiB':>9} {'compiler':>9} {'error':>6} {'s':>5}")
    for index in map(int, sys.argv[1:] or range(len(POINTS))):
        preset, name, mesh_text, remat, exchange = POINTS[index]
        where, mesh = topology(name), MeshSpec.parse(mesh_text)
        config = preset_run(preset, where.size)
        config = dataclasses.replace(config, model=config.model.replace(remat=remat, dispatch=exchange))
        model = estimate(config, mesh)
        with compiling_alone():
            found = compile_step("train", config, mesh.build(where.devices), where.platform)
        row = f"{preset:<14} {name:<10} {mesh_text:<18} {remat:<5} {exchange or '-':<11} {model.peak / 2**30:9.2f}"
        parts = " ".join(f"{part}={value / 2**30:.2f}" for part, value in vars(model).items())
        if found.refused:
            print(f"{row} {'refused':>9} {'':>6} {found.seconds:5.0f}  {found.refused}  [{parts}]", flush=True)
        else:
            print(f"{row} {found.peak / 2**30:9.2f} {model.peak / found.peak - 1:+6.0%} {found.seconds:5.0f}  [{parts}]", flush=True)


if __name__ == "__main__":
    main()
