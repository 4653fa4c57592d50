"""A model as a Hugging Face checkpoint folder, which transformers loads."""

import json
import os
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import paths
from moe_jax.distributed import first, on_first
from moe_jax.errors import ConfigError
from moe_jax.hf.config import config_json, family_of
from moe_jax.hf.load import Progress
from moe_jax.hf.names import Target, targets
from moe_jax.hf.shards import write_shards
from moe_jax.model import Model

# What of a source folder goes along when its model is saved elsewhere.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def save_hf(
    model: Model,
    params: dict[str, Any],
    path: str | PathLike[str],
    dtype: str | None = None,
    shard_bytes: int = 4 << 30,
    companions: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes config.json and the safetensors files of the family whose models compute the same (Qwen3-MoE, OLMoE, Mixtral, Llama, Qwen2, Qwen3).

    dtype: float32, bfloat16 or float16; None: that of the parameters, which loses no bit. shard_bytes: of a file, at most. companions: a folder whose
    tokenizer is copied. The folder appears whole or not at all. Raises Unsupported for a model that no family
    has, ConfigError for a folder with something in it, OSError for a disk without room.
    """
    folder, family = Path(path), family_of(model.config)
    kind = np.dtype(jnp.dtype(dtype or model.config.dtypes.params))
    wanted = targets(model, family)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; save into a new folder")
    flat = paths.flatten(params)
    tensors = (_tensor(model, flat[target.path], target).astype(kind, copy=False) for target in wanted.values())
    total = sum(np.prod(target.shape, dtype=int) for target in wanted.values()) * kind.itemsize
    tensors = tensors if progress is None else _told(tensors, total, progress)

    def find_room() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder.parent).free) < total:
            raise OSError(28, f"No space left on device: {total:,} bytes are to be written, and {free:,} are free", str(folder))

    def write() -> None:
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            (new / "config.json").write_text(json.dumps(config_json(model.config, family, kind.name), indent=2) + "\n")
            write_shards(new, {name: (target.shape, kind) for name, target in wanted.items()}, tensors, shard_bytes)
            for name in () if companions is None else COMPANIONS:
                if (Path(str(companions)) / name).is_file():
                    shutil.copyfile(Path(str(companions)) / name, new / name)
            new.chmod(0o755)
            os.replace(new, folder)
        except OSError as error:
            error.filename = error.filename or str(folder)  # a full disk's names none
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)  # not there where all went well

    on_first(find_room)  # before any process waits for the parts of another
    if not first():  # all processes bring the parts together, the first one writes
        for _ in tensors:
            pass
    on_first(write)


def _tensor(model: Model, leaf: jax.Array, target: Target) -> np.ndarray:
    """One tensor of the files, on the host of every process."""
    if model.mesh is not None and not leaf.is_fully_addressable:
        part = jax.jit(lambda x: x[target.index], out_shardings=NamedSharding(model.mesh, PartitionSpec()))(leaf)
    else:
        part = leaf[target.index] if target.index else leaf
    return np.asarray(part).T if target.transposed else np.asarray(part)


def _told(tensors, total: int, progress: Progress):
    done = 0
    for tensor in tensors:
        yield tensor
        done += tensor.nbytes
        progress(done, total)
