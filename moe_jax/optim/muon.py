"""Muon for stacks of matrices: momentum, then each matrix of the stack replaced by a nearly orthogonal one.

A parameter is [..., in, out]: the last two axes are a matrix (y = x @ W) and every axis before them counts separate matrices.
m is the shorter of the two, n the longer.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from optax.contrib import MuonDimensionNumbers

from moe_jax.errors import ConfigError, check_known
from moe_jax.platforms import platform

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic: steepest at zero, singular values end between about 0.7 and 1.2
FORMS = ("auto", "standard", "gram")
DTYPES = ("float32", "bfloat16")
BATCHES = ("map", "vmap")
MATRIX = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def orthogonalise(
    x: jax.Array,
    steps: int = 5,
    form: str = "auto",
    dtype: str = "float32",
    eps: float = 1e-7,
    batch: str | None = None,
) -> jax.Array:
    """The Newton-Schulz image of every matrix in x [..., in, out]: same singular vectors, singular values near 1; float32.

    form: "standard" multiplies the matrix itself at every step. "gram" takes the m by m Gram matrix once and iterates on that; it needs fewer
    operations where n > 1.5 m. "auto" is "gram" for such matrices in float32, and "standard" otherwise. dtype: of the operands of products; they
    accumulate in float32, and the gram form carries its two matrices in float32. In bfloat16 both err by some 2e-2 (results/step_cpu has where more).
    batch: "map" takes one matrix at a time (fastest on a CPU), "vmap" all at once (accelerators; never merges the stack axes,
    so their sharding stays); None decides by the platform the program is lowered for.
    A zero matrix stays zero; Frobenius norms up to 1e19 do not overflow. Raises ConfigError for an unknown form, dtype or batch.
    Source: Jordan et al. 2024, "Muon" (Frobenius pre-scaling, the quintic); Gram form: the same polynomial with R = X Xᵀ carried along.
    """
    check_known("form", form, FORMS)
    check_known("dtype", dtype, DTYPES)
    if x.ndim < 2:
        raise ConfigError(f"orthogonalise needs matrices [..., in, out], got shape {x.shape}")
    m, n = sorted(x.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    factors = partial(_gram, tall=tall) if takes_gram(form, dtype, m, n) else _standard
    solve = partial(_image, partial(factors, steps=steps, eps=eps, dtype=dtype), tall)
    # Without the barriers XLA may give the products a transposed layout, for which the CPU has no bfloat16 product (it fails at run time).
    x = lax.optimization_barrier(x.astype(dtype))
    if batch is None:
        batch = "map" if platform() == "cpu" else "vmap"
    check_known("batch", batch, BATCHES)
    if batch == "map":
        return lax.optimization_barrier(lax.map(solve, x.reshape(-1, *x.shape[-2:])).reshape(x.shape))
    return lax.optimization_barrier(solve(x))


def takes_gram(form: str, dtype: str, m: int, n: int) -> bool:
    """Whether matrices of m by n are orthogonalised in the Gram form; see `orthogonalise`."""
    return form == "gram" or (form == "auto" and dtype == "float32" and n > 1.5 * m)


def _image(factors: Callable[[jax.Array], tuple[jax.Array, jax.Array]], tall: bool, x: jax.Array) -> jax.Array:
    """P X, or Xᵀ P of a tall matrix, with the (P, X) of `factors` for the wide one; P is symmetric but for rounding."""
    p, x = factors(_transposed(x) if tall else x)
    p = p.astype(x.dtype)
    return _product(_transposed(x), p) if tall else _product(p, x)


def _transposed(x: jax.Array) -> jax.Array:
    # A CPU multiplies rows several times faster than columns, and lays one matrix anew faster than a whole stack.
    laid = x.ndim == 2 and platform() == "cpu"
    return with_layout_constraint(x.mT, Layout((0, 1))) if laid else x.mT


def _product(a: jax.Array, b: jax.Array, transpose: bool = False) -> jax.Array:
    """a @ b, or a @ bᵀ with `transpose`, of every matrix, accumulated in float32."""
    stack = tuple(range(a.ndim - 2))
    contracted = (a.ndim - 1,), (b.ndim - 1 if transpose else b.ndim - 2,)
    # HIGHEST: float32 means float32 (the default is TF32 on NVIDIA and bfloat16 passes on TPU). Contracting the last axes of both, instead of
    # writing b.mT, spares the CPU a copy that costs more than a bfloat16 product.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contracted, (stack, stack)), precision=precision, preferred_element_type=jnp.float32)


def _prescale(r: jax.Array, eps: float) -> jax.Array:
    # The trace of X Xᵀ is the squared Frobenius norm of X, so the pre-scaling costs no pass over X.
    return 1.0 / (jnp.sqrt(jnp.trace(r, axis1=-2, axis2=-1))[..., None, None] + eps)


def _standard(x: jax.Array, steps: int, eps: float, dtype: str) -> tuple[jax.Array, jax.Array]:
    """X <- P X, P = a I + b R + c R² with R = X Xᵀ, for X [..., m, n]; the first step also divides X by its norm. The last P and X."""
    a, b, c = COEFFICIENTS
    identity = jnp.eye(x.shape[-2], dtype=jnp.float32)

    def factor(x, scale_of=lambda r: 1.0):
        r = _product(x, x, transpose=True)
        scale = scale_of(r)
        r = r * scale**2
        rounded = r.astype(dtype)
        return ((a * identity + b * r + c * _product(rounded, rounded)) * scale).astype(dtype)

    def step(_, both):
        x = _product(*both).astype(dtype)
        return factor(x), x

    x = x.astype(dtype)
    first = factor(x, partial(_prescale, eps=eps)), x
    # Written out it takes a compiler minutes for the matrices of a large model; a loop gives a CPU the layout that it has no product for.
    return lax.fori_loop(0, steps - 1, step, first, unroll=platform() == "cpu")


def _gram(x: jax.Array, tall: bool, steps: int, eps: float, dtype: str) -> tuple[jax.Array, jax.Array]:
    """The same polynomials as Q of Q X, and X: R = X Xᵀ, P = a I + H with H = b R + c R², Q <- P Q, R <- P R P; Q <- Q P for Xᵀ Q of a tall one.

    No operand of a product holds a I: rounded together with H it would cost the small singular values their digits, in bfloat16 all of them. The
    order matters because rounded factors do not quite commute: P P R would lose its symmetry, and the small values with it.
    """
    a, b, c = COEFFICIENTS

    def factor(r):
        rounded = r.astype(dtype)
        return (b * r + c * _product(rounded, rounded)).astype(dtype)

    def left(h, x):
        return a * x + _product(h, x.astype(dtype))

    def right(h, x):
        return a * x + _product(x.astype(dtype), h)

    def step(_, carry):
        r, h, q = carry
        r = left(h, right(h, r))
        h = factor(r)
        return r, h, right(h, q) if tall else left(h, q)

    r = _product(x, x, transpose=True)
    scale = _prescale(r, eps)
    r = r * scale**2
    h = factor(r)
    return lax.fori_loop(0, steps - 1, step, (r, h, a * jnp.eye(x.shape[-2]) + h))[2] * scale, x


class MuonState(NamedTuple):
    """count: updates done. momentum: exponential moving average of the gradients, shaped as the parameters."""

    count: jax.Array
    momentum: optax.Updates


def scale_by_muon(
    beta: float = 0.95,
    steps: int = 5,
    consistent_rms: float | None = None,
    dead: str = "keep",
    dimension_numbers: MuonDimensionNumbers | optax.Params = MATRIX,
    form: str = "auto",
    dtype: str = "float32",
    eps: float = 1e-7,
    batch: str | None = None,
    mesh: Mesh | None = None,
    places: Any = None,
) -> optax.GradientTransformation:
    """Muon's direction for every leaf, without learning rate or weight decay.

    momentum <- beta momentum + (1 - beta) g, mixed once more with g (Nesterov), without optax's bias correction, as in the seed study. The orthogonal
    matrix is scaled by sqrt(max(1, out/in)) (Keller Jordan), or by consistent_rms * sqrt(max(in, out)) when that is given (0.2 in Moonlight, arXiv
    2502.16982).
    dead: a matrix of a stack whose gradient is exactly zero (an expert that got no token) still moves under "keep", at full size for
    hundreds of updates, because orthogonalising undoes the decay of its momentum; under "skip" it gets no update. Its momentum
    decays under both.
    dimension_numbers: one for every leaf, or a tree of them shaped as the parameters; axes that they do not name count matrices.
    steps, form, dtype, eps, batch: see `orthogonalise`. mesh, places: where the devices of a mesh divide the matrices among them, and a tree
    of pairs of PartitionSpecs: how each parameter is stored, and how its axes [stack..., in, out] lie while a device has its matrices whole, and no others.
    """
    check_known("dead", dead, ("keep", "skip"))

    def solve(matrices):
        return orthogonalise(matrices, steps, form, dtype, eps, batch)

    def direction(mixed, gradient, numbers, place):
        own = solve
        if mesh is not None:
            # mixed where it is stored, or the compiler would move both that it is made of
            mixed = lax.with_sharding_constraint(mixed, NamedSharding(mesh, place[0]))
            own = jax.shard_map(solve, mesh=mesh, in_specs=place[1], out_specs=place[1])
        matrices, restore = as_matrices(mixed, numbers)
        with jax.named_scope("orthogonalise"):
            update = own(matrices) * shape_scale(matrices.shape, consistent_rms)
        if dead == "skip":
            update = update * jnp.any(as_matrices(gradient, numbers)[0] != 0, axis=(-2, -1), keepdims=True)
        return restore(update).astype(mixed.dtype)

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        gradients, count = updates, jnp.asarray(optax.safe_increment(state.count))
        momentum = optax.tree.update_moment(gradients, state.momentum, beta, 1)
        mixed = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, gradients)
        one = isinstance(dimension_numbers, MuonDimensionNumbers)
        numbers = jax.tree.map(lambda _: dimension_numbers, gradients) if one else dimension_numbers
        where = jax.tree.map(lambda _: None, gradients) if mesh is None else places
        return jax.tree.map(direction, mixed, gradients, numbers, where), MuonState(count, momentum)

    return optax.GradientTransformation(init, update)


def shape_scale(shape: tuple[int, ...], consistent_rms: float | None = None) -> float:
    """The factor that makes updates of matrices [..., in, out] comparable: Keller Jordan's, or Moonlight's when consistent_rms is given."""
    fan_in, fan_out = shape[-2:]
    if consistent_rms is None:
        return math.sqrt(max(1.0, fan_out / fan_in))
    return consistent_rms * math.sqrt(max(fan_in, fan_out))


def as_matrices(x: jax.Array, numbers: MuonDimensionNumbers = MATRIX) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """x as [stack..., in, out], and the function that undoes it. The stack axes keep their order and are never merged."""
    axes: Any = numbers  # an input axis and an output axis
    return jnp.moveaxis(x, axes, (-2, -1)), lambda y: jnp.moveaxis(y, (-2, -1), axes)


def matrix_rms(x: jax.Array, numbers: MuonDimensionNumbers = MATRIX) -> jax.Array:
    """Root mean square of each matrix of the stack, shape [stack...]: of an update, it shows experts that move without tokens."""
    return jnp.sqrt(jnp.mean(jnp.square(as_matrices(x, numbers)[0]), axis=(-2, -1)))
