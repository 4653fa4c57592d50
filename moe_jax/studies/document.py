"""A short document as data (headings, text, tables, figures), written as Markdown, as one HTML page and as plain text."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

from moe_jax.files import write_atomic

FIGURES = "figures"  # the folder of a document's figures


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    text: str
    kind: str = ""  # "" | "note" | "warning": the last two stand in a box


@dataclasses.dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1  # how many leading columns hold words, written flush left; numbers are written flush right
    last_words: int = 0  # how many columns at the end hold words
    notes: tuple[str, ...] = ()

    def is_words(self, column: int) -> bool:
        return column < self.words or column >= len(self.header) - self.last_words


@dataclasses.dataclass(frozen=True)
class Figure:
    name: str  # file name without suffix
    caption: str
    png: bytes


Block = Heading | Text | Bullets | Table | Figure


def write(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> tuple[Path, ...]:
    """name.html, name.md and the figures beside them, which it returns in this order. The page is written last: where it is, all is."""
    figures = {folder / FIGURES / f"{block.name}.png": block.png for block in blocks if isinstance(block, Figure)}
    paths = folder / f"{name}.html", folder / f"{name}.md"
    for path, data in {**figures, paths[1]: to_markdown(title, blocks), paths[0]: to_html(title, blocks)}.items():
        write_atomic(path, data)
    return *paths, *figures


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The document as Markdown; figures are links into the folder `figures` beside it."""
    return "\n\n".join([f"# {title}", *map(_markdown, blocks)]) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The document as one page that needs no other file: figures are inside it, and it follows the reader's light or dark setting."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def to_text(table: Table) -> str:
    """A table for a terminal: columns padded to their widest entry, two spaces apart."""
    widths = [max(len(row[i]) for row in (table.header, *table.rows)) for i in range(len(table.header))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(w) if table.is_words(i) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join([table.caption, line(table.header), "  ".join("-" * w for w in widths), *map(line, table.rows), *table.notes])


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text, kind):
            return f"> **{kind.capitalize()}:** {text}" if kind else text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Figure(name, caption, _):
            return f"![{_alt(caption)}]({FIGURES}/{name}.png)\n\n*{caption}*"
        case Table():
            rule = ["---" if block.is_words(i) else "---:" for i in range(len(block.header))]
            lines = ["| " + " | ".join(_cell(c) for c in row) + " |" for row in (block.header, rule, *block.rows)]
            return "\n".join([f"**{block.caption}**", "", *lines, *(line for note in block.notes for line in ("", note))])


def _alt(caption: str) -> str:
    """What stands for a figure that cannot be seen: the caption's first clause, without what Markdown would read as a link."""
    return caption.split(". ")[0].split(": ")[0].replace("[", "(").replace("]", ")")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text, kind):
            label = f"<strong>{kind.capitalize()}:</strong> " if kind else ""
            return f'<p class="{kind or "text"}">{label}{html.escape(text)}</p>'
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{html.escape(item)}</li>" for item in items) + "\n</ul>"
        case Figure(_, caption, png):
            image = f'<img alt="{html.escape(_alt(caption))}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            return f"<figure>{image}\n<figcaption>{html.escape(caption)}</figcaption></figure>"
        case Table():
            classes = ["words" if block.is_words(i) else "number" for i in range(len(block.header))]
            head = _row("th", classes, block.header)
            body = "\n".join(_row("td", classes, row) for row in block.rows)
            below = "".join(f'<p class="below">{html.escape(note)}</p>' for note in block.notes)
            return (
                f'<div class="table"><table>\n<caption>{html.escape(block.caption)}</caption>\n<thead>{head}</thead>\n'
                f"<tbody>\n{body}\n</tbody></table></div>{below}"
            )


def _row(tag: str, classes: Sequence[str], cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} class="{c}">{html.escape(x)}</{tag}>' for c, x in zip(classes, cells, strict=True)) + "</tr>"


_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #5f6670; --line: #d5d9de;
  --box: #f2f4f7; --warn: #fff1e0; --edge: #d55e00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16181b; --faint: #a2a9b3; --line: #3a3f46; --box: #22262b; --warn: #3a2a17; --edge: #e69f00; }
}
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--paper); max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .5rem; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.note, .warning { padding: .6rem .9rem; border-left: 4px solid var(--line); background: var(--box); }
.warning { background: var(--warn); border-color: var(--edge); }
.table { overflow-x: auto; margin: 1.2rem 0 .4rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
.words { text-align: left; } .number { text-align: right; } td.number { white-space: nowrap; }
.below, figcaption { color: var(--faint); font-size: .85rem; margin: .3rem 0; max-width: 54rem; }
figure { margin: 1.4rem 0; }
figure img { width: 100%; height: auto; background: #fff; border-radius: 6px; }
li { margin: .35rem 0; }
@media print {
  body { max-width: none; margin: 0; font-size: 11pt; } .table { overflow: visible; } table { font-size: 8pt; }
  figure, tr, li { break-inside: avoid; } h2 { break-after: avoid; }
}
"""
