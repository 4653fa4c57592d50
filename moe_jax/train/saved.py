"""A model from a folder, a file or by its name: configuration and parameters, ready to be applied."""

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax import paths
from moe_jax.config_tools import rebuild
from moe_jax.errors import CheckpointError, ConfigError, MoeJaxWarning, nearest
from moe_jax.hf import gguf
from moe_jax.hf.config import FAMILIES, Family, read_config
from moe_jax.hf.load import Progress, Stored, fill
from moe_jax.hf.names import targets
from moe_jax.hf.shards import find_tensors
from moe_jax.model import Model, ModelConfig
from moe_jax.model.config import PRESETS
from moe_jax.train import sources
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.data import DataConfig
from moe_jax.train.run_config import RunConfig

# Fields that say which documents a tokenizer is trained on.
_DOCUMENTS = "source split document_order validation_share max_documents max_characters".split()
FETCHED = {"smollm2_135m": "smollm2"}  # weights that launch.data --fetch= brings, and their tokenizer


@dataclasses.dataclass(frozen=True)
class Saved:
    """A model as it was found. Its parameters are read when they are asked for."""

    config: ModelConfig
    what: str  # in words, e.g. "tiny with fresh parameters"
    load: Callable[[Model, Progress | None], dict[str, Any]] = dataclasses.field(repr=False)  # onto the model's mesh, in the types it has
    run: RunConfig | None = None  # the run that trained it
    step: int = 0  # updates done
    tokenizer: str | None = None  # what its words are, for tokenizers.load; None: a run's own, or any of the size

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """On the default device."""
        return self.load(Model(self.config), None)

    def text(self, source: str | None, seq_len: int | None = None) -> DataConfig:
        """The text `source` in the words of this model. None: that of its run, in the run's windows, or wiki in windows of at most 128 tokens.

        Raises ConfigError as `check_words` does.
        """
        if self.run is None:
            fitting = DataConfig.fitting(source or "wiki", self.config.vocab_size, min(seq_len or 128, self.config.max_seq_len))
            return fitting if self.tokenizer is None else fitting.replace(tokenizer=self.tokenizer)
        own = self.run.data
        return self.check_words(own.replace(source=source or own.source, seq_len=seq_len or own.seq_len))

    def check_words(self, text: DataConfig) -> DataConfig:
        """The text; raises ConfigError when the run's tokenizer, trained on its documents, would be trained on others: ids would mean other words."""
        own = text if self.run is None else self.run.data
        changed = [name for name in _DOCUMENTS if getattr(text, name) != getattr(own, name)]
        if changed and text.tokenizer == own.tokenizer and own.tokenizer.startswith("bpe:"):
            before, now = (", ".join(f"{name}={getattr(data, name)}" for name in changed) for data in (own, text))
            raise ConfigError(
                f"the tokenizer {own.tokenizer} of this run was trained on {before}, and on {now} its ids would mean other words; leave that as it was"
            )
        return text


def load_model(source: str | os.PathLike[str], step: int | None = None) -> Saved:
    """A preset by name, with fresh parameters of seed 0; smollm2_135m (launch.data --fetch=smollm2_135m); the folder of a Hugging Face checkpoint; a .gguf
    file; or what a run has trained: its folder, or the folder of its checkpoints.

    step: which checkpoint of a run; None: the newest that is intact, with a warning for each that is not. All of its bytes are verified, once and here, and
    nothing is renamed. The configuration is that in the checkpoint, with defaults for what it does not say. The optimizer's state is read to host memory and
    dropped. A folder that is called like a preset is written ./NAME. Raises ConfigError (nothing of that name; fields that this code does not have),
    MissingData (not fetched), CheckpointError (no checkpoint, none that is intact, or parameters of other shapes).
    """
    name, path = str(source), Path(source)
    if name in PRESETS:
        config = ModelConfig.preset(name)
        return Saved(config, f"preset {name} with fresh parameters", lambda model, _: model.init(0))
    if name in FETCHED:
        return _of_gguf(sources.locate(sources.find(name))[0], name, FETCHED[name])
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(path, path.name, None)
    if _is_hf(path):
        return _of_hf(path)
    return _of_run(path, step)


def _of_gguf(path: Path, name: str, tokenizer: str | None) -> Saved:
    values, tensors = gguf.read(path)
    return Saved(ModelConfig(**values), name, _reader(tensors, FAMILIES["llama"], str(path)), tokenizer=tokenizer)


def _reader(tensors: Mapping[str, Stored], family: Family, where: str) -> Callable[[Model, Progress | None], dict[str, Any]]:
    return lambda model, progress: fill(model, targets(model, family), tensors, where, progress)


def _is_hf(folder: Path) -> bool:
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def _of_hf(folder: Path) -> Saved:
    config, family = read_config(folder)
    own = folder / "tokenizer.json"
    return Saved(
        config, folder.resolve().name, _reader(find_tensors(folder), family, str(folder)), tokenizer=str(own) if own.is_file() else None
    )


def _of_run(source: Path, step: int | None) -> Saved:
    folder, found, manifest = _intact(source, step)
    where = f"checkpoint step {found} in {folder}"
    supervised = "data" in manifest["config"]  # reinforcement learning has a config of its own
    run = rebuild(RunConfig, manifest["config"], where) if supervised else None
    config = run.model if run else rebuild(ModelConfig, manifest["config"]["model"], where)
    shapes = {path.removeprefix("params/"): tuple(shape) for path, (shape, _) in manifest["leaves"].items() if path.startswith("params/")}
    wanted = {path: spec.shape for path, spec in paths.flatten(Model(config).specs).items()}
    wrong = [path for path in sorted(wanted.keys() | shapes.keys()) if shapes.get(path) != wanted.get(path)]
    if wrong:
        raise CheckpointError(f"{where} does not have the parameters of its model in this code: {', '.join(wrong[:4])}")

    def load(model: Model, progress: Progress | None) -> dict[str, Any]:
        del progress  # the reader of checkpoints has none
        host = {path: np.broadcast_to(np.zeros((), jnp.dtype(kind)), shape) for path, (shape, kind) in manifest["leaves"].items()}
        leaves = Checkpoints(folder, manifest["config"], manifest["data_fingerprint"]).load(found, manifest, host)
        flat = {path.removeprefix("params/"): leaf for path, leaf in leaves.items() if path.startswith("params/")}
        types = {path: spec.dtype for path, spec in paths.flatten(model.specs).items()}
        return model.place(paths.unflatten({path: np.asarray(leaf).astype(types[path]) for path, leaf in flat.items()}))

    tokenizer = manifest["config"].get("tokenizer") or None  # of reinforcement learning
    return Saved(config, f"{source.resolve().name}, trained for {found:,} updates", load, run, found, tokenizer)


def _intact(source: Path, step: int | None) -> tuple[Path, int, dict[str, Any]]:
    """The folder of the checkpoints, the step to load and its manifest, all bytes of it verified."""
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    if not folder.is_dir():
        raise ConfigError(f"no model {str(source)!r}: neither a folder nor a preset{nearest(str(source), PRESETS)} ({', '.join(PRESETS)})")
    reader = Checkpoints(folder, None, "")
    steps = [found for found in reader.steps() if step in (None, found)]
    if not steps:
        there = ", ".join(map(str, reader.steps())) or "none; give a run folder of launch.train, or train with checkpoint_every above 0"
        raise CheckpointError(f"no checkpoint{'' if step is None else f' of step {step}'} in {source}; it has {there}")
    for found in reversed(steps):
        try:
            return folder, found, reader.manifest(found)
        except CheckpointError as error:
            warnings.warn(str(error), MoeJaxWarning, stacklevel=3)
    raise CheckpointError(f"no intact checkpoint in {folder}; damaged: {', '.join(map(str, steps))}")
