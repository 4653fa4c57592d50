"""A model from disk or from its preset's name: configuration and parameters, ready to be applied."""

import dataclasses
import os
import typing
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax import paths
from moe_jax.errors import CheckpointError, ConfigError, MoeJaxWarning, nearest
from moe_jax.model import Model, ModelConfig
from moe_jax.model.config import PRESETS
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Saved:
    """A model as it was found."""

    config: ModelConfig
    params: dict[str, Any]
    run: RunConfig | None  # the run that trained it; None: it is a preset with the fresh parameters of seed 0
    step: int  # updates done


def load_model(source: str | os.PathLike[str], step: int | None = None) -> Saved:
    """A preset by name, with fresh parameters of seed 0, or what a run has trained: its folder, or the folder of its checkpoints.

    step: which checkpoint; None: the newest that is intact, with a warning for each that is not. All bytes are verified, and nothing is renamed. The
    configuration is that in the checkpoint, with defaults for what it does not say. The optimizer's state is read to host memory and dropped.
    A folder that is called like a preset is written ./NAME. Raises ConfigError (neither preset nor folder; fields that this code does not have),
    CheckpointError (no checkpoint, none that is intact, or parameters of other shapes).
    """
    if str(source) in PRESETS:
        config = ModelConfig.preset(str(source))
        return Saved(config, Model(config).init(0), None, 0)
    folder, found, manifest = _intact(Path(source), step)
    where = f"checkpoint step {found} in {folder}"
    run = rebuild(RunConfig, manifest["config"], where)
    host = {path: np.broadcast_to(np.zeros((), jnp.dtype(kind)), shape) for path, (shape, kind) in manifest["leaves"].items()}
    leaves, _, _ = Checkpoints(folder, manifest["config"], manifest["data_fingerprint"]).restore(host, found)
    flat = {path.removeprefix("params/"): jnp.array(leaf) for path, leaf in leaves.items() if path.startswith("params/")}
    wanted = {path: spec.shape for path, spec in paths.flatten(Model(run.model).specs).items()}
    wrong = [path for path in sorted(wanted.keys() | flat.keys()) if path not in flat or flat[path].shape != wanted.get(path)]
    if wrong:
        raise CheckpointError(f"{where} does not have the parameters of its model in this code: {', '.join(wrong[:4])}")
    return Saved(run.model, paths.unflatten(flat), run, found)


def rebuild(kind: Any, value: Any, where: str) -> Any:
    """The dataclass that `config_dict` made `value` of; a field that it lacks gets its default. Raises ConfigError naming unknown fields."""
    if isinstance(value, list):
        return tuple(value)
    if not dataclasses.is_dataclass(kind):
        return value
    kinds = typing.get_type_hints(kind)
    unknown = [field for field in value if field not in kinds]
    if unknown:
        raise ConfigError(f"{where} was written by other code: {kind.__name__} has no {', '.join(unknown)} here")  # type: ignore[union-attr]
    return kind(**{field: rebuild(kinds[field], part, where) for field, part in value.items()})  # type: ignore[operator]


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
