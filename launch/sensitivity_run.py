"""From the flags of launch.sensitivity to the files of its report."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from launch.sensitivity_logits import Logits
from launch.sensitivity_report import build
from launch.sensitivity_tables import About
from moe_jax.config_tools import config_dict, flatten
from moe_jax.errors import ConfigError
from moe_jax.model import Model
from moe_jax.noise import Noise, NoiseSpec
from moe_jax.sensitivity import OPPOSITE, arms_of, sensitivity
from moe_jax.studies.document import Table
from moe_jax.trace_store import TraceReader
from moe_jax.train import data as text
from moe_jax.train.data import DataConfig
from moe_jax.train.record import Routes
from moe_jax.train.saved import Saved


@dataclasses.dataclass(frozen=True)
class Config:
    """What --set can reach."""

    model: str
    noise: str
    data: DataConfig
    data_seed: int = 0
    step: int = 0  # of the model's checkpoint
    seeds: int = 8
    first_seed: int = 0
    windows: int = 64
    batch: int = 8
    phase: str = "eval"
    replay: str | None = None

    def __post_init__(self):
        for field, least in (("seeds", 2), ("windows", 1), ("batch", 1), ("first_seed", 0), ("data_seed", 0)):
            if getattr(self, field) < least:
                raise ConfigError(f"{field} must be at least {least}, got {getattr(self, field)}")

    def spec(self) -> NoiseSpec:
        return NoiseSpec.parse(self.noise)


def make_config(saved: Saved, model: str, source: str | None, length: int | None, given: dict[str, Any]) -> Config:
    """The config of these flags: the text is the run's own, or for a preset one that fits its vocabulary; the batch is that of routes to replay."""
    if length is not None and length > saved.config.max_seq_len:
        raise ConfigError(f"--seq_len={length} is longer than the {saved.config.max_seq_len} positions of {model}")
    data = saved.text(source, length or (512 if saved.run is None else None))
    if given["batch"] is None:
        given["batch"] = 8 if given["replay"] is None else TraceReader(given["replay"]).info.batch
    return Config(model, data=data, data_seed=saved.run.data_seed if saved.run else 0, step=saved.step, **given)


def acting_noise(config: Config, saved: Saved) -> Noise:
    """The noise over the model's layers in the phase; raises ConfigError when none acts, or there is no router that it could fool."""
    if not saved.config.moe_layers:
        raise ConfigError(f"{config.model} is a dense model: it has no routes that noise could change")
    noise = saved.config.resolve(config.spec())
    acting = noise.in_phase(config.phase)
    if acting is None:
        used = sorted({phase for _, site in noise.structure for phase in site.phases})
        raise ConfigError(
            f"the noise {config.noise} does not act in the phase {config.phase}; it acts in {', '.join(used) or 'none'} (--phase)"
        )
    return acting


def describe(config: Config, saved: Saved) -> str:
    """What would run."""
    arms = arms_of(acting_noise(config, saved))[1]
    passes = sum(bool(noisy) or routes == OPPOSITE for routes, noisy in arms)
    batches = -(-config.windows // config.batch)
    lines = [
        json.dumps(config_dict(config), indent=2),
        f"{len(arms)} arms, {passes} of them with noise or noisy routes and so once per seed:",
    ]
    lines += [f"  {routes:12} {' + '.join(noisy) or 'none'}" for routes, noisy in arms]
    total = batches * (1 + passes * config.seeds + len(arms) - passes)
    return "\n".join([*lines, f"{total:,} forward passes of {config.batch} x {config.data.seq_len} tokens, in 2 compiled programs"])


def measure(config: Config, saved: Saved, folder: Path, mesh: Mesh | None = None) -> tuple[Path, Table]:
    """Runs all arms, over the devices of `mesh`, and writes the report into the folder; returns its page and the table of damages."""
    shape, acting = saved.config, acting_noise(config, saved)
    data = text.build(saved.check_words(config.data).replace(eval_windows=config.windows), config.data_seed)
    data.check_vocabulary(shape.vocab_size)
    windows = min(config.windows, len(data.validation_starts))
    if windows < config.windows:
        print(
            f"the validation text has {windows} windows of {config.data.seq_len} tokens, fewer than the {config.windows} asked for",
            file=sys.stderr,
        )
    logits = Logits(acting, shape.moe_layers, shape.experts_per_token, shape.selection_bias)
    recorded = None if config.replay is None else TraceReader(config.replay).info
    routes = None if recorded is None else _routes(config, saved, recorded.weights)

    batches = data.validation_batches(config.batch)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    model = Model(shape, mesh)
    params = saved.params if mesh is None else saved.load(model, None)
    found = sensitivity(model, params, batches, config.spec(), seeds, config.phase, routes, logits, _Progress(-(-windows // config.batch)))
    about = About(
        saved.what,
        f"{config.data.source} (validation windows of {config.data.seq_len} tokens, tokenizer {config.data.tokenizer})",
        config.noise,
        config.spec().table(),
        tuple(sorted({site.kind for _, site in acting.structure})),
        config.phase,
        shape.num_experts,
        shape.experts_per_token,
        settings=tuple((name, str(value)) for name, value in flatten(config).items() if name != "replay"),
    )
    if recorded is not None:
        about = dataclasses.replace(
            about, recorded="recorded", source=f"the routes in {Path(str(config.replay)).name} (source: {recorded.source})"
        )
    return build(found, about, logits, folder)


def _routes(config: Config, saved: Saved, weights: bool):
    """(batch, its tokens) -> the recorded routes, verified, of these tokens."""
    store = Routes(str(config.replay), saved.config, config.batch, config.data.seq_len, "ids+weights" if weights else "ids")
    return lambda index, tokens: store.of(index, tokens).trace


class _Progress:
    """A line on stderr every few seconds."""

    def __init__(self, batches: int):
        self.batches, self.start, self.last = batches, time.monotonic(), 0.0

    def __call__(self, done: int, share: float) -> None:
        now, part = time.monotonic() - self.start, (done + share) / self.batches
        if now - self.last >= 5 or part >= 1:
            self.last = now
            left = now / part - now
            print(
                f"batch {min(done + 1, self.batches)}/{self.batches} ({part:.0%}), {now:.0f} s elapsed, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
