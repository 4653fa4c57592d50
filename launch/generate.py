"""Continues prompts with a model, all of them at once.

  python -m launch.generate --model=smollm2_135m --prompt="The capital of France is" --max_tokens=8
  python -m launch.generate --model=models/smollm2_4x --chat --prompt="Why is the sky blue?" --temperature=0.7 --top_p=0.9
  python -m launch.generate --model=models/smollm2_4x --prompts=prompts.txt --noise=experts=relative:0.05 --routes=routes/sampled

--model is whatever launch.convert --from takes. --noise acts while sampling (its phase is rollout); the same command gives the same text. --routes records
which experts each token took (mj.read_trace, mj.Replay). Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint or trace.
"""

import sys
import time

from absl import flags

from launch.common import MeshFlag, run

_MODEL = flags.DEFINE_string("model", None, "The model.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to continue.")
_PROMPTS = flags.DEFINE_string("prompts", None, "A file with a prompt on each line.")
_CHAT = flags.DEFINE_boolean("chat", False, "Put each prompt into the model's chat template, as a user's message.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes, smollm2 or the path of a tokenizer.json; none means the model's own.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "Tokens to sample after each prompt, at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", None, "Sample among so many of the likeliest.", lower_bound=1)
_TOP_P = flags.DEFINE_float("top_p", None, "Sample among the fewest tokens that have this probability together.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling and of the noise.", 0, 2**32 - 1)
_NOISE = flags.DEFINE_string("noise", "", "SITE=KIND:SCALE[:layers=…], comma-separated, as for launch.train.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Numbers of the parameters and the computation.")
_ROUTES = flags.DEFINE_string("routes", None, "A folder to record the routes into.")
_MESH = MeshFlag()


def main(argv: list[str]) -> None:
    """Tokenises, samples, prints."""
    from moe_jax.errors import ConfigError
    from moe_jax.generate import Sampler, Sampling
    from moe_jax.keys import Draw
    from moe_jax.model import DTypePolicy, Model
    from moe_jax.noise import NoiseSpec
    from moe_jax.train.saved import load_model
    from moe_jax.train.writers import Transfer

    prompts = _read_prompts()
    saved = load_model(_MODEL.value)
    config = saved.config.replace(dtypes=DTypePolicy(_DTYPE.value, _DTYPE.value))
    noise = config.resolve(NoiseSpec.parse(_NOISE.value)) if _NOISE.value else None
    if noise is not None and noise.in_phase("rollout") is None:
        raise ConfigError(
            f"the noise {_NOISE.value} does not act while sampling, in the phase rollout; add rollout to its phases, or name none"
        )
    if _ROUTES.value and not config.moe_layers:
        raise ConfigError(f"{_MODEL.value} is a dense model: it has no routes to record")
    tokenizer = _tokenizer(saved)
    if _CHAT.value:
        prompts = [tokenizer.chat.render([{"role": "user", "content": prompt}]) for prompt in prompts]
    ids = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    model = Model(config, _MESH.build())
    params = saved.load(model, Transfer("read"))
    stop = tuple(sorted({*tokenizer.chat.stops, *(() if tokenizer.eos_id is None else (tokenizer.eos_id,))}))
    sampling = Sampling(_MAX_TOKENS.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, stop, _SEED.value)
    sampler = Sampler(model, _TOP_K.value, bool(_ROUTES.value))
    began, seen = time.monotonic(), []
    draw = Draw(seed=_SEED.value, phase="rollout")
    found = sampler(params, ids, sampling, noise, draw, progress=lambda _, going: seen.append((time.monotonic(), going)))
    for row, prompt in enumerate(prompts):
        ids = found.sampled(row)
        print(f"{prompt}{tokenizer.decode(ids[:-1] if ids[-1] in stop else ids)}\n")
    count = int((found.lengths - found.prompt_lengths).sum())
    print(f"{count} tokens of {len(prompts)} sequences in {time.monotonic() - began:.1f} s{_pace(seen)}", file=sys.stderr)
    if _ROUTES.value and found.trace is not None:
        from moe_jax.trace_store import write_trace

        write_trace(
            _ROUTES.value,
            found.trace,
            model_hash=config.routing_hash(),
            num_experts=config.num_experts,
            tokens=found.tokens,
            source="rollout",
        )
        print(f"routes: {_ROUTES.value}", file=sys.stderr)


def _pace(seen: list[tuple[float, int]]) -> str:
    """Words for the tokens of sequences that go on, by second. seen: when a step was asked for, and how many sequences the one before it samples for."""
    if len(seen) < 4:
        return ""
    times, going = zip(*seen, strict=True)
    return f", {sum(going[1:-1]) / (times[-1] - times[1]):.1f} tokens/s after compiling"


def _read_prompts() -> list[str]:
    from moe_jax.errors import ConfigError, DataError

    prompts = list(_PROMPT.value)
    if _PROMPTS.value:
        try:
            with open(_PROMPTS.value, encoding="utf-8") as file:
                prompts += [line.rstrip("\n") for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--prompts={_PROMPTS.value} cannot be read ({error})") from None
    if not prompts or not all(prompts):
        raise ConfigError("give --prompt=TEXT, or --prompts=FILE with a prompt on each line; none may be empty")
    return prompts


def _tokenizer(saved):
    """The model's own, or the one that its run was trained with."""
    from moe_jax.errors import ConfigError
    from moe_jax.train import tokenizers

    name = _TOKENIZER.value or saved.tokenizer
    if name is None and saved.run is not None:
        from moe_jax.train.data import load_corpus

        return load_corpus(saved.run.data).tokenizer
    if name is None:
        raise ConfigError(
            f"{_MODEL.value} has no tokenizer of its own; name one by --tokenizer=bytes, smollm2 or the path of a tokenizer.json"
        )
    return tokenizers.load(name)


if __name__ == "__main__":
    run(main)
