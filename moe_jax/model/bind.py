"""Where Flax ends: an NNX module that declares parameters becomes its specs and a pure function of a plain dict of arrays."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from moe_jax.axes import ParamSpec
from moe_jax.paths import SEPARATOR, unflatten


def declare(spec: ParamSpec) -> nnx.Param:
    """A parameter of a module: abstract, with its declaration attached. Read it in `__call__` as `self.name[...]`."""
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec)


def bind(module: nnx.Module) -> tuple[dict[str, Any], Callable]:
    """(specs, call): the nested dict of the module's ParamSpecs, and call(params, *args, **kwargs) -> module(*args, **kwargs).

    `params` has the structure of `specs` with an array for each spec. The module is split once, here; `call` runs while a program is
    traced and leaves nothing of Flax in it.
    """
    graph, state = nnx.split(module)
    specs = unflatten({SEPARATOR.join(map(str, path)): variable.get_metadata("spec") for path, variable in nnx.to_flat_state(state)})

    def call(params, *args, **kwargs):
        return _merge(graph, state, params)(*args, **kwargs)

    return specs, call


def _merge(graph, state, params):
    variables = []
    for path, variable in nnx.to_flat_state(state):
        leaf = params
        for name in path:
            leaf = leaf[name]
        variables.append((path, variable.replace(leaf)))
    return nnx.merge(graph, nnx.from_flat_state(variables))
