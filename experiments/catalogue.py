"""The studies by name."""

import importlib

from moe_jax.errors import ConfigError, nearest
from moe_jax.studies.run import Experiment

EXPERIMENTS = ("noise_factorial", "noise_sites", "replay_freeze")


def load(name: str) -> Experiment:
    """The experiment NAME:PRESET; each module has `experiment(preset)`. Raises ConfigError with the nearest known name."""
    module, _, preset = name.partition(":")
    if module not in EXPERIMENTS:
        raise ConfigError(f"unknown experiment {module!r}{nearest(module, EXPERIMENTS)}; known: {', '.join(EXPERIMENTS)}")
    found = importlib.import_module(f"experiments.{module}")
    if not preset:
        raise ConfigError(f"experiment {module} needs a preset: {module}:{found.PRESETS[0]} (known: {', '.join(found.PRESETS)})")
    return found.experiment(preset)
