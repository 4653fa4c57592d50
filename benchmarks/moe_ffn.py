"""Forward + backward of the MoE feed-forward layer: each dispatch implementation against the ideal, the active experts' matmuls alone.

    python benchmarks/moe_ffn.py                 # dense and blocked on a CPU (dense: 13 GB at 128 experts); dense and ragged on an accelerator
    python benchmarks/moe_ffn.py --all           # ragged on a CPU too (7 GB at 128 experts)
    python benchmarks/moe_ffn.py --implementations blocked --dtype bfloat16
    python benchmarks/moe_ffn.py --skew 1.0 --reps 15 --only e8

The ideal multiplies each expert's true number of rows: two products forward, two for the rows' gradients, two for the weights', nothing else. Rows are
gathered and matrices split before the clock starts, and the experts are independent, so that XLA runs several small products at once. "in a loop"
are as many operations in equal loads, one expert after another: in a loop XLA:CPU runs small products one by one, each on one core. blocked is a loop, since
the loads are not known before it runs.
"blocked, expert=N" and "blocked, data=N" are the same layer on a mesh of one CPU device for each core: N loops side by side, each with its own experts
(dispatch by all_gather) or with its own tokens (the experts' gradients summed at the end). `taskset -c 0 python benchmarks/moe_ffn.py` shows one core alone.
Timings are interleaved: every variant once, then every variant again, so that a busy machine disturbs all of them alike; what takes seconds a pass and
gigabytes comes after the others, two rounds of it. What takes more than 4 GB is called once, with its page faults ("first call"; dense at 128 experts takes
13 s without them and 40 s with them): an allocator that keeps what is freed may have cut it up by the next call, and a second 13 GB would end the process
on a machine of 24 GB.
"""

import argparse
import functools
import os
import statistics
import sys
import time

from process import described, restart_with_settings

SHAPES = {"e8": dict(T=3072, D=384, F=1536, E=8, K=2), "e128": dict(T=3072, D=256, F=96, E=128, K=8)}


def main():
    args = _arguments()
    if not args.plain_malloc:
        restart_with_settings()
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))  # runs from a checkout that is not installed
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_num_cpu_devices", devices())
    cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(args.dtype or ("float32" if cpu else "bfloat16"))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, cores: {cores()}, {dtype} rows, {described()}")
    names = ["dense", "blocked", "ragged"] if args.all else ["dense", "blocked"] if cpu else ["dense", "ragged"]
    names = args.implementations or names
    for label in args.only or SHAPES:
        _compare(label, names, args, dtype)
    if cpu and "ragged" not in names:
        print("ragged was not run: on a CPU it takes seconds a pass (--all runs it)")


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every implementation, however slow here")
    parser.add_argument(
        "--implementations", nargs="+", choices=["dense", "blocked", "ragged"], help="these, instead of what suits the machine"
    )
    parser.add_argument("--only", nargs="+", choices=sorted(SHAPES), help="these shapes")
    parser.add_argument(
        "--skew", type=float, default=0.5, help="standard deviation of each expert's offset of the router logits (default 0.5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and the routing")
    parser.add_argument("--reps", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the rows; weights are float32 (default: float32 on a CPU)")
    parser.add_argument("--plain_malloc", action="store_true", help="leave the allocator as it is")
    return parser.parse_args()


def devices() -> int:
    """CPU devices: one for each core, as far as they divide the experts and the tokens."""
    return max(count for count in (1, 2, 4, 8) if count <= cores())


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compare(label: str, names: list[str], args, dtype):
    """Prints one table."""
    import jax

    x, decision, matrices, dy = _problem(**SHAPES[label], skew=args.skew, seed=args.seed, dtype=dtype)
    loads, experts_rows = _split(x, decision, matrices, dy)
    calls = {
        "ideal": (jax.jit(_matmuls), (experts_rows,)),
        "in a loop": (jax.jit(functools.partial(_one_by_one, SHAPES[label]["K"])), (x, dy, matrices)),
        **{name: (_layer(name), (x, decision, matrices, dy)) for name in names},
    }
    if "blocked" in names and len(jax.devices()) > 1:
        calls |= {f"blocked, {axis}={len(jax.devices())}": _divided(axis, x, decision, matrices, dy) for axis in ("expert", "data")}
    slow = {"dense", "ragged"} if jax.default_backend() == "cpu" else set()
    timed = _timed({name: call for name, call in calls.items() if name not in slow}, args.reps)
    timed |= _timed({name: call for name, call in calls.items() if name in slow}, 2)

    sizes = " ".join(f"{letter}{size}" for letter, size in SHAPES[label].items())
    print(
        f"\n{sizes}, load max/mean {max(loads) * len(loads) / sum(loads):.2f} (skew {args.skew}, seed {args.seed}), {args.reps} interleaved rounds"
    )
    print(f"{'':20s}{'median ms':>10s}{'min ms':>9s}{'ideal/this':>12s}{'(by min)':>10s}{'temp MB':>9s}{'compile s':>11s}")
    ideal = timed["ideal"][0]
    for name, (taken, memory, compile_s) in timed.items():
        ratio, by_min = (measure(ideal) / measure(taken) for measure in (statistics.median, min))
        median, least = 1e3 * statistics.median(taken), 1e3 * min(taken)
        shown = f"{name}, first call" if len(taken) == 1 < args.reps else name
        print(f"{shown:20s}{median:10.1f}{least:9.1f}{ratio:12.2f}{by_min:10.2f}{memory:9.0f}{compile_s:11.1f}", flush=True)


def _timed(calls: dict, rounds: int) -> dict:
    """{name: (seconds of each round, megabytes of temporaries, seconds to compile)}"""
    import jax

    compiled, found = {}, {}

    def large(name):
        return found[name][1] > 4000

    for name, (function, inputs) in calls.items():
        begin = time.perf_counter()
        compiled[name] = function.lower(*inputs).compile()
        found[name] = ([], compiled[name].memory_analysis().temp_size_in_bytes / 1e6, time.perf_counter() - begin)
        if not large(name):
            jax.block_until_ready(compiled[name](*inputs))
    for turn in range(rounds):
        for name, (_, inputs) in calls.items():
            if turn and large(name):
                continue
            begin = time.perf_counter()
            jax.block_until_ready(compiled[name](*inputs))
            found[name][0].append(time.perf_counter() - begin)
    return found


def _problem(T, D, F, E, K, skew, seed, dtype):
    """(x, decision, matrices, dy): normal numbers; logits N(0,1) + N(0,skew) per expert."""
    import jax.numpy as jnp
    import numpy as np

    from moe_jax.routing import RoutingDecision, combine, select

    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    logits = normal(T, E) + normal(1, E, scale=skew)
    ids = select(logits, K)
    matrices = {"up": normal(E, D, F, scale=D**-0.5), "down": normal(E, F, D, scale=F**-0.5)}
    return normal(T, D).astype(dtype), RoutingDecision(ids, combine(logits, ids)), matrices, normal(T, D).astype(dtype)


def _split(x, decision, matrices, dy):
    """(loads, [(x rows, dy rows, up, down) of each expert that has rows]): what the ideal gets for nothing."""
    import jax.numpy as jnp
    import numpy as np

    ids = np.asarray(decision.ids)
    order, loads = np.argsort(ids.ravel(), kind="stable"), np.bincount(ids.ravel(), minlength=matrices["up"].shape[0])
    token = np.split(order // ids.shape[1], np.cumsum(loads)[:-1])
    cast = {name: a.astype(x.dtype) for name, a in matrices.items()}
    parts = [(x[t], dy[t], cast["up"][e], cast["down"][e]) for e, t in enumerate(map(jnp.asarray, token)) if t.size]
    return loads.tolist(), parts


def _matmuls(parts):
    """[(y, dx, d_up, d_down)] of every expert without activation, weights or sums."""
    import jax.numpy as jnp

    dot, out = functools.partial(jnp.dot, preferred_element_type=jnp.float32), []
    for x, dy, up, down in parts:
        hidden, d_hidden = dot(x, up).astype(x.dtype), dot(dy, down.T).astype(x.dtype)
        out.append((dot(hidden, down), dot(d_hidden, up.T), dot(x.T, d_hidden), dot(hidden.T, dy)))
    return out


def _one_by_one(slots, x, dy, matrices):
    """The products of `_matmuls` for experts of equal load, each with the next rows of x and dy, in one loop; what is left over of the rows is left out."""
    import jax
    import jax.numpy as jnp

    experts = matrices["up"].shape[0]
    load = len(x) * slots // experts

    def share(rows):
        return jnp.tile(rows, (slots, 1))[: experts * load].reshape(experts, load, -1)

    def one(part):
        return _matmuls([part])[0]

    return jax.lax.map(one, (share(x), share(dy), *(matrices[name].astype(x.dtype) for name in ("up", "down"))))


def _divided(axis: str, x, decision, matrices, dy):
    """(the layer on a mesh of all devices along `axis`, its arguments there)"""
    import jax

    from moe_jax.mesh import Layout, MeshSpec

    mesh = MeshSpec(**{axis: len(jax.devices())}).build()
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((axis,), ()))
    rows, matrices = jax.device_put((x, decision, dy), split), jax.device_put(matrices, split if axis == "expert" else whole)
    name = "all_gather" if axis == "expert" else "blocked"
    return _layer(name, Layout.of(mesh, batch=mesh.size)), (rows[0], rows[1], matrices, rows[2])


def _layer(name: str, layout=None):
    """One pass forward and backward of the layer, gradients of rows, combine weights and matrices."""
    import jax

    from moe_jax.dispatch import dispatch
    from moe_jax.experts import Experts
    from moe_jax.routing import RoutingDecision

    def run(x, decision, matrices, dy):
        def forward(x, weights, matrices):
            return dispatch(x, RoutingDecision(decision.ids, weights), Experts(matrices), name, force=True, layout=layout)[0]

        y, pull = jax.vjp(forward, x, decision.weights, matrices)
        return y, pull(dy)

    return jax.jit(run)


if __name__ == "__main__":
    main()
