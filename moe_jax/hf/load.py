"""A checkpoint folder's tensors, streamed one at a time into their places on the devices.

In host memory are a few rows of one tensor, of those that this process's devices hold, and nothing else: beside what the devices hold (which on a CPU is host
memory too) the peak is less than the largest tensor.
"""

import functools
import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import paths
from moe_jax.axes import ParamSpec
from moe_jax.errors import CheckpointError
from moe_jax.hf import gguf, shards
from moe_jax.hf.config import read_config
from moe_jax.hf.names import Target, targets
from moe_jax.model import DTypePolicy, Model, ModelConfig

Progress = Callable[[int, int], None]  # bytes read, bytes in all
Stored = shards.Tensor | gguf.Tensor
_PIECE = 4 << 20  # bytes of a file in host memory at a time, but for a row that is longer
# Tensors of older checkpoints that are computed from the configuration.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load_hf(
    path: str | PathLike[str],
    mesh: Mesh | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> tuple[Model, dict[str, Any]]:
    """The model of a Hugging Face checkpoint folder and its parameters, each on the devices where the mesh wants it.

    Qwen3-MoE, OLMoE, Mixtral, Llama, Qwen2 and Qwen3, in safetensors files of float32, float16 or bfloat16. dtype: of the parameters and of the
    computation (the router's and the loss's stay float32). progress: gets the bytes read and the bytes in all after each tensor.
    Raises ConfigError and Unsupported (config.json), CheckpointError (damaged files; names that are missing, unused or of another shape).
    """
    folder = Path(path)
    config, family = read_config(folder)
    model = Model(config.replace(dtypes=DTypePolicy(dtype, dtype)), mesh)
    return model, fill(model, targets(model, family), shards.find_tensors(folder), str(folder), progress)


def fill(
    model: Model, wanted: Mapping[str, Target], stored: Mapping[str, Stored], where: str, progress: Progress | None = None
) -> dict[str, Any]:
    """The model's parameters, each tensor of `wanted` read once and written into its place.

    Raises CheckpointError listing the names that `stored` lacks, has beside them, or has in another shape.
    """
    _check_names(model.config, wanted, stored, where)
    specs, shardings = paths.flatten(model.specs), model.shardings
    placed = {} if shardings is None else paths.flatten(shardings)
    parts = {path: _Parts(spec, placed.get(path)) for path, spec in specs.items()}
    total, done = sum(stored[name].nbytes for name in wanted), 0
    for name, target in wanted.items():
        parts[target.path].put(target, stored[name])
        done += stored[name].nbytes
        if progress is not None:
            progress(done, total)
    return paths.unflatten({path: part.array() for path, part in parts.items()})


class _Parts:
    """One parameter while it is being filled: on each device of this process its part of it."""

    def __init__(self, spec: ParamSpec, sharding: Any):
        self.spec, self.sharding = spec, sharding
        everything = {jax.local_devices()[0]: (slice(None),) * len(spec.shape)}
        places = everything if sharding is None else sharding.addressable_devices_indices_map(spec.shape)
        self.places = {
            device: tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, spec.shape, strict=True))
            for device, index in places.items()
        }
        self.buffers = {
            device: jnp.zeros(tuple(part.stop - part.start for part in place), spec.dtype, device=device)
            for device, place in self.places.items()
        }

    def put(self, target: Target, stored: Stored) -> None:
        """Reads what the devices hold of a tensor, equal parts once and a few rows at a time, and waits until it is there."""
        stack, holders = len(target.index), {}
        for device, place in self.places.items():
            if all(part.start <= i < part.stop for i, part in zip(target.index, place, strict=False)):
                inner = place[stack:][::-1] if target.transposed else place[stack:]
                holders.setdefault(tuple((part.start, part.stop) for part in inner), []).append(device)
        step = max(1, _PIECE * stored.shape[0] // max(stored.nbytes, 1))
        for ((begin, end), *rest), devices in holders.items():
            for first in range(begin, end, step):
                piece = stored.read((slice(first, min(first + step, end)), *(slice(*columns) for columns in rest)))
                at = (first - begin, *(0 for _ in rest))
                for device in devices:
                    within = tuple(i - part.start for i, part in zip(target.index, self.places[device], strict=False))
                    where = tuple(map(np.int32, (*within, *(at[::-1] if target.transposed else at))))
                    value = jax.device_put(piece, device)
                    self.buffers[device] = jax.block_until_ready(_write(self.buffers[device], value, where, target.transposed))

    def array(self) -> jax.Array:
        if self.sharding is None:
            return next(iter(self.buffers.values()))
        return jax.make_array_from_single_device_arrays(self.spec.shape, self.sharding, list(self.buffers.values()))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transposed")
def _write(buffer: jax.Array, value: jax.Array, at: tuple[jax.Array, ...], transposed: bool) -> jax.Array:
    """The buffer with a part of one matrix (or vector) of it set, in place."""
    value = (value.T if transposed else value).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice(buffer, value.reshape((1,) * (buffer.ndim - value.ndim) + value.shape), at)


def _check_names(config: ModelConfig, wanted: Mapping[str, Target], stored: Mapping[str, Stored], where: str) -> None:
    missing = [name for name in wanted if name not in stored]
    unused = [name for name in stored if name not in wanted and not _DERIVED.fullmatch(name)]
    if config.tie_embeddings and "lm_head.weight" in unused and "model.embed_tokens.weight" in stored:
        head, embedding = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
        if head.shape == embedding.shape and np.array_equal(head.read(), embedding.read()):  # written twice by some tools
            unused.remove("lm_head.weight")
    shaped = [
        f"{name} {stored[name].shape} instead of {target.shape}"
        for name, target in wanted.items()
        if name in stored and stored[name].shape != target.shape
    ]
    found = [(missing, "are missing"), (unused, "are not of this model"), (shaped, "have another shape")]
    told = [f"{len(names)} {what}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}" for names, what in found if names]
    if told:
        raise CheckpointError(f"the tensors of {where} do not fit its configuration; {'; '.join(told)}")
