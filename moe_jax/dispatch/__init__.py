"""Dispatch: tokens, a routing decision and experts in; the weighted sum of the experts' outputs and a count of what happened out.

One contract (`base.py`), several implementations: `dense` (every expert on every token, the reference), `blocked` (sorted tiles, CPU) and `ragged` (grouped
matmul, GPU and TPU). T tokens, D model width, K experts per token.
"""

import sys
import types
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.base import DispatchStats
from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.dispatch.dense import dispatch_dense
from moe_jax.dispatch.ragged import dispatch_ragged
from moe_jax.errors import nearest
from moe_jax.experts import Experts
from moe_jax.routing import RoutingDecision

IMPLEMENTATIONS = ("dense", "blocked", "ragged")

__all__ = ["IMPLEMENTATIONS", "DispatchStats", "dispatch"]


def dispatch(
    x: Float[Array, "T D"],
    decision: RoutingDecision,
    experts: Experts,
    implementation: str | Callable | None = None,
    tokens: Int[Array, "T"] | None = None,
    force: bool = False,
) -> tuple[Float[Array, "T D"], DispatchStats]:
    """y[t] = sum_k weights[t,k] * mlp_{ids[t,k]}(x[t]), in the type of x, and the DispatchStats.

    implementation: a name of `IMPLEMENTATIONS`, a function (x, decision, experts, tokens) -> (y, stats), or None for the platform's own: blocked on a
    CPU, ragged on a GPU or TPU. tokens: global token numbers, from which the
    rows' logical numbers come; default 0..T-1. force: run an implementation on a platform where it is refused for its slowness.
    Products are in the type of x with float32 sums; gradients of weights come back in the weights' type. `experts.context` gets no gradient.
    Raises ValueError for an unknown name or shapes that do not fit, NotImplementedError for what an implementation cannot do here.
    """
    _check_shapes(x, decision, experts, tokens)
    if callable(implementation):
        return implementation(x, decision, experts, tokens)
    name = _platform_choice() if implementation is None else implementation
    if name == "dense":
        return dispatch_dense(x, decision, experts, tokens)
    if name == "blocked":
        return dispatch_blocked(x, decision, experts, tokens)
    if name == "ragged":
        return dispatch_ragged(x, decision, experts, tokens, force=force)
    raise ValueError(f"unknown dispatch implementation {name!r}{nearest(name, IMPLEMENTATIONS)}; known: {', '.join(IMPLEMENTATIONS)}")


def _platform_choice() -> str:
    return "blocked" if jax.default_backend() == "cpu" else "ragged"


def _check_shapes(x, decision: RoutingDecision, experts: Experts, tokens):
    """A wrong rank would broadcast to a plausible answer; refuse it here."""
    if x.ndim != 2:
        raise ValueError(f"dispatch needs x of shape [T, D], got {x.shape}; flatten batch and sequence first")
    count, width = x.shape
    if decision.ids.ndim != 2 or decision.ids.shape[0] != count or decision.weights.shape != decision.ids.shape:
        raise ValueError(
            f"{count} tokens need ids and weights of shape [{count}, K], got {decision.ids.shape} and {decision.weights.shape}"
        )
    if experts.weights["up"].shape[1] != width:
        raise ValueError(
            f"x has width {width}, the experts' up matrices {experts.weights['up'].shape} need width {experts.weights['up'].shape[1]}"
        )
    if tokens is not None and tokens.shape != (count,):
        raise ValueError(f"{count} tokens need token numbers of shape ({count},), got {tokens.shape}")


class _CallableModule(types.ModuleType):
    """`mj.dispatch(x, ...)` is a name that users call, and importing this package makes `mj.dispatch` the package: so it can be called."""

    def __call__(self, *args, **kwargs):
        return dispatch(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
