"""What training carries from one update to the next, and the values that a study varies without compiling again."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from moe_jax.noise import Noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint must hold; the data's position is the step."""

    step: Int[Array, ""]  # updates done
    params: dict[str, Any]
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """The values that differ between cells of one program. All are arrays; only the noise's structure is static."""

    noise: Noise | None  # resolved for the model
    noise_seed: jax.Array | int  # of noise and dropout draws
    balance_weight: Float[Array, ""] | float  # of the balance loss
    z_weight: Float[Array, ""] | float  # of the z loss
