"""Dispatch by sorting the assignments and multiplying all experts at once: the form for GPUs (by tiles) and TPUs (`jax.lax.ragged_dot`).

No padding and no drop. Rows are sorted and put back by gathers in both directions, since a permutation's transpose is the inverse permutation.
On a CPU XLA expands ragged_dot to a dense product per expert (8.7 times the ideal at 8 experts, 130 times at 128), so it is refused there unless forced.
R = T*K assignments, D model width, E experts.
"""

import jax
import jax.numpy as jnp

from moe_jax.dispatch.base import DispatchStats, row_numbers, sort_by_expert
from moe_jax.errors import Unsupported
from moe_jax.experts import Experts, expert_mlp
from moe_jax.manual import vary_like
from moe_jax.platforms import platform
from moe_jax.products import matmul
from moe_jax.routing import RoutingDecision


def dispatch_ragged(x, decision: RoutingDecision, experts: Experts, tokens=None, force: bool = False, share: float | None = None):
    """See `dispatch`; y is float32. force: run on a CPU all the same. share: as `dispatch_blocked` takes it; None: no assignment is nobody's.

    Raises Unsupported (a NotImplementedError) on a CPU without `force`.
    """
    if platform() == "cpu" and not force:
        raise Unsupported(
            "dispatch 'ragged' on a CPU is up to 130 times slower than the matmuls it holds; use 'blocked', or from Python force=True to run it anyway"
        )
    (count, slots), width = decision.ids.shape, x.shape[1]
    order, sizes = sort_by_expert(decision.ids, experts.count)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)

    numbers = row_numbers(tokens, decision).reshape(-1)[order]

    def grouped_dot(rows, name):
        return matmul(rows, experts.weights[name], experts.operators.get(name), numbers, sizes, experts.first_row(name))

    x_rows = _permute(vary_like(jnp.broadcast_to(x[:, None], (count, slots, width)).reshape(-1, width), order), order, place)
    # what a grouped product leaves in the rows of no group, and in their gradients, is not said
    known = (lambda rows: jnp.where((jnp.arange(order.size) < sizes.sum())[:, None], rows, 0)) if share is not None else lambda rows: rows
    out = _permute(known(expert_mlp(known(x_rows), numbers, experts, grouped_dot)), place, order).reshape(count, slots, width)
    return (decision.weights[..., None] * out).sum(1), DispatchStats(sizes.astype(jnp.float32))


@jax.custom_vjp
def _permute(rows, order, inverse):
    """rows[order]; `inverse` undoes it, and is the gather that its derivative needs instead of a scatter-add."""
    del inverse
    return rows[order]


_permute.defvjp(lambda rows, order, inverse: (rows[order], inverse), lambda inverse, d_rows: (d_rows[inverse], None, None))
