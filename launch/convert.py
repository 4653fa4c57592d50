"""Turns a model into a Hugging Face checkpoint folder, which every --model and --start here reads, and transformers too.

  python -m launch.convert --from=smollm2_135m --to=models/smollm2
  python -m launch.convert --from=models/smollm2 --to=models/smollm2_4x --upcycle_experts=4 --experts_per_token=2
  python -m launch.train   --start=models/smollm2_4x --steps=300 --workdir=runs/smollm2_4x
  python -m launch.convert --from=runs/smollm2_4x --to=models/trained --dtype=bfloat16

--from is a run folder of launch.train, a Hugging Face folder, a .gguf file, smollm2_135m (launch.data --fetch=smollm2_135m), or a preset (fresh parameters).
With --upcycle_experts a dense model becomes a mixture: copies of each feed-forward behind new routers, which give the dense model's logits until
--expert_noise or --reinitialise makes the experts differ, or training does. Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint.
"""

from typing import Any

from absl import flags

from launch.common import run, tell

_FROM: Any = flags.DEFINE_string("from", None, "The model.", required=True)
_TO = flags.DEFINE_string("to", None, "The new folder. Needed unless --dry_run.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a run; none means the newest.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Numbers of the new files; none means those of the model.")
_SHARD = flags.DEFINE_float("shard_gb", 4.0, "Size of a file in GB (1e9 bytes), at most.", lower_bound=1e-6)
_EXPERTS = flags.DEFINE_integer("upcycle_experts", None, "Makes a mixture of so many experts of a dense model.", lower_bound=2)
_PER_TOKEN = flags.DEFINE_integer("experts_per_token", 2, "Experts that each token is sent to.", lower_bound=1)
_ROUTER = flags.DEFINE_float("router_std", 0.02, "Standard deviation of the new routers' weights.", lower_bound=0.0)
_EXPERT_NOISE = flags.DEFINE_float(
    "expert_noise", 0.0, "Noise on each new expert, in standard deviations of its matrices.", lower_bound=0.0
)
_REINITIALISE = flags.DEFINE_float("reinitialise", 0.0, "Share of each new expert's hidden units that are drawn anew.", 0.0, 1.0)
_DENSE = flags.DEFINE_list("dense_layers", [], "Layers, counted from 0, that stay dense.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.", 0, 2**32 - 1)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the configuration and the parameters of what would be written; write nothing.")


def main(argv: list[str]) -> None:
    """Loads, perhaps upcycles, saves."""
    import json
    from pathlib import Path

    import jax.numpy as jnp

    from moe_jax.errors import ConfigError
    from moe_jax.hf.config import config_json, family_of
    from moe_jax.hf.save import save_hf
    from moe_jax.model import Model
    from moe_jax.train.saved import load_model
    from moe_jax.train.writers import Transfer
    from moe_jax.upcycle import upcycle, upcycled

    saved = load_model(_FROM.value, _STEP.value)
    config = saved.config
    if _EXPERTS.value is not None:
        config = upcycled(config, _EXPERTS.value, _PER_TOKEN.value, _ROUTER.value, _layers(_DENSE.value))
    model, family = Model(config), family_of(config)
    if _DRY_RUN.value:
        print(json.dumps(config_json(config, family, _DTYPE.value), indent=2))
        print(model.param_table())
        return
    if not _TO.value:
        raise ConfigError("--to is needed: the folder that the model goes into")
    params = saved.load(Model(saved.config), Transfer("read"))
    if _EXPERTS.value is not None:
        params = upcycle(Model(saved.config), params, model, _SEED.value, _EXPERT_NOISE.value, _REINITIALISE.value)
    companions = _FROM.value if Path(_FROM.value).is_dir() else None
    save_hf(model, params, _TO.value, _DTYPE.value, int(_SHARD.value * 1e9), companions, Transfer("wrote"))
    if not (Path(_TO.value) / "tokenizer.json").is_file():
        _save_tokenizer(saved, Path(_TO.value))
    kind = _DTYPE.value or config.dtypes.params
    size = model.parameter_count() * jnp.dtype(kind).itemsize / 1e9
    print(
        f"{family.architecture}, {model.parameter_count():,} parameters ({model.active_parameter_count():,} active), {size:.2f} GB in {kind}: {_TO.value}"
    )


def _save_tokenizer(saved, folder) -> None:
    """tokenizer.json of the model, or of the run that trained it; a line on stderr where there should be one and is none."""
    from moe_jax.errors import DataError
    from moe_jax.train import tokenizers
    from moe_jax.train.data import load_corpus
    from moe_jax.train.sources import cache_root

    spec = saved.tokenizer or (saved.run.data.tokenizer if saved.run else "bytes")
    try:
        if spec.startswith("bpe:"):  # trained on the run's text, and kept in the cache
            mark = load_corpus(saved.run.data).tokenizer.fingerprint
            kept = [f"{path}#{tokenizers.END_OF_TEXT}" for path in cache_root().glob(f"bpe-{spec[4:]}-*/tokenizer-*.json")]
            spec = next((one for one in kept if tokenizers.load(one).fingerprint == mark), "")
            if not spec:
                raise DataError(f"{cache_root()} does not keep that of {saved.run.data.source}")
        if spec != "bytes":  # which no library has
            tokenizers.save(spec, folder)
    except DataError as error:
        tell(f"no tokenizer.json: {error}")


def _layers(texts: list[str]) -> tuple[int, ...]:
    from moe_jax.errors import ConfigError

    if not all(text.strip().isdecimal() for text in texts):
        raise ConfigError(f"--dense_layers takes layer numbers, got {','.join(texts)}")
    return tuple(int(text) for text in texts)


if __name__ == "__main__":
    run(main)
