"""A configuration is checked when it is made and when it is changed; presets have the sizes they are named for."""

import dataclasses
import math

import pytest

from moe_jax.errors import ConfigError
from moe_jax.model import DTypePolicy, Model, ModelConfig
from moe_jax.model.config import PRESETS

BAD = [
    (dict(activation="slu"), r"unknown activation 'slu' \(did you mean 'silu'\?\); known: silu, gelu, relu"),
    (dict(router_score="soft-max"), r"unknown router_score 'soft-max' \(did you mean 'softmax'\?\)"),
    (dict(rope_style="interleave"), r"did you mean 'interleaved'\?"),
    (dict(qk_norm="heads"), r"did you mean 'head'\?"),
    (dict(remat="dot"), r"did you mean 'dots'\?"),
    (dict(loss_chunk="token"), r"did you mean 'tokens'\?"),
    (dict(dispatch="block"), r"unknown dispatch 'block' \(did you mean 'blocked'\?\); known: dense, blocked"),
    (dict(selection_bias=True), "selection_bias goes with router_score=sigmoid, got 'softmax'"),
    (dict(d_model=30), "d_model=30 is not divisible by num_heads=4; change one of them or set head_dim"),
    (dict(head_dim=5), "head_dim=5 must be even"),
    (dict(head_dim=0), "head_dim must be a whole number from 1 to 2,147,483,647, got 0"),
    (dict(num_kv_heads=0), "num_kv_heads must be a whole number from 1 to 2,147,483,647, got 0"),
    (dict(num_kv_heads=-2), "num_kv_heads must be a whole number from 1 to 2,147,483,647, got -2"),
    (dict(num_layers=10**22), "num_layers must be a whole number from 1 to 10,000, got 1000"),
    (dict(num_layers=1.5), "num_layers must be a whole number from 1 to 10,000, got 1.5"),
    (dict(num_experts=65_536), "num_experts must be a whole number from 1 to 65,535, got 65536"),
    (dict(d_model="32"), "d_model must be a whole number from 1 to 2,147,483,647, got '32'"),
    (dict(init_std=-1.0), "init_std must be finite and not negative, got -1.0"),
    (dict(norm_eps=0.0), "norm_eps must be finite and above 0, got 0.0"),
    (dict(rope_theta=math.nan), "rope_theta must be finite and above 0, got nan"),
    (dict(num_kv_heads=3), "num_heads=4 is not divisible by num_kv_heads=3"),
    (dict(experts_per_token=5), "experts_per_token=5 must be between 1 and num_experts=4"),
    (dict(experts_per_token=0), "experts_per_token=0 must be between 1 and num_experts=4"),
    (dict(d_expert=0), "d_expert must be a whole number from 1 to 2,147,483,647, got 0"),
    (dict(d_ff=0), "d_ff must be a whole number from 1 to 2,147,483,647, got 0"),
    (dict(dense_layers=(0, 2)), r"dense_layers \[2\] do not exist: the model has layers 0 to 1"),
    (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    (dict(dropout=-0.1), r"dropout must be in \[0, 1\), got -0.1"),
    (dict(sliding_window=0), "sliding_window must be at least 1 or none, got 0"),
    *(
        (dict([(field, 0)]), f"{field} must be a whole number from 1 to .*, got 0")
        for field in ("vocab_size", "num_layers", "num_heads", "max_seq_len", "loss_chunk_size")
    ),
]


@pytest.mark.parametrize("changes, message", BAD, ids=lambda value: str(value)[:30])
def test_bad_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.preset("tiny", **changes)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown model preset 'tinny' \(did you mean 'tiny'\?\); known: tiny, quick, small, seed_79m"):
        ModelConfig.preset("tinny")
    with pytest.raises(ConfigError, match=r"unknown model field 'num_expert' \(did you mean 'num_experts'\?\)"):
        ModelConfig.preset("tiny", num_expert=4)
    with pytest.raises(ConfigError, match=r"unknown model field 'dropuot' \(did you mean 'dropout'\?\)"):
        ModelConfig().replace(dropuot=0.1)
    with pytest.raises(ConfigError, match="dtypes.compute is 'float16'; use float32 or bfloat16"):
        DTypePolicy(compute="float16")


def test_replace_checks_again_and_changes_nothing_else():
    config = ModelConfig.preset("tiny")
    changed = config.replace(num_layers=3, dense_layers=(2, 0))
    assert changed.dense_layers == (0, 2) and changed.moe_layers == (1,) and config.num_layers == 2 and config.moe_layers == (0, 1)
    with pytest.raises(ConfigError, match="dense_layers"):
        changed.replace(num_layers=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3  # pyright: ignore
    assert hash(config) == hash(ModelConfig.preset("tiny"))


def test_derived_sizes():
    config = ModelConfig.preset("tiny", num_kv_heads=2, head_dim=6, d_ff=100, d_model=33)
    assert (config.kv_heads, config.head_width, config.dense_width) == (2, 6, 100)
    plain = ModelConfig.preset("tiny")
    assert (plain.kv_heads, plain.head_width, plain.dense_width) == (4, 8, 48)
    assert ModelConfig.preset("tiny", num_experts=0).moe_layers == ()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_those_of_the_seed_share_its_shape(name):
    config = ModelConfig.preset(name)
    if name in ("quick", "small", "seed_79m"):
        assert (config.gated, config.rope_style, config.fused_qkv, config.scale_embedding, config.tie_embeddings) == (
            False,
            "interleaved",
            True,
            True,
            True,
        )
        assert (config.num_experts, config.experts_per_token, config.dropout, config.renormalise) == (8, 2, 0.1, True)


def test_the_seed_has_its_number_of_parameters():
    model = Model(ModelConfig.preset("seed_79m"))
    assert (model.parameter_count(), model.active_parameter_count()) == (79_059_840, 36_592_512)
    # by hand: tied embedding; per layer fused qkv, output, router, 8 experts of 2 matrices, 2 norms; the final norm
    d, inner = 384, 1536
    assert model.parameter_count() == 49_152 * d + 6 * (3 * d * d + d * d + d * 8 + 8 * 2 * d * inner + 2 * d) + d
    assert model.active_parameter_count() == model.parameter_count() - 6 * 6 * 2 * d * inner
    assert "total 79,059,840, active 36,592,512" in model.param_table().splitlines()[-1]
