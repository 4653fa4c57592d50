"""Matrix products with float32 sums, in the form that a CPU multiplies fast."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Float[Array, "..."]:
    """a times b over one axis of each, summed in float32 and returned as float32; a may have leading axes when it contracts its last.

    A product over both first axes (a weight gradient) has no fast form on a CPU, where a transpose is otherwise folded into the product: bfloat16 ran
    at a fifth of the speed of the same product over a last axis. There, a is laid out anew first.
    """
    if jax.default_backend() == "cpu" and (a.ndim, b.ndim, contract_a, contract_b) == (2, 2, 0, 0):
        a, contract_a = with_layout_constraint(a.T, Layout((0, 1))), 1
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)
