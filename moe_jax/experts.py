"""The expert MLP as a function of rows, weights and a way to multiply: y = down(hidden), hidden = act(up) or act(gate) * up.

R rows, D model width, F expert width, E experts. A row is one assignment (token, slot); its logical number is token*K + slot.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.errors import check_known

ACTIVATIONS: Mapping[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weights", "operators", "context", "first"), meta_fields=("activation", "mask")
)
@dataclasses.dataclass(frozen=True)
class Experts:
    """E expert MLPs and how they compute; what a dispatch implementation applies to the rows that the router sent.

    Operators and mask are functions of the rows' logical numbers: where a row is computed changes nothing.
    """

    weights: dict[str, Array]  # up [E,D,F], down [E,F,D], and gate [E,D,F] when gated; may be wider in type than the rows
    operators: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the matmuls that are not exact: see moe_jax.products
    context: Any = None  # pytree of arrays that `mask` reads
    activation: str = "silu"
    # (context, rows Int[R], width) -> Float[R, width], multiplied into the hidden layer (dropout); None: no multiplication at all. Static, so that it may
    # stand inside a custom derivative and a shard_map.
    mask: Callable | None = None
    first: Any = 0  # global number of the first of these experts, where they are a part of all: a coordinate of the weight gradients' draws

    def __post_init__(self):
        check_known("activation", self.activation, ACTIVATIONS)

    @property
    def gated(self) -> bool:
        return "gate" in self.weights

    @property
    def count(self) -> int:
        return self.weights["up"].shape[0]

    def first_row(self, name: str) -> Any:
        """The logical number of a stack's first row, counted over all experts."""
        return self.first * self.weights[name].shape[1]

    def hidden(self, up: Float[Array, "R F"], gate: Float[Array, "R F"] | None, rows: Int[Array, "R"]) -> Float[Array, "R F"]:
        """The hidden layer from its pre-activations, with the mask applied; computed in float32, returned in the type of `up`."""
        act, exact = ACTIVATIONS[self.activation], up.astype(jnp.float32)
        hidden = act(exact) if gate is None else act(gate.astype(jnp.float32)) * exact
        return (hidden if self.mask is None else hidden * self.mask(self.context, rows, hidden.shape[-1])).astype(up.dtype)


def expert_mlp(x: Float[Array, "R D"], rows: Int[Array, "R"], experts: Experts, grouped_dot: Callable) -> Float[Array, "R D"]:
    """The MLP of every row, with `grouped_dot(x, name)` multiplying each row by its own expert's matrix of that name; the result is float32."""
    up = grouped_dot(x, "up").astype(x.dtype)
    gate = grouped_dot(x, "gate").astype(x.dtype) if experts.gated else None
    return grouped_dot(experts.hidden(up, gate, rows), "down")
