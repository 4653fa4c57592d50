"""Tokens a second of sampling a batch of answers in one program: with the cache, without it, and beside transformers' generate with the same weights.

  python benchmarks/sample.py [ANSWERS]

The model is the mixture of e7b:mini with fresh parameters; greedy, no stop token, so that every answer has all its tokens and they can be compared. Without
torch and transformers the third is left out. Then what each phase of a step of reinforcement learning takes, without and with noise. Medians of five; the
first call, which compiles, is not counted.
"""

import dataclasses
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments import e7b  # noqa: E402
from moe_jax.hf.save import save_hf  # noqa: E402
from moe_jax.keys import Draw  # noqa: E402
from moe_jax.model import Model  # noqa: E402
from moe_jax.rl import loop  # noqa: E402
from moe_jax.rl.sample import sample  # noqa: E402

ROUNDS = 5
RUN = e7b.SIZES["mini"].run


def pace(call: Callable[[], np.ndarray], tokens: int) -> tuple[float, np.ndarray]:
    """Tokens/s and what was made."""
    made, times = call(), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return tokens / statistics.median(times), made


def with_cache(model: Model, params, prompts: np.ndarray) -> np.ndarray:
    width, count = prompts.shape[1], RUN.response_tokens
    lengths, how = np.full(len(prompts), width, np.int32), (np.float32(0), np.float32(1), np.zeros(0, np.int32), np.uint32(0))
    return np.asarray(_sampling(model)(params, prompts, lengths, None, Draw(phase="rollout"), how).tokens)[:, width : width + count]


@functools.cache
def _sampling(model: Model):
    return jax.jit(functools.partial(sample, model, RUN.response_tokens))


def without_cache(model: Model, params, prompts: np.ndarray) -> np.ndarray:
    return np.asarray(_whole(model)(params, prompts))[:, prompts.shape[1] :]


@functools.cache
def _whole(model: Model):
    """Every token from a pass over all positions."""

    @jax.jit
    def generate(params, prompts):
        width, count = prompts.shape[1], RUN.response_tokens

        def one(step, tokens):
            logits = model.apply(params, tokens).logits
            chosen = jnp.argmax(jax.lax.dynamic_index_in_dim(logits, width + step - 1, 1, keepdims=False), -1)
            return jax.lax.dynamic_update_index_in_dim(tokens, chosen.astype(tokens.dtype), width + step, 1)

        return jax.lax.fori_loop(0, count, one, jnp.pad(prompts, ((0, 0), (0, count))))

    return generate


def theirs(folder: str, prompts: np.ndarray) -> Callable[[], np.ndarray]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    given = torch.from_numpy(prompts.astype(np.int64))
    count = RUN.response_tokens
    how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def call() -> np.ndarray:
        with torch.no_grad():
            return model.generate(given, attention_mask=torch.ones_like(given), **how)[:, prompts.shape[1] :].numpy()

    return call


def phases(noise: str) -> str:
    """The median seconds of each phase of a step, and their shares."""
    config = dataclasses.replace(
        RUN, noise=noise, steps=ROUNDS + 1, eval_problems=RUN.answers, eval_samples=0, eval_every=ROUNDS + 1, eval_split="tune"
    )
    series = loop.run(config, config.program(), config.load_task()).series
    found = {name: [value for _, value in series[f"seconds/{name}"]] for name in ("sample", "reward", "score", "update")}
    times = {name: statistics.median(values[config.mini_batches if name == "update" else 1 :]) for name, values in found.items()}
    times["update"] *= config.mini_batches
    total = sum(times.values())
    return (
        ", ".join(f"{name} {value * 1000:.0f} ms ({value / total:.0%})" for name, value in times.items())
        + f"; a step {total * 1000:.0f} ms"
    )


def main(answers: int = RUN.answers) -> None:
    model = Model(RUN.model)
    params = model.init(0)
    prompts = np.random.default_rng(0).integers(2, RUN.model.vocab_size, (answers, RUN.prompt_tokens)).astype(np.int32)
    tokens = answers * RUN.response_tokens
    where = f"{os.cpu_count()} cores, jax {jax.__version__}, {jax.devices()[0].platform}"
    print(f"{where}: {answers} answers of {RUN.response_tokens} tokens; tokens/s, median of {ROUNDS}")
    first, made = pace(lambda: with_cache(model, params, prompts), tokens)
    print(f"with cache        {first:>10,.0f}", flush=True)
    calls = {"without": lambda: functools.partial(without_cache, model, params, prompts)}
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, params, folder)
        calls["transformers"] = lambda: theirs(folder, prompts)
        for name, prepare in calls.items():
            try:
                found, others = pace(prepare(), tokens)
            except ImportError:
                print(f"{name:<17} not installed")
                continue
            print(
                f"{name:<17} {found:>10,.0f}   the cache is {first / found:.1f} times as fast; same tokens {np.mean(made == others):.4f}",
                flush=True,
            )
    for name, noise in (("clean", ""), ("5 % on every matmul", "matmuls=relative:0.05")):
        print(f"a step of {RUN.prompts} x {RUN.samples} answers, {name}: {phases(noise)}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
