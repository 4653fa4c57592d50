"""GGUF files: metadata, and the tensors of a Llama model under their Hugging Face names, dequantised when read.

Layout (ggml's docs/gguf.md): "GGUF", version, tensor count, pair count; the metadata as (key, type, value); (name, sizes, type, offset) of each tensor;
the tensors' bytes from the next multiple of the alignment on.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.errors import DataError, MoeJaxError, Unsupported

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32  # elements that share a scale
_DAMAGE = (struct.error, KeyError, ValueError, RecursionError, MemoryError)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """4-bit numbers: the first half of a block in the low bits, the second in the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _plain(dtype: Any) -> tuple[int, int, Callable[[np.ndarray], np.ndarray]]:
    size = np.dtype(dtype).itemsize
    return 1, size, lambda blocks: blocks.reshape(-1).view(dtype).astype(np.float32)


# ggml's number of a type -> name, elements in a block, its bytes, and what they mean
_TYPES: dict[int, tuple[str, tuple[int, int, Callable[[np.ndarray], np.ndarray]]]] = {
    0: ("F32", _plain(np.float32)),
    1: ("F16", _plain(np.float16)),
    2: ("Q4_0", (_BLOCK, 18, lambda blocks: _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8))),
    3: ("Q4_1", (_BLOCK, 20, lambda blocks: _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2))),
    8: ("Q8_0", (_BLOCK, 34, lambda blocks: _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32))),
    30: ("BF16", _plain(ml_dtypes.bfloat16)),
}

_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file; read as float32."""

    file: Path
    kind: int  # of _TYPES
    shape: tuple[int, ...]
    offset: int
    heads: int = 0  # of q and k: their rows lie as rotary pairs side by side and are put into halves, Hugging Face's order

    @property
    def nbytes(self) -> int:
        elements, size, _ = _TYPES[self.kind][1]
        return math.prod(self.shape) // elements * size

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Its values, or those of a slice for each axis; only whole rows, which are whole blocks, are read. Of q and k all, since their order changes."""
        _, size, meaning = _TYPES[self.kind][1]
        part = bool(index and self.shape[1:]) and not self.heads
        first, last, _ = index[0].indices(self.shape[0]) if part else (0, self.shape[0], 1)
        row = self.nbytes // self.shape[0] if part else 0
        stored = np.fromfile(self.file, np.uint8, (last - first) * row if part else self.nbytes, offset=self.offset + first * row)
        values = meaning(stored.reshape(-1, size)).reshape(last - first, *self.shape[1:])
        if self.heads:
            rows, columns = self.shape
            values = values.reshape(self.heads, rows // self.heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        return np.ascontiguousarray(values[(slice(None), *index[1:]) if part else index])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields of a ModelConfig, tensors by their Hugging Face names) of a Llama model.

    Raises DataError for a damaged file, Unsupported for another architecture or a type of numbers that is not read here.
    """
    metadata, found = _open(path, lambda key: not key.startswith("tokenizer.") or key.endswith(".tokens"))
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise Unsupported(f"{path} holds a model of the architecture {kind!r}; supported: llama")
    scaled = [key for key in metadata if key.startswith("llama.rope.scal") and metadata[key] not in ("none", 0.0, 1.0)]
    if scaled or metadata.get("llama.expert_count"):
        raise Unsupported(f"{path}: {', '.join(scaled) or 'llama.expert_count'} is not supported here")
    try:
        heads, width = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
        groups = metadata.get("llama.attention.head_count_kv", heads)
        values = {
            "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
            "d_model": width,
            "num_layers": metadata["llama.block_count"],
            "num_heads": heads,
            "num_kv_heads": groups,
            "head_dim": metadata.get("llama.attention.key_length", width // heads),
            "max_seq_len": metadata["llama.context_length"],
            "num_experts": 0,
            "experts_per_token": 1,
            "d_expert": metadata["llama.feed_forward_length"],
            "d_ff": metadata["llama.feed_forward_length"],
            "rope_theta": float(metadata.get("llama.rope.freq_base", 10_000.0)),
            "norm_eps": _short(metadata["llama.attention.layer_norm_rms_epsilon"]),
            "tie_embeddings": "output.weight" not in found,
        }
    except KeyError as error:
        raise DataError(f"{path} lacks the metadata {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{path} is damaged: its metadata are of another kind ({error})") from None
    wrong = [name for name, value in values.items() if not isinstance(value, (float, int) if name in ("rope_theta", "norm_eps") else int)]
    if wrong:
        raise DataError(f"{path} is damaged: {', '.join(wrong)} should be whole numbers, got {[values[name] for name in wrong]}")
    tensors = {}
    for name, (shape, type_, offset) in found.items():
        turned = {"attn_q": heads, "attn_k": groups}.get(name.split(".")[2] if name.startswith("blk.") else "", 0)
        tensors[_hf_name(name)] = Tensor(path, type_, shape, offset, turned)
    return values, tensors


def _short(value: float) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _BLOCK_NAMES:
        return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
    return _NAMES.get(name, name)


def read_metadata(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The named metadata values of a GGUF file (version 2 or 3), and the optional ones that it has; its tensors are not read.

    Raises DataError for a damaged file or an absent name.
    """
    found = _open(path, {*names, *optional}.__contains__)[0]
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path} lacks the metadata {', '.join(missing)}")
    return found


def _open(path: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
    """The wanted metadata, and (shape, type, offset in the file) of each tensor."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", view, 0)
            if magic != b"GGUF" or version not in (2, 3):
                raise DataError(f"{path} is not a GGUF file of version 2 or 3 (it starts with {magic!r}, version {version})")
            found, at, alignment = {}, struct.calcsize("<4sIQQ"), 32
            for _ in range(pairs):
                key, at = _value(view, at, _STRING)
                (type_,) = struct.unpack_from("<I", view, at)
                value, at = _value(view, at + 4, type_)
                alignment = value if key == "general.alignment" else alignment
                if wanted(key):
                    found[key] = value
            return found, _tensors(path, view, at, tensors, alignment)
    except MoeJaxError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged: its metadata cannot be read ({type(error).__name__}: {error})") from None


def _tensors(path: Path, view: mmap.mmap, at: int, count: int, alignment: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    listed = {}
    for _ in range(count):
        name, at = _value(view, at, _STRING)
        (axes,) = struct.unpack_from("<I", view, at)
        *sizes, type_, offset = struct.unpack_from(f"<{axes}QIQ", view, at + 4)
        at += 4 + 8 * axes + 12
        if name in listed:
            raise DataError(f"{path} holds two tensors called {name}: refused")
        listed[name] = (tuple(sizes[::-1]), type_, offset)
    begin = -(-at // alignment) * alignment
    for name, (shape, type_, offset) in listed.items():
        if type_ not in _TYPES:
            kinds = ", ".join(kind for kind, _ in _TYPES.values())
            raise Unsupported(f"{path}: the tensor {name} is of ggml's type {type_}, which is not read here; supported: {kinds}")
        elements, size, _ = _TYPES[type_][1]
        if not shape or shape[-1] % elements:
            raise DataError(f"{path} is damaged: {name} of shape {shape} does not divide into blocks of {elements}")
        end = begin + offset + math.prod(shape) // elements * size
        if end > len(view):
            raise DataError(f"{path} is truncated: {name} ends at byte {end:,} of a file of {len(view):,}")
    return {name: (shape, type_, begin + offset) for name, (shape, type_, offset) in listed.items()}


def _value(view: mmap.mmap, at: int, type_: int) -> tuple[Any, int]:
    """The value of a GGUF type at byte `at`, and where it ends. A length or count that lies ends in an error at the file's end."""
    if type_ == _STRING:
        (length,) = struct.unpack_from("<Q", view, at)
        end = at + 8 + length
        if end > len(view):
            raise ValueError(f"a string of {length} bytes at byte {at} runs past the end, {len(view)}")
        return view[at + 8 : end].decode(), end
    if type_ == _ARRAY:
        kind, count = struct.unpack_from("<IQ", view, at)
        at, values = at + 12, []
        for _ in range(count):
            value, at = _value(view, at, kind)
            values.append(value)
        return values, at
    return struct.unpack_from(_SCALARS[type_], view, at)[0], at + struct.calcsize(_SCALARS[type_])
