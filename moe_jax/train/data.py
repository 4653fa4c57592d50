"""Token windows: documents to one token array, windows as offsets into it, and batches that are a function of (seed, step).

A micro-batches per step, B sequences per micro-batch (all processes together), S tokens per sequence, N tokens in all.
The only state of the pipeline is the step number: a resumed run asks for `batches(start_step)`. A checkpoint keeps `fingerprint` beside it
and refuses data whose fingerprint differs, for the same step would then mean other text.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64

from moe_jax.errors import ConfigError, DataError
from moe_jax.train import texts, tokenizers
from moe_jax.train.sources import Cache, MissingData, find

SPLIT_WORDS = {
    "clean": "documents are divided before any window is cut, the same way for every seed; no token is in both parts",
    "leaky": "windows of one token stream at every offset, divided at random per seed; validation text is also trained on",
}
# The fields of a config that decide its corpus; the others only cut windows from it.
_CORPUS_FIELDS = "source tokenizer split document_order document_separator validation_share max_documents max_characters max_tokens".split()
_BLOCK = 1024  # documents encoded at a time
_PREFETCH = 4  # batches made ahead


@dataclass(frozen=True)
class DataConfig:
    """What text a run sees and how it is cut. The defaults are a small clean study; the seed's values stand behind each field."""

    source: str = "wiki"  # catalogue name, or PATH[#FIELD] (texts.documents)
    tokenizer: str = "bpe:2048"  # tokenizers.load; seed: smollm2
    seq_len: int = 128  # S; seed: 512
    batch_size: int = 16  # B, sequences per micro-batch; seed: 24
    accumulation: int = 1  # A, micro-batches per update; seed: 4
    split: Literal["clean", "leaky"] = "clean"  # seed: leaky
    document_order: Literal["hash", "file"] = "hash"  # hash: fixed and mixed, so that a cap takes of every topic; seed: file
    max_documents: int | None = None  # seed: 2000
    max_characters: int | None = None  # of each document; seed: 3000
    max_tokens: int | None = None  # of the whole stream, both parts; seed: 500_000
    validation_share: float = 0.1  # of the documents (clean) or the windows (leaky)
    eval_windows: int | None = None  # windows that an evaluation reads; None: all; seed: 2400
    document_separator: bool = True  # the end-of-text token after every document; seed: False

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "accumulation", "max_documents", "max_characters", "max_tokens", "eval_windows"):
            value, optional = getattr(self, name), name.startswith(("max", "eval"))
            if not (value is None and optional) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1{' or None' if optional else ''}, got {value!r}")
        for name, known in (("split", SPLIT_WORDS), ("document_order", ("hash", "file"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.validation_share, float) or not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share must lie between 0 and 1, got {self.validation_share!r}")
        tokenizers.check_spec(self.tokenizer)
        if not texts.is_path(self.source) and find(self.source).kind != "text":
            raise ConfigError(f"source {self.source!r} holds {find(self.source).kind}, not text")

    @classmethod
    def fitting(cls, source: str, vocab_size: int, seq_len: int, **changes: Any) -> "DataConfig":
        """A text with a tokenizer for a vocabulary of this size; made-up text always has bytes, so that nothing is fetched for it."""
        known = {260: "bytes", 49_152: "smollm2"}
        tokenizer = "bytes" if source == "synthetic" else known.get(vocab_size, f"bpe:{vocab_size}")
        return cls(source, tokenizer, seq_len, **changes)

    def replace(self, **changes: Any) -> "DataConfig":
        """A copy with other values, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A source as token ids: the same for every run seed. In a leaky corpus everything is in `train`."""

    config: DataConfig
    train: Int32[np.ndarray, "Nt"]
    validation: Int32[np.ndarray, "Nv"]
    tokenizer: tokenizers.Tokenizer
    text_sha256: str  # of the chosen documents, in order
    train_documents: int  # that gave at least one token
    validation_documents: int
    empty_documents: int  # found in the source and left out
    text_bytes: int  # of the documents that were encoded
    text_tokens: int  # which they became, before the cap and without separators


def load_corpus(config: DataConfig, cache: Cache = None) -> Corpus:
    """Reads, divides and tokenises a source. A trained tokenizer sees the training documents only.

    Raises DataError (missing or damaged source, too few documents), ConfigError (a separator that the tokenizer lacks).
    """
    in_order = config.document_order == "file"
    found = texts.documents(config.source, cache, config.max_documents if in_order else None)
    chosen = [text for text in found if text.strip()]
    empty = len(found) - len(chosen)
    if not in_order:
        chosen = sorted(chosen, key=lambda text: _hash("order", text))
    chosen = [text[: config.max_characters] for text in chosen[: config.max_documents]]
    held_out = _held_out(chosen, config) if config.split == "clean" else [False] * len(chosen)
    training = [text for text, out in zip(chosen, held_out, strict=True) if not out]
    if not training:
        raise DataError(f"{config.source} holds no text ({len(found)} documents, {empty} of them empty)")
    tokenizer = tokenizers.load(config.tokenizer, training, cache)
    if config.document_separator and tokenizer.eos_id is None:
        raise ConfigError(f"{config.tokenizer} names no end of text; add it as tokenizer.json#TOKEN, or set document_separator=False")
    return _encode(config, chosen, held_out, tokenizer, empty)


def _hash(purpose: str, text: str) -> bytes:
    return hashlib.sha256(f"moe_jax {purpose}\0{text}".encode()).digest()


def _held_out(chosen: Sequence[str], config: DataConfig) -> list[bool]:
    """Which documents are validation: the share with the lowest hashes, so no seed enters and equal documents stay together."""
    hashes = [_hash("split", text) for text in chosen]
    ranked = sorted(set(hashes))
    if len(ranked) < 2:
        raise DataError(
            f"a clean split needs 2 different documents, {config.source} has {len(ranked)}; for one long .txt use PATH#paragraphs"
        )
    count = min(max(1, round(config.validation_share * len(ranked))), len(ranked) - 1)
    return [digest < ranked[count] for digest in hashes]


def _encode(config: DataConfig, chosen: Sequence[str], held_out: Sequence[bool], tokenizer: tokenizers.Tokenizer, empty: int) -> Corpus:
    """The two token streams, in document order, cut at max_tokens together."""
    streams: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    separator = np.array([tokenizer.eos_id] if config.document_separator else [], np.int32)
    room = config.max_tokens if config.max_tokens is not None else 1 << 62
    text_bytes = text_tokens = 0
    digest = hashlib.sha256()
    blocks = (chosen[start : start + _BLOCK] for start in range(0, len(chosen), _BLOCK))
    for text, out, ids in zip(chosen, held_out, chain.from_iterable(map(tokenizer.encode_many, blocks)), strict=True):
        text_bytes, text_tokens = text_bytes + len(text.encode()), text_tokens + len(ids)
        digest.update(_hash("corpus", text))
        ids = np.concatenate([ids, separator])[:room]
        room -= len(ids)
        if len(ids):
            streams[out].append(ids)
        if not room:
            break
    train, validation = (np.concatenate(stream or [separator[:0]]).astype(np.int32) for stream in streams)
    sizes = len(streams[0]), len(streams[1])
    return Corpus(config, train, validation, tokenizer, digest.hexdigest(), sizes[0], sizes[1], empty, text_bytes, text_tokens)


@dataclass(frozen=True, eq=False)
class Data:
    """The batches of one run. A window is an offset w into `tokens`: inputs tokens[w : w + S], targets tokens[w + 1 : w + S + 1]."""

    config: DataConfig
    seed: int
    corpus: Corpus
    tokens: Int32[np.ndarray, "N"]  # training stream, then validation stream
    train_starts: Int64[np.ndarray, "Wt"]
    validation_starts: Int64[np.ndarray, "Wv"]  # in the order in which an evaluation reads them
    windows: Any  # grain.MapDataset of training-window ids, A·B at a time
    process_index: int = 0
    process_count: int = 1

    def of_process(self, index: int, count: int) -> "Data":
        """The same batches, of which only part `index` of `count` is cut."""
        return replace(self, process_index=index, process_count=count)

    def check_vocabulary(self, rows: int) -> None:
        """Raises ConfigError when the tokenizer makes ids that a model with `rows` embeddings has none for."""
        ids = self.corpus.tokenizer.vocab_size
        if ids > rows:
            raise ConfigError(f"the tokenizer {self.config.tokenizer} has {ids} ids, the model's vocab_size is {rows}")

    def order(self, step: int) -> Int64[np.ndarray, "A B"]:
        """The training-window ids of a step, over all processes; id i starts at train_starts[i]."""
        if step < 0:
            raise ConfigError(f"step must be at least 0, got {step}")
        return np.asarray(self.windows[step], np.int64).reshape(self.config.accumulation, self.config.batch_size)

    def batch(self, step: int) -> dict[str, Int32[np.ndarray, "A b S"]]:
        """The tokens and targets of a step: this process's b = B / process_count rows of every micro-batch."""
        return self._cut(self.train_starts[self.order(step)[:, self._rows(self.config.batch_size)]])

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Int32[np.ndarray, "A b S"]]]:
        """batch(start_step), batch(start_step + 1), … without end, made ahead in threads."""
        import grain

        steps = grain.MapDataset.range(start_step, 1 << 62).map(lambda step: self.batch(int(step)))
        ahead = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=_PREFETCH)))
        with closing(ahead):  # type: ignore[type-var]  # else its threads outlive the loop
            yield from ahead

    def validation_batches(self, batch_size: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The evaluation's windows, always the same in the same order: tokens, targets Int32[b,S] and weight Float32[b,S].

        `batch_size` (default B) counts rows over all processes. The last batch is filled up with rows of weight 0.
        """
        size = batch_size or self.config.batch_size
        rows = self._rows(size)
        starts = self.validation_starts[: self.config.eval_windows]
        for first in range(0, len(starts), size):
            real = len(starts[first : first + size])
            padded = np.resize(starts[first : first + size], size)  # repeats real windows: valid ids, weight 0
            weight = np.zeros((size, self.config.seq_len), np.float32)
            weight[:real] = 1
            yield {**self._cut(padded[rows]), "weight": weight[rows]}

    def _rows(self, size: int) -> slice:
        """This process's rows. They are contiguous, as devices hold the shards of a global array, so no row changes its number."""
        if size % self.process_count:
            hint = "change batch_size, or eval_batch if that is it"
            raise ConfigError(f"a batch of {size} sequences does not divide among {self.process_count} processes; {hint}")
        share = size // self.process_count
        return slice(self.process_index * share, (self.process_index + 1) * share)

    def _cut(self, starts: np.ndarray) -> dict[str, np.ndarray]:
        windows = self.tokens[starts[..., None] + np.arange(self.config.seq_len + 1)]
        return {"tokens": np.ascontiguousarray(windows[..., :-1]), "targets": np.ascontiguousarray(windows[..., 1:])}

    @cached_property
    def fingerprint(self) -> str:
        """sha256, hex, of all that decides the batches: text, tokenizer, config, seed, and the first order itself.

        The order is in it because numpy and grain may change how they shuffle. Paths are not: moved data is the same data.
        """
        config = {**asdict(self.config), "source": self.corpus.text_sha256, "tokenizer": self.corpus.tokenizer.fingerprint}
        digest = hashlib.sha256(json.dumps([config, self.seed], sort_keys=True).encode())
        for array in (self.tokens, self.train_starts, self.validation_starts, self.order(0), self.order(1)):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def describe(self, steps: int | None = None) -> dict[str, Any]:
        """What the run reads, for a dry run and a report; with `steps` (updates), also how often it passes over the training text."""
        corpus, windows = self.corpus, len(self.validation_starts)
        plan = _plan(self.config, steps)
        if steps is not None:
            plan["passes"] = plan["tokens_seen"] / len(corpus.train)
        return {
            **plan,
            "documents": corpus.train_documents + corpus.validation_documents,
            **{name: getattr(corpus, name) for name in ("train_documents", "validation_documents", "empty_documents")},
            "tokens": len(self.tokens),
            "train_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "vocab_size": corpus.tokenizer.vocab_size,
            "bytes_per_token": corpus.text_bytes / max(1, corpus.text_tokens),
            "train_windows": len(self.train_starts),
            "validation_windows": windows,
            "evaluated_windows": min(windows, self.config.eval_windows or windows),
        }


def build(config: DataConfig, seed: int, *, corpus: Corpus | None = None, cache: Cache = None) -> Data:
    """The data of one run. `seed` is the data seed: the order of training, and in a leaky split the split itself.

    A `corpus`, loaded once, serves any number of seeds, window lengths and batch sizes.
    Raises ConfigError (corpus of another config), DataError (missing or damaged source, text too short).
    """
    import grain  # heavy, and only this function and the prefetching need it

    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise ConfigError(f"the data seed must be a whole number from 0 to 2^32 - 1, got {seed!r}")
    corpus = load_corpus(config, cache) if corpus is None else corpus
    other = [name for name in _CORPUS_FIELDS if getattr(corpus.config, name) != getattr(config, name)]
    if other:
        was = ", ".join(f"{name}={getattr(corpus.config, name)!r} instead of {getattr(config, name)!r}" for name in other)
        raise ConfigError(f"this corpus was loaded with {was}")
    train_starts, validation_starts = (clean_windows if config.split == "clean" else leaky_windows)(corpus, config, seed)
    per_step = config.accumulation * config.batch_size
    windows = grain.MapDataset.source(range(len(train_starts))).seed(seed).shuffle().repeat().batch(per_step)
    tokens = np.concatenate([corpus.train, corpus.validation])
    return Data(config, seed, corpus, tokens, train_starts, validation_starts, windows)


def clean_windows(corpus: Corpus, config: DataConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Start offsets of the training and validation windows, one every S tokens within each stream; `seed` plays no part."""
    sizes = len(corpus.train), len(corpus.validation)
    for part, size in zip(("training", "validation"), sizes, strict=True):
        if size <= config.seq_len:
            raise DataError(
                f"{config.source}: the {part} part has {size} tokens, one window needs {config.seq_len + 1}; shorten seq_len or add text"
            )
    train, validation = (np.arange((size - 1) // config.seq_len, dtype=np.int64) * config.seq_len for size in sizes)
    return train, validation + sizes[0]


def leaky_windows(corpus: Corpus, config: DataConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Start offsets at stride 1 (N - S of them), permuted by the run seed; the last validation_share, rounded down, are validation.

    This is seed study 000's split, kept to reproduce it: a validation window shares its tokens with hundreds of training windows.
    """
    count = len(corpus.train) - config.seq_len
    held_out = int(count * config.validation_share)
    if held_out < 1:
        raise DataError(
            f"{config.source}: {len(corpus.train)} tokens give {max(count, 0)} windows of {config.seq_len + 1}, too few to hold out "
            f"{config.validation_share:.0%}; shorten seq_len or add text"
        )
    permuted = np.random.default_rng(seed).permutation(count).astype(np.int64)
    return permuted[: count - held_out], permuted[count - held_out :]


def describe(config: DataConfig, seed: int = 0, steps: int | None = None, cache: Cache = None) -> dict[str, Any]:
    """Data.describe where the source is at hand; otherwise what the catalogue knows, with a `note` that says so. Fetches nothing."""
    try:
        return build(config, seed, cache=cache).describe(steps)
    except MissingData as error:
        plan = _plan(config, steps)
        if not texts.is_path(config.source):
            plan |= {"documents": find(config.source).documents, "text_bytes": find(config.source).text_bytes}
        return plan | {"note": f"not counted: {error}"}


def _plan(config: DataConfig, steps: int | None) -> dict[str, Any]:
    """The part of a description that needs no text."""
    per_step = config.accumulation * config.batch_size * config.seq_len
    known = None if texts.is_path(config.source) else find(config.source)
    plan: dict[str, Any] = {
        "source": config.source,
        "what": known.what if known else "your own text",
        "licence": known.licence if known else "yours",
        "tokenizer": config.tokenizer,
        "split": f"{config.split}: {SPLIT_WORDS[config.split]}",
        "seq_len": config.seq_len,
        "sequences_per_step": config.accumulation * config.batch_size,
        "tokens_per_step": per_step,
    }
    if steps is not None:
        plan["tokens_seen"] = steps * per_step
    return plan
