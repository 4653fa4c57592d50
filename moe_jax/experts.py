"""The expert MLP as a function of rows, weights and a way to multiply: y = down(hidden), hidden = act(up) or act(gate) * up.

R rows, D model width, F expert width, E experts. A row is one assignment (token, slot); its logical number is token*K + slot.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from moe_jax.dots import dot
from moe_jax.errors import nearest

ACTIVATIONS: Mapping[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def plain_product(context, site: str, pass_: str, rows, a: Array, b: Array, contract: tuple[int, int]) -> Float[Array, "..."]:
    """a times b over axis contract[0] of a and contract[1] of b, both 2-D, accumulated in float32. The clean form of `Experts.product`."""
    del context, site, pass_, rows
    return dot(a, b, *contract)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weights", "context"), meta_fields=("activation", "product", "mask"))
@dataclasses.dataclass(frozen=True)
class Experts:
    """E expert MLPs and how they compute; what a dispatch implementation applies to the rows that the router sent.

    The functions are static and read arrays only through `context`, so that they may stand inside a custom derivative and a shard_map.
    They are functions of the rows' logical numbers: where a row is computed changes nothing.
    """

    weights: dict[str, Array]  # up [E,D,F], down [E,F,D], and gate [E,D,F] when gated; may be wider in type than the rows
    context: Any = None  # pytree of arrays that `product` and `mask` read (noise scales, keys)
    activation: str = "silu"
    # (context, site, pass_, rows Int[R], a, b, contract) -> float32 product. site: expert_gate | expert_up | expert_down; pass_: one of
    # keys.PASSES.
    # "grad_weight" products are partial sums over a block of rows: what perturbs dW belongs outside, on the cotangent of the weights.
    product: Callable = plain_product
    # (context, rows Int[R], width) -> Float[R, width], multiplied into the hidden layer (dropout); None: no multiplication at all.
    mask: Callable | None = None

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}{nearest(self.activation, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}"
            )

    @property
    def gated(self) -> bool:
        return "gate" in self.weights

    @property
    def count(self) -> int:
        return self.weights["up"].shape[0]

    def hidden(self, up: Float[Array, "R F"], gate: Float[Array, "R F"] | None, rows: Int[Array, "R"]) -> Float[Array, "R F"]:
        """The hidden layer from its pre-activations, with the mask applied; elementwise, in the type of `up`."""
        act = ACTIVATIONS[self.activation]
        hidden = act(up) if gate is None else act(gate) * up
        return hidden if self.mask is None else hidden * self.mask(self.context, rows, hidden.shape[-1]).astype(hidden.dtype)


def expert_mlp(x: Float[Array, "R D"], rows: Int[Array, "R"], experts: Experts, grouped_dot: Callable) -> Float[Array, "R D"]:
    """The MLP of every row, with `grouped_dot(x, w, site)` multiplying each row by its own expert's matrix; the result is float32."""
    w = experts.weights
    up = grouped_dot(x, w["up"], "expert_up").astype(x.dtype)
    gate = grouped_dot(x, w["gate"], "expert_gate").astype(x.dtype) if experts.gated else None
    return grouped_dot(experts.hidden(up, gate, rows), w["down"], "expert_down")
