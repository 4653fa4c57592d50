"""What noise costs: the whole training step of the 79 M model with `relative` noise on every matmul in both passes, beside the clean step, and the draws alone.

    python benchmarks/noise.py                                   # float32 and bfloat16, 4 x 512 tokens
    python benchmarks/noise.py --only=bfloat16 --rounds=11
    python benchmarks/noise.py --noise=experts=relative:0.05     # any spec against clean

Both programs live in one process and step in turn, so that a busy machine disturbs both alike; each round gives one ratio. The draws are timed inside
y * (1 + s n), the form in which a matmul's epilogue holds them, and y * s alone is subtracted.
"""

import argparse
import os
import statistics
import sys
import time

from process import described, restart_with_settings

BATCH, LENGTH = 4, 512
ROWS, COLUMNS = 2048, 8192


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each side (default 11)")
    parser.add_argument("--only", choices=("float32", "bfloat16"), help="this type alone")
    parser.add_argument("--noise", default="matmuls=relative:0.05", help="the spec (default matmuls=relative:0.05)")
    args = parser.parse_args()
    restart_with_settings()
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    import jax

    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {described()}")
    draws_alone(args.rounds)
    for dtype in [args.only] if args.only else ["float32", "bfloat16"]:
        whole_step(dtype, args.noise, args.rounds)


def draws_alone(rounds: int) -> None:
    """Prints nanoseconds per element of each generator."""
    import jax
    import jax.numpy as jnp

    from moe_jax.noise import draws

    key, rows, shape = jnp.array([1, 2], jnp.uint32), jnp.arange(ROWS), (ROWS, COLUMNS)
    forms = {
        "y * s": lambda y: y * 0.05,
        "moe_jax normal": lambda y: y * (1 + 0.05 * draws.normal(key, rows, COLUMNS)),
        "moe_jax uniform": lambda y: y * (1 + 0.05 * draws.uniform(key, rows, COLUMNS)),
        "moe_jax hash and exact inverse": lambda y: y * (1 + 0.05 * 2**0.5 * jax.lax.erf_inv(2 * draws.uniform(key, rows, COLUMNS) - 1)),
        "jax.random.normal, threefry": lambda y: y * (1 + 0.05 * jax.random.normal(jax.random.key(0, impl="threefry2x32"), shape)),
        "jax.random.normal, rbg": lambda y: y * (1 + 0.05 * jax.random.normal(jax.random.key(0, impl="rbg"), shape)),
    }
    y = jnp.ones(shape)
    seconds = interleaved({name: (jax.jit(form), (y,)) for name, form in forms.items()}, rounds)
    base = statistics.median(seconds.pop("y * s"))
    print(f"\ndraws alone, [{ROWS}, {COLUMNS}] float32, y * s ({1e9 * base / y.size:.2f} ns per element) subtracted")
    for name, taken in seconds.items():
        print(f"  {name:<32}{1e9 * (statistics.median(taken) - base) / y.size:7.2f} ns per element")


def interleaved(programs: dict, rounds: int) -> dict[str, list[float]]:
    """name -> seconds of each round; one warm call first."""
    import jax

    for function, arguments in programs.values():
        jax.block_until_ready(function(*arguments))
    seconds = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (function, arguments) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def whole_step(dtype: str, noise: str, rounds: int) -> None:
    """Prints the medians of both steps and the median of the rounds' ratios."""
    import jax.numpy as jnp
    import numpy as np
    from step import setting

    sides = {}
    for name, text in (("clean", ""), ("noisy", noise)):
        program, knobs = setting(dtype, text)
        sides[name] = Side(program, knobs, program.init(jnp.uint32(0)))
    generator, vocabulary = np.random.default_rng(0), sides["clean"].program.model.config.vocab_size
    seconds = {name: [] for name in sides}
    for done in range(rounds + 1):
        text = generator.integers(0, vocabulary, (1, BATCH, LENGTH + 1)).astype(np.int32)
        for name, side in sides.items():
            taken = side.step({"tokens": text[..., :-1], "targets": text[..., 1:]})
            if done:  # the first step compiles
                seconds[name].append(taken)
    ratios = [noisy / clean for clean, noisy in zip(seconds["clean"], seconds["noisy"], strict=True)]
    print(f"\n{dtype}, {BATCH} x {LENGTH} tokens, noise {noise}, {rounds} interleaved rounds")
    for name, taken in seconds.items():
        print(f"  {name:<8}{statistics.median(taken):7.3f} s ({min(taken):.3f} to {max(taken):.3f}), loss {sides[name].loss:.3f}")
    least = min(seconds["noisy"]) / min(seconds["clean"])
    print(f"  noisy / clean: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), of minima {least:.3f}")


class Side:
    def __init__(self, program, knobs, state):
        self.program, self.knobs, self.state, self.loss = program, knobs, state, float("nan")

    def step(self, batch) -> float:
        import jax

        begin = time.perf_counter()
        self.state, metrics, _ = self.program.train(self.state, batch, self.knobs)
        jax.block_until_ready(self.state)
        taken = time.perf_counter() - begin
        self.loss = float(metrics["loss"][0] / metrics["loss"][1])
        return taken


if __name__ == "__main__":
    main()
