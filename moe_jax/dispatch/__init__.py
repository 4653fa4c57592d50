"""Dispatch: tokens, a routing decision and experts in; the weighted sum of the experts' outputs and a count of what happened out.

One contract (`base.py`). Three ways to compute: `dense` (every expert on every token, the reference), `blocked` (sorted tiles, CPU) and `ragged` (grouped
matmul, GPU and TPU). On a mesh these leave tokens where they are and gather the experts' weights; three others leave the weights and move tokens:
`all_gather`, `all_to_all` and `ragged_all_to_all` (`sharded.py`), which compute as the platform does best. T tokens, D model width, K experts per token.
"""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.all_gather import one_by_one
from moe_jax.dispatch.base import DispatchStats
from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.dispatch.dense import dispatch_dense
from moe_jax.dispatch.ragged import dispatch_ragged
from moe_jax.dispatch.sharded import EXCHANGES, dispatch_sharded
from moe_jax.errors import ConfigError, check_known
from moe_jax.experts import Experts
from moe_jax.mesh import Layout
from moe_jax.platforms import platform
from moe_jax.routing import RoutingDecision

LOCAL = ("dense", "blocked", "ragged")
IMPLEMENTATIONS = LOCAL + EXCHANGES

__all__ = ["IMPLEMENTATIONS", "DispatchStats", "dispatch"]


def dispatch(
    x: Float[Array, "T D"],
    decision: RoutingDecision,
    experts: Experts,
    implementation: str | Callable | None = None,
    tokens: Int[Array, "T"] | None = None,
    force: bool = False,
    layout: Layout | None = None,
    factor: float = 2.0,
    chunks: int = 1,
) -> tuple[Float[Array, "T D"], DispatchStats]:
    """y[t] = sum_k weights[t,k] * mlp_{ids[t,k]}(x[t]), in the type of x, and the DispatchStats.

    implementation: a name of `IMPLEMENTATIONS`, a function (x, decision, experts, tokens) -> (y, stats), or None for the platform's own: blocked on a
    CPU, ragged on a GPU or TPU; on a mesh that divides the experts, all_gather or all_to_all, whichever moves fewer rows. tokens: global token numbers,
    from which the rows' logical numbers come; default 0..T-1. force: run an implementation on a platform where it is refused for its slowness.
    layout: how x (over its tokens) and the experts lie on a mesh; None: on one device, where an exchange has nobody to exchange with. factor: of the
    buffers of all_to_all, in mean loads; what does not fit makes the layer take all_gather, and is counted. chunks: parts of a device's tokens that go
    through the experts one after the other, each computed again in the backward pass: less memory, the same numbers but for the order of sums.
    Products are in the type of x with float32 sums; gradients of weights come back in the weights' type. `experts.context` gets no gradient.
    Raises ValueError for an unknown name or shapes that do not fit, Unsupported for what an implementation cannot do here.
    """
    _check_shapes(x, decision, experts, tokens)
    if not callable(implementation):
        check_known("dispatch implementation", implementation, (None, *IMPLEMENTATIONS))
    if factor <= 0:
        raise ValueError(f"the buffers' factor must be above 0, got {factor}")
    stays = callable(implementation) or implementation in LOCAL
    local: Any = functools.partial(_local, implementation if stays else _platform_choice(), force)
    tokens = jnp.arange(len(x), dtype=jnp.int32) if tokens is None and (chunks > 1 or layout is not None) else tokens
    if layout is None or not layout.all_axes:
        y, stats = one_by_one(local, chunks, x, decision, experts, tokens) if chunks > 1 else local(x, decision, experts, tokens)
        return y.astype(x.dtype), stats
    if len(x) % layout.size(*layout.tokens):
        raise ConfigError(
            f"{len(x)} tokens do not divide over the mesh axes {', '.join(layout.tokens)}: {layout.size(*layout.tokens)} devices"
        )
    exchange: Any = "" if stays else implementation
    return dispatch_sharded(x, decision, experts, tokens, layout, exchange, local, factor, force, chunks)


def _local(name: Any, force: bool, x, decision, experts, tokens, share: float | None = None):
    if callable(name):
        return name(x, decision, experts, tokens)
    if name == "blocked":
        return dispatch_blocked(x, decision, experts, tokens, share=share)
    if name == "ragged":
        return dispatch_ragged(x, decision, experts, tokens, force=force, share=share)
    return dispatch_dense(x, decision, experts, tokens)


def _platform_choice() -> str:
    return "blocked" if platform() == "cpu" else "ragged"


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

    __call__ = staticmethod(dispatch)


sys.modules[__name__].__class__ = _CallableModule
