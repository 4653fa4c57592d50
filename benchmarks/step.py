"""A whole training step of the 79 M model at 4 x 512 tokens, beside a plain torch step: tokens/s, peak memory, and what takes the time.

    python benchmarks/step.py                        # float32 and bfloat16; torch beside it where torch is installed
    python benchmarks/step.py --torch_python=PATH    # torch from another environment
    python benchmarks/step.py --rounds=5 --only=bfloat16

A step is one micro-batch forward and backward with dropout and gate noise, clipping, Muon and AdamW: all 79,059,840 parameters move. Each side is a
process of its own; they step in turn, so that a busy machine disturbs all alike, under the same settings (process.py) and as many threads as cores.
On a CPU XLA multiplies with the faster of its two libraries, tried before the steps start (products.py), unless XLA_FLAGS name one.
On a CPU with jemalloc moe_jax steps twice: on one device, whose larger products use every core, and on a mesh of one device per core, where small products,
passes over memory and Newton-Schulz run side by side too (launch.local --processes=1 --devices_per_process=2 -- python -m launch.train --mesh=expert=2 …).
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import products
from process import described, jemalloc, restart_with_settings

HERE = os.path.dirname(os.path.abspath(__file__))
BATCH, LENGTH = 4, 512


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side (default 5)")
    parser.add_argument("--only", choices=("float32", "bfloat16"), help="this type alone")
    parser.add_argument("--torch_python", default=sys.executable, help="the Python that has torch")
    parser.add_argument("--no_parts", action="store_true", help="leave the table of parts out")
    parser.add_argument("--worker", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    parser.add_argument("--mesh", help=argparse.SUPPRESS)
    parser.add_argument("--parts", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    restart_with_settings()
    sys.path.insert(0, os.path.join(HERE, ".."))
    if args.worker:
        return worker(args.worker, args.mesh)
    if args.parts:
        return print_parts(args.parts)
    print(f"{BATCH} x {LENGTH} tokens a step, {os.cpu_count()} cores, {described()}")
    for dtype in [args.only] if args.only else ["float32", "bfloat16"]:
        named = products.FLAG in os.environ.get("XLA_FLAGS", "")
        flag = products.faster(dtype) if not named and runs_on_cpu() else ""
        env = {**os.environ, "XLA_FLAGS": f"{flag} {os.environ.get('XLA_FLAGS', '')}".strip()}
        print(f"\n{dtype}: XLA's products by {'Eigen (' + flag + ')' if flag else 'what XLA_FLAGS name' if named else 'its default'}")
        compare(dtype, args, env)
        if not args.no_parts:
            subprocess.run([sys.executable, __file__, f"--parts={dtype}"], check=True, env=env)


# --- side by side -----------------------------------------------------------------------------------------------------------------


def compare(dtype: str, args, env: dict[str, str]) -> None:
    """Steps every side in turn, in the environment env, and prints medians, peaks and the ratio to the faster torch."""
    commands = {"moe_jax": [sys.executable, __file__, f"--worker={dtype}"]}
    devices = max(d for d in (1, 2, 4) if d <= (os.cpu_count() or 1))  # these divide the batch and the experts
    if devices > 1 and jemalloc() and runs_on_cpu():
        commands[f"moe_jax, expert={devices}"] = [*commands["moe_jax"], f"--mesh=expert={devices}"]
    if has_torch(args.torch_python):
        for experts in ("loop", "grouped_mm"):
            script = [args.torch_python, os.path.join(HERE, "torch_step.py"), "--worker", f"--threads={os.cpu_count()}"]
            commands[f"torch, {experts}"] = [*script, f"--experts={experts}", f"--dtype={dtype}", f"--batch={BATCH}", f"--seq={LENGTH}"]
    sides = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for name, command in commands.items()
    }
    try:
        for side in [*sides.values(), *sides.values()]:
            ask(side)  # the first step compiles, the second still asks the system for memory
        answers = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                answers[name].append(ask(side))
    finally:
        for side in sides.values():
            side.kill()
    seconds = {name: statistics.median(answer["seconds"] for answer in found) for name, found in answers.items()}
    print(f"{dtype}: median of {args.rounds} interleaved steps")
    for name, found in answers.items():
        spread = f"{min(a['seconds'] for a in found):.2f} to {max(a['seconds'] for a in found):.2f} s"
        rate, peak = BATCH * LENGTH / seconds[name], max(a["peak_rss_mb"] for a in found) / 1e3
        print(f"  {name:<18}{rate:7.0f} tokens/s   {seconds[name]:6.2f} s ({spread})   peak {peak:4.1f} GB   loss {found[-1]['loss']:.2f}")
    others = [value for name, value in seconds.items() if name.startswith("torch")]
    if others:
        for name in (name for name in seconds if not name.startswith("torch")):
            print(f"  {name} is {min(others) / seconds[name]:.2f} times as fast as the faster torch")
    else:
        print("  torch is not installed here (pip install torch, or --torch_python)")


def ask(side) -> dict:
    side.stdin.write("step\n")
    side.stdin.flush()
    line = side.stdout.readline()
    if not line:
        raise SystemExit(f"{side.args} ended without an answer")
    return json.loads(line)


def has_torch(python: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec("torch") is not None
    return subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0


# --- our side ---------------------------------------------------------------------------------------------------------------------


def runs_on_cpu() -> bool:
    """Asks another process: jax in this one would take the device."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "cpu"


def setting(dtype: str, noise: str = "router_logits=additive:0.1:phases=train", mesh: str | None = None):
    """(program, knobs): the seed's model and optimizer with gate noise on, or another; Newton-Schulz in bfloat16, as in the seed and in the torch step.

    Here in the Gram form, which takes 0.6 of the operations and errs as much (benchmarks/muon.py).
    """
    import jax.numpy as jnp

    from moe_jax.mesh import MeshSpec
    from moe_jax.model import DTypePolicy, ModelConfig
    from moe_jax.noise import NoiseSpec
    from moe_jax.optim.plan import OptimizerConfig
    from moe_jax.train.program import Program
    from moe_jax.train.state import Knobs
    from moe_jax.train.step import Objective

    model = ModelConfig.preset("seed_79m", dtypes=DTypePolicy(compute=dtype))
    optimizer = OptimizerConfig(ns_dtype="bfloat16", ns_form="gram", schedule="warmup_constant", warmup=0)
    resolved = model.resolve(NoiseSpec.parse(noise)) if noise else None
    devices = MeshSpec.parse(mesh).build() if mesh else None
    return Program(model, optimizer, Objective(), devices), Knobs(resolved, jnp.uint32(0), jnp.float32(0.01), jnp.float32(0.0))


def worker(dtype: str, mesh: str | None) -> None:
    """Answers each 'step' on stdin with one JSON line."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    if mesh:
        jax.config.update("jax_num_cpu_devices", int(mesh.split("=")[1]))
    program, knobs = setting(dtype, mesh=mesh)
    state, generator = program.init(jnp.uint32(0)), np.random.default_rng(0)
    for line in sys.stdin:
        if line.strip() != "step":
            return
        text = generator.integers(0, program.model.config.vocab_size, (1, BATCH, LENGTH + 1)).astype(np.int32)
        began = time.perf_counter()
        state, metrics, _ = program.train(state, {"tokens": text[..., :-1], "targets": text[..., 1:]}, knobs)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        loss = float(metrics["loss"][0] / metrics["loss"][1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_rss_mb": peak}), flush=True)


def print_parts(dtype: str) -> None:
    """Each part of the step as a program of its own, forward and backward, and the whole: medians of five interleaved."""
    import jax

    parts = part_programs(dtype)
    for function, arguments in parts.values():
        jax.block_until_ready(function(*arguments))
    times = {name: [] for name in parts}
    for _ in range(5):
        for name, (function, arguments) in parts.items():
            began = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    whole = medians.pop("whole step")
    print(f"  parts of the {dtype} step, each alone ({whole:.2f} s together):")
    for name, seconds in medians.items():
        print(f"    {name:<28}{seconds:6.2f} s   {seconds / whole:5.1%}")
    print(f"    {'everything else':<28}{whole - sum(medians.values()):6.2f} s   {1 - sum(medians.values()) / whole:5.1%}")


def part_programs(dtype: str) -> dict:
    """name -> (jitted function, arguments). Layers are scanned as in the model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moe_jax.keys import Draw
    from moe_jax.losses import cross_entropy
    from moe_jax.model.attention import Attention
    from moe_jax.model.bind import bind
    from moe_jax.model.layers import Scope
    from moe_jax.model.moe import MoE

    program, knobs = setting(dtype)
    config, params = program.model.config, program.model.init(0)
    x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, config.d_model)).astype(dtype)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    scope = Scope(Draw(phase="train").key(), 0, jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH), {}, (), config.dropout)
    attention, moe = bind(Attention(config))[1], bind(MoE(config))[1]

    def through(layer):
        def loss(stack, x):
            return jax.lax.scan(lambda x, p: (layer(p, x).astype(x.dtype), None), x, stack)[0].astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss, (0, 1)))

    targets = jnp.zeros(BATCH * LENGTH, jnp.int32)
    head = jax.jit(jax.grad(lambda h, w: cross_entropy(h, w, targets, jnp.ones(targets.shape))[0], (0, 1)))
    state = program.init(jnp.uint32(0))
    update = jax.jit(program.plan.transformation().update)
    text = np.zeros((1, BATCH, LENGTH), np.int32)
    whole = jax.jit(lambda state: program.train(state, {"tokens": text, "targets": text}, knobs))
    return {
        "attention": (through(lambda p, x: attention(p, x, positions, scope)[0]), (params["layers"]["attention"], x)),
        "router and experts": (through(lambda p, x: moe(p, x, scope)[0]), (params["layers"]["feed_forward"], x)),
        "head and cross-entropy": (head, (x.reshape(-1, config.d_model), params["embedding"])),
        "clip, Muon and AdamW": (update, (params, state.opt_state, state.params)),
        "whole step": (whole, (state,)),
    }


if __name__ == "__main__":
    main()
