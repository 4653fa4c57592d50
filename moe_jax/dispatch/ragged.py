"""Dispatch by sorting the assignments and multiplying all experts at once with `jax.lax.ragged_dot`: the form for GPUs and TPUs.

No padding and no drop. Rows are sorted and put back by gathers in both directions, since a permutation's transpose is the inverse permutation.
On a CPU XLA expands ragged_dot to a dense product per expert (8.7 times the ideal at 8 experts, 130 times at 128), so it is refused there unless forced.
R = T*K assignments, D model width, E experts, M and N the inner and outer width of a product.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.dispatch.base import DispatchStats, row_numbers, sort_by_expert
from moe_jax.experts import Experts, expert_mlp, plain_product
from moe_jax.routing import RoutingDecision

# Contract axis 0 of both sides group by group: [R,M], [R,N] -> [E,M,N].
_WEIGHT_GRADIENT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def dispatch_ragged(x, decision: RoutingDecision, experts: Experts, tokens=None, force: bool = False):
    """See `dispatch`. force: run on a CPU all the same.

    Raises NotImplementedError on a CPU without `force`, and for a product that is not the plain one: it is a product of all experts at once, which
    the per-tile hook cannot stand for.
    """
    if jax.default_backend() == "cpu" and not force:
        raise NotImplementedError(
            "implementation='ragged' on a CPU is up to 130 times slower than the matmuls it holds; use 'blocked', or pass force=True to run it anyway"
        )
    if experts.product is not plain_product:
        raise NotImplementedError(
            "implementation='ragged' multiplies all experts at once and cannot call a perturbing product per tile; use 'blocked' or 'dense'"
        )
    (count, slots), width = decision.ids.shape, x.shape[1]
    order, sizes = sort_by_expert(decision.ids, experts.count)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)

    def grouped_dot(rows, w, site):
        del site
        return _grouped_dot(rows, w.astype(rows.dtype), sizes)

    x_rows = _permute(jnp.broadcast_to(x[:, None], (count, slots, width)).reshape(-1, width), order, place)
    numbers = row_numbers(tokens, decision).reshape(-1)[order]
    out = _permute(expert_mlp(x_rows, numbers, experts, grouped_dot), place, order).reshape(count, slots, width)
    y = (decision.weights[..., None] * out).sum(1).astype(x.dtype)
    zero = jnp.zeros((), jnp.int32)
    return y, DispatchStats(sizes.astype(jnp.float32), zero, zero)


@jax.custom_vjp
def _permute(rows, order, inverse):
    """rows[order]; `inverse` undoes it, and is the gather that its derivative needs instead of a scatter-add."""
    del inverse
    return rows[order]


_permute.defvjp(lambda rows, order, inverse: (rows[order], inverse), lambda inverse, d_rows: (d_rows[inverse], None, None))


@jax.custom_vjp
def _grouped_dot(rows, w, sizes):
    """[R,M] x [E,M,N] -> float32 [R,N]. By hand, since autodiff would multiply bfloat16 weights with a float32 cotangent."""
    return lax.ragged_dot(rows, w, sizes, preferred_element_type=jnp.float32)


def _grouped_dot_backward(residuals, d_out):
    rows, w, sizes = residuals
    d_out = d_out.astype(rows.dtype)
    d_rows = lax.ragged_dot(d_out, w.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32)
    d_w = lax.ragged_dot_general(rows, d_out, sizes, _WEIGHT_GRADIENT, preferred_element_type=jnp.float32)
    return d_rows.astype(rows.dtype), d_w.astype(w.dtype), None


_grouped_dot.defvjp(lambda rows, w, sizes: (_grouped_dot(rows, w, sizes), (rows, w, sizes)), _grouped_dot_backward)
