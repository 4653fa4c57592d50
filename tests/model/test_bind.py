"""Binding leaves plain dicts and a pure function: specs as declared, the same numbers as the mathematics, nothing of Flax in the program."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import paths
from moe_jax.axes import ParamSpec
from moe_jax.model.bind import bind, declare

INNER = ParamSpec((3, 4), ("embed", "mlp"), "hidden", scale=0.5)
OUTER = ParamSpec((4,), ("mlp",), "bias", "zeros")


class Inner(nnx.Module):
    def __init__(self):
        self.matrix = declare(INNER)

    def __call__(self, x):
        return x @ self.matrix[...]


class Outer(nnx.Module):
    def __init__(self):
        self.inner = Inner()
        self.shift = declare(OUTER)
        self.factor = 2.0

    def __call__(self, x, power=1):
        return (self.factor * self.inner(x) + self.shift[...]) ** power


PARAMS = {"inner": {"matrix": jnp.arange(12.0).reshape(3, 4)}, "shift": jnp.arange(4.0)}
X = jnp.array([[1.0, 2.0, 3.0]])


def test_specs_and_call():
    specs, call = bind(Outer())
    assert specs == {"inner": {"matrix": INNER}, "shift": OUTER}
    expected = (2 * np.asarray(X) @ np.arange(12.0).reshape(3, 4) + np.arange(4.0)) ** 2
    np.testing.assert_allclose(call(PARAMS, X, power=2), expected, rtol=1e-6)
    again = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)  # nothing of the first call stays in the module
    np.testing.assert_allclose(call(again, X), 2 * np.sqrt(expected), rtol=1e-6)


def test_gradients_have_the_structure_of_the_parameters():
    _, call = bind(Outer())
    gradients = jax.grad(lambda params: call(params, X).sum())(PARAMS)
    assert jax.tree.structure(gradients) == jax.tree.structure(PARAMS) and type(gradients["inner"]) is dict
    np.testing.assert_array_equal(gradients["inner"]["matrix"], np.repeat(2 * np.asarray(X).T, 4, axis=1))
    np.testing.assert_array_equal(gradients["shift"], 1.0)


def test_the_program_is_that_of_plain_jax():
    _, call = bind(Outer())

    def plain(params, x):
        return (2.0 * (x @ params["inner"]["matrix"]) + params["shift"]) ** 1

    assert str(jax.make_jaxpr(call)(PARAMS, X)) == str(jax.make_jaxpr(plain)(PARAMS, X))


def test_nothing_of_flax_in_the_whole_models_program(make_model, params, tokens):
    """Neither in the equations nor among what goes in and out."""
    model = make_model()
    closed = jax.make_jaxpr(lambda params: model.apply(params, tokens, capture=("trace",)))(params)
    assert "flax" not in str(closed) and "nnx" not in str(closed)
    assert jax.tree.structure(model.specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec)) == jax.tree.structure(params)
    assert all(type(node) is dict for node in (params, params["layers"], params["layers"]["feed_forward"]))
    for path, spec in paths.flatten(model.specs).items():
        assert paths.flatten(params)[path].shape == spec.shape and paths.flatten(params)[path].dtype == spec.dtype
