"""Dispatch by sorting the assignments and multiplying them tile by tile, with gathers alone in both directions: the form for a CPU.

`tiles.py` lays the tiles out. One loop per size class has a traced count, so no tile is computed for nothing. Rows of x are gathered inside the loop;
results are written side by side, and each token gathers its K rows. The derivative is by hand, tile by tile: no rows are ever scattered or added in
place, and an expert's weight gradient is accumulated in the loop's carry. Saved for it: the pre-activations of all rows, [rows, F] in the type of x
(twice when gated), and, only when the last product is not exact, its output [rows, D] in float32. The hidden layer and its mask are computed again.
T tokens, D model width, E experts, K experts per token, F expert width, R rows of one tile.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.dispatch.base import DispatchStats, row_numbers
from moe_jax.dispatch.tiles import Tables, Tiling, make_tables
from moe_jax.dots import dot, made_once
from moe_jax.experts import Experts
from moe_jax.manual import total, vary_like
from moe_jax.products import partial_sums, product, sum_count, weight_gradient
from moe_jax.routing import RoutingDecision


def dispatch_blocked(x, decision: RoutingDecision, experts: Experts, tokens=None, share: float | None = None, **sizes: int):
    """See `dispatch`; y is float32. sizes: `unit` and `largest` of `Tiling.fit`, by default from the mean load.

    share: the part of the assignments that these experts are expected to have, where the others are nobody's (one more unit of rows); None: all.
    """
    tiling = Tiling.fit(decision.ids.size, experts.count, share=share, **sizes)
    tables = make_tables(decision.ids, tiling)
    numbers = row_numbers(tokens, decision).reshape(-1)
    y = _weighted_sum(tiling, x, decision.weights, experts, tables, numbers)
    return y, DispatchStats(tables.sizes.astype(jnp.float32), tables.padded)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(tiling: Tiling, x, weights, experts: Experts, tables: Tables, numbers):
    """y [T,D] in float32. Differentiable in x, weights and experts.weights; experts.context gets no gradient."""
    return _forward(tiling, x, weights, experts, tables, numbers)[0]


def _forward(tiling: Tiling, x, weights, experts: Experts, tables: Tables, numbers):
    """(y [T,D], what the backward pass needs)."""
    width, names, x_bits = experts.weights["up"].shape[-1], _inputs(experts), _bits(x)

    def one_tile(rows: _Rows, carry):
        saved, out = carry
        x_rows = _floats(_take(x_bits, rows.assignment // weights.shape[1]), x.dtype)
        pre = {name: _product(experts, name, "forward", rows, x_rows).astype(x.dtype) for name in names}
        hidden = experts.hidden(pre["up"], pre.get("gate"), rows.number)
        y_rows = _product(experts, "down", "forward", rows, hidden)
        return {name: _put(saved[name], _bits(pre[name]), rows.start) for name in names}, _put(out, y_rows, rows.start)

    empty = {name: jnp.zeros((tiling.rows, width), x_bits.dtype) for name in names}
    carry = (empty, jnp.zeros((tiling.rows, x.shape[1]), jnp.float32))
    saved, out = _each_tile(tiling, tables, numbers, one_tile, vary_like(carry, x, experts, tables, numbers))
    y = _combine(out, tables, weights)
    kept = out if "down" in experts.operators else None
    return y, (x, weights, experts, tables, numbers, saved, kept)


def _backward(tiling: Tiling, residuals, dy):
    """Cotangents of x, weights, experts (its weights alone), and none of the tables."""
    x, weights, experts, tables, numbers, saved, kept = residuals
    names, x_bits, dy_bits = _inputs(experts), _bits(x), _bits(dy.astype(x.dtype))

    def one_tile(rows: _Rows, carry):
        dx_out, d_weight_out, d_experts = carry
        token = rows.assignment // weights.shape[1]
        dy_rows = _floats(_take(dy_bits, token), x.dtype)
        gate = jnp.where(rows.filled, _take(weights.reshape(-1), rows.assignment), 0.0)[:, None]
        pre = [_floats(lax.dynamic_slice_in_dim(saved[name], rows.start, rows.size), x.dtype) for name in names]
        hidden, pull = jax.vjp(lambda up, gate=None: experts.hidden(up, gate, rows.number), *pre)
        weighted = (dy_rows * gate).astype(x.dtype)
        if kept is None:  # <dy, hidden W> = <dy W^T, hidden>, and the product commutes with the weight: the output need not be kept
            unweighted = _product(experts, "down", "grad_input", rows, dy_rows)
            d_hidden, d_weight = unweighted * gate, (unweighted * hidden).sum(1)
        else:  # a perturbation in padding is no gradient: what comes back for those rows is set to zero
            d_hidden = jnp.where(rows.filled[:, None], _product(experts, "down", "grad_input", rows, weighted), 0.0)
            d_weight = (lax.dynamic_slice_in_dim(kept, rows.start, rows.size) * dy_rows).sum(1)
            hidden = made_once(hidden, rows.start >= 0)
        d_experts = _accumulate(experts, d_experts, "down", rows, hidden, weighted)
        # the rows stand in memory before they are laid anew for the product: a gather that transposes misses the cache at every number
        x_rows, dx_rows = _floats(made_once(_take(x_bits, token), rows.start >= 0), x.dtype), 0.0
        for name, d_pre in zip(names, pull(d_hidden.astype(x.dtype)), strict=True):
            dx_rows = dx_rows + _product(experts, name, "grad_input", rows, d_pre)
            d_experts = _accumulate(experts, d_experts, name, rows, x_rows, d_pre)
        return _put(dx_out, dx_rows, rows.start), _put(d_weight_out, d_weight, rows.start), d_experts

    carry = (
        jnp.zeros((tiling.rows, x.shape[1]), jnp.float32),
        jnp.zeros((tiling.rows,), jnp.float32),
        {name: (jnp.zeros(w.shape, jnp.float32),) * sum_count(experts.operators.get(name)) for name, w in experts.weights.items()},
    )
    dx_rows, d_weight, d_experts = _each_tile(tiling, tables, numbers, one_tile, vary_like(carry, x, experts, tables, numbers, dy))
    dx = total(_combine(dx_rows, tables, jnp.ones_like(weights)), x).astype(x.dtype)
    d_weights = total(_take(d_weight, tables.row_of).reshape(weights.shape), weights).astype(weights.dtype)
    gradients = {
        name: weight_gradient(experts.operators.get(name), d_experts[name], w, experts.first_row(name)).astype(w.dtype)
        for name, w in experts.weights.items()
    }
    d_experts = dataclasses.replace(experts, weights=gradients, operators=dict.fromkeys(experts.operators), context=None, first=None)
    return dx, d_weights, d_experts, None, None


_weighted_sum.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of one tile."""

    size: int
    expert: jax.Array
    start: jax.Array  # the first one's place in the arrays of all rows
    assignment: jax.Array  # Int[R] local token*K + slot; padding has those of other rows
    number: jax.Array  # Int[R] logical row numbers
    filled: jax.Array  # Bool[R] False in padding
    sets: bool  # whether this tile is the first of its expert to be computed

    @classmethod
    def of(cls, tables: Tables, numbers, size: int, sets: bool, tile) -> "_Rows":
        assignment = lax.dynamic_slice_in_dim(tables.order, tables.first[tile], size)
        filled = jnp.arange(size) < tables.filled[tile]
        return cls(size, tables.expert[tile], tables.start[tile], assignment, _take(numbers, assignment), filled, sets)


def _each_tile(tiling: Tiling, tables: Tables, numbers, one_tile, carry):
    """carry after one_tile(rows, carry) for every tile; a loop for each size class. Not lax.switch: XLA:CPU copies the carry through it."""
    for size_class in range(1, tiling.classes + 2):
        size, sets = min(size_class, tiling.classes) * tiling.unit, size_class <= tiling.classes

        def step(tile, carry, size=size, sets=sets):
            return one_tile(_Rows.of(tables, numbers, size, sets, tile), carry)

        carry = lax.fori_loop(tables.bounds[size_class], tables.bounds[size_class + 1], step, carry)
    return carry


def _inputs(experts: Experts) -> tuple[str, ...]:
    """The matrices that x meets, in the order in which the hidden layer takes them (a dict through jax comes back sorted)."""
    return ("up", "gate") if experts.gated else ("up",)


def _product(experts: Experts, name: str, pass_: str, rows: _Rows, a):
    """float32 product of the tile's rows with its expert's matrix, or in the pass grad_input with its transpose."""
    w = lax.dynamic_index_in_dim(experts.weights[name], rows.expert, keepdims=False).astype(a.dtype)
    return product(experts.operators.get(name), pass_, rows.number, a, w, lambda a, w: dot(a, w, 1, 0 if pass_ == "forward" else 1))


def _accumulate(experts: Experts, d_experts: dict, name: str, rows: _Rows, a, b) -> dict:
    """d_experts with the sums of a^T b over the tile's rows set or added for the tile's expert."""
    totals = []
    for sums, part in zip(d_experts[name], partial_sums(experts.operators.get(name), a, b, lambda a, b: dot(a, b, 0, 0)), strict=True):
        if not rows.sets:
            part = part + lax.dynamic_index_in_dim(sums, rows.expert, keepdims=False)
        totals.append(lax.dynamic_update_index_in_dim(sums, part, rows.expert, 0))
    return {**d_experts, name: tuple(totals)}


def _bits(array):
    """bfloat16 as integers of the same bits, for buffers that a loop slices: XLA:CPU would turn the whole buffer into float32 and back for each slice."""
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype.itemsize == 2 else array


def _floats(bits, dtype):
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)


def _take(array, index):
    """array[index] for an index that is known to be inside: without the selects that guard one that is not."""
    return array.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _put(array, rows, start):
    return lax.dynamic_update_slice_in_dim(array, rows, start, 0)


def _combine(rows, tables: Tables, weights):
    """sum_k weights[t,k] * rows[row_of[t,k]], [T,D], by K gathers."""
    row_of = tables.row_of.reshape(weights.shape)
    parts = [weights[:, k, None] * _take(rows, row_of[:, k]) for k in range(weights.shape[1])]
    return functools.reduce(jnp.add, parts)
