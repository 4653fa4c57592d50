"""Explains a noise spec in words and numbers: what it hits and what it spares, how many numbers it draws, how large its error is, what it does.

  python -m launch.noise --noise=router_gemm=relative:0.05 --preset=seed_79m
  python -m launch.noise --noise=e7b_as_run --preset=quick --phase=rollout
  python -m launch.noise --noise=experts=quantise:fp8_e4m3:layers=0-2,router_logits=additive:0.1:phases=train --data=synthetic

The model has fresh parameters. One batch goes through it clean, and once more with the noise of --phase on; in the phase "train" a spec that
names gradients gets a backward pass too, of the mean cross-entropy. Dropout is off. Wherever noise acts, the noisy program computes the exact
value as well, from the same operands, which are those that arrive in the noisy network; the difference is that site's error:

  error         relative: ||y' - y|| / ||y|| over all elements of the product or value in all layers that are hit; then the layer where it
                is largest. Only rows that stand for a token count: rows that fill up a tile or a chunk are left out.
  numbers       how many random numbers one step draws for the layers that are hit; quantise and bias draw none, bit_flip 32 an element.
  logits        of the clean network's routers, before selection: mean and std over the experts of a token, averaged over tokens; offset is
                |mean| / std, averaged the same way. The softmax ignores the mean, and relative noise grows with it. margin: how far the last
                chosen expert leads the next. error/std: rms error of the logits at the router's own sites, in units of std.
  sets changed  tokens whose set of experts differs between the clean and the noisy pass.

Exit codes: 0 done, 2 usage or config, 3 data.
"""

import sys
from typing import TYPE_CHECKING

from absl import flags

from launch.common import apply_overrides, define_set, run
from moe_jax.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from launch.noise_report import Config

_NOISE = flags.DEFINE_string(
    "noise",
    None,
    "The spec: SITE=KIND:SCALE[:passes=…][:layers=…][:phases=…], comma-separated, or the name of one "
    "(e7b_as_run, e7b_as_described, dense7b_as_run, seed_gate_0.1).",
    required=True,
)
_PRESET = flags.DEFINE_string("preset", "quick", "Model preset: tiny, quick, small, seed_79m.")
_DATA = flags.DEFINE_string(
    "data",
    "wiki",
    "Text, as for launch.train. Only the default is fetched when it is missing, and is replaced by synthetic when it cannot be.",
)
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Tokens in each; none means 512, or the model's max_seq_len if less.", lower_bound=1)
_PHASE = flags.DEFINE_enum(
    "phase",
    None,
    ["rollout", "old_logprob", "train", "eval"],
    "Measure in this phase; none means train, or the first in which the spec acts.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of parameters, data order and noise; --set init_seed= and the like part them.", lower_bound=0)
_REPLAY = flags.DEFINE_string(
    "replay", None, "Routes of launch.record: both passes take those of its first step, which must be of this batch."
)
_REPLAY_WHAT = flags.DEFINE_enum("replay_what", "ids", ["ids", "ids+weights"], "What of them.")
_SET = define_set()


def main(argv: list[str]) -> None:
    """Prints the explanation."""
    from launch.noise_report import explain, read_spec

    spec = read_spec(_NOISE.value)
    make_config(_DATA.value).model.resolve(spec)  # what is wrong with the flags is said before any text is read
    config, batch, text = _batch()
    print("measuring on the batch; two programs to compile", file=sys.stderr, flush=True)
    explained = explain(spec, config, batch, text, _PHASE.value, _PRESET.value, _routes(config, batch["tokens"]))
    print(f"noise   {_NOISE.value}\n{explained}")


def make_config(source: str) -> "Config":
    """What the flags name, with text from `source`; synthetic text needs no tokenizer that would have to be fetched."""
    from launch.noise_report import Config
    from moe_jax.model import ModelConfig
    from moe_jax.train.data import DataConfig

    model = ModelConfig.preset(_PRESET.value)
    data = DataConfig.fitting(source, model.vocab_size, _SEQ_LEN.value or min(512, model.max_seq_len), batch_size=_BATCH.value)
    seed = _SEED.value
    return apply_overrides(Config(model, data, seed, seed, seed), _SET.value)


def _routes(config: "Config", tokens: "np.ndarray"):
    """The replay that the flags ask for, or None."""
    if _REPLAY.value is None:
        return None
    from moe_jax.train.record import Routes

    rows, length = tokens.shape
    return Routes(_REPLAY.value, config.model, rows, length, _REPLAY_WHAT.value).of(0, tokens)


def _batch() -> tuple["Config", dict[str, "np.ndarray"], str]:
    """The config, its first training batch, and where that comes from in words."""
    from moe_jax.train import sources

    config = make_config(_DATA.value)
    try:
        return config, *_read(config)
    except sources.MissingData:
        if flags.FLAGS["data"].present or config.data.source != _DATA.default:
            raise
    try:
        for name in (_DATA.default, *(["smollm2_tokenizer"] if config.data.tokenizer == "smollm2" else [])):
            sources.fetch(name, progress=lambda line: print(line, file=sys.stderr, flush=True))
        return config, *_read(config)
    except DataError as error:
        config = make_config("synthetic")
        batch, text = _read(config)
        return config, batch, f"{text}, since {_DATA.default} is not to be had ({error})"


def _read(config: "Config") -> tuple[dict[str, "np.ndarray"], str]:
    from moe_jax.train.data import build

    data = build(config.data, config.data_seed)
    data.check_vocabulary(config.model.vocab_size)
    return {name: part[0] for name, part in data.batch(0).items()}, f"{config.data.source}, tokenizer {config.data.tokenizer}"


if __name__ == "__main__":
    run(main)
