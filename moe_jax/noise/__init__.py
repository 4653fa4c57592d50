"""Noise as data: what is perturbed (spec), by what (kinds), with which draws (draws). It serves any array and knows no model."""

from moe_jax.noise.dot import Operator
from moe_jax.noise.kinds import perturb
from moe_jax.noise.spec import Noise, NoiseSpec, SiteNoise

__all__ = ["Noise", "NoiseSpec", "Operator", "SiteNoise", "perturb"]
