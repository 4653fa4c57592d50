"""config.json of Hugging Face, in the spellings of transformers 4 and 5, to a ModelConfig and back. What cannot be done as it says is refused by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.errors import ConfigError, Unsupported
from moe_jax.files import read_object
from moe_jax.model import ModelConfig


@dataclass(frozen=True)
class Family:
    """A kind of model that transformers has."""

    model_type: str
    architecture: str  # the class's name
    experts: str = ""  # the key with the number of experts; "": a dense model
    expert_width: str = ""  # the key with the width of one
    qk_norm: str = "none"
    biases: str = "attention_bias"  # the key that adds biases to q, k, v and o; "qkv": q, k and v always have one; "": none


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen3_moe", "Qwen3MoeForCausalLM", "num_experts", "moe_intermediate_size", "head"),
        Family("olmoe", "OlmoeForCausalLM", "num_experts", "intermediate_size", "projection"),
        Family("mixtral", "MixtralForCausalLM", "num_local_experts", "intermediate_size", biases=""),
        Family("llama", "LlamaForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM", biases="qkv"),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm="head"),
    )
}

# Keys that say nothing about what a forward pass computes: names, ids of words, how the weights were drawn or are stored, how a program may run.
_IGNORED = set(
    """architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id initializer_range
    router_aux_loss_coef output_router_logits output_attentions output_hidden_states return_dict pretraining_tp _name_or_path name_or_path
    chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder tokenizer_class _attn_implementation _attn_implementation_autoset
    is_llama_config transformers.js_config""".split()  # the last two are in SmolLM2's
)
# Keys that have to say nothing, with how a model would differ.
_OFF = {
    "attention_dropout": "dropout on attention weights; dropout is set by --set model.dropout=",
    "mlp_bias": "biases in the feed-forward",
    "router_jitter_noise": "jitter on what router and experts read; ask for noise by --noise=router_input=jitter:…",
    "quantization_config": "quantised weights; dequantise them first",
    "partial_rotary_factor": "rotary positions on a part of each head",
    "n_shared_experts": "shared experts",
    "shared_expert_intermediate_size": "shared experts",
    "auto_map": "code of its own",
    "clip_qkv": "clipped q, k and v",
    "mlp_only_layers": "dense layers",
}
_KNOWN = set(
    """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings attention_bias
    sliding_window use_sliding_window max_window_layers layer_types num_experts num_local_experts num_experts_per_tok norm_topk_prob
    decoder_sparse_step""".split()
)


_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "relu": "relu"}


def read_config(folder: Path) -> tuple[ModelConfig, Family]:
    """The configuration of a checkpoint folder. Raises ConfigError (a bad config.json), Unsupported (a family, or a key that changes it)."""
    path = folder / "config.json"
    values = read_object(path, ConfigError)
    if values is None:
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        return parse_config(values)
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a field is missing or of another kind ({type(error).__name__}: {str(error)[:100]})") from None


def parse_config(values: dict[str, Any]) -> tuple[ModelConfig, Family]:
    """As `read_config`, of the parsed file."""
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise Unsupported(f"the model type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    family, layers, heads = FAMILIES[kind], values["num_hidden_layers"], values["num_attention_heads"]
    fields: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "d_model": values["hidden_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": None if values.get("num_key_value_heads") in (None, heads) else values["num_key_value_heads"],
        "head_dim": None if values.get("head_dim") in (None, values["hidden_size"] / heads) else values["head_dim"],
        "max_seq_len": values["max_position_embeddings"],
        "activation": _activation(values.get("hidden_act", "silu")),
        "norm_eps": values.get("rms_norm_eps", 1e-5 if kind in ("olmoe", "mixtral") else 1e-6),
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "qk_norm": family.qk_norm,
        "attention_bias": family.biases == "qkv" or bool(family.biases and values.get("attention_bias")),
        "output_bias": family.biases == "attention_bias" and bool(values.get("attention_bias")),
        "sliding_window": _window(values, layers),
        "rope_theta": _rope_theta(values),
    }
    used: set[str] = set()
    if family.experts:
        fields |= _experts(values, family, layers)
        used = {"clip_qkv"} if kind == "olmoe" else {"mlp_only_layers"} if kind == "qwen3_moe" else set()
    else:
        fields |= {"num_experts": 0, "experts_per_token": 1, "d_expert": values["intermediate_size"], "d_ff": values["intermediate_size"]}
    for key, what in _OFF.items():
        if key not in used and values.get(key):
            raise Unsupported(f"{key}={values[key]!r} means {what}, which is not supported here")
    unknown = sorted(key for key in values.keys() - _KNOWN - _IGNORED - _OFF.keys() if values[key] not in (None, False))
    if unknown:
        raise Unsupported(f"unknown fields {', '.join(unknown)}: what they change is not known here; take them out if it is nothing")
    return ModelConfig(**fields), family


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise Unsupported(f"hidden_act={name!r} is not supported here; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _experts(values: dict[str, Any], family: Family, layers: int) -> dict[str, Any]:
    count = next((values[key] for key in ("num_experts", "num_local_experts") if values.get(key)), None)  # transformers 5 writes the second
    if count is None:
        raise ConfigError(f"the number of experts is missing ({family.experts})")
    fields = {
        "num_experts": count,
        "experts_per_token": values["num_experts_per_tok"],
        "d_expert": values[family.expert_width],
        "renormalise": True if family.model_type == "mixtral" else bool(values.get("norm_topk_prob", False)),
    }
    if family.model_type == "qwen3_moe":
        step, named = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
        fields |= {
            "dense_layers": tuple(layer for layer in range(layers) if layer in named or (layer + 1) % step),
            "d_ff": values["intermediate_size"],
        }
    if family.model_type == "olmoe":
        fields["clip_qkv"] = values.get("clip_qkv")
    return fields


def _window(values: dict[str, Any], layers: int) -> int | None:
    """The sliding window, which all layers have or none."""
    window = values.get("sliding_window")
    if not window or values["model_type"] == "mixtral":
        return window or None
    kinds = values.get("layer_types") or [
        "full_attention" if layer < values.get("max_window_layers", 28) else "sliding_attention" for layer in range(layers)
    ]
    if not values.get("use_sliding_window") or set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        raise Unsupported(
            f"sliding_window={window} in some layers only ({kinds.count('sliding_attention')} of {layers}), which is not supported here"
        )
    return window


def _rope_theta(values: dict[str, Any]) -> float:
    rope = values.get("rope_parameters") or {}
    for scaling in (rope, values.get("rope_scaling") or {}):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise Unsupported(f"rope scaling {kind!r} is not supported here; supported: default")
    return float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))


def family_of(config: ModelConfig) -> Family:
    """The family whose models compute what this configuration says. Raises Unsupported, naming the fields that none of them has."""
    wrong = {name: value for name, value in _STRANGE.items() if getattr(config, name) != value}
    if wrong:
        raise Unsupported(
            "no model of Hugging Face that is known here has "
            + ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
            + "; it can be kept as a checkpoint"
        )
    biases = (config.attention_bias, config.output_bias)
    if not config.moe_layers:
        name = "qwen3" if config.qk_norm == "head" else "qwen2" if biases == (True, False) else "llama"
    else:
        name = {"head": "qwen3_moe", "projection": "olmoe", "none": "mixtral"}[config.qk_norm]
    family = FAMILIES[name]
    again = parse_config(config_json(config, family))[0]
    differing = [field for field in _COMPARED if getattr(again, field) != getattr(config, field)]
    if differing:
        raise Unsupported(
            f"{family.architecture}, the nearest model of Hugging Face, has no {', '.join(f'{f}={getattr(config, f)!r}' for f in differing)}"
        )
    return family


# What all models of Hugging Face have in common, and the fields of which they have some.
_STRANGE = {
    "gated": True,
    "router_score": "softmax",
    "learned_noise": False,
    "selection_bias": False,
    "rope_style": "half",
    "fused_qkv": False,
}
_STRANGE |= {"scale_embedding": False}
_COMPARED = """vocab_size d_model num_layers num_heads kv_heads head_width max_seq_len moe_layers renormalise rope_theta norm_eps qk_norm attention_bias
    output_bias sliding_window clip_qkv tie_embeddings activation""".split()


def config_json(config: ModelConfig, family: Family, dtype: str | None = None) -> dict[str, Any]:
    """config.json as a dict, in the spelling that transformers 4 and 5 both read. dtype: of the files' numbers; None: that of the parameters."""
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.dense_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation),
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype or config.dtypes.params,
    }
    if family.biases == "attention_bias":
        values["attention_bias"] = config.attention_bias
    if family.model_type in ("qwen2", "qwen3", "qwen3_moe"):
        values |= {"sliding_window": config.sliding_window, "use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
        values["layer_types"] = ["full_attention" if config.sliding_window is None else "sliding_attention"] * config.num_layers
    if family.model_type == "mixtral":
        values["sliding_window"] = config.sliding_window
    if family.experts:
        values |= {
            family.experts: config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            family.expert_width: config.d_expert,
        }
    if family.model_type != "mixtral" and family.experts:
        values["norm_topk_prob"] = config.renormalise
    if family.model_type == "qwen3_moe":
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
    if family.model_type == "olmoe":
        values["clip_qkv"] = config.clip_qkv
    return values
