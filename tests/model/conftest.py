"""One tiny model, its parameters, and programs that are compiled once for all tests that run them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.axes import ParamSpec
from moe_jax.keys import Draw
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec


@functools.cache
def model_of(**changes) -> Model:
    return Model(ModelConfig.preset("tiny", **changes))


@functools.cache
def program_of(train: bool, **changes):
    """Jitted (params, tokens, noise, draw) -> ((objective, Output), gradients): cross-entropy and both router losses."""
    model = model_of(**changes)

    @jax.jit
    def program(params, tokens, noise, draw):
        def objective(params):
            total, _, out = model.loss(
                params, tokens, tokens[:, ::-1], noise=noise, draw=draw, train=train, capture=("trace", "router_logits")
            )
            aux = sum(weight * out.aux[name][0] for name, weight in (("balance_loss", 0.01), ("z_loss", 0.001)) if name in out.aux)
            return total / tokens.size + aux, out

        return jax.value_and_grad(objective, has_aux=True)(params)

    return program


def random_params(model: Model, seed: int = 0) -> dict:
    """Parameters drawn by NumPy, which compiles nothing: norms around 1, and routers ten times wider than others."""
    random = np.random.default_rng(seed)

    def one(spec):
        scale = {"router": 0.2, "norm": 0.1, "bias": 0.1, "selection_bias": 0.2}.get(spec.role, 0.05)
        return jnp.asarray((spec.role == "norm") + scale * random.normal(size=spec.shape), spec.dtype)

    return jax.tree.map(one, model.specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


@pytest.fixture(scope="session")
def make_params():
    return random_params


@pytest.fixture(scope="session")
def make_model():
    return model_of


@pytest.fixture(scope="session")
def program():
    return program_of


@pytest.fixture(scope="session")
def params():
    """Of the tiny preset."""
    return random_params(model_of())


@pytest.fixture(scope="session")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 260, (4, 8)))


@pytest.fixture(scope="session")
def noise():
    """Noise at both sites, large enough to change choices."""
    return NoiseSpec.parse("router_logits=additive:0.3,router_input=relative:0.2")


@pytest.fixture(scope="session")
def draw():
    return Draw(seed=7, step=3, phase="train")
