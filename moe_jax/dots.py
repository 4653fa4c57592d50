"""Matrix products with float32 sums, in the form that a CPU multiplies fast."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from moe_jax.platforms import platform


def made_once(x: Array, true: Any) -> Array:
    """x. On a CPU it stands in memory, where XLA would compute an elementwise or gathered x again, draws and all, in each operation that reads it.

    true: a traced Bool[] that is always True; a conditional is what XLA:CPU does not fuse through (it drops barriers).
    """
    return jax.lax.cond(true, lambda x: x, jnp.zeros_like, x) if platform() == "cpu" else x


def dot(a: Array, b: Array, contract_a: int, contract_b: int, precision=None, laid: bool = True) -> Float[Array, "..."]:
    """a times b over one axis of each, summed in float32 and returned as float32; a may have leading axes when it contracts its last.

    A product over both first axes (a weight gradient) has no fast form on a CPU, where a transpose is otherwise folded into the product: bfloat16 ran
    at a fifth of the speed of the same product over a last axis. There, a is laid out anew first, unless `laid` is False.
    """
    if laid and platform() == "cpu" and (a.ndim, b.ndim, contract_a, contract_b) == (2, 2, 0, 0):
        # the barrier keeps a transpose of the result out of the product, for which bfloat16 has no kernel (it fails at run time)
        return jax.lax.optimization_barrier(dot(with_layout_constraint(a.T, Layout((0, 1))), b, 1, 0, precision))
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
