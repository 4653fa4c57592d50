"""Where each tensor of a Hugging Face checkpoint belongs: one table per family, from our parameters' paths to their names.

L layers, E experts.
"""

import dataclasses
import itertools

from moe_jax import paths
from moe_jax.errors import Unsupported
from moe_jax.hf.config import Family
from moe_jax.model import Model


@dataclasses.dataclass(frozen=True)
class Target:
    """One tensor of a file as a part of one of our parameters."""

    path: str  # of the parameter
    index: tuple[int, ...]  # along its leading stack axes: layer in the stack, expert
    shape: tuple[int, ...]  # of the tensor in the file
    transposed: bool  # the file has it as [out, in], the parameter as [in, out]


def _matrix(name: str) -> tuple[str, bool]:
    return f"{name}.weight", True


def _same(name: str) -> tuple[str, bool]:
    return name, False


# Path outside the layers, or in a layer's block -> name in the file, and whether it is transposed there.
_ENDS = {
    "embedding": _same("model.embed_tokens.weight"),
    "norm_final/scale": _same("model.norm.weight"),
    "head": _same("lm_head.weight"),
}
_BLOCK = {
    "norm_attention/scale": _same("input_layernorm.weight"),
    "norm_moe/scale": _same("post_attention_layernorm.weight"),
    **{f"attention/{part}": _matrix(f"self_attn.{part}_proj") for part in "qkvo"},
    **{f"attention/{part}_bias": _same(f"self_attn.{part}_proj.bias") for part in "qkvo"},
    **{f"attention/{part}_norm/scale": _same(f"self_attn.{part}_norm.weight") for part in "qk"},
}
_DENSE = {f"feed_forward/{part}": _matrix(f"mlp.{part}_proj") for part in ("gate", "up", "down")}
_EXPERTS = {f"feed_forward/{part}": _matrix(f"mlp.experts.{{expert}}.{part}_proj") for part in ("gate", "up", "down")}
_MIXTRAL = {
    "feed_forward/router": _matrix("block_sparse_moe.gate"),
    "feed_forward/gate": _matrix("block_sparse_moe.experts.{expert}.w1"),
    "feed_forward/up": _matrix("block_sparse_moe.experts.{expert}.w3"),
    "feed_forward/down": _matrix("block_sparse_moe.experts.{expert}.w2"),
}
_MOE = {"feed_forward/router": _matrix("mlp.gate"), **_EXPERTS}
TABLES: dict[str, dict[str, tuple[str, bool]]] = {"qwen3_moe": _MOE, "olmoe": _MOE, "mixtral": _MIXTRAL}


def targets(model: Model, family: Family) -> dict[str, Target]:
    """Every tensor of the model's checkpoint by its name in the files, in the order of the layers.

    Raises Unsupported for a parameter that the family has no name for.
    """
    stacks = model.stacks()
    found: list[tuple[int, str, Target]] = []
    for path, spec in paths.flatten(model.specs).items():
        stack, _, within = path.partition("/")
        layers = stacks.get(stack)
        moe = layers is not None and layers[0] in model.config.moe_layers
        table = _ENDS if layers is None else _BLOCK | (TABLES.get(family.model_type, {}) if moe else _DENSE)
        name, transposed = table.get(path if layers is None else within, ("", False))
        if not name:
            raise Unsupported(f"{family.architecture} has no parameter like {path}")
        counts = [size for size, axis in zip(spec.shape, spec.axes, strict=True) if axis in ("layers", "experts")]
        shape = spec.shape[len(counts) :]
        for index in itertools.product(*map(range, counts)):
            layer = -1 if layers is None else layers[index[0]]
            full = name if layers is None else f"model.layers.{layer}.{name.format(expert=index[-1])}"
            found.append((layer, full, Target(path, index, shape[::-1] if transposed else shape, transposed)))
    return {name: target for _, name, target in sorted(found, key=lambda item: item[0])}
