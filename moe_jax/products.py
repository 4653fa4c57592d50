"""The product of rows with weights that every dense and grouped matmul of a model is, with its derivative by hand.

An `operator` (noise.dot.Operator, or None for exact arithmetic) computes each of the three products: the result, dX and dW, from a function that
multiplies. R rows, M inner and N outer width, G groups.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.dots import dot
from moe_jax.manual import total, vary_like
from moe_jax.platforms import platform

_TILE = 512  # rows at a time of a grouped weight gradient


def product(operator: Any, pass_: str, rows, a, b, multiply, axis: int = -2, part: tuple[Any, int] = (0, 0)) -> Float[Array, "..."]:
    """multiply(a, b) in float32 as `operator` does it.

    rows: logical numbers of a's rows. axis: of the weights b, the one that "forward" contracts. part: which columns the result has, if not
    all: the first one's number and how many there are.
    """
    return multiply(a, b) if operator is None else operator.product(pass_, rows, a, b, multiply, axis, part)


def partial_sums(operator: Any, a, b, multiply) -> tuple[jax.Array, ...]:
    """What a weight gradient over some of the rows adds to: multiply(a, b), and whatever else `operator` needs. All are of one shape."""
    return (multiply(a, b),) if operator is None else operator.partial_sums(a, b, multiply)


def sum_count(operator: Any) -> int:
    return 1 if operator is None else operator.sum_count


def weight_gradient(operator: Any, sums: tuple[jax.Array, ...], w: Array, first: Any = 0) -> Float[Array, "..."]:
    """The gradient [..., N] of the weights w from its sums over all rows, in float32.

    first: the logical number of its first row, counted over all leading axes. In a shard_map the sums of all devices that hold the same w are added up
    first, so that an error is one of the whole result.
    """
    sums = tuple(total(part, w) for part in sums)
    return sums[0] if operator is None else operator.weight_gradient(sums, first)


def matmul(
    x: Float[Array, "... M"],
    w: Float[Array, "..."],
    operator: Any = None,
    rows: Int[Array, "..."] | None = None,
    sizes: Int[Array, "G"] | None = None,
    first: Any = 0,
    transposed: bool = False,
    precision: lax.Precision | None = None,
    divided: bool = False,
) -> Float[Array, "... N"]:
    """x @ w in the type of x, summed and returned in float32; dX comes in the type of x, dW in that of w.

    w: [M, N]. sizes: w is [G, M, N] and multiplies that many rows of x [R, M] each, in order. transposed: w is [N, M]. rows: the logical numbers of x's rows;
    first: that of w's first row; both are coordinates of the operator's draws and not needed without one. precision: of the multiplications, default the
    platform's own. divided: the compiler divides x over a mesh, which it cannot where a layout is asked for.
    """
    return _matmul(_How(transposed, precision, divided), x, w, operator, rows, sizes, first)


class _How(NamedTuple):
    transposed: bool
    precision: lax.Precision | None
    divided: bool

    @property
    def axis(self) -> int:
        return -1 if self.transposed else -2

    def dot(self, a, b, contract_a: int, contract_b: int):
        return dot(a, b, contract_a, contract_b, self.precision, laid=not self.divided)


def outer_by_group(a: Float[Array, "R M"], b: Float[Array, "R N"], sizes: Int[Array, "G"], tile: int = _TILE) -> Float[Array, "G M N"]:
    """a^T b in float32 over the rows of each group, which lie one after the other; rows of no group may hold anything.

    A loop over the tiles of each group: where lax.ragged_dot_general contracts the rows, XLA makes G copies of them, 4 GB for 16 groups of a layer at 30B.
    """
    ends, tile = jnp.cumsum(sizes), min(tile, len(a))

    def one_group(bounds):
        begin, end = bounds

        def one_tile(index, total):
            first = begin + index * tile
            start = jnp.minimum(first, len(a) - tile)  # the last tile may reach back into rows that were counted
            mine = (start + jnp.arange(tile) >= first) & (start + jnp.arange(tile) < end)
            left, right = (jnp.where(mine[:, None], lax.dynamic_slice_in_dim(x, start, tile), 0) for x in (a, b))
            return total + dot(left, right, 0, 0, laid=False)

        empty = vary_like(jnp.zeros((a.shape[1], b.shape[1]), jnp.float32), a, b, sizes)
        return lax.fori_loop(0, (end - begin + tile - 1) // tile, one_tile, empty)

    return lax.map(one_group, (ends - sizes, ends))


def product_by_group(a: Float[Array, "R M"], w: Float[Array, "G M N"], sizes: Int[Array, "G"]) -> Float[Array, "R N"]:
    """a @ w in float32 with a matrix for each group of rows, which lie one after the other; rows of no group come out as anything.

    For GPUs, where XLA makes of lax.ragged_dot a product of every row with every group's matrix (benchmarks/compile_gpu.py; G times the operations): one
    batched product of tiles, each of one group, all of the same number of rows. At most a tile in each group is not full, so about twice the operations,
    and each tile brings its matrix along.
    """
    count, groups = len(a), len(sizes)
    tile = next(size for size in (1024, 512, 256, 128, 64, 0) if size <= count // groups) or min(64, count)
    ends, needed = jnp.cumsum(sizes), -(-sizes // tile)
    begins, last = ends - sizes, jnp.cumsum(needed)
    first = last - needed  # each group's first tile
    index = jnp.arange(count // tile + groups)
    group = jnp.minimum(jnp.searchsorted(last, index, side="right"), groups - 1)
    source = (begins[group] + (index - first[group]) * tile)[:, None] + jnp.arange(tile)
    with jax.named_scope("product_by_group"):
        out = lax.dot_general(
            a[jnp.clip(source, 0, count - 1)], w[group], (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
        ).reshape(-1, w.shape[-1])
    row = jnp.arange(count)
    mine = jnp.minimum(jnp.searchsorted(ends, row, side="right"), groups - 1)
    place = row - begins[mine]
    return out[jnp.clip((first[mine] + place // tile) * tile + place % tile, 0, len(out) - 1)]


def _by_group(a, w, sizes):
    if platform() == "gpu":
        return product_by_group(a, w, sizes)
    return lax.ragged_dot(a, w, sizes, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(how: _How, x, w, operator, rows, sizes, first):
    def multiply(a, b):
        if sizes is None:
            return how.dot(a, b, a.ndim - 1, b.ndim + how.axis)
        return _by_group(a, b, sizes)

    return product(operator, "forward", rows, x, w.astype(x.dtype), multiply, how.axis)


def _forward(how: _How, x, w, operator, rows, sizes, first):
    return _matmul(how, x, w, operator, rows, sizes, first), (x, w, operator, rows, sizes, first)


def _backward(how: _How, saved, dy):
    x, w, operator, rows, sizes, first = saved
    dy = dy.astype(x.dtype)

    def times_transpose(a, b):
        if sizes is None:
            return how.dot(a, b, a.ndim - 1, b.ndim - 3 - how.axis)
        return _by_group(a, b.swapaxes(-1, -2), sizes)

    def transpose_times(a, b):
        if sizes is not None:
            return outer_by_group(a, b, sizes)
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        return how.dot(b, a, 0, 0) if how.transposed else how.dot(a, b, 0, 0)

    dx = product(operator, "grad_input", rows, dy, w.astype(x.dtype), times_transpose, how.axis)
    dw = weight_gradient(operator, partial_sums(operator, x, dy, transpose_times), w, first)
    return total(dx, x).astype(x.dtype), dw.astype(w.dtype), None, None, None, None


_matmul.defvjp(_forward, _backward)
