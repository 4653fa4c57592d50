"""Tokenizers: round trips, deterministic training, the GGUF reader on files made here, SmolLM2 itself where it is cached."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.errors import ConfigError, DataError
from moe_jax.hf import gguf
from moe_jax.train import sources, texts, tokenizers

TEXT = "Grüße, 日本\n\t2024 — naïve"
DOCUMENTS = texts.documents("synthetic", limit=100)


def test_bytes():
    tokenizer = tokenizers.load("bytes")
    ids = tokenizer.encode("aé")
    assert ids.dtype == np.int32 and ids.tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([97, 256]) == "a<|endoftext|>"
    assert tokenizer.decode([104, 258, 97]) == "ha"  # the preset tiny has 260 ids
    assert tokenizer.encode("").shape == (0,)


def test_bytes_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert tokenizers.load("bytes").encode("a").tolist() == [97]
    with pytest.raises(DataError, match="pip install tokenizers"):
        tokenizers.load("bpe:300", DOCUMENTS)


def test_bpe(tmp_path):
    tokenizer = tokenizers.load("bpe:400", DOCUMENTS, tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (400, 0)
    ids = tokenizer.encode_many([*DOCUMENTS, TEXT])
    assert [tokenizer.decode(one) for one in ids] == [*DOCUMENTS, TEXT]  # bytes never seen in training too
    assert all(one.dtype == np.int32 for one in ids)
    flat = np.concatenate(ids[:-1])
    assert flat.min() > 0 and flat.max() < 400
    assert len(flat) < sum(map(len, DOCUMENTS)) / 2  # it merges
    assert [tokenizer.decode([one]) for one in tokenizer.encode("2024").tolist()] == ["2", "0", "2", "4"]


def test_bpe_training_is_deterministic(tmp_path):
    """Two other processes, with other hash seeds and another number of threads, train the same ids."""
    here = tokenizers.load("bpe:600", DOCUMENTS, tmp_path / "here").fingerprint
    program = (
        "import sys; from moe_jax.train import texts, tokenizers;"
        "print(tokenizers.load('bpe:600', texts.documents('synthetic', limit=100), sys.argv[1]).fingerprint)"
    )
    for seed, threads in (("1", "1"), ("2", "2")):
        environment = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "PATH": ""}
        command = [sys.executable, "-c", program, str(tmp_path / seed)]
        assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip() == here
    assert tokenizers.load("bpe:600", DOCUMENTS[:-1], tmp_path).fingerprint != here
    assert tokenizers.load("bpe:599", DOCUMENTS, tmp_path).fingerprint != here


def test_bpe_cache(tmp_path, monkeypatch):
    first = tokenizers.load("bpe:300", DOCUMENTS, tmp_path)
    [path] = tmp_path.rglob("*.json")
    stored, trained = path.read_bytes(), []
    train = tokenizers.train_bpe
    monkeypatch.setattr(tokenizers, "train_bpe", lambda *arguments: trained.append(1) or train(*arguments))
    assert tokenizers.load("bpe:300", DOCUMENTS, tmp_path).fingerprint == first.fingerprint and not trained
    path.write_bytes(stored.replace(b'"merges"', b'"Merges"'))  # damaged: trained again, not believed
    assert tokenizers.load("bpe:300", DOCUMENTS, tmp_path).fingerprint == first.fingerprint and trained == [1]
    assert path.read_bytes() == stored
    (tmp_path / "file").write_text("")
    assert tokenizers.load("bpe:300", DOCUMENTS, tmp_path / "file").fingerprint == first.fingerprint  # no cache, no harm


def test_own_tokenizer(tmp_path):
    backend = tokenizers.train_bpe(300, DOCUMENTS)
    backend.add_tokens(["<stop>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    path = tmp_path / "tokenizer.json"
    path.write_text(backend.to_str())
    own = tokenizers.load(str(path))
    assert (own.vocab_size, own.eos_id) == (301, 0)
    assert len(own.encode(DOCUMENTS[0])) > 4  # a saved length limit does not cut texts
    ended = tokenizers.load(f"{path}#<stop>")
    assert ended.eos_id == 300 and ended.fingerprint != own.fingerprint
    with pytest.raises(DataError, match="no token '<end>'"):
        tokenizers.load(f"{path}#<end>")


def test_own_tokenizer_without_an_end(tmp_path):
    backend = tokenizers.train_bpe(300, DOCUMENTS)
    contents = json.loads(backend.to_str().replace("<|endoftext|>", "<|odd|>"))
    (tmp_path / "t.json").write_text(json.dumps(contents))
    assert tokenizers.load(str(tmp_path / "t.json")).eos_id is None


def test_errors(tmp_path):
    for spec, message in (
        ("smolm2", "did you mean 'smollm2'"),
        ("bpe:10", "at least 257"),
        ("bpe:x", "at least 257"),
        ("gpt2", "known: bytes"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenizers.load(spec)
    with pytest.raises(ConfigError, match="none were given"):
        tokenizers.load("bpe:300")
    with pytest.raises(DataError, match="no tokenizer at"):
        tokenizers.load(str(tmp_path / "gone.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable tokenizer.json"):
        tokenizers.load(str(tmp_path / "bad.json"))
    with pytest.raises(sources.MissingData, match="--fetch=smollm2_tokenizer"):
        tokenizers.load("smollm2", cache=tmp_path)


# GGUF


def gguf_string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_file(path, tokens, types, merges, last=()):
    """A GGUF file of metadata alone, with every scalar kind before the arrays, to be skipped; `last` are strings behind them."""
    scalars = [(0, "<B", 1), (3, "<h", -2), (6, "<f", 0.5), (7, "<?", True), (10, "<Q", 7), (12, "<d", 1.5)]
    pairs = [gguf_string(f"s{kind}") + struct.pack("<I", kind) + struct.pack(code, value) for kind, code, value in scalars]
    pairs.append(gguf_string("general.name") + struct.pack("<I", 8) + gguf_string("tiny"))
    pairs.append(gguf_string("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<2f", 0, 1))
    for name, values in (("tokens", tokens), ("merges", merges)):
        body = b"".join(map(gguf_string, values))
        pairs.append(gguf_string(f"tokenizer.ggml.{name}") + struct.pack("<IIQ", 9, 8, len(values)) + body)
    pairs.append(gguf_string("tokenizer.ggml.token_type") + struct.pack(f"<IIQ{len(types)}i", 9, 5, len(types), *types))
    pairs += [gguf_string(f"last.{text}") + struct.pack("<I", 8) + gguf_string(text) for text in last]
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs)) + b"".join(pairs))
    return path


NAMES = ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "general.name"]


def test_gguf_reader(tmp_path):
    path = gguf_file(tmp_path / "x.gguf", ["<|endoftext|>", "a", "Ġ"], [3, 1, 1], ["Ġ a"])
    assert list(gguf.read_metadata(path, NAMES).values()) == ["tiny", ["<|endoftext|>", "a", "Ġ"], ["Ġ a"], [3, 1, 1]]
    with pytest.raises(DataError, match="lacks the metadata gone"):
        gguf.read_metadata(path, ["gone"])


@pytest.mark.parametrize("last", [(), ("text",)])
def test_gguf_cut_anywhere_is_one_clear_error(tmp_path, last):
    path = gguf_file(tmp_path / "x.gguf", ["a", "b"], [1, 1], ["a b"], last)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="is damaged"):
            gguf.read_metadata(path, NAMES)


def test_gguf_lying_counts_end_quickly(tmp_path):
    path = gguf_file(tmp_path / "x.gguf", ["a", "b"], [1, 1], ["a b"])
    whole = path.read_bytes()
    for kind in (None, 8, 5):  # the number of pairs, of strings in an array, of integers in an array
        at = 16 if kind is None else whole.index(struct.pack("<IIQ", 9, kind, 2)) + 8
        path.write_bytes(whole[:at] + struct.pack("<Q", 1 << 60) + whole[at + 8 :])
        with pytest.raises(DataError, match="is damaged"):
            gguf.read_metadata(path, NAMES)
    nested = gguf_string("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + nested)
    with pytest.raises(DataError, match="is damaged"):
        gguf.read_metadata(path, NAMES)
    path.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(DataError, match="not a GGUF file"):
        gguf.read_metadata(path, NAMES)


def test_smollm2_is_rebuilt_from_its_metadata(tmp_path, monkeypatch):
    """A GGUF made of a BPE trained here gives back that BPE: same ids, same text."""
    backend = tokenizers.train_bpe(400, DOCUMENTS)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    path = gguf_file(tmp_path / "x.gguf", tokens, [3] + [1] * (len(tokens) - 1), merges)
    monkeypatch.setattr(tokenizers, "locate", lambda source, cache: [path])
    rebuilt = tokenizers.load("smollm2")
    expected = [encoding.ids for encoding in backend.encode_batch([*DOCUMENTS, TEXT])]
    assert [ids.tolist() for ids in rebuilt.encode_many([*DOCUMENTS, TEXT])] == expected
    assert (rebuilt.vocab_size, rebuilt.eos_id, rebuilt.encode("<|endoftext|>").tolist()) == (400, 0, [0])


def test_smollm2_itself():
    if not sources.is_cached(sources.CATALOGUE["smollm2_tokenizer"]):
        pytest.skip("SmolLM2 is not in the cache; python -m launch.data --fetch=smollm2_tokenizer")
    tokenizer = tokenizers.load("smollm2")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (49152, 0)
    # Digits are split off first, so both spaces are one token; GPT-2's pattern alone gives "Ġ", "Ġ", "1", "2".
    assert [tokenizer.decode([one]) for one in tokenizer.encode("a,  12").tolist()] == ["a", ",", "  ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    if sources.is_cached(sources.CATALOGUE["wiki"]):
        assert sum(map(len, tokenizer.encode_many(texts.documents("wiki", limit=1000)))) == 108800
