"""A declaration is checked when it is made, starts as it says, and is laid over a mesh or refused with the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax.axes import ParamSpec, Rules
from moe_jax.errors import ConfigError

RULES = Rules((("experts", "expert"), ("embed", "fsdp"), ("mlp", "tensor"), ("vocab", "tensor")))
SIZES = {"data": 2, "fsdp": 1, "expert": 4, "tensor": 2}


def test_a_declaration_is_checked():
    with pytest.raises(ConfigError, match=r"shape \(2, 3\) needs 2 axis names, got \('embed',\)"):
        ParamSpec((2, 3), ("embed",), "hidden")
    with pytest.raises(ConfigError, match="unknown role 'routr' \\(did you mean 'router'\\?\\); known: embedding, .*selection_bias"):
        ParamSpec((2,), ("embed",), "routr")
    with pytest.raises(ConfigError, match="unknown initialiser 'glorot'; known: normal, ones, zeros"):
        ParamSpec((2,), ("embed",), "hidden", "glorot").initial(jax.random.key(0))


def test_size_and_stacking():
    spec = ParamSpec((3, 5), ("embed", "mlp"), "hidden", scale=0.5)
    stacked = spec.stacked(4)
    assert spec.size == 15 and stacked.size == 60
    assert (stacked.shape, stacked.axes) == ((4, 3, 5), ("layers", "embed", "mlp"))
    assert (stacked.role, stacked.init, stacked.scale) == ("hidden", "normal", 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_values(dtype):
    key = jax.random.key(3)
    drawn = ParamSpec((200, 100), ("embed", "mlp"), "hidden", scale=0.02, dtype=dtype).initial(key)
    assert drawn.dtype == dtype and drawn.shape == (200, 100)
    values = np.asarray(drawn, np.float64)
    # 20,000 draws: the mean is within 5 standard errors, the standard deviation within 5 of its own (0.5 %) and bfloat16's rounding
    assert abs(values.mean()) < 5 * 0.02 / 20_000**0.5
    assert abs(values.std() / 0.02 - 1) < 5 / 40_000**0.5 + 2e-3
    np.testing.assert_array_equal(drawn, (0.02 * jax.random.normal(key, (200, 100), jnp.float32)).astype(dtype))
    for init, value in (("ones", 1.0), ("zeros", 0.0)):
        constant = ParamSpec((3,), ("embed",), "norm", init, dtype=dtype).initial(key)
        assert constant.dtype == dtype and (constant == value).all()


def test_partition_maps_each_axis_by_its_name():
    assert RULES.partition(("layers", "experts", "embed", "mlp"), (3, 8, 5, 6), SIZES) == PartitionSpec(None, "expert", None, "tensor")
    assert RULES.partition(("experts", "mlp"), (8, 6), {"expert": 4}) == PartitionSpec("expert", None)  # the mesh has no tensor axis
    both = Rules((("experts", ("expert", "tensor")),))
    assert both.partition(("experts", "mlp"), (8, 6), SIZES) == PartitionSpec(("expert", "tensor"), None)
    with pytest.raises(ConfigError, match="axis 'experts' of size 12 does not divide over the mesh axes expert=4 x tensor=2"):
        both.partition(("experts",), (12,), SIZES)
    assert Rules().partition(("experts", "mlp"), (7, 5), SIZES) == PartitionSpec(None, None)


def test_partition_refuses_a_mesh_axis_used_twice():
    with pytest.raises(ConfigError, match="logical axes 'vocab' and 'mlp' both map to mesh axis 'tensor'; change one rule"):
        RULES.partition(("vocab", "mlp"), (4, 4), SIZES)


def test_partition_refuses_uneven_division():
    with pytest.raises(ConfigError, match="axis 'experts' of size 6 does not divide over the mesh axes expert=4; choose"):
        RULES.partition(("experts", "mlp"), (6, 4), SIZES)


def test_partition_refuses_a_shape_of_another_rank():
    with pytest.raises(ValueError):
        RULES.partition(("experts", "mlp"), (8,), SIZES)
