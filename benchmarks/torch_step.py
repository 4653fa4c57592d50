"""A plain PyTorch training step of the seed_79m model, the yardstick for moe_jax's own step.

B batch, S sequence, T = B*S tokens, D width, E experts, K experts per token, F expert width, H heads, V vocabulary.

Runs with torch and numpy alone:

    python benchmarks/torch_step.py --experts=grouped_mm --dtype=bfloat16      # one JSON line: tokens/s, losses, peak memory
    python benchmarks/torch_step.py --profile                                  # the share of attention, experts, head, Muon, ...
    python benchmarks/torch_step.py --ffn                                      # the MoE feed-forward alone, medians of 7
    python benchmarks/torch_step.py --worker                                   # 'step' on stdin -> one JSON line; 'quit' ends
    python benchmarks/torch_step.py --worker=ffn                               # 'e8 loop', 'e128 ideal', ... -> one JSON line

Allocator settings come from the environment and matter: give both sides of a comparison the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import resource
import statistics
import sys
import time
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

V, D, LAYERS, H, E, K, WIDTH = 49152, 384, 6, 8, 8, 2, 1536
PARAMETERS = 79_059_840  # what the original run printed
INIT_STD, BALANCE_WEIGHT = 0.02, 0.01
MUON_LR, ADAMW_LR = 0.01, 0.001
FFN_SHAPES = {"e8": (3072, 384, 1536, 8, 2), "e128": (3072, 256, 96, 128, 8)}  # T, D, F, E, K
HEAD_CHUNK = 512  # tokens per chunk of the float32 head on a CPU


def dropout(x, p):
    """F.dropout; on a CPU with a mask from torch.rand, which takes half the time of F.dropout's Bernoulli sampler."""
    if p == 0 or x.is_cuda or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * ((torch.rand(x.shape) >= p) * (1 / (1 - p))).to(x.dtype)


# --- experts: both implementations take rows that are sorted by expert ------------------------------------------------------


def sort_by_expert(ids, num_experts):
    """ids Int[T,K] -> order Int[T*K] (assignments, expert by expert) and sizes Int[E]."""
    flat = ids.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts)


def experts_loop(rows, sizes, up, down, p):
    """rows [N,D] sorted by expert, up [E,D,F], down [E,F,D] -> [N,D], two matmuls for each expert that has tokens."""
    out = []
    # unbind, not up[e]: its gradient is one stack, where indexing would add E arrays of the whole size
    for x, w1, w2 in zip(rows.split(sizes.tolist()), up.unbind(0), down.unbind(0), strict=True):
        out.append(dropout(F.silu(x @ w1), p) @ w2)
    return torch.cat(out)


def experts_grouped_mm(rows, sizes, up, down, p):
    """The same through F.grouped_mm."""
    offsets = sizes.cumsum(0).to(torch.int32)
    return F.grouped_mm(dropout(F.silu(F.grouped_mm(rows, up, offs=offsets)), p), down, offs=offsets)


EXPERTS = {"loop": experts_loop, "grouped_mm": experts_grouped_mm}


def moe_ffn(x, ids, weights, up, down, experts, p=0.0, out_p=0.0):
    """x [T,D], ids and weights [T,K] -> [T,D]: gather by expert, the two matmuls, the weighted sum of the K results."""
    order, sizes = sort_by_expert(ids, up.shape[0])
    token = order // ids.shape[1]
    y = EXPERTS[experts](x.index_select(0, token), sizes, up, down, p)
    y = y * weights.flatten()[order].to(y.dtype)[:, None]
    return dropout(x.new_zeros(x.shape, dtype=y.dtype).index_add(0, token, y), out_p)


# --- model ------------------------------------------------------------------------------------------------------------------


def causal_attention(q, k, v, p):
    """q, k, v [B,H,S,D/H]. With dropout, torch's fused kernel for CPUs is out and its fallback is slower than these plain products."""
    if p == 0 or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
    s, width = q.shape[2:]
    later = torch.full((s, s), -torch.inf, dtype=q.dtype).triu(1)
    q, k, v_ = (x.reshape(-1, s, width) for x in (q, k, v))
    scores = torch.baddbmm(later, q, k.mT, alpha=width**-0.5)
    return torch.bmm(dropout(scores.softmax(-1), p), v_).view_as(v)


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.qkv, self.out, self.p = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False), p

    def forward(self, x, rotation):
        b, s, _ = x.shape
        qkv = self.qkv(x).view(b, s, 3, H, D // H)
        pairs = torch.view_as_complex(qkv[:, :, :2].float().unflatten(-1, (-1, 2)))  # adjacent pairs, float32
        q, k = torch.view_as_real(pairs * rotation).flatten(-2).to(qkv.dtype).transpose(1, 3).unbind(2)
        v = qkv[:, :, 2].transpose(1, 2)
        y = causal_attention(q, k, v, self.p)
        return dropout(self.out(y.transpose(1, 2).reshape(b, s, D)), self.p)


class MoE(nn.Module):
    def __init__(self, experts, dtype, p, noise):
        super().__init__()
        self.experts, self.dtype, self.p, self.noise = experts, dtype, p, noise
        self.gate = nn.Parameter(torch.empty(E, D))
        self.up, self.down = nn.Parameter(torch.empty(E, D, WIDTH)), nn.Parameter(torch.empty(E, WIDTH, D))

    def route(self, x):
        """x [T,D] -> ids, weights [T,K] and the balance loss; float32 whatever the experts use."""
        with torch.autocast(x.device.type, enabled=False):
            logits = x.float() @ self.gate.t()
            if self.noise:
                logits = logits + self.noise * torch.randn_like(logits)
            top, ids = logits.topk(K)
            share = torch.bincount(ids.flatten(), minlength=E) / ids.numel()
            return ids, top.softmax(-1), E * (share * logits.softmax(-1).mean(0)).sum()

    def forward(self, x):
        rows = x.view(-1, D)
        ids, weights, balance = self.route(rows)
        # autocast does not know grouped_mm: cast once, here, for both implementations
        y = moe_ffn(rows.to(self.dtype), ids, weights, self.up.to(self.dtype), self.down.to(self.dtype), self.experts, self.p, self.p)
        return y.view_as(x), balance


class Block(nn.Module):
    def __init__(self, experts, dtype, p, noise):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.attention, self.moe = Attention(p), MoE(experts, dtype, p, noise)

    def forward(self, x, rotation):
        with record_function("part/attention"):
            x = x + self.attention(self.norm1(x), rotation)
        with record_function("part/experts"):
            y, balance = self.moe(self.norm2(x))
            return x + y, balance


class Model(nn.Module):
    """The seed's decoder: forward(tokens, targets Int[B,S]) -> mean cross-entropy + balance losses summed over the layers."""

    def __init__(self, experts, dtype, p, noise):
        super().__init__()
        self.embedding, self.p = nn.Parameter(torch.empty(V, D)), p
        self.blocks = nn.ModuleList(Block(experts, dtype, p, noise) for _ in range(LAYERS))
        self.norm, self.chunked_head = nn.RMSNorm(D), False
        for w in self.parameters():
            if w.ndim > 1:
                nn.init.normal_(w, 0.0, INIT_STD)

    def rotation(self, s, device):
        angle = torch.outer(torch.arange(s, device=device), 10000.0 ** (-torch.arange(0, D // H, 2, device=device) / (D // H)))
        return torch.polar(torch.ones_like(angle), angle)[:, None, None]  # [S,1,1,D/H/2], against [B,S,2,H,D/H/2]

    def forward(self, tokens, targets):
        with record_function("part/head"):  # the tied table: its look-up and the head are one part
            x = dropout(F.embedding(tokens, self.embedding) * math.sqrt(D), self.p)
        rotation, balance = self.rotation(tokens.shape[1], tokens.device), 0.0
        for block in self.blocks:
            x, layer_balance = block(x, rotation)
            balance = balance + layer_balance
        with record_function("part/head"):
            x = dropout(self.norm(x), self.p).view(-1, D)
            return self.cross_entropy(x, targets.flatten()) + BALANCE_WEIGHT * balance

    def cross_entropy(self, x, targets):
        if self.chunked_head:
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=HEAD_CHUNK)
            return F.linear_cross_entropy(x, self.embedding, targets, options=options)
        return F.cross_entropy(F.linear(x, self.embedding).float(), targets)


# --- optimizer --------------------------------------------------------------------------------------------------------------


def orthogonalise(x, steps=5, coefficients=(3.4445, -4.7750, 2.0315)):
    """Newton-Schulz in bfloat16 on a stack [N,rows,cols], every matrix for itself; one batched product per line."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """The seed's Muon on 2-D parameters (out,in) and on stacks [E,in,out]: averaged momentum without bias correction, Nesterov.

    torch.optim.Muon has the same rule for one 2-D matrix at a time; here all matrices of one shape are one batch.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [w for w in group["params"] if w.grad is not None]
            grads = [w.grad for w in params]
            buffers = [self.state[w].setdefault("momentum", torch.zeros_like(w)) for w in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, buffers, group["momentum"])  # Nesterov, in the gradient's own memory
            by_shape = defaultdict(list)
            for w in params:
                by_shape[w.shape].append(w)
            for same in by_shape.values():
                self._update(same, group["lr"])

    def _update(self, params, lr):
        stacked = params[0].ndim == 3
        rows, cols = params[0].shape[:-3:-1] if stacked else params[0].shape  # a stack is (in,out): its rows are its last axis
        x = torch.stack([w.grad.to(torch.bfloat16) for w in params])
        x = orthogonalise(x.flatten(0, 1) if stacked else x).view(x.shape)
        torch._foreach_add_(params, list(x.unbind(0)), alpha=-lr * math.sqrt(max(1.0, rows / cols)))


def optimizers(model):
    """Muon on every matrix but the tied table (router gates too), AdamW on the table and the norm scales."""
    named = dict(model.named_parameters())
    adamw = [w for n, w in named.items() if n == "embedding" or "norm" in n]
    muon = [w for n, w in named.items() if n != "embedding" and "norm" not in n]
    return Muon(muon, MUON_LR), torch.optim.AdamW(adamw, ADAMW_LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True)


def make_step(batch=4, seq=512, experts="loop", dtype="float32", dropout=0.1, noise=0.1, device="cpu", compile=False, seed=0):
    """-> (step(tokens, targets Int[B,S]) -> loss as a float, model). One call: one micro-batch, one full optimizer update.

    Raises ValueError for an unknown experts or dtype.
    """
    if experts not in EXPERTS or dtype not in ("float32", "bfloat16"):
        raise ValueError(f"experts={experts!r}, dtype={dtype!r}: known are {sorted(EXPERTS)} and float32, bfloat16")
    torch.manual_seed(seed)
    model = Model(experts, getattr(torch, dtype), dropout, noise).to(device)
    count = sum(w.numel() for w in model.parameters())
    assert count == PARAMETERS, f"{count:,} parameters, the seed has {PARAMETERS:,}"
    model.chunked_head = device == "cpu" and dtype == "float32" and not compile
    muon, adamw = optimizers(model)
    forward = torch.compile(model) if compile else model

    def step(tokens, targets):
        assert tokens.shape == (batch, seq), f"tokens {tuple(tokens.shape)}, the step was made for {(batch, seq)}"
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(tokens, targets)
        loss.backward()
        with record_function("part/clip"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        with record_function("part/muon"):
            muon.step()
        with record_function("part/adamw"):
            adamw.step()
        muon.zero_grad()
        adamw.zero_grad()
        return loss.item()

    return step, model


# --- measuring --------------------------------------------------------------------------------------------------------------


def timed(function, device="cpu"):
    """-> (seconds, result), with the device's queue empty at both ends."""
    wait = torch.cuda.synchronize if device != "cpu" else contextlib.nullcontext
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - start, result


def peak_mb(device="cpu"):
    """Peak of resident memory in MB; on a GPU the peak of what torch allocated there."""
    if device != "cpu":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def step_runner(args):
    """-> a function that runs one step on fresh tokens and gives {"seconds", "loss", "peak_rss_mb"}."""
    step, _ = make_step(args.batch, args.seq, args.experts, args.dtype, args.dropout, args.noise, args.device, args.compile, args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    def run():
        text = torch.randint(V, (args.batch, args.seq + 1), generator=generator).to(args.device)
        seconds, loss = timed(lambda: step(text[:, :-1], text[:, 1:]), args.device)
        return {"seconds": seconds, "loss": loss, "peak_rss_mb": peak_mb(args.device)}

    return run


def skewed_routing(tokens, num_experts, k, seed=0):
    """-> ids Int[T,K], weights Float[T,K] (NumPy) from logits = N(0,1) + one N(0,0.5) bias per expert; K best, softmax over them."""
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


def ffn_runners(shape, seed=0):
    """-> ({"ideal" | "loop" | "grouped_mm": function}, max/mean load): forward + backward in float32, every gradient taken."""
    t, d, f, e, k = FFN_SHAPES[shape]
    ids, weights = (torch.from_numpy(a) for a in skewed_routing(t, e, k, seed))
    sizes = torch.bincount(ids.flatten(), minlength=e)
    torch.manual_seed(seed)
    x, dy, up, down = torch.randn(t, d), torch.randn(t, d), torch.randn(e, d, f) * d**-0.5, torch.randn(e, f, d) * f**-0.5
    inputs = [a.requires_grad_() for a in (x, weights, up, down)]
    runners = {n: lambda n=n: torch.autograd.grad(moe_ffn(x, ids, weights, up, down, n), inputs, dy) for n in EXPERTS}
    return {"ideal": ideal_gemms(sizes.tolist(), d, f), **runners}, sizes.max().item() * e / (t * k)


def ffn_table(seed, repeats=7):
    for shape in FFN_SHAPES:
        runners, load = ffn_runners(shape, seed)
        times = defaultdict(list)
        for _ in range(repeats + 1):  # interleaved; the first round warms up
            for name, run in runners.items():
                times[name].append(timed(run)[0] * 1e3)
        row = "  ".join(f"{name} {statistics.median(ms[1:]):.0f}" for name, ms in times.items())
        print(f"{shape} {FFN_SHAPES[shape]} max/mean load {load:.2f}, ms: {row}")


def serve(answer):
    """Reads a command per line and prints answer(line) as one JSON line, until 'quit' or the end of the input."""
    for line in map(str.strip, sys.stdin):
        if line == "quit":
            return
        print(json.dumps(answer(line)), flush=True)


def serve_ffn(seed):
    tables = {shape: ffn_runners(shape, seed) for shape in FFN_SHAPES}

    def answer(line):
        shape, name = line.split()
        runners, load = tables[shape]
        return {"seconds": timed(runners[name])[0], "max_over_mean_load": load, "peak_rss_mb": peak_mb()}

    serve(answer)


def part_shares(events):
    """Profiler events of one step -> {part: ms}. A backward op carries the sequence number of the forward op it belongs to."""
    top = [e for e in events if e.cpu_parent is None or e.name.startswith("part/")]
    part_of, spent, total = {}, defaultdict(float), 0.0

    def claim(event, part):
        if event.sequence_nr >= 0:
            part_of[event.sequence_nr] = part
        for child in event.cpu_children:
            claim(child, part)

    for event in (e for e in top if e.name.startswith("part/")):
        claim(event, event.name[5:])
        spent[event.name[5:]] += event.cpu_time_total / 1e3
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function") and event.cpu_parent is None:
            spent[part_of.get(event.sequence_nr, "other")] += event.cpu_time_total / 1e3
    return dict(spent)


def print_profile(run):
    run()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        total = run()["seconds"] * 1e3
    parts = part_shares(recorded.events())
    parts["other"] = total - sum(ms for name, ms in parts.items() if name != "other")
    for name, ms in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{name:10s} {ms:8.0f} ms  {ms / total:6.1%}")
    print(f"{'step':10s} {total:8.0f} ms")


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--worker", nargs="?", const="step", choices=("step", "ffn"), help="serve commands from stdin")
    p.add_argument("--profile", action="store_true", help="print the share of each part of one step (CPU)")
    p.add_argument("--ffn", action="store_true", help="time the MoE feed-forward alone")
    p.add_argument("--experts", choices=sorted(EXPERTS), default="loop")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    for name, default in (("batch", 4), ("seq", 512), ("threads", 2), ("steps", 3), ("seed", 0)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--noise", type=float, default=0.1)
    return p.parse_args()


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    if args.worker == "ffn":
        return serve_ffn(args.seed)
    if args.ffn:
        return ffn_table(args.seed)
    run = step_runner(args)
    if args.worker:
        return serve(lambda line: run() if line == "step" else {"error": f"unknown command {line!r}: step or quit"})
    if args.profile:
        return print_profile(run)
    run()
    results = [run() for _ in range(args.steps)]
    seconds = statistics.median(r["seconds"] for r in results)
    print(json.dumps({"tokens_per_second": args.batch * args.seq / seconds, "losses": [r["loss"] for r in results], **results[-1]}))


if __name__ == "__main__":
    main()
