"""Tokens a second of greedy generation with a cache, beside transformers' generate with the same weights on the same cores.

  python -m launch.convert --from=smollm2_135m --to=models/smollm2
  python benchmarks/generate.py models/smollm2 [TOKENS] [BATCH ...]

Without torch and transformers only the first column is measured. Medians of five; the first call, which compiles, is not counted.
"""

import os
import statistics
import sys
import time

import numpy as np

PROMPT, ROUNDS = 16, 5


def ours(folder: str, batch: int, tokens: int):
    """A call that generates, and its tokens."""
    from moe_jax.generate import Sampler, Sampling
    from moe_jax.hf.load import load_hf

    model, params = load_hf(folder)
    sampler, prompts = Sampler(model), np.random.default_rng(0).integers(17, 1000, (batch, PROMPT)).tolist()
    return lambda: np.stack([row[PROMPT:] for row in sampler(params, prompts, Sampling(max_tokens=tokens)).tokens])


def theirs(folder: str, batch: int, tokens: int):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    prompts = torch.from_numpy(np.random.default_rng(0).integers(17, 1000, (batch, PROMPT)))
    how = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)

    def call():
        with torch.no_grad():
            return model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)[:, PROMPT:].numpy()

    return call


def main(folder: str, tokens: int = 64, *batches: int) -> None:
    print(f"{os.cpu_count()} cores, float32, {PROMPT} tokens of prompt and {tokens} generated; tokens/s, median of {ROUNDS}")
    for batch in batches or (1, 8):
        found, made = {}, {}
        for name, prepare in (("moe_jax", ours), ("transformers", theirs)):
            try:
                call = prepare(folder, batch, tokens)
            except ImportError:
                continue
            made[name] = call()
            times = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            found[name] = batch * tokens / statistics.median(times)
        same = f", same tokens {np.mean(made['moe_jax'] == made['transformers']):.3f}" if len(made) == 2 else ""
        ratio = f", ratio {found['moe_jax'] / found['transformers']:.2f}" if len(found) == 2 else ""
        print(f"batch {batch}: " + ", ".join(f"{name} {pace:.1f}" for name, pace in found.items()) + ratio + same, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
