"""Compiles training steps for an NVIDIA H100 that is not here: whether they compile, in how long, the memory they need, how their products are done.

    pip install -e '.[gpu]' && python benchmarks/compile_gpu.py          # a CPU is enough: no driver, no GPU
    python benchmarks/compile_gpu.py --only=seed_79m --batch=16 --hlo=/tmp/seed.txt

XLA's CUDA compiler takes the description of a device instead of one. Kernels that it would choose by timing (autotuning) are its defaults, so nothing here
says how fast a step is; memory, shapes and operations are those of the program. "x ideal": the operations that the experts' products with their rows
(forward, and the gradients of the rows) became, against those of the active experts alone. 1.0 is a grouped product; the number of experts says that XLA
multiplies every row by every expert.
"""

import argparse
import math
import os
import re
import sys
import time

# GPU: sizes as NVIDIA gives them for the H100 SXM; names of the fields as XLA's GpuTargetConfigProto
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Two layers of OLMoE: layers are a loop, and its 64 experts show what a few do not.
# name -> (preset, type, noise, sequences, tokens in each)
CASES = {
    "seed_79m": ("seed_79m", "bfloat16", "router_logits=additive:0.1:phases=train", 16, 512),
    "seed_79m noisy": ("seed_79m", "bfloat16", "matmuls=relative:0.05", 16, 512),
    "seed_79m float32": ("seed_79m", "float32", "router_logits=additive:0.1:phases=train", 16, 512),
    "olmoe_1b_7b": ("olmoe_1b_7b", "bfloat16", "router_logits=additive:0.1:phases=train", 2, 2048),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, nargs="+", help="these cases")
    parser.add_argument("--dispatch", help="the experts' dispatch, instead of what a GPU gets")
    parser.add_argument("--batch", type=int, help="sequences, instead of each case's")
    parser.add_argument("--hlo", help="write the last compiled program here, as text")
    args = parser.parse_args()
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin asks a driver for versions, and there may be none
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    import jax
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1")
    except NotImplementedError:
        raise SystemExit("jax's CUDA plugin is not installed: pip install -e '.[gpu]'") from None
    print(f"jax {jax.__version__}, compiled for one H100 that is not attached")
    print(f"{'':<18}{'tokens':>8}{'compile s':>11}{'state GiB':>11}{'temp GiB':>10}{'x ideal':>9}")
    for name in args.only or CASES:
        step = Step(*CASES[name], args.dispatch, args.batch, topology.devices[0])
        began = time.perf_counter()
        compiled = step.lowered().compile()
        seconds, memory, text = time.perf_counter() - began, compiled.memory_analysis(), compiled.as_text()
        state, temporary = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
        ratio = grouped_operations(text) / step.ideal()
        print(f"{name:<18}{step.tokens:>8}{seconds:>11.0f}{state:>11.2f}{temporary:>10.2f}{ratio:>9.1f}", flush=True)
        if args.hlo:
            with open(args.hlo, "w") as out:
                out.write(text)


class Step:
    """A training step of a preset on abstract arrays that lie on a device that does not exist."""

    def __init__(self, preset, dtype, noise, batch, length, dispatch, other_batch, device):
        from moe_jax.model import DTypePolicy, ModelConfig

        chosen = {"dispatch": dispatch} if dispatch else {}
        depth = {} if preset == "seed_79m" else {"num_layers": 2}
        self.model = ModelConfig.preset(preset, dtypes=DTypePolicy(compute=dtype), **chosen, **depth)
        self.noise, self.shape, self.device = noise, (1, other_batch or batch, length), device

    @property
    def tokens(self) -> int:
        return self.shape[1] * self.shape[2]

    def ideal(self) -> float:
        """Operations of the active experts' products with their rows: forward, and the gradients of the rows."""
        c = self.model
        matrices = 3 if c.gated else 2
        return 4.0 * self.tokens * c.experts_per_token * matrices * c.d_model * c.d_expert * c.num_layers

    def lowered(self):
        import jax
        import jax.numpy as jnp

        from moe_jax.noise import NoiseSpec
        from moe_jax.optim.plan import OptimizerConfig
        from moe_jax.platforms import tracing_for
        from moe_jax.train.program import Program
        from moe_jax.train.state import Knobs
        from moe_jax.train.step import Objective

        where = jax.sharding.SingleDeviceSharding(self.device)

        def placed(tree):
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)

        with tracing_for("gpu"):
            program = Program(self.model, OptimizerConfig(ns_dtype="bfloat16", schedule="warmup_constant", warmup=0), Objective())
            noise = self.model.resolve(NoiseSpec.parse(self.noise))
            knobs = Knobs(jax.tree.map(jnp.asarray, noise), jnp.uint32(0), jnp.float32(0.01), jnp.float32(0.0))
            state = placed(jax.eval_shape(program.init, jnp.uint32(0)))
            text = jax.ShapeDtypeStruct(self.shape, jnp.int32, sharding=where)
            step = jax.jit(lambda state, batch, knobs: program.train(state, batch, knobs), donate_argnums=0)
            return step.trace(state, {"tokens": text, "targets": text}, placed(knobs)).lower(lowering_platforms=("cuda",))


def grouped_operations(text: str) -> float:
    """Operations of the grouped products (lax.ragged_dot, or ours) in HLO text; loops count as often as they go round."""
    from moe_jax.plan.hlo import executions

    found = 0.0
    for count, lines in executions(text):
        shapes = {}
        for line in lines:
            if match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", line):
                shapes[match[1]] = [int(size) for size in match[2].split(",") if size]
            if re.search("ragged_dot|product_by_group", line) and (
                product := re.search(r" dot\(%?([\w.\-]+),.*lhs_contracting_dims=\{([\d,]+)\}", line)
            ):
                summed = math.prod(shapes[product[1]][int(axis)] for axis in product[2].split(","))
                found += 2.0 * count * math.prod(shapes[match[1]]) * summed
    return found


if __name__ == "__main__":
    main()
