"""Newton-Schulz on stacked matrices: the forms of moe_jax.optim.muon and optax's against each other, interleaved, on this machine.

    python benchmarks/muon.py [--repeats=5] [--scale=1.0]

For each stack of the seed model: milliseconds (median), GFLOP/s actually done, operations against the standard form's, error against a
float64 iteration (Frobenius norm of the difference over that of the result: random Gaussian matrices, and rank 64 plus 1e-3 of noise), and
the stack's share of all the seed model's Newton-Schulz time. `--scale=0.25` takes a quarter of each stack.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.optim import muon

STACKS = ((6, 8, 384, 1536), (6, 8, 1536, 384), (6, 384, 1152))


def through_optax(x: jax.Array) -> jax.Array:
    transformation = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, eps=1e-7, weight_dimension_numbers=muon.MATRIX)
    return transformation.update(x, transformation.init(x))[0]


FORMS = {
    "standard f32": partial(muon.orthogonalise, form="standard"),
    "standard bf16": partial(muon.orthogonalise, form="standard", dtype="bfloat16"),
    "gram f32": partial(muon.orthogonalise, form="gram"),
    "gram bf16": partial(muon.orthogonalise, form="gram", dtype="bfloat16"),
    "optax f32": through_optax,
}


def operations(name: str, shape: tuple[int, ...]) -> float:
    """Floating-point operations of the matrix products in one call."""
    m, n = sorted(shape[-2:])
    each = 4 * m**2 * n + 34 * m**3 if name.startswith("gram") else 5 * (4 * m**2 * n + 2 * m**3)
    return float(np.prod(shape[:-2]) * each)


def reference(x: np.ndarray) -> np.ndarray:
    a, b, c = muon.COEFFICIENTS
    x = np.asarray(x, np.float64)
    x = x if x.shape[0] <= x.shape[1] else x.T
    y = x / np.linalg.norm(x)
    for _ in range(5):
        r = y @ y.T
        y = a * y + (b * r + c * r @ r) @ y
    return y


def error(function, x: np.ndarray) -> float:
    want, got = reference(x), np.asarray(jax.jit(function)(x[None]))[0]
    got = got if got.shape == want.shape else got.T
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def inputs(shape: tuple[int, ...]) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """A random stack, one random matrix, and one of rank 64 with a thousandth of noise (a momentum early in training looks like that)."""
    draw = np.random.default_rng(0)
    stack = draw.standard_normal(shape, np.float32)
    rows, columns = shape[-2:]
    low = draw.standard_normal((rows, 64)) @ draw.standard_normal((64, columns)) / 8 + 1e-3 * draw.standard_normal((rows, columns))
    return jnp.asarray(stack), stack.reshape(-1, rows, columns)[0], low.astype(np.float32)


def milliseconds(x: jax.Array, repeats: int) -> dict[str, float]:
    """Median time of each form on the stack x; the forms take turns."""
    programs = {name: jax.jit(function) for name, function in FORMS.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program(x).block_until_ready()
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program(x).block_until_ready()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each form on each stack")
    parser.add_argument("--scale", type=float, default=1.0, help="part of each stack's leading axis to take")
    arguments = parser.parse_args()
    stacks = [(max(1, round(arguments.scale * shape[0])), *shape[1:]) for shape in STACKS]
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind} ({jax.default_backend()}); medians of {arguments.repeats}, interleaved")
    results = {shape: milliseconds(inputs(shape)[0], arguments.repeats) for shape in stacks}
    totals = {name: sum(result[name] for result in results.values()) for name in FORMS}
    for shape, result in results.items():
        _, random, low = inputs(shape)
        print(f"\nstack {list(shape)}\n{'form':<18}{'ms':>8}{'GFLOP/s':>9}{'ops':>6}{'error':>10}{'low rank':>10}{'share':>7}")
        for name, function in FORMS.items():
            done = operations(name, shape)
            print(
                f"{name:<18}{result[name]:>8.1f}{done / result[name] / 1e6:>9.0f}{done / operations('standard', shape):>6.2f}"
                f"{error(function, random):>10.1e}{error(function, low):>10.1e}{result[name] / totals[name]:>7.0%}"
            )
    print("\nall stacks: " + ", ".join(f"{name} {total:.0f} ms" for name, total in totals.items()))


if __name__ == "__main__":
    main()
