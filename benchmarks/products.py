"""XLA's two libraries for matrix products on a CPU, YNNPACK (its default) and Eigen: which is faster here, and by how much.

    python benchmarks/products.py                # a table for float32 and bfloat16, sums in float32, at the shapes of the 79 M model's step

A process is asked for one of them by XLA_FLAGS (`FLAG` for Eigen), for all its products; what XLA_FLAGS say of it already is left out here. Which is faster
depends on the CPU: Eigen multiplies bfloat16 as float32, and on an Intel Xeon without AMX took three quarters of YNNPACK's time. `benchmarks/step.py` asks
`faster` before it starts.
"""

import argparse
import json
import os
import subprocess
import sys
import time

FLAG = "--xla_cpu_experimental_ynn_fusion_type="
# (rows, inner, columns): how many of them a step has, roughly. An expert's products and the head's; those of Newton-Schulz in the Gram form.
MODEL = {(512, 384, 1536): 144, (512, 1536, 384): 144, (2048, 384, 8192): 18}
NEWTON_SCHULZ = {(384, 1536, 384): 200, (384, 384, 384): 1700}
SHAPES = {**MODEL, **NEWTON_SCHULZ}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return print(json.dumps(_seconds(args.worker)))
    print(f"GFLOP/s, YNNPACK / Eigen, {os.cpu_count()} cores; the last line: Eigen's time over YNNPACK's, for all of a step in this type")
    found = {dtype: _both(dtype) for dtype in ("float32", "bfloat16")}
    print(f"{'rows x inner x columns':<26}" + "".join(f"{dtype:>14}" for dtype in found))
    for index, shape in enumerate(SHAPES):
        operations = 2e-9 * shape[0] * shape[1] * shape[2]
        cells = ("/".join(f"{operations / seconds[index]:.0f}" for seconds in both if seconds) for both in found.values())
        print(f"{' x '.join(map(str, shape)):<26}" + "".join(f"{cell:>14}" for cell in cells))
    shares = (f"{_step(both[1], both[1]) / _step(both[0], both[0]):.2f}" if both[1] else "no Eigen" for both in found.values())
    print(f"{'':<26}" + "".join(f"{share:>14}" for share in shares))


def faster(dtype: str) -> str:
    """The flag for XLA_FLAGS under which the products of a step took less time just now: FLAG or "". dtype: the model's; Newton-Schulz has bfloat16 in both."""
    found = {name: _both(name) for name in {dtype, "bfloat16"}}
    if not found[dtype][1]:
        return ""
    ynnpack, eigen = (_step(found[dtype][library], found["bfloat16"][library]) for library in (0, 1))
    return FLAG if eigen < ynnpack else ""


def _both(dtype: str) -> tuple[list[float], list[float]]:
    """Seconds of each shape with YNNPACK and with Eigen, the least of three processes in turn; nothing where this XLA does not know the flag."""
    turns = [[_ask(dtype, flag) for flag in ("", FLAG)] for _ in range(3)]
    ynnpack, eigen = ([min(times) for times in zip(*runs, strict=True)] for runs in zip(*turns, strict=True))
    return ynnpack, eigen


def _ask(dtype: str, flag: str) -> list[float]:
    others = [word for word in os.environ.get("XLA_FLAGS", "").split() if not word.startswith(FLAG)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*others, flag]).strip()}
    done = subprocess.run([sys.executable, __file__, f"--worker={dtype}"], env=env, capture_output=True, text=True, check=not flag)
    return json.loads(done.stdout) if done.returncode == 0 else []  # XLA ends a process at a flag that it does not know


def _step(model: list[float], newton_schulz: list[float]) -> float:
    """Seconds of all products of a step, from those of each shape in the model's type and in Newton-Schulz's."""
    each = [*model[: len(MODEL)], *newton_schulz[len(MODEL) :]]
    return sum(count * seconds for count, seconds in zip(SHAPES.values(), each, strict=True))


def _seconds(dtype: str) -> list[float]:
    """The least time of each shape in this process."""
    import jax
    import jax.numpy as jnp

    found = []
    for rows, inner, columns in SHAPES:
        a, b = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32)).lower(a, b).compile()
        times = []
        for _ in range(12):
            begin = time.perf_counter()
            jax.block_until_ready(product(a, b))
            times.append(time.perf_counter() - begin)
        found.append(min(times))
    return found


if __name__ == "__main__":
    main()
