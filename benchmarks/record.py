"""What watching the router costs: the whole step of the 79 M model with its router statistics against one without, and with its routes on disk.

    python benchmarks/record.py                                  # float32 and bfloat16, 4 x 512 tokens
    python benchmarks/record.py --only=bfloat16 --rounds=15

Three programs live in one process and step in turn, so that a busy machine disturbs them alike; each round gives one ratio. "bare" is the same step
without what only the statistics need (the compiler leaves it out, since nothing returns it). "recorded" returns the experts and weights of every
token too and hands them to a TraceWriter, which writes in the background; what is left of that after the last round is timed apart.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

from process import described, restart_with_settings

BATCH, LENGTH = 4, 512


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each side (default 11)")
    parser.add_argument("--only", choices=("float32", "bfloat16"), help="this type alone")
    parser.add_argument(
        "--noise", default="router_logits=additive:0.1:phases=train", help="of every side, '' for none (default: noise on the gate)"
    )
    args = parser.parse_args()
    restart_with_settings()
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    import jax

    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {described()}")
    for dtype in [args.only] if args.only else ["float32", "bfloat16"]:
        compare(dtype, args.noise, args.rounds)


def compare(dtype: str, noise: str, rounds: int) -> None:
    """Steps the three sides in turn and prints their medians and the medians of the rounds' ratios."""
    import jax.numpy as jnp
    import numpy as np
    from step import setting

    from moe_jax.train.program import Program
    from moe_jax.train.step import Objective

    program, knobs = setting(dtype, noise)
    recording = Program(program.model.config, program.plan.config, Objective(), record=True)
    generator, vocabulary = np.random.default_rng(0), program.model.config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "bare": Side(bare(program), knobs, program.init(jnp.uint32(0))),
            "statistics": Side(program.train, knobs, program.init(jnp.uint32(0))),
            "recorded": Side(recording.train, knobs, program.init(jnp.uint32(0)), writer(program.model.config, folder)),
        }
        seconds = {name: [] for name in sides}
        for done in range(rounds + 1):
            text = generator.integers(0, vocabulary, (1, BATCH, LENGTH + 1)).astype(np.int32)
            for name, side in sides.items():
                taken = side.step(done, {"tokens": text[..., :-1], "targets": text[..., 1:]})
                if done:  # the first step compiles
                    seconds[name].append(taken)
        began = time.perf_counter()
        sides["recorded"].writer.close()
        closing = time.perf_counter() - began
        size = sum(os.path.getsize(os.path.join(parent, name)) for parent, _, names in os.walk(folder) for name in names)
    print(f"\n{dtype}, {BATCH} x {LENGTH} tokens, noise {noise or 'none'}, {rounds} interleaved rounds")
    for name, taken in seconds.items():
        print(f"  {name:<12}{statistics.median(taken):7.3f} s ({min(taken):.3f} to {max(taken):.3f})")
    for name, base in (("statistics", "bare"), ("recorded", "statistics")):
        ratios = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
        least = min(seconds[name]) / min(seconds[base])
        print(f"  {name} / {base}: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), of minima {least:.3f}")
    print(f"  on disk {size / 1e3:,.0f} kB for {rounds + 1} steps, ids and weights and tokens; closing the recording took {closing:.3f} s")


def bare(program):
    """The train step that returns no router statistics."""
    import jax

    from moe_jax.train.step import Objective, make_train_step

    step = make_train_step(program.model, program.plan, Objective())

    def without(state, batch, knobs):
        state, metrics, flags = step(state, batch, knobs)
        return state, {name: value for name, value in metrics.items() if not name.startswith("router/")}, flags

    return jax.jit(without, donate_argnums=0)


def writer(config, folder: str):
    from moe_jax.trace_store import TraceInfo, TraceWriter

    numbers = (config.routing_hash(), config.moe_layers, config.num_experts, config.experts_per_token, BATCH, LENGTH)
    return TraceWriter(folder, TraceInfo(*numbers, "made up", "self", True))


class Side:
    def __init__(self, train, knobs, state, writer=None):
        self.train, self.knobs, self.state, self.writer = train, knobs, state, writer

    def step(self, done: int, batch) -> float:
        """Seconds of one step, until its state is there and, when it records, its routes are handed on."""
        import jax

        began = time.perf_counter()
        self.state, metrics, _ = self.train(self.state, batch, self.knobs)
        if self.writer is not None:
            self.writer.write(done, jax.device_get(metrics["trace"]), batch["tokens"][0])
        jax.block_until_ready(self.state)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
