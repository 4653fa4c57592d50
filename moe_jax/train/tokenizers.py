"""Tokenizers by name: plain bytes, a byte-level BPE trained on the training documents, SmolLM2's, or your own tokenizer.json."""

import hashlib
import json
import mmap
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from moe_jax.errors import ConfigError, DataError, nearest
from moe_jax.train.run_folder import write_atomic
from moe_jax.train.sources import Cache, cache_root, find, locate, sha256_of

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>")
SMALLEST_BPE = 257  # 256 bytes and the end of text
_CONTROL = 3  # GGUF token type of special tokens


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back; neither way adds tokens. A special token written out in a text is read as one, except by `bytes`."""

    name: str
    vocab_size: int  # ids are 0 … vocab_size - 1
    eos_id: int | None  # what stands between documents
    fingerprint: str  # sha256, hex, of everything that decides the ids
    encode_many: Callable[[Sequence[str]], list[Int32[np.ndarray, "N"]]] = field(repr=False, compare=False)
    decode: Callable[[Sequence[int] | np.ndarray], str] = field(repr=False, compare=False)

    def encode(self, text: str) -> Int32[np.ndarray, "N"]:
        """The ids of one text."""
        return self.encode_many([text])[0]


def load(spec: str, training_documents: Sequence[str] | None = None, cache: Cache = None) -> Tokenizer:
    """The tokenizer that a spec names.

    spec: `bytes` (256 ids and an end of text; needs no library); `bpe:2048` (that many ids, trained on `training_documents` alone and
    kept in the cache under their hash); `smollm2` (fetched: python -m launch.data --fetch=smollm2_tokenizer); /path/tokenizer.json,
    or /path/tokenizer.json#TOKEN to say which token ends a document.
    Raises ConfigError (unknown spec, no documents to train on), DataError (missing or damaged file, library absent).
    """
    check_spec(spec)
    if spec == "bytes":
        return _bytes()
    if spec == "smollm2":
        return _wrap(spec, _smollm2(cache), END_OF_TEXT)
    if spec.startswith("bpe:"):
        if not training_documents:
            raise ConfigError(f"{spec} is trained on documents; none were given")
        return _wrap(spec, _trained(int(spec[4:]), training_documents, cache), END_OF_TEXT)
    path, mark, end = spec.partition(".json#")
    return _wrap(spec, _from_file(Path(path + ".json" if mark else spec).expanduser()), end or None)


def check_spec(spec: str) -> None:
    """Raises ConfigError unless `spec` has one of the forms of `load`; touches no file."""
    if spec in ("bytes", "smollm2") or spec.partition("#")[0].endswith(".json"):
        return
    if spec.startswith("bpe:"):
        if not spec[4:].isdigit() or not SMALLEST_BPE <= int(spec[4:]) < 1 << 24:
            raise ConfigError(f"{spec!r}: a byte-level BPE has at least {SMALLEST_BPE} ids (256 bytes and the end of text), as in bpe:2048")
        return
    hint = nearest(spec, ("bytes", "smollm2", "bpe:2048"))
    raise ConfigError(f"unknown tokenizer {spec!r}{hint}; known: bytes, bpe:SIZE, smollm2, /path/tokenizer.json")


def _bytes() -> Tokenizer:
    """UTF-8 bytes as ids, 256 as the end of text."""

    def encode_many(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(ids: Sequence[int] | np.ndarray) -> str:
        pieces = [bytes([i]) for i in range(256)] + [END_OF_TEXT.encode()]
        return b"".join(pieces[i] for i in np.asarray(ids).tolist()).decode(errors="replace")

    return Tokenizer("bytes", 257, 256, hashlib.sha256(b"moe_jax bytes 1").hexdigest(), encode_many, decode)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError("this tokenizer needs the tokenizers library: pip install tokenizers (the tokenizer `bytes` needs none)") from None
    return tokenizers


def _wrap(name: str, backend: Any, end: str | None) -> Tokenizer:
    """A Tokenizer around one of the library's; `end` is the token that ends a document (None: the first known one)."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if end is not None and end not in vocabulary:
        raise DataError(f"{name}: the vocabulary has no token {end!r} to end documents with")
    end = end or next((token for token in KNOWN_ENDS if token in vocabulary), None)

    def encode_many(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, np.int32) for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(ids: Sequence[int] | np.ndarray) -> str:
        return backend.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    # Parsed and written again, because the library does not promise the order of the keys.
    canonical = json.dumps([json.loads(backend.to_str()), end], sort_keys=True)
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
    eos_id = None if end is None else vocabulary[end]
    return Tokenizer(name, max(vocabulary.values()) + 1, eos_id, fingerprint, encode_many, decode)


def _from_file(path: Path) -> Any:
    library = _library()
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}")
    try:
        backend = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a readable tokenizer.json: {str(error)[:200]}") from None
    backend.no_truncation()  # a saved length limit would cut documents silently
    backend.no_padding()
    return backend


def _byte_level(model: Any) -> Any:
    """Single digits, then GPT-2's byte-level pieces: SmolLM2's pre-tokenizer, used for the trained ones too."""
    library = _library()
    pre = library.pre_tokenizers
    backend = library.Tokenizer(model)
    backend.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    backend.decoder = library.decoders.ByteLevel()
    return backend


def train_bpe(vocab_size: int, documents: Sequence[str]) -> Any:
    """A byte-level BPE (library object) of at most `vocab_size` ids; id 0 ends a text. The same documents give the same ids."""
    library = _library()
    backend = _byte_level(library.models.BPE())
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents, trainer, length=len(documents))
    return backend


def _trained(vocab_size: int, documents: Sequence[str], cache: Cache) -> Any:
    """A trained BPE out of the cache, or trained now and put there under the hash of its recipe and documents."""
    digest = hashlib.sha256(f"recipe 1, {vocab_size} ids".encode())
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    folder = cache_root(cache) / f"bpe-{vocab_size}-{digest.hexdigest()[:20]}"
    for path in sorted(folder.glob("tokenizer-*.json")):
        if path.stem == f"tokenizer-{sha256_of(path)}":  # else damaged: train again, which costs seconds
            return _from_file(path)
    backend = train_bpe(vocab_size, documents)
    text = backend.to_str()
    with suppress(OSError):  # a cache that cannot be written costs only time
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"tokenizer-{hashlib.sha256(text.encode()).hexdigest()}.json", text)
    return backend


def _smollm2(cache: Cache) -> Any:
    """SmolLM2's, out of the metadata of its GGUF file."""
    library = _library()
    path = locate(find("smollm2_tokenizer"), cache)[0]
    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
    metadata = read_gguf_metadata(path, names)
    tokens, types, merges = (metadata[name] for name in names)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = _byte_level(library.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    backend.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special])
    return backend


_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def read_gguf_metadata(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The named metadata values of a GGUF file (version 2 or 3); its tensors are not touched.

    Raises DataError for a damaged file or an absent name.
    Layout (ggml's docs/gguf.md): "GGUF", version, tensor count, pair count, then (key, type, value) pairs.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            magic, version, _, count = struct.unpack_from("<4sIQQ", view, 0)
            if magic != b"GGUF" or version not in (2, 3):
                raise DataError(f"{path} is not a GGUF file of version 2 or 3 (it starts with {magic!r}, version {version})")
            found, at = {}, struct.calcsize("<4sIQQ")
            for _ in range(count):
                key, at = _gguf_value(view, at, _STRING)
                (type_,) = struct.unpack_from("<I", view, at)
                value, at = _gguf_value(view, at + 4, type_)
                if key in names:
                    found[key] = value
    except (struct.error, KeyError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: its metadata cannot be read ({type(error).__name__}: {error})") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path} lacks the metadata {', '.join(missing)}")
    return found


def _gguf_value(view: mmap.mmap, at: int, type_: int) -> tuple[Any, int]:
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
            value, at = _gguf_value(view, at, kind)
            values.append(value)
        return values, at
    return struct.unpack_from(_SCALARS[type_], view, at)[0], at + struct.calcsize(_SCALARS[type_])
