"""A layer's tokens in several chunks: the same values, gradients and errors as in one, on one device and on meshes; what cannot be split is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax as mj
from moe_jax.errors import ConfigError
from moe_jax.mesh import MeshSpec
from tests import few_sizes

CONFIG = mj.ModelConfig.preset("tiny", num_layers=1, num_experts=8)
TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 0, 260)


@pytest.fixture(scope="module", autouse=True)
def few():
    """Chunks are not about the sizes of tiles."""
    few_sizes.use(few_sizes.few)
    yield
    few_sizes.use(few_sizes.fit)


def step(config, mesh="", noise="matmuls=relative:0.05"):
    """(loss, gradients, experts' load) of one batch."""
    model = mj.Model(config, MeshSpec.parse(mesh).build(jax.devices()[:4]) if mesh else None)

    def objective(params):
        loss, _, out = model.loss(params, TOKENS, TOKENS, noise=mj.NoiseSpec.parse(noise), draw=mj.Draw(seed=0, step=0, phase="train"))
        return loss, out.load

    (loss, load), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(model.init(0))
    return float(loss), jax.tree.map(np.asarray, grads), np.asarray(load)


@pytest.fixture(scope="module")
def whole():
    return step(CONFIG)


@pytest.mark.parametrize(
    "mesh, changes",
    [
        ("", {}),
        pytest.param("expert=4", {"dispatch": "all_to_all"}, marks=pytest.mark.slow),
        # every chunk overflows
        pytest.param("expert=4", {"dispatch": "all_to_all", "exchange_factor": 0.5}, marks=pytest.mark.slow),
        pytest.param("expert=4", {"dispatch": "all_gather"}, marks=pytest.mark.slow),
        pytest.param("data=4", {}, marks=pytest.mark.slow),
    ],
)
def test_chunks_change_nothing(mesh, changes, whole):
    loss, grads, load = step(CONFIG.replace(dispatch_chunks=4, **changes), mesh)
    assert abs(loss - whole[0]) < 1e-6 * whole[0]
    np.testing.assert_array_equal(load, whole[2])
    for found, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.slow
def test_an_error_that_needs_all_rows_is_that_of_all_rows():
    """Of kind accumulation, a weight gradient's error is of the sums over every row."""
    noise = "experts=accumulation:0.05"
    expected, found = step(CONFIG, noise=noise), step(CONFIG.replace(dispatch_chunks=4), noise=noise)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="64 tokens of a device do not divide into 5 parts"):
        step(CONFIG.replace(dispatch_chunks=5))
    with pytest.raises(ConfigError, match="dispatch_chunks must be a whole number from 1 to 2,147,483,647, got 0"):
        CONFIG.replace(dispatch_chunks=0)


@pytest.mark.slow
def test_a_chunk_is_computed_in_the_memory_of_a_chunk():
    """Temporaries of an expert layer's gradient fall by more than half."""
    config = CONFIG.replace(d_model=64, d_expert=256, remat="full", dispatch="all_to_all")
    tokens = jnp.zeros((16, 64), jnp.int32)

    def temporaries(chunks):
        model = mj.Model(config.replace(dispatch_chunks=chunks), MeshSpec(expert=4).build(jax.devices()[:4]))
        gradient = jax.jit(jax.grad(lambda params: model.loss(params, tokens, tokens)[0]))
        return gradient.lower(model.abstract()).compile().memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]

    assert temporaries(8) < 0.5 * temporaries(1)
