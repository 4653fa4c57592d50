"""A mesh has the devices it says, or is refused; parameters are born where the rules put them, with the same bits."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import paths
from moe_jax.axes import Rules
from moe_jax.errors import ConfigError
from moe_jax.mesh import MeshSpec
from moe_jax.model import Model, ModelConfig


def test_build_and_mismatch():
    mesh = MeshSpec(data=2, expert=4).build()
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    two = MeshSpec(tensor=2).build(jax.devices()[3:5])
    assert [device.id for device in two.devices.flat] == [3, 4]
    with pytest.raises(ConfigError, match="mesh .*'expert': 3.* needs 6 devices, there are 8"):
        MeshSpec(data=2, expert=3).build()


def test_parameters_are_born_sharded():
    config = ModelConfig.preset("tiny", num_layers=1, gated=False, fused_qkv=True)
    mesh = MeshSpec(expert=4, tensor=2).build()
    model = Model(config, mesh)
    params, plain = paths.flatten(model.init(0)), paths.flatten(Model(config).init(0))
    up = params["layers/feed_forward/up"]
    assert up.sharding.spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    # [layers 1, experts 4, embed 32, mlp 48]: a quarter of the experts and half of the width on each of 8 devices
    assert {shard.data.shape for shard in up.addressable_shards} == {(1, 1, 32, 24)} and len(up.addressable_shards) == 8
    assert {shard.data.shape for shard in params["layers/norm_moe/scale"].addressable_shards} == {(1, 32)}
    for path, array in params.items():
        np.testing.assert_array_equal(array, plain[path], err_msg=path)
        abstract = paths.flatten(model.abstract())[path]
        assert (abstract.shape, abstract.dtype, abstract.sharding) == (array.shape, array.dtype, array.sharding), path


def test_a_model_that_does_not_fit_the_mesh_is_refused():
    mesh = MeshSpec(expert=8).build()
    with pytest.raises(ConfigError, match="axis 'experts' of size 4 does not divide over mesh axis 'expert' of size 8"):
        Model(ModelConfig.preset("tiny"), mesh).init(0)
    with pytest.raises(ConfigError, match="'embed' and 'mlp' both map to mesh axis 'expert'|'experts' and 'embed' both map"):
        Model(ModelConfig.preset("tiny", num_experts=8), mesh, Rules((("experts", "expert"), ("embed", "expert")))).abstract()
