"""Records which experts a model chooses over a text, for --replay: a clean pass of a checkpoint is the reference that noise is held against.

  python -m launch.record --model=runs/quick --steps=200 --out=routes/reference
  python -m launch.record --model=models/qwen3_30b --mesh=fsdp=2,expert=4 --steps=10 --out=routes/large
  python -m launch.train --preset=quick --start=runs/quick --steps=200 --noise=matmuls=relative:0.05 --replay=routes/reference --workdir=runs/held

The routes are those of the batches that launch.train reads in its first --steps updates with the same text, --seed and sizes (or of the
validation windows), without dropout, and without noise unless --noise asks for it, which makes them `noisy` routes instead of a `reference`.
Experts and weights are stored (--ids_only: experts), with the tokens, so that a replay over other text is refused.
Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint or trace.
"""

from absl import flags

from launch.common import Hosts, MeshFlag, apply_overrides, define_set, run
from moe_jax.errors import ConfigError

_MODEL = flags.DEFINE_string("model", None, "A run folder, a Hugging Face folder, or a preset (fresh parameters).", required=True)
_OUT = flags.DEFINE_string("out", None, "The folder of the routes. Needed unless --dry_run.")
_STEPS = flags.DEFINE_integer("steps", 200, "Updates whose batches are passed, or batches of validation windows.", lower_bound=1)
_SPLIT = flags.DEFINE_enum("split", "train", ["train", "validation"], "Which text.")
_DATA = flags.DEFINE_string("data", None, "Text, as for launch.train; none means that of the run, or wiki.")
_SEED = flags.DEFINE_integer("seed", None, "The data's order and the noise's draws; none means the run's, or 0.", lower_bound=0)
_NOISE = flags.DEFINE_string("noise", "", "SITE=KIND:SCALE[:phases=…], as for launch.train; none means clean.")
_IDS_ONLY = flags.DEFINE_boolean(
    "ids_only", False, "Store experts without weights: a fifth of the size, a third above 255 experts; tokens are stored in any case."
)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the text, the sizes and what would be written; write nothing.")
_MESH, _HOSTS = MeshFlag(), Hosts()
_SET = define_set()


def main(argv: list[str]) -> None:
    """Makes the data, passes it through the model, says what was written."""
    from moe_jax.distributed import first
    from moe_jax.model import Model
    from moe_jax.noise import NoiseSpec
    from moe_jax.train.data import build
    from moe_jax.train.record import record, source_of, trace_info
    from moe_jax.train.saved import load_model

    _MESH.check()
    _HOSTS.start()
    saved = load_model(_MODEL.value)
    text = saved.check_words(apply_overrides(saved.text(_DATA.value), _SET.value))
    seed = (saved.run.data_seed if saved.run else 0) if _SEED.value is None else _SEED.value
    noise = NoiseSpec.parse(_NOISE.value) if _NOISE.value else None
    source = source_of(saved.config, noise, _SPLIT.value)
    data, steps = build(text, seed), _STEPS.value
    rows = text.accumulation * text.batch_size if _SPLIT.value == "train" else text.batch_size
    if _SPLIT.value == "validation":
        steps = min(steps, -(-data.describe()["evaluated_windows"] // rows))
    info = trace_info(saved.config, data, rows, source, not _IDS_ONLY.value)
    tokens = steps * rows * text.seq_len
    say = print if first() else lambda _: None
    say(
        f"{steps} steps of {rows} x {text.seq_len} tokens of {text.source} ({_SPLIT.value}), seed {seed}, {_NOISE.value or 'no noise'} "
        f"(source: {source}); {len(info.layers)} routing layers, {info.top_k} of {info.num_experts} experts"
    )
    say(f"{info.bytes_per_token} bytes of experts a token, {info.bytes_per_token * tokens / 1e6:,.1f} MB in all before compression")
    if _DRY_RUN.value:
        return
    if not _OUT.value:
        raise ConfigError("--out is needed: the folder that the routes go into")
    model = Model(saved.config, _MESH.build())
    record(
        model,
        saved.load(model, None),
        data,
        _OUT.value,
        steps,
        noise=noise,
        weights=info.weights,
        split=_SPLIT.value,
        noise_seed=seed,
    )
    say(f"routes: {_OUT.value}")


if __name__ == "__main__":
    run(main)
