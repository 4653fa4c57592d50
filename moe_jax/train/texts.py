"""The documents of a source as a list of strings: a catalogue name, a file or folder of your own, or made-up sentences."""

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_jax.errors import ConfigError, DataError
from moe_jax.train.sources import CATALOGUE, SUFFIXES, Cache, Source, find, locate


def is_path(spec: str) -> bool:
    """Whether a spec names a file or folder of your own rather than a catalogue entry."""
    return spec not in CATALOGUE and (any(mark in spec for mark in "/\\#") or spec.endswith(SUFFIXES))


def documents(spec: str | Source, cache: Cache = None, limit: int | None = None) -> list[str]:
    """The texts of a source in file order, as far as `limit` of them that are more than blanks.

    spec is a catalogue name of kind text, or PATH or PATH#FIELD, where PATH is one of
      x.parquet, x.jsonl    one document per row, from column or field FIELD (default `text`)
      x.json                a list or dict of strings, or of records with FIELD
      x.txt                 one document; with #paragraphs one per block between blank lines
      folder/               all such files in it, by name
    Raises ConfigError (unknown name), DataError (not fetched, damaged, no such field).
    """
    if isinstance(spec, str) and is_path(spec):
        texts = _own(spec)
    else:
        source = find(spec) if isinstance(spec, str) else spec
        if source.kind != "text":
            raise ConfigError(f"{source.name} holds {source.kind}, not text")
        if source.registry == "none":
            texts = synthetic_texts(source.documents or 0)
        else:
            texts = (text for path in locate(source, cache) for text in _read(path, source.field))
    found, full = [], 0
    for text in texts:
        found.append(text)
        full += bool(text.strip())
        if full == limit:
            break
    return found


def _own(spec: str) -> Iterator[str]:
    name, mark, field = spec.rpartition("#")
    if not mark or Path(spec).expanduser().exists():
        name, field = spec, ""
    path = Path(name).expanduser()
    files = sorted(file for file in path.glob("[!.]*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"no text at {path}: expected a file that ends in {', '.join(SUFFIXES)}, or a folder of them")
    for file in files:
        yield from _read(file, field)


def _read(path: Path, field: str) -> Iterator[str]:
    """The documents of one file; how is told by its suffix."""
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt}
    if path.suffix not in readers:
        raise DataError(f"cannot read {path}: its name must end in {', '.join(SUFFIXES)}")
    with _readable(path):
        yield from readers[path.suffix](path, field)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the system says of a file as a DataError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _read_txt(path: Path, field: str) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if field not in ("", "text", "paragraphs"):
        raise DataError(f"{path} has no fields; only #paragraphs may follow a .txt file, got #{field}")
    yield from text.split("\n\n") if field == "paragraphs" else (text,)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for record, where in records(path):
        yield _text(record, field, where)


def records(path: Path) -> Iterator[tuple[Any, str]]:
    """The records of a .jsonl file, each with the words for where it stands. Raises DataError (unreadable, not UTF-8, a line that is not JSON)."""
    with _readable(path), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _parsed(line, where), where


def _read_json(path: Path, field: str) -> Iterator[str]:
    records = _parsed(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(records, list | dict):
        raise DataError(f"{path} holds {type(records).__name__}; expected a list or a dict of texts or records")
    for key, record in records.items() if isinstance(records, dict) else enumerate(records):
        yield _text(record, field, f"{path}, entry {key!r}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # too deep for the parser is as unreadable as broken
        raise DataError(f"{where} is not JSON ({str(error)[:100]}); is the file complete? Fetch it again") from None


def _text(record: Any, field: str, where: str) -> str:
    """The text of one JSON record: the record itself when it is a string, else its field."""
    value = record.get(field or "text") if isinstance(record, dict) else record
    if not isinstance(value, str):
        has = f"it has: {', '.join(record)}" if isinstance(record, dict) else f"it is {type(record).__name__}"
        raise DataError(f"{where}: no text in field {field or 'text'!r} ({has}); name the field as PATH#FIELD")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise DataError(f"{where}: character {error.start} is not text (half of a surrogate pair); repair the record") from None
    return value


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow (or moe-jax[hf])") from None
    field = field or "text"
    try:
        with parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                raise DataError(f"{path}: no column {field!r}; it has: {', '.join(table.schema_arrow.names)}; name it as PATH#COLUMN")
            for batch in table.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _text("" if value is None else {field: value}, field, str(path))
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def synthetic_texts(count: int, seed: int = 0) -> Iterator[str]:
    """`count` documents of 3 to 8 sentences over 256 made-up words, each with four likely successors: something to learn."""
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words: list[str] = []
    while len(words) < 256:
        word = "".join(syllables[int(rng.random() * len(syllables))] for _ in range(1 + int(rng.random() * 3)))
        if word not in words:
            words.append(word)
    successors = [[int(rng.random() * 256) for _ in range(4)] for _ in words]
    for _ in range(count):
        sentences = []
        for _ in range(3 + int(rng.random() * 6)):
            state, sentence = int(rng.random() * 256), []
            for _ in range(5 + int(rng.random() * 10)):
                sentence.append(words[state])
                state = successors[state][min(3, int(-1.5 * math.log(1 - rng.random())))]
            sentences.append(" ".join(sentence).capitalize() + ".")
        yield " ".join(sentences)
