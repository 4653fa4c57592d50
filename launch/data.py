"""Lists the text and tokenizers that can be fetched by name, fetches them, and describes how a corpus would be cut into batches.

  python -m launch.data --list
  python -m launch.data --fetch=wiki,smollm2_tokenizer
  python -m launch.data --describe=wiki --tokenizer=bpe:4096 --seq_len=256
  python -m launch.data --describe=/my/texts.jsonl#body --tokenizer=/my/tokenizer.json

Files go to $MOE_JAX_CACHE, else ~/.cache/moe_jax; every download is compared with a pinned sha256. Exit codes: 0 done, 2 usage, 3 data.
"""

from absl import flags

from launch.common import run
from moe_jax.train import sources

_LIST = flags.DEFINE_bool("list", False, "Print every source: what it is, its licence, its size, and whether it is in the cache.")
_FETCH = flags.DEFINE_list("fetch", [], "Names to download (commas between); a sound copy in the cache is kept, a damaged one replaced.")
_DESCRIBE = flags.DEFINE_string(
    "describe", None, "A source, or a file of your own as PATH or PATH#FIELD: counts its documents, tokens and windows."
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "bpe:2048", "For --describe: bytes, bpe:SIZE, smollm2, or the path of a tokenizer.json.")
_SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "For --describe: tokens per window.")
_SPLIT = flags.DEFINE_enum("split", "clean", ["clean", "leaky"], "For --describe: held out by document, or the seed study's leaky windows.")


def table() -> str:
    """The catalogue as aligned columns, one source a line."""
    rows = [("name", "kind", "documents", "download", "cached", "licence", "what")]
    for source in sources.CATALOGUE.values():
        documents = f"{source.documents:,}" if source.documents else "-"
        download = f"{source.download_bytes / 1e6:.1f} MB" if source.download_bytes else "none"
        cached = "yes" if sources.is_cached(source) else "no"
        rows.append((source.name, source.kind, documents, download, cached, source.licence, source.what))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def describe() -> str:
    """How the source of --describe would be cut, one `name  value` line each."""
    from moe_jax.train import data  # imports jax by way of grain, which listing and fetching can do without

    config = data.DataConfig(source=_DESCRIBE.value, tokenizer=_TOKENIZER.value, seq_len=_SEQ_LEN.value, split=_SPLIT.value)  # type: ignore[arg-type]
    values = data.describe(config).items()
    return "\n".join(
        f"{name:20} {value if isinstance(value, str) else format(value, ',.6g' if isinstance(value, float) else ',')}"
        for name, value in values
    )


def main(argv: list[str]) -> None:
    """Does what the flags ask for, in the order fetch, list, describe."""
    wanted = [sources.find(name.strip()) for name in _FETCH.value]  # every name is checked before the first download
    for source in wanted:
        sources.fetch(source, progress=lambda line: print(line, flush=True))
    if _LIST.value or not (wanted or _DESCRIBE.value):
        print(f"{table()}\ncache: {sources.cache_root()}")
    if _DESCRIBE.value:
        print(describe())


if __name__ == "__main__":
    run(main)
