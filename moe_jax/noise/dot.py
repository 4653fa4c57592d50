"""Noise on a matmul: the operator that computes its three products with an error.

The error is added to the whole logical result, in float32, before any cast: after the sum over all rows for dW (of a
micro-batch: those of one update share dW's draws, so that a relative error does not depend on the split). Passes that the spec does not name are
exact products at the activations that arrive. R rows, C columns of a result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from moe_jax.keys import fold, name_word
from moe_jax.noise.formats import round_trip
from moe_jax.noise.kinds import ELEMENTWISE, perturb


@functools.partial(jax.tree_util.register_dataclass, data_fields=("scale", "key"), meta_fields=("site", "kind", "passes", "format"))
@dataclasses.dataclass(frozen=True)
class Operator:
    """One matmul of one layer in one phase; `moe_jax.products` asks it for each product.

    relative, additive, ...: the kinds of `perturb` on the result. accumulation: y + s sqrt((a^2) (b^2)) n. quantise: the operands are rounded to `format`
    (by s of the way), rows along their last axis and weights along the axis that the forward pass contracts, in whichever of the passes are named: with
    all three, each of the three products has both operands rounded, as in a low-precision kernel, and rounding itself has derivative 1.
    """

    scale: Float[Array, ""]
    key: UInt32[Array, "2"]  # of seed, phase, step and layer
    site: str
    kind: str
    passes: tuple[str, ...]
    format: str | None = None

    def product(self, pass_: str, rows, a, b, multiply, axis: int, part=(0, 0)):
        """See products.product. a [..., M] are rows, b weights with `axis` the one that the forward pass contracts."""
        if pass_ not in self.passes:
            return multiply(a, b)
        if self.kind == "quantise":
            return multiply(self._rounded(a, -1), self._rounded(b, axis))
        y = multiply(a, b)
        size = multiply(_square(a), _square(b)) if self.kind == "accumulation" else None
        return self._with_error(y, size, pass_, rows.reshape(-1), a.dtype, part)

    @property
    def elementwise(self) -> bool:
        """Whether a part of a result's columns can be computed by itself."""
        return self.kind in ELEMENTWISE

    @property
    def sum_count(self) -> int:
        return 2 if self.kind == "accumulation" and "grad_weight" in self.passes else 1

    def partial_sums(self, a, b, multiply) -> tuple[jax.Array, ...]:
        """See products.partial_sums. a [R, M] are the rows that came in, b [R, N] the cotangents of those that went out."""
        if self.kind == "quantise" and "grad_weight" in self.passes:
            return (multiply(self._rounded(a, -1), self._rounded(b, -1)),)
        total = (multiply(a, b),)
        return total if self.sum_count == 1 else (*total, multiply(_square(a), _square(b)))

    def in_parts(self) -> "Operator | None":
        """This operator for a part of the rows, where `weight_gradient` follows on the sum of the parts' gradients; None when it needs all rows at once."""
        if self.kind == "quantise":
            return self
        rest = tuple(name for name in self.passes if name != "grad_weight")
        return None if self.sum_count > 1 else dataclasses.replace(self, passes=rest)

    def weight_gradient(self, sums: tuple[jax.Array, ...], first):
        """See products.weight_gradient."""
        if "grad_weight" not in self.passes or self.kind == "quantise":
            return sums[0]
        rows = first + jnp.arange(sums[0].size // sums[0].shape[-1], dtype=jnp.int32)
        return self._with_error(sums[0], sums[-1], "grad_weight", rows, sums[0].dtype)

    def _with_error(self, y, squares, pass_: str, rows, stored, part=(0, 0)):
        """y with its error; squares: for accumulation, the sum of the squared products. stored: the type in which the result is kept."""
        key = fold(self.key, name_word(f"{self.site}/{pass_}"))
        flat = y.reshape(-1, y.shape[-1])
        if self.kind == "accumulation":
            return perturb(flat, "additive", self.scale * jnp.sqrt(squares.reshape(flat.shape)), key, rows).reshape(y.shape)
        return perturb(flat, self.kind, self.scale, key, rows, stored=stored, part=part).reshape(y.shape)

    def _rounded(self, x, axis: int):
        """x moved `scale` of the way to its value in the format, float32."""
        x = x.astype(jnp.float32)
        return (1.0 - self.scale) * x + self.scale * round_trip(x, str(self.format), axis)


def _square(x):
    return jnp.square(x.astype(jnp.float32))
