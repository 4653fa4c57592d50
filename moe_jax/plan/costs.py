"""What a run would need on usual slices, without compiling: the memory model and the roofline, in a few lines. And the defaults of a planned run."""

import dataclasses
import math

from moe_jax.model import ModelConfig
from moe_jax.model.config import DTypePolicy
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.plan.chips import CHIPS
from moe_jax.plan.search import Candidate, search
from moe_jax.plan.topology import parse
from moe_jax.train.data import DataConfig
from moe_jax.train.run_config import RunConfig

USUAL = ("v5e:8x8", "v5p:4x4x4", "v6e:8x8", "h100:8", "h100:64")


def preset_run(preset: str, devices: int, seq_len: int | None = None, batch: int | None = None) -> RunConfig:
    """A run of a model preset as accelerators run it: a sequence for each device, bfloat16 products, Newton-Schulz in bfloat16.

    seq_len: default 4096, or the model's positions if they are fewer. batch: sequences in an update, default one for each device.
    """
    model = ModelConfig.preset(preset)
    model = model.replace(
        dtypes=DTypePolicy("float32", "bfloat16"), loss_chunk_size=512 if model.vocab_size > 65_536 else model.loss_chunk_size
    )
    length = seq_len or min(4096, model.max_seq_len)
    sequences = batch or devices
    data = DataConfig.fitting("wiki", model.vocab_size, length, batch_size=sequences)
    optimizer = OptimizerConfig(ns_dtype="bfloat16", warmup=50, total=1000)
    return RunConfig(model=model, data=data, optimizer=optimizer, updates=1000, eval_batch=sequences)


def best(config: RunConfig, name: str, keep_remat: bool = False) -> Candidate | None:
    """The best mesh on a slice, by the model alone; None where none fits. The network between the devices is not looked at."""
    kind, shape = parse(name)
    chip, devices = CHIPS[kind], math.prod(shape)
    found = search(fitted(config, devices), chip, devices, None, keep_remat)
    return found[0] if found[0].fits(chip) else None


def fitted(config: RunConfig, devices: int) -> RunConfig:
    """The run with at least a sequence for each device in a batch, so that every device has work: accumulated micro-batches are joined for it."""
    data = config.data
    if data.batch_size % devices == 0:
        return config
    whole = data.batch_size * data.accumulation
    sequences = -(-max(whole, devices) // devices) * devices
    return dataclasses.replace(config, data=data.replace(batch_size=sequences, accumulation=1), eval_batch=sequences, loss_windows=None)


def describe(config: RunConfig, names: tuple[str, ...] = USUAL) -> str:
    """A line for each slice: the best mesh, its memory and its time, or that nothing fits."""
    lines = []
    for name in names:
        chip, found = CHIPS[name.split(":")[0]], best(config, name)
        if found is None or found.memory is None or found.roofline is None:
            lines.append(f"{name:<10} no mesh of it holds the step")
            continue
        fast, slow = found.roofline.seconds(chip)
        run = fitted(config, found.mesh.size)
        need = f"{name:<10} {found.mesh!s:<25} {found.memory.peak / 2**30:5.1f} GiB of {chip.limit / 2**30:.0f}"
        time = f"{run.data.batch_size} x {run.data.seq_len} tokens in {fast:.2f} to {slow:.2f} s"
        lines.append(
            f"{need}, {time}; {config.updates:,} updates in {fast * config.updates / 60:.1f} to {slow * config.updates / 60:.1f} min"
        )
    return "\n".join(lines)
