"""Expert parallelism by gathering tokens: every device gets the tokens of its group, computes its own experts on them, and the results are added up.

Runs inside a shard_map. In a layer's forward pass the rows of x, the decisions' ids with the tokens' numbers, and their weights are gathered (three
all-gathers), and the results are added and divided again (one reduce-scatter, in float32); in the backward pass dy is gathered, and dx and the weights'
gradients are reduce-scattered. A device receives (size - 1) * T rows whatever the routing, and nothing can overflow.
T tokens of one device, D model width, E experts, K experts per token.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.dispatch.base import DispatchStats, Group
from moe_jax.errors import ConfigError
from moe_jax.experts import Experts
from moe_jax.manual import varying
from moe_jax.products import weight_gradient
from moe_jax.routing import RoutingDecision


def exchange_all_gather(x, decision: RoutingDecision, experts: Experts, tokens, group: Group, local: Callable, lean: bool = False):
    """(y float32 [T,D], this device's DispatchStats).

    local: computes a device's own experts: (x, decision, experts, tokens) -> (y float32, stats), where an id equal to their number is nobody's. Where
    tokens are repeated over an axis of the group instead of divided, nothing is gathered over it. lean: the tokens of one device after those of another,
    computed again in the backward pass, in the memory that one device's tokens need: for a branch that must not decide how much memory a program takes.
    """
    split = tuple(axis for axis in group.axes if axis in varying(x))
    gather = functools.partial(lax.all_gather, axis_name=split, tiled=True) if split else lambda y: y
    numbered = gather(jnp.concatenate([decision.ids, tokens[:, None]], axis=1).astype(jnp.int32))
    mine = numbered[:, :-1] - lax.axis_index(group.axes) * experts.count
    here = (mine >= 0) & (mine < experts.count)
    owned = RoutingDecision(jnp.where(here, mine, experts.count), jnp.where(here, gather(decision.weights), 0.0))
    gathered = gather(x)
    compute = functools.partial(one_by_one, local, len(gathered) // len(x)) if lean else local
    y, stats = compute(gathered, owned, experts, numbered[:, -1])
    others = tuple(axis for axis in group.axes if axis not in split)
    y = lax.psum(y, others) if others else y
    y = lax.psum_scatter(y, split, scatter_dimension=0, tiled=True) if split else y
    own = lax.dynamic_slice_in_dim(here, lax.axis_index(split) * len(x), len(x)).sum() if split else here.sum()
    return y, DispatchStats(stats.load, padded=stats.padded, sent=jnp.int32(len(gathered) - len(x)), received=here.sum() - own)


def one_by_one(local: Callable, parts: int, x, decision: RoutingDecision, experts: Experts, tokens):
    """As `local`, the tokens in equal parts one after another, each computed again in the backward pass.

    Errors of weight gradients come once, on the sum; an operator that cannot is not split. Raises ConfigError where the tokens do not divide.
    """
    if len(x) % parts:
        raise ConfigError(f"{len(x)} tokens of a device do not divide into {parts} parts; change dispatch_chunks")
    operators = {name: operator.in_parts() for name, operator in experts.operators.items()}
    if None in operators.values():
        return local(x, decision, experts, tokens)
    weights = {name: _with_error(w, experts.operators.get(name), experts.first_row(name)) for name, w in experts.weights.items()}
    experts = dataclasses.replace(experts, weights=weights, operators=operators)

    @jax.checkpoint
    def one(experts, part):
        return local(part[0], part[1], experts, part[2])

    cut = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), (x, decision, tokens))
    y, stats = lax.map(functools.partial(one, experts), cut)
    return y.reshape(x.shape), jax.tree.map(lambda leaf: jnp.asarray(leaf).sum(0), stats)


@jax.custom_vjp
def _with_error(w, operator, first):
    """w; its gradient gets the operator's error."""
    del operator, first
    return w


_with_error.defvjp(
    lambda w, operator, first: (w, (w, operator, first)),
    lambda saved, dw: (weight_gradient(saved[1], (dw.astype(jnp.float32),), saved[0], saved[2]).astype(dw.dtype), None, None),
)
