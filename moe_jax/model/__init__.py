"""The decoder: its configuration, its parts, and the Model a user holds."""

from moe_jax.model.config import DTypePolicy, ModelConfig
from moe_jax.model.model import Model, Output

__all__ = ["DTypePolicy", "Model", "ModelConfig", "Output"]
