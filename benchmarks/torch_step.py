"""A plain PyTorch training step of the seed_79m model, the yardstick for moe_jax's own step.

B batch, S sequence, T = B*S tokens, D width, E experts, K experts per token, F expert width, H heads, V vocabulary.

Runs with torch alone:
    python benchmarks/torch_step.py --experts=grouped_mm --dtype=bfloat16      # one JSON line: tokens/s, losses, peak memory
    python benchmarks/torch_step.py --profile                                  # the share of attention, experts, head, Muon, ...
    python benchmarks/torch_step.py --worker                                   # 'step' on stdin -> one JSON line; 'quit' ends

Allocator settings come from the environment and matter: give both sides of a comparison the same ones.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

V, D, LAYERS, H, E, K, WIDTH = 49152, 384, 6, 8, 8, 2, 1536
PARAMETERS = 79_059_840  # what the original run printed
INIT_STD, BALANCE_WEIGHT = 0.02, 0.01
MUON_LR, ADAMW_LR = 0.01, 0.001
HEAD_CHUNK = 512  # tokens; of the float32 head on a CPU
BFLOAT16_UNIT = 32  # rows per expert are a multiple, on a CPU: torch compiles a bfloat16 kernel (2-7 ms) for every new row count


def dropout(x, p):
    """F.dropout; on a CPU from 16 random bits per element, in 2/5 of the time that F.dropout's Bernoulli draws take."""
    if p == 0 or x.is_cuda or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
    return x * (bits.view(x.shape) >= round(p * 2**16) - 2**15).to(x.dtype).mul_(1 / (1 - p))


def experts_loop(rows, sizes, up, down, p):
    """rows [N,D] sorted by expert, sizes Int[E], up [E,D,F], down [E,F,D] -> [N,D]; two matmuls per expert."""
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


def moe_ffn(x, ids, weights, up, down, experts, p=0.0):
    """x [T,D], ids and weights [T,K] -> [T,D]: gather by expert, the two matmuls, the weighted sum of the K results."""
    flat = ids.flatten()
    order, sizes = flat.argsort(stable=True), torch.bincount(flat, minlength=up.shape[0])
    unit = BFLOAT16_UNIT if x.dtype == torch.bfloat16 and not x.is_cuda else 1
    padded = (sizes + unit - 1) // unit * unit
    row = torch.arange(len(flat), device=x.device) + ((padded - sizes).cumsum(0) - (padded - sizes))[flat[order]]
    token = row.new_zeros(int(padded.sum())).index_copy(0, row, order // ids.shape[1])
    weight = x.new_zeros(len(token)).index_copy(0, row, weights.flatten()[order].to(x.dtype))  # 0 at padding
    y = EXPERTS[experts](x.index_select(0, token), padded, up, down, p) * weight[:, None]
    return torch.zeros_like(x).index_add(0, token, y)


def causal_attention(q, k, v, p):
    """q, k, v [B,H,S,D/H]. On a CPU torch's fused kernel has no dropout, and its fallback is slower than these plain products."""
    if p == 0 or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
    *_, s, width = q.shape
    later = torch.full((s, s), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(later, q.reshape(-1, s, width), k.reshape(-1, s, width).mT, alpha=width**-0.5)
    return torch.bmm(dropout(scores.softmax(-1), p), v.reshape(-1, s, width)).view(q.shape)


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.qkv, self.out, self.p = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False), p

    def forward(self, x, rotation):
        b, s, _ = x.shape
        qkv = self.qkv(x).view(b, s, 3, H, D // H)
        pairs = torch.view_as_complex(qkv[:, :, :2].float().unflatten(-1, (-1, 2)))  # adjacent pairs, float32
        q, k = torch.view_as_real(pairs * rotation).flatten(-2).to(qkv.dtype).transpose(1, 3).unbind(2)
        y = causal_attention(q, k, qkv[:, :, 2].transpose(1, 2), self.p)
        return self.out(y.transpose(1, 2).reshape(b, s, D))


class MoE(nn.Module):
    def __init__(self, experts, dtype, p, noise):
        super().__init__()
        self.experts, self.dtype, self.p, self.noise = experts, dtype, p, noise
        self.gate = nn.Parameter(torch.empty(E, D))
        self.up, self.down = nn.Parameter(torch.empty(E, D, WIDTH)), nn.Parameter(torch.empty(E, WIDTH, D))

    def route(self, x):
        """x [T,D] -> ids, weights [T,K] and the balance loss; float32 whatever the experts use."""
        with torch.autocast(x.device.type, enabled=False):
            logits = x @ self.gate.t()
            if self.noise:
                logits = logits + self.noise * torch.randn_like(logits)
            top, ids = logits.topk(K)
            share = torch.bincount(ids.flatten(), minlength=E) / ids.numel()
            return ids, top.softmax(-1), E * (share * logits.softmax(-1).mean(0)).sum()

    def forward(self, x):
        rows = x.view(-1, D)
        ids, weights, balance = self.route(rows)
        # autocast does not know grouped_mm: cast once, here, for both implementations
        rows, up, down = (a.to(self.dtype) for a in (rows, self.up, self.down))
        return moe_ffn(rows, ids, weights, up, down, self.experts, self.p).view_as(x), balance


class Block(nn.Module):
    def __init__(self, experts, dtype, p, noise):
        super().__init__()
        self.norm1, self.norm2, self.p = nn.RMSNorm(D), nn.RMSNorm(D), p
        self.attention, self.moe = Attention(p), MoE(experts, dtype, p, noise)

    def forward(self, x, rotation):
        with record_function("part/attention"):
            x = x + dropout(self.attention(self.norm1(x), rotation), self.p)
        with record_function("part/experts"):
            y, balance = self.moe(self.norm2(x))
            return x + dropout(y, self.p), balance


class Model(nn.Module):
    """The seed's decoder in training: forward(tokens, targets Int[B,S]) -> cross-entropy + balance losses summed over layers."""

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
            return F.linear_cross_entropy(x, self.embedding, targets, options=nn.LinearCrossEntropyOptions(batch_chunk_size=HEAD_CHUNK))
        return F.cross_entropy(F.linear(x, self.embedding).float(), targets)


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
    """The seed's Muon on matrices (out,in) and stacks [E,in,out]: averaged momentum without bias correction, Nesterov.

    torch.optim.Muon has the same rule for one matrix at a time; here all matrices of one shape are one batch.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for w in group["params"]:
                by_shape[w.shape].append(w)
                if w not in self.state:
                    self.state[w]["momentum"] = torch.zeros_like(w)
            grads, buffers = zip(*((w.grad, self.state[w]["momentum"]) for w in group["params"]), strict=True)
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, buffers, group["momentum"])  # Nesterov, in the gradient's own memory
            for same in by_shape.values():
                self._update(same, group["lr"])

    def _update(self, params, lr):
        stacked = params[0].ndim == 3
        rows, cols = params[0].shape[:-3:-1] if stacked else params[0].shape  # a stack is (in,out): its rows are its last axis
        x = torch.stack([w.grad.to(torch.bfloat16) for w in params])
        x = orthogonalise(x.flatten(0, 1) if stacked else x).view(x.shape)
        torch._foreach_add_(params, list(x.unbind(0)), alpha=-lr * math.sqrt(max(1.0, rows / cols)))


def optimizers(model):
    """Muon on every matrix but the tied table (the router gates too), AdamW on the table and the norm scales."""
    named = dict(model.named_parameters())
    adamw = [n for n in named if n == "embedding" or "norm" in n]
    muon = Muon([w for n, w in named.items() if n not in adamw], MUON_LR)
    return muon, torch.optim.AdamW([named[n] for n in adamw], ADAMW_LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True)


def make_step(batch=4, seq=512, experts="loop", dtype="float32", dropout=0.1, noise=0.1, device="cpu", compile=False, seed=0):
    """-> (step(tokens, targets Int[B,S]) -> loss as a float, model). One call: one micro-batch, one full optimizer update.
    Raises ValueError for an unknown experts or dtype, or tokens of another shape.
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
        if tokens.shape != (batch, seq):
            raise ValueError(f"tokens are {tuple(tokens.shape)}, the step was made for {(batch, seq)}")
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(tokens, targets)
        loss.backward()
        with record_function("part/clip"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        with record_function("part/muon"):
            muon.step()
        with record_function("part/adamw"):
            adamw.step()
        model.zero_grad()
        return loss.item()

    return step, model


def timed(function, device="cpu"):
    """-> (seconds, result), with a GPU's queue empty at both ends."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - start, result


def peak_mb(device="cpu"):
    """Peak resident memory in MB; on a GPU the peak of what torch allocated there."""
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round(peak / 2**20)


def step_runner(args):
    """-> a function that runs one step on fresh random tokens and gives {"seconds", "loss", "peak_rss_mb"}."""
    step, _ = make_step(args.batch, args.seq, args.experts, args.dtype, args.dropout, args.noise, args.device, args.compile, args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    def run():
        text = torch.randint(V, (args.batch, args.seq + 1), generator=generator).to(args.device)
        seconds, loss = timed(lambda: step(text[:, :-1], text[:, 1:]), args.device)
        return {"seconds": seconds, "loss": loss, "peak_rss_mb": peak_mb(args.device)}

    return run


def serve(answer):
    """Prints answer(line) as one JSON line for each line of stdin, until 'quit' or the end; a wrong line gets {"error": ...}."""
    for line in map(str.strip, sys.stdin):
        if line == "quit":
            return
        try:
            print(json.dumps(answer(line)), flush=True)
        except (KeyError, ValueError) as error:
            print(json.dumps({"error": f"{line!r}: {error}"}), flush=True)


def part_times(events):
    """Profiler events of one step -> {part: ms}. A backward node carries the sequence number of the forward op it belongs to."""
    part_of, spent = {}, defaultdict(float)

    def claim(event, part):
        part_of[event.sequence_nr] = part
        for child in event.cpu_children:
            claim(child, part)

    for event in (e for e in events if e.name.startswith("part/")):
        part = event.name.removeprefix("part/")
        claim(event, part)
        spent[part] += event.cpu_time_total / 1e3
    for event in (e for e in events if e.name.startswith("autograd::engine::evaluate_function")):
        spent[part_of.get(event.sequence_nr, "other") if event.sequence_nr >= 0 else "other"] += event.cpu_time_total / 1e3
    return spent


def print_profile(run):
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        total = run()["seconds"] * 1e3
    parts = part_times(recorded.events())
    parts["other"] += total - sum(parts.values())
    for name, ms in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{name:10s} {ms:8.0f} ms  {ms / total:6.1%}")
    print(f"{'step':10s} {total:8.0f} ms")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--worker", action="store_true", help="serve 'step' and 'quit' from stdin")
    p.add_argument("--profile", action="store_true", help="print the time of each part of one step (CPU)")
    p.add_argument("--experts", choices=sorted(EXPERTS), default="loop")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    for name, default in {"batch": 4, "seq": 512, "threads": 2, "steps": 3, "seed": 0, "dropout": 0.1, "noise": 0.1}.items():
        p.add_argument(f"--{name}", type=type(default), default=default)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    run = step_runner(args)
    if args.worker:
        return serve(lambda line: {"step": run}[line]())
    run()
    if args.profile:
        return print_profile(run)
    results = [run() for _ in range(args.steps)]
    rate = args.batch * args.seq / statistics.median(r["seconds"] for r in results)
    print(json.dumps({"tokens_per_second": rate, "losses": [r["loss"] for r in results], "peak_rss_mb": results[-1]["peak_rss_mb"]}))


if __name__ == "__main__":
    main()
