"""config.json both ways: both spellings, the presets as published, and everything that would change the model refused by name."""

import json

import pytest

from moe_jax.errors import ConfigError, Unsupported
from moe_jax.hf.config import FAMILIES, config_json, family_of, parse_config, read_config
from moe_jax.model import Model, ModelConfig

# Qwen/Qwen3-30B-A3B, as its config.json on the hub has it (transformers 4.51)
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False,
    "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 50304,
}  # fmt: skip
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.parametrize(
    "values, preset, total, active",
    [
        (QWEN3_30B, "qwen3_30b_a3b", 30_532_122_624, 3_353_032_704),
        (OLMOE, "olmoe_1b_7b", 6_919_161_856, 1_282_017_280),
        (MIXTRAL, "mixtral_8x7b", 46_702_792_704, 12_879_925_248),
    ],
)
def test_published_models_have_their_published_parameters(values, preset, total, active):
    """Counted from the declarations: nothing is allocated."""
    config, family = parse_config(values)
    assert config.replace(d_ff=None) == ModelConfig.preset(preset, d_ff=None)
    model = Model(config)
    assert (model.parameter_count(), model.active_parameter_count()) == (total, active)
    print(f"{preset}: {total:,} parameters, {active:,} active")
    again, _ = parse_config(config_json(config, family))
    assert again == config.replace(dtypes=again.dtypes) and family_of(config) == family


def test_both_spellings_are_one_model():
    newer = dict(QWEN3_30B)
    newer["num_local_experts"], newer["dtype"] = newer.pop("num_experts"), newer.pop("torch_dtype")
    newer["rope_parameters"] = {"rope_theta": newer.pop("rope_theta"), "rope_type": "default"}
    del newer["rope_scaling"]
    assert parse_config(newer) == parse_config(QWEN3_30B)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "deepseek_v3"}, "model type 'deepseek_v3' is not supported; supported: qwen3_moe, olmoe"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope scaling 'llama3'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 means dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* means quantised weights"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported here; supported: silu"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 24}, r"sliding_window=8 in some layers only \(24 of 48\)"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0 means clipped q, k and v"),
        ({"shared_expert_intermediate_size": 64}, "means shared experts"),
        ({"something_new": 3}, "unknown fields something_new"),
        ({"rope_interleaved": True, "qkv_bias": True}, "unknown fields qkv_bias, rope_interleaved"),
        ({"num_experts": None}, "the number of experts is missing"),
        ({"hidden_size": "2048"}, "a field is missing or of another kind"),
        ({"num_hidden_layers": None}, "a field is missing or of another kind"),
        ({"num_experts_per_tok": 500}, "experts_per_token=500 must be between 1 and num_experts=128"),
    ],
)
def test_what_changes_the_model_is_refused_by_name(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B | change))
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "[]", "{", "[" * 100_000, '{"model_type": ["x"]}'])
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "num_hidden_layers", "num_experts_per_tok", "moe_intermediate_size"])
def test_a_missing_field_is_named(missing):
    with pytest.raises(KeyError, match=missing):
        parse_config({name: value for name, value in QWEN3_30B.items() if name != missing})


def test_jitter_of_mixtral_is_refused():
    with pytest.raises(Unsupported, match="router_jitter_noise=0.1 means jitter .*--noise=router_input=jitter"):
        parse_config(MIXTRAL | {"router_jitter_noise": 0.1})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gated": False}, "gated=False"),
        ({"fused_qkv": True, "rope_style": "interleaved"}, "rope_style='interleaved', fused_qkv=True"),
        ({"qk_norm": "projection", "dense_layers": (1,)}, r"OlmoeForCausalLM, .* has no moe_layers=\(0, 2, 3\)"),
        ({"qk_norm": "none", "renormalise": False}, "MixtralForCausalLM, .* has no renormalise=False"),
        ({"output_bias": True}, "Qwen3MoeForCausalLM, .* has no output_bias=True"),
        ({"clip_qkv": 3.0}, "has no clip_qkv=3.0"),
    ],
)
def test_a_model_that_no_family_has_is_refused(changes, message):
    with pytest.raises(Unsupported, match=message):
        family_of(ModelConfig.preset("qwen3_tiny", **changes))


def test_every_family_is_found_for_its_own_models():
    for name, changes in {
        "qwen3_moe": {},
        "olmoe": {"qk_norm": "projection"},
        "mixtral": {"qk_norm": "none"},
        "llama": {"num_experts": 0, "experts_per_token": 1, "qk_norm": "none"},
        "qwen2": {"num_experts": 0, "experts_per_token": 1, "qk_norm": "none", "attention_bias": True},
        "qwen3": {"num_experts": 0, "experts_per_token": 1},
    }.items():
        assert family_of(ModelConfig.preset("qwen3_tiny", **changes)) == FAMILIES[name]
