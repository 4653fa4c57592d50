"""Tiny random checkpoints by transformers' own classes, and what these compute with them: run it where torch and transformers are.

  python tests/parity/checkpoints.py FOLDER [CASE …]

writes FOLDER/CASE with config.json, model.safetensors and reference.npz. The test beside it makes all cases when it can; `stored` holds one of each
family (transformers 5.23.0, torch 2.13.0) for where it cannot.
"""

import sys
from pathlib import Path

COMMON = dict(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    rms_norm_eps=1e-6,
)
COMMON |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None, intermediate_size=20)
QWEN = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=6, norm_topk_prob=True, sliding_window=None)
MIXTRAL = dict(num_local_experts=4, num_experts_per_tok=2)
# case -> (transformers' model type, its config's fields)
CASES = {
    "qwen3_moe": ("qwen3_moe", QWEN),
    "qwen3_moe_dense_between": (
        "qwen3_moe",
        QWEN | dict(num_hidden_layers=4, mlp_only_layers=[1], tie_word_embeddings=True, norm_topk_prob=False),
    ),
    "qwen3_moe_every_second": ("qwen3_moe", QWEN | dict(num_hidden_layers=4, decoder_sparse_step=2, attention_bias=True, rope_theta=1e6)),
    "olmoe": ("olmoe", dict(num_experts=5, num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=0.4)),
    "olmoe_normalised": (
        "olmoe",
        dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, num_key_value_heads=4, tie_word_embeddings=True),
    ),
    "mixtral": ("mixtral", MIXTRAL | dict(sliding_window=5)),
    "mixtral_wide_heads": ("mixtral", MIXTRAL | dict(head_dim=10, sliding_window=None, rope_theta=1e5, tie_word_embeddings=True)),
    "llama": ("llama", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "llama_biases": ("llama", dict(attention_bias=True, head_dim=6, tie_word_embeddings=False)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)),
    "qwen3": ("qwen3", dict(head_dim=6, tie_word_embeddings=False)),
    "qwen3_tied": ("qwen3", dict(head_dim=8, tie_word_embeddings=True, attention_bias=True, num_key_value_heads=4)),
}
STORED = ("qwen3_moe_dense_between", "olmoe", "mixtral", "llama_biases", "qwen2", "qwen3")


def make(case: str, folder: Path) -> None:
    """Writes the checkpoint and reference.npz: logits, router logits, loss, some gradients, and the logits in bfloat16."""
    import numpy as np
    import torch
    import transformers

    kind, fields = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **(COMMON | fields))
    torch.manual_seed(sum(map(ord, case)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * spread if parameter.ndim == 1 else spread * 1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    moe = "num_experts_per_tok" in fields
    if moe:
        model.set_experts_implementation("eager")
    tokens = torch.randint(0, config.vocab_size, (2, 12))
    out = model(tokens, **({"output_router_logits": True} if moe else {}))
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    found = {"tokens": tokens, "logits": out.logits, "loss": loss}
    if moe:
        found["router_logits"] = torch.stack(out.router_logits).unflatten(1, tokens.shape)
    found |= {f"gradient {name}": value.clone() for name, value in gradients(model, kind)}
    found["logits_bfloat16"] = model.to(torch.bfloat16)(tokens).logits.float()
    np.savez(folder / "reference.npz", **{name: value.detach().numpy() for name, value in found.items()})


def gradients(model, kind: str):
    """(name in the files, gradient) of embedding, norms, routers, and two experts of each layer, which transformers 5 holds as one array."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj").replace(".mlp.", ".block_sparse_moe." if kind == "mixtral" else ".mlp.")
            width, (gate, up) = gradient.shape[1] // 2, ("w1", "w3") if kind == "mixtral" else ("gate_proj", "up_proj")
            for expert in (0, 3):
                yield f"{prefix}{expert}.{gate}.weight", gradient[expert, :width]
                yield f"{prefix}{expert}.{up}.weight", gradient[expert, width:]
        elif name.endswith("mlp.gate.weight") and kind == "mixtral":
            yield name.replace(".mlp.", ".block_sparse_moe."), gradient
        elif name.endswith(("embed_tokens.weight", "norm.weight", "mlp.gate.weight", "gate_proj.weight", "q_proj.bias", "v_proj.bias")):
            yield name, gradient  # that of k's bias is 0 but for rounding: a softmax does not see it


if __name__ == "__main__":
    for name in sys.argv[2:] or CASES:
        make(name, Path(sys.argv[1]) / name)
