"""The MoE feed-forward alone in PyTorch, forward and backward in float32, beside its active matrix products.

T tokens, D width, F expert width, E experts, K experts per token.

    python benchmarks/torch_moe_ffn.py               # a table: milliseconds, medians of 7 interleaved rounds
    python benchmarks/torch_moe_ffn.py --worker      # 'e8 loop', 'e128 ideal', ... on stdin -> one JSON line; 'quit' ends

Routing is skewed and comes from a seed through NumPy alone, so that another program can draw the same.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

import numpy as np
import torch
from torch_step import EXPERTS, moe_ffn, peak_mb, serve, timed

SHAPES = {"e8": (3072, 384, 1536, 8, 2), "e128": (3072, 256, 96, 128, 8)}  # T, D, F, E, K


def skewed_routing(tokens, num_experts, k, seed=0):
    """-> ids Int[T,K], weights Float[T,K] (NumPy): logits = N(0,1) + one bias per expert, 0.5*N(0,1); the K best, softmax over them."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, num_experts)) + 0.5 * rng.standard_normal(num_experts)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    top = np.exp(np.take_along_axis(logits, ids, 1))
    return ids, (top / top.sum(1, keepdims=True)).astype(np.float32)


def ideal_gemms(sizes, width, hidden):
    """-> a function that runs the active products alone (two forward, four backward per expert), into buffers that exist."""
    calls = []
    for n in sizes:
        x, h, w1, w2 = (torch.randn(s) for s in ((n, width), (n, hidden), (width, hidden), (hidden, width)))
        x2, h2, d1, d2 = (torch.empty_like(a) for a in (x, h, w1, w2))
        calls += [(x, w1, h2), (h, w2, x2), (x, w2.t(), h2), (h.t(), x, d2), (h, w1.t(), x2), (x.t(), h, d1)]
    return lambda: [torch.mm(a, b, out=out) for a, b, out in calls]


def runners(shape, seed=0):
    """-> ({"ideal" | "loop" | "grouped_mm": function}, max/mean load); all gradients are taken: x, combine weights, up, down."""
    t, d, f, e, k = SHAPES[shape]
    ids, weights = (torch.from_numpy(a) for a in skewed_routing(t, e, k, seed))
    sizes = torch.bincount(ids.flatten(), minlength=e)
    torch.manual_seed(seed)
    x, dy, up, down = torch.randn(t, d), torch.randn(t, d), torch.randn(e, d, f) * d**-0.5, torch.randn(e, f, d) * f**-0.5
    inputs = [a.requires_grad_() for a in (x, weights, up, down)]
    table = {n: lambda n=n: torch.autograd.grad(moe_ffn(x, ids, weights, up, down, n), inputs, dy) for n in EXPERTS}
    return {"ideal": ideal_gemms(sizes.tolist(), d, f), **table}, sizes.max().item() * e / (t * k)


def print_table(seed, repeats=7):
    for shape in SHAPES:
        table, load = runners(shape, seed)
        times = defaultdict(list)
        for _ in range(repeats + 1):  # the first round warms up
            for name, run in table.items():
                times[name].append(timed(run)[0] * 1e3)
        row = "  ".join(f"{name} {statistics.median(ms[1:]):.0f}" for name, ms in times.items())
        print(f"{shape} {SHAPES[shape]} max/mean load {load:.2f}, ms: {row}")


def worker(seed):
    tables = {shape: runners(shape, seed) for shape in SHAPES}

    def answer(line):
        shape, name = line.split()
        table, load = tables[shape]
        return {"seconds": timed(table[name])[0], "max_over_mean_load": load, "peak_rss_mb": peak_mb()}

    serve(answer)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--worker", action="store_true", help="serve 'SHAPE NAME' and 'quit' from stdin")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    return worker(args.seed) if args.worker else print_table(args.seed)


if __name__ == "__main__":
    main()
