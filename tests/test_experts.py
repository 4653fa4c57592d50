"""The expert MLP against NumPy: gated and not, every activation, the mask, and rows and names handed on as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from moe_jax.experts import Experts, expert_mlp

R, D, F, E = 7, 5, 6, 3
X = jax.random.normal(jax.random.key(0), (R, D))
EXPERT = np.array([0, 2, 1, 1, 0, 2, 2])  # whose matrices each row uses
ROWS = jnp.arange(100, 100 + R)


def make(gated=True, **options) -> Experts:
    shapes = {"up": (E, D, F), "down": (E, F, D)} | ({"gate": (E, D, F)} if gated else {})
    draw = np.random.default_rng(1)
    return Experts({name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in shapes.items()}, **options)


def per_row(experts):
    """Each row times its own expert's matrix of a name."""

    def dot(x, name):
        return jnp.einsum("rd,rdf->rf", x, experts.weights[name][EXPERT].astype(x.dtype), preferred_element_type=jnp.float32)

    return dot


NUMPY = {
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def reference(x, experts, activation, mask=1.0):
    w = {name: np.asarray(value, np.float64) for name, value in experts.weights.items()}
    x = np.asarray(x, np.float64)
    out = []
    for row, expert in zip(x, EXPERT, strict=True):
        up = row @ w["up"][expert]
        hidden = NUMPY[activation](row @ w["gate"][expert]) * up if "gate" in w else NUMPY[activation](up)
        out.append((hidden * mask) @ w["down"][expert])
    return np.array(out)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_against_numpy(gated, activation):
    experts = make(gated, activation=activation)
    assert experts.gated == gated and experts.count == E
    y = jax.jit(lambda x, experts: expert_mlp(x, ROWS, experts, per_row(experts)))(X, experts)
    np.testing.assert_allclose(y, reference(X, experts, activation), rtol=2e-5, atol=2e-5)


def test_the_result_is_float32_and_the_hidden_layer_of_the_inputs_type():
    seen, experts = {}, make()

    def dot(x, name):
        seen[name] = x.dtype
        return per_row(experts)(x, name)

    y = expert_mlp(X.astype("bfloat16"), ROWS, experts, dot)
    assert y.dtype == jnp.float32
    assert seen == dict.fromkeys(("up", "gate", "down"), jnp.bfloat16)


def test_the_mask_gets_the_context_and_the_rows_and_multiplies_the_hidden_layer():
    seen = {}

    def mask(context, rows, width):
        seen.update(context=context, rows=rows, width=width)
        return jnp.full((rows.shape[0], width), 3.0)

    experts = make(False, context={"scale": jnp.ones(())}, mask=mask)
    y = expert_mlp(X, ROWS, experts, per_row(experts))
    np.testing.assert_allclose(y, reference(X, experts, "silu", mask=3.0), rtol=2e-5, atol=2e-5)
    assert seen["rows"] is ROWS and seen["width"] == F and set(seen["context"]) == {"scale"}


def test_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation 'sillu' \\(did you mean 'silu'\\?\\); known: silu, gelu, relu"):
        make(activation="sillu")
