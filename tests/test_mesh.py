"""A mesh has the devices it says, or is refused; parameters are born where the rules put them, with the same bits."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import paths
from moe_jax.axes import Rules
from moe_jax.errors import ConfigError
from moe_jax.mesh import Layout, MeshSpec
from moe_jax.model import Model, ModelConfig


def test_build_and_mismatch():
    mesh = MeshSpec(data=2, expert=4).build()
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    two = MeshSpec(tensor=2).build(jax.devices()[3:5])
    assert [device.id for device in two.devices.flat] == [3, 4]
    with pytest.raises(ConfigError, match="mesh data=2,expert=3 needs 6 devices, there are 8"):
        MeshSpec(data=2, expert=3).build()


def test_parameters_are_born_sharded():
    config = ModelConfig.preset("tiny", num_layers=1, num_experts=8, gated=False, fused_qkv=True)
    mesh = MeshSpec(fsdp=2, expert=2, tensor=2).build()
    model = Model(config, mesh)
    params, plain = paths.flatten(model.init(0)), paths.flatten(Model(config).init(0))
    up = params["layers/feed_forward/up"]
    assert up.sharding.spec == PartitionSpec(None, ("expert", "tensor"), "fsdp", None)
    # [layers 1, experts 8, embed 32, expert_mlp 48]: a quarter of the experts and half of the model's width on each of 8 devices
    assert {shard.data.shape for shard in up.addressable_shards} == {(1, 2, 16, 48)} and len(up.addressable_shards) == 8
    assert {shard.data.shape for shard in params["layers/norm_moe/scale"].addressable_shards} == {(1, 16)}
    for path, array in params.items():
        np.testing.assert_array_equal(array, plain[path], err_msg=path)
        abstract = paths.flatten(model.abstract())[path]
        assert (abstract.shape, abstract.dtype, abstract.sharding) == (array.shape, array.dtype, array.sharding), path


def test_a_model_that_does_not_fit_the_mesh_is_refused():
    mesh = MeshSpec(expert=8).build()
    with pytest.raises(ConfigError, match="axis 'experts' of size 4 does not divide over the mesh axes expert=8; choose"):
        Model(ModelConfig.preset("tiny"), mesh).init(0)
    with pytest.raises(ConfigError, match="'embed' and 'mlp' both map to mesh axis 'expert'|'experts' and 'embed' both map"):
        Model(ModelConfig.preset("tiny", num_experts=8), mesh, Rules((("experts", "expert"), ("embed", "expert")))).abstract()


def test_a_mesh_as_text():
    assert MeshSpec.parse("data=2, expert=4") == MeshSpec(data=2, expert=4) and MeshSpec.parse("") == MeshSpec()
    assert str(MeshSpec(fsdp=2, tensor=4)) == "fsdp=2,tensor=4" and str(MeshSpec()) == "one device"
    for text, message in (
        ("dat=2", r"unknown mesh axis 'dat' \(did you mean 'data'\?\) in 'dat=2'; known: data, fsdp, expert, tensor, slices"),
        ("lanes=8", "unknown mesh axis 'lanes'"),
        ("data=two", "cannot read mesh 'data=two' at 'data=two'"),
        ("data=2,data=4", "write each axis once"),
        ("expert=0", "mesh axis expert must be a whole number of at least 1, got 0"),
        ("data=4,slices=3", "the data axis of size 4 does not divide over 3 slices"),
    ):
        with pytest.raises(ConfigError, match=message):
            MeshSpec.parse(text)


def test_slices_split_the_data_axis_alone():
    """Eight devices of one process cannot be two slices; devices that say their slice are laid out slice by slice along data."""
    with pytest.raises(ConfigError, match="mesh data=4,expert=2,slices=2 does not fit the slices that there are"):
        MeshSpec(data=4, expert=2, slices=2).build()


def test_a_batch_is_divided_over_what_divides_it():
    mesh = MeshSpec(data=2, fsdp=2, expert=2).build()
    assert Layout.of(mesh, 8).rows == ("data", "fsdp", "expert")
    assert Layout.of(mesh, 4).rows == ("data", "fsdp")  # repeated over the expert axis
    message = (
        "a batch of 6 sequences does not divide over the mesh axes data=2 x fsdp=2; change batch_size, or eval_batch if that is it, or"
    )
    with pytest.raises(ConfigError, match=message):
        Layout.of(mesh, 6)
