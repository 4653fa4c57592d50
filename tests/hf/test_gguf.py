"""GGUF: every block format against loops over its bytes, a Llama model's tensors and their order, damage anywhere one clear line."""

import math
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.errors import DataError, MoeJaxError, Unsupported
from moe_jax.hf import gguf
from moe_jax.train.saved import load_model

DRAW = np.random.default_rng(0)


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key, value):
    kind, packed = (
        (4, struct.pack("<I", value)) if isinstance(value, int) else (6, struct.pack("<f", value)) if isinstance(value, float) else (8, b"")
    )
    if isinstance(value, str):
        packed = text(value)
    if isinstance(value, list):
        kind, packed = 9, struct.pack("<IQ", 8, len(value)) + b"".join(map(text, value))
    return text(key) + struct.pack("<I", kind) + packed


def write(path, pairs, tensors):
    """tensors: name -> (ggml's type, shape, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pair(*item) for item in pairs.items())
    at, body = 0, b""
    for name, (kind, shape, content) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", kind, at)
        body += content + bytes(-len(content) % 32)
        at = len(body)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


def blocks(kind, count):
    """Random blocks: (bytes, the numbers they mean), by a loop over each."""
    content, numbers = b"", []
    for _ in range(count):
        scale, shift = np.float16(DRAW.normal()), np.float16(DRAW.normal())
        packed = DRAW.integers(0, 256, 16, dtype=np.uint8)
        nibbles = [int(byte) & 15 for byte in packed] + [int(byte) >> 4 for byte in packed]
        if kind == 2:
            content += scale.tobytes() + packed.tobytes()
            numbers += [np.float32(scale) * np.float32(n - 8) for n in nibbles]
        elif kind == 3:
            content += scale.tobytes() + shift.tobytes() + packed.tobytes()
            numbers += [np.float32(scale) * np.float32(n) + np.float32(shift) for n in nibbles]
        else:
            whole = DRAW.integers(-128, 128, 32, dtype=np.int8)
            content += scale.tobytes() + whole.tobytes()
            numbers += [np.float32(scale) * np.float32(n) for n in whole]
    return content, np.array(numbers, np.float32)


def tensor(kind, shape):
    """((type, shape, bytes), values)."""
    count = math.prod(shape)
    if kind in (2, 3, 8):
        content, values = blocks(kind, count // 32)
    else:
        values = DRAW.normal(size=count).astype({0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}[kind])
        content, values = values.tobytes(), values.astype(np.float32)
    return (kind, shape, content), values.reshape(shape)


HEADS, GROUPS, WIDTH, INNER, WORDS = 4, 2, 32, 64, 6
PAIRS = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 128, "llama.embedding_length": WIDTH, "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": GROUPS, "llama.rope.freq_base": 1e5, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": [f"w{i}" for i in range(WORDS)],
}  # fmt: skip


def model_file(path, **changes):
    """A tiny Llama: (path, values by GGUF name)."""
    half = WIDTH // HEADS * GROUPS
    shapes = {"token_embd.weight": (8, (WORDS, WIDTH)), "output_norm.weight": (0, (WIDTH,))}
    for layer in range(2):
        of = {
            "attn_norm": (0, (WIDTH,)),
            "ffn_norm": (0, (WIDTH,)),
            "attn_q": (3, (WIDTH, WIDTH)),
            "attn_k": (3, (half, WIDTH)),
            "attn_v": (2, (half, WIDTH)),
        }
        of |= {
            "attn_output": (8, (WIDTH, WIDTH)),
            "ffn_gate": (3, (INNER, WIDTH)),
            "ffn_up": (1, (INNER, WIDTH)),
            "ffn_down": (30, (WIDTH, INNER)),
        }
        shapes |= {f"blk.{layer}.{name}.weight": what for name, what in of.items()}
    made = {name: tensor(*what) for name, what in shapes.items()}
    return write(path, PAIRS | changes, {name: what for name, (what, _) in made.items()}), {
        name: values for name, (_, values) in made.items()
    }


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 8, 30])
def test_a_format_means_what_a_loop_over_its_bytes_says(tmp_path, kind):
    stored, values = tensor(kind, (5, 64))
    path = write(tmp_path / "x.gguf", {}, {"x": stored})
    (shape, type_, offset) = gguf._open(path, lambda _: False)[1]["x"]
    found = gguf.Tensor(path, type_, shape, offset).read()
    assert found.dtype == np.float32 and np.array_equal(found, values)
    assert np.array_equal(gguf.Tensor(path, type_, shape, offset).read((slice(1, 3), slice(5, 9))), values[1:3, 5:9])


@pytest.mark.parametrize("kind", [0, 2, 3, 8, 30])
def test_a_piece_is_what_the_whole_has_there_and_no_more_is_read(tmp_path, kind, monkeypatch):
    """Two rows of eight at a time; of q and k, whose rows lie in another order, all."""
    stored, values = tensor(kind, (8, 64))
    path = write(tmp_path / "x.gguf", {}, {"x": stored})
    (shape, type_, offset) = gguf._open(path, lambda _: False)[1]["x"]
    read, fromfile = [], np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *arguments, **how: read.append(arguments[2]) or fromfile(*arguments, **how))
    one = gguf.Tensor(path, type_, shape, offset)
    pieces = [one.read((slice(first, first + 2), slice(0, 64))) for first in range(0, 8, 2)]
    assert np.array_equal(np.concatenate(pieces), values) and read == [one.nbytes // 4] * 4
    assert np.array_equal(one.read((slice(3, 8), slice(40, 64))), values[3:8, 40:]) and read[-1] == one.nbytes * 5 // 8
    turned = gguf.Tensor(path, type_, shape, offset, heads=2)
    assert np.array_equal(turned.read((slice(1, 3), slice(0, 64))), turned.read()[1:3]) and read[-1] == one.nbytes


def test_a_vector_is_read_whole(tmp_path):
    """Its elements are no rows: 32 of them share a block."""
    stored, values = tensor(8, (64,))
    path = write(tmp_path / "x.gguf", {}, {"x": stored})
    (shape, type_, offset) = gguf._open(path, lambda _: False)[1]["x"]
    assert np.array_equal(gguf.Tensor(path, type_, shape, offset).read((slice(5, 40),)), values[5:40])


def test_a_llama_model_is_loaded(tmp_path):
    path, values = model_file(tmp_path / "tiny.gguf")
    saved = load_model(path)
    c, params = saved.config, saved.params
    assert (c.num_layers, c.num_heads, c.kv_heads, c.rope_theta, c.norm_eps, c.tie_embeddings, c.vocab_size) == (
        2,
        4,
        2,
        1e5,
        1e-5,
        True,
        WORDS,
    )
    layer = params["layers"]
    assert np.array_equal(params["embedding"], values["token_embd.weight"])
    assert np.array_equal(layer["feed_forward"]["down"][1], values["blk.1.ffn_down.weight"].T)
    assert np.array_equal(layer["attention"]["v"][0], values["blk.0.attn_v.weight"].T)


def test_rotary_pairs_are_put_into_halves(tmp_path):
    """A head's rows 0, 1, 2, 3 … are the pairs (0, 1), (2, 3) … there, and the halves (0, 2, …), (1, 3, …) here."""
    path, values = model_file(tmp_path / "tiny.gguf")
    params = load_model(path).params
    for name, heads in (("q", HEADS), ("k", GROUPS)):
        theirs, width = values[f"blk.0.attn_{name}.weight"], WIDTH // HEADS
        ours = np.asarray(params["layers"]["attention"][name][0]).T
        for head in range(heads):
            order = [*range(0, width, 2), *range(1, width, 2)]
            assert np.array_equal(ours[head * width : (head + 1) * width], theirs[head * width : (head + 1) * width][order])


def test_a_gguf_path_is_a_model(tmp_path):
    path, _ = model_file(tmp_path / "tiny.gguf")
    saved = load_model(path)
    assert saved.what == "tiny.gguf" and saved.params["embedding"].shape == (WORDS, WIDTH)
    assert jnp.isfinite(saved.params["embedding"]).all()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"general.architecture": "qwen3moe"}, Unsupported, "architecture 'qwen3moe'; supported: llama"),
        ({"llama.expert_count": 8}, Unsupported, "llama.expert_count is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, Unsupported, "llama.rope.scaling.type is not supported"),
        ({"llama.block_count": "two"}, MoeJaxError, "."),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, changes, error, message):
    path, _ = model_file(tmp_path / "x.gguf", **changes)
    with pytest.raises(error, match=message):
        load_model(path)


def test_an_unknown_type_of_numbers_is_named(tmp_path):
    path = write(tmp_path / "x.gguf", PAIRS, {"token_embd.weight": (12, (1, 256), bytes(144))})
    with pytest.raises(Unsupported, match="token_embd.weight is of ggml's type 12, .* supported: F32, F16, Q4_0, Q4_1, Q8_0, BF16"):
        gguf.read(path)


def test_a_file_cut_anywhere_is_one_clear_line(tmp_path):
    path, _ = model_file(tmp_path / "x.gguf")
    content = path.read_bytes()
    for cut in [*range(1, 1200, 37), len(content) // 2, len(content) - 40]:
        path.write_bytes(content[:cut])
        with pytest.raises(DataError) as caught:
            gguf.read(path)
        assert "\n" not in str(caught.value)
