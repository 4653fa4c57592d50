"""The studies by name."""

import importlib
from typing import Any

from moe_jax.errors import ConfigError, nearest
from moe_jax.studies.run import Experiment

EXPERIMENTS = ("noise_factorial", "noise_sites", "replay_freeze", "qwen3_30b", "e7b")


def load(name: str) -> Experiment:
    """The experiment NAME:PRESET, or NAME.STUDY:PRESET of a module with several studies. Raises ConfigError with the nearest known name."""
    found = load_all(name)
    if len(found) > 1:
        first, _, preset = name.partition(":")
        raise ConfigError(f"{name} is {len(found)} studies; name one: {', '.join(f'{first}.{study}:{preset}' for study in found)}")
    return next(iter(found.values()))


def load_all(name: str) -> dict[str, Experiment]:
    """The experiment under the name "", or each study of a module that has several, by the name of its folder, in the order in which they run."""
    where, _, preset = name.partition(":")
    module, dot, study = where.partition(".")
    found, known = _module(module), ()
    if hasattr(found, "STUDIES"):
        known = tuple(found.STUDIES)
    if dot and study not in known:
        raise ConfigError(f"{module} has no study {study!r}{nearest(study, known)}; known: {', '.join(known) or 'none, it is one study'}")
    if not preset:
        raise ConfigError(f"experiment {where} needs a preset: {where}:{found.PRESETS[0]} (known: {', '.join(found.PRESETS)})")
    if preset not in found.PRESETS:
        raise ConfigError(f"{where} has no preset {preset!r}{nearest(preset, found.PRESETS)}; known: {', '.join(found.PRESETS)}")
    if not known:
        return {"": found.experiment(preset)}
    return {"": found.experiment(preset, study)} if dot else {study: found.experiment(preset, study) for study in known}


def _module(name: str) -> Any:
    if name not in EXPERIMENTS:
        raise ConfigError(f"unknown experiment {name!r}{nearest(name, EXPERIMENTS)}; known: {', '.join(EXPERIMENTS)}")
    return importlib.import_module(f"experiments.{name}")
