"""Tokenizers by name: plain bytes, a byte-level BPE trained on the training documents, SmolLM2's, or your own tokenizer.json."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from moe_jax.errors import ConfigError, DataError, nearest
from moe_jax.files import write_atomic
from moe_jax.hf import gguf
from moe_jax.train.chat import Chat
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
    chat: Chat = field(default=Chat(), repr=False, compare=False)

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
        return _wrap(spec, *_smollm2(cache), END_OF_TEXT)
    if spec.startswith("bpe:"):
        if not training_documents:
            raise ConfigError(f"{spec} is trained on documents; none were given")
        return _wrap(spec, _trained(int(spec[4:]), training_documents, cache), Chat(), END_OF_TEXT)
    text, mark, end = spec.partition(".json#")
    path = Path(text + ".json" if mark else spec).expanduser()
    return _wrap(spec, _from_file(path), Chat.beside(path), end or None)


def save(spec: str, folder: Path, cache: Cache = None) -> None:
    """Writes tokenizer.json and what goes with it into a folder, of `smollm2` or of another folder's tokenizer.json."""
    path = Path(spec.partition("#")[0]).expanduser()
    backend, chat = _smollm2(cache) if spec == "smollm2" else (_from_file(path), Chat.beside(path))
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    chat.write(folder)


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
        # a model may have more ids than there are pieces
        return b"".join(pieces[i] for i in np.asarray(ids).tolist() if i < len(pieces)).decode(errors="replace")

    return Tokenizer("bytes", 257, 256, hashlib.sha256(b"moe_jax bytes 1").hexdigest(), encode_many, decode)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError("this tokenizer needs the tokenizers library: pip install tokenizers (the tokenizer `bytes` needs none)") from None
    return tokenizers


def _wrap(name: str, backend: Any, chat: Chat, end: str | None) -> Tokenizer:
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
    return Tokenizer(name, max(vocabulary.values()) + 1, eos_id, fingerprint, encode_many, decode, chat)


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


def _smollm2(cache: Cache) -> tuple[Any, Chat]:
    """SmolLM2's, out of the metadata of its GGUF file."""
    library = _library()
    path = locate(find("smollm2_tokenizer"), cache)[0]
    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
    ids = {f"{word}_token": f"tokenizer.ggml.{word}_token_id" for word in ("bos", "eos", "unknown", "padding")}
    metadata = gguf.read_metadata(path, names, ["tokenizer.chat_template", *ids.values()])
    tokens, types, merges = (metadata[name] for name in names)
    words = tuple(
        (name.replace("unknown", "unk").replace("padding", "pad"), tokens[metadata[key]]) for name, key in ids.items() if key in metadata
    )
    stops = (metadata[ids["eos_token"]],) if ids["eos_token"] in metadata else ()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = _byte_level(library.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    backend.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special])
    return backend, Chat(metadata.get("tokenizer.chat_template", ""), words, stops)
