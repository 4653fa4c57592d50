"""The page of the logit_offset study that goes router by router, and that applies its rule: built from the ledger, without jax."""

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_jax.studies import Ledger, Run, document, summary
from moe_jax.studies.analysis import interval_text, number
from moe_jax.studies.design import Cell, cell_key
from moe_jax.studies.document import Block, Figure, Heading, Table, Text
from moe_jax.studies.figures import DPI, GREY, PALETTE, RULE, WIDTH
from moe_jax.studies.ledger import replace_file
from moe_jax.studies.report import NO_FIGURES
from moe_jax.studies.stats import paired

SCALE = 0.05  # of the noise that table and figure show
KINDS = ("relative", "centred_relative", "rms_relative")


def write_page(claim: Cell, clean: Cell, claimed: float, workdir: Path) -> Sequence[Path]:
    """routers.md, routers.html and their figure, beside the report; nothing while a cell that they show has fewer than two seeds."""
    by_cell = _by_cell(Ledger.read(workdir))
    cells = {kind: cell_key({"kind": kind, "scale": SCALE}) for kind in KINDS}
    if any(len(by_cell.get(cell, ())) < 2 for cell in (*cells.values(), cell_key(clean))):
        return ()
    arrays = {kind: _stacked(by_cell[cell]) for kind, cell in cells.items()}
    blocks: list[Block] = [Heading("What the rule says"), Text(decision(by_cell[cell_key(claim)], by_cell[cell_key(clean)], claimed))]
    blocks += [Text(_offset(arrays["relative"])), Heading("Router by router"), _table(arrays)]
    blocks += [_figure(arrays)] if importlib.util.find_spec("matplotlib") else [Text(NO_FIGURES, "note")]
    paths = (workdir / "routers.html", workdir / "routers.md")
    title = "What relative noise on the routers' logits is relative to"
    for block in blocks:
        if isinstance(block, Figure):
            replace_file(workdir / "figures" / f"{block.name}.png", block.png)
    replace_file(paths[1], document.to_markdown(title, blocks).encode())
    replace_file(paths[0], document.to_html(title, blocks).encode())
    return paths


def decision(noisy: Sequence[Run], clean: Sequence[Run], claimed: float) -> str:
    """'Refuted', 'Confirmed' or 'Unresolved': the claim, by the interval of experts changed, in %."""
    of = [{run.seed: run.metrics["changed"] for run in runs} for runs in (noisy, clean)]
    seeds = sorted(of[0].keys() & of[1].keys())
    found = paired([of[0][seed] for seed in seeds], [of[1][seed] for seed in seeds], seeds)
    low, high = found.interval
    word = "Refuted" if high < claimed else "Confirmed" if low > claimed else "Unresolved"
    return (
        f"{word}: 5 % relative noise changes half of a token's chosen experts. It changes {number(found.mean, 2)} % "
        f"{interval_text(found.interval, 2)} of them (95 % t interval over {found.n} blocks of text and draws); the claim is "
        f"{claimed:g} %."
    )


def _offset(arrays: dict[str, np.ndarray]) -> str:
    each, found = arrays["offset"].mean(0), summary(arrays["offset"].mean(1))
    low, high, most = float(each.min()), float(each.max()), int(each.argmax())
    return (
        f"The common offset of a token's logits is {number(found.mean, 3)} {interval_text(found.interval, 3)} of their standard "
        f"deviations on average over routers, {low:.3f} to {high:.3f} by router (most in router {most}): relative noise is then "
        f"{np.hypot(1, low):.2f} to {np.hypot(1, high):.2f} times as large against the spread as noise of that scale relative to the "
        "spread itself."
    )


def _by_cell(ledger: Ledger) -> dict[tuple, list[Run]]:
    by_cell: dict[tuple, list[Run]] = {}
    for run in ledger.finished().values():
        by_cell.setdefault(cell_key(run.cell), []).append(run)
    return by_cell


def _stacked(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """name -> [seeds, routers]."""
    return {name: np.array([run.arrays[name] for run in runs], np.float64) for name in runs[0].arrays}


def _table(arrays: dict[str, dict[str, np.ndarray]]) -> Table:
    clean, routers = arrays["relative"], arrays["relative"]["offset"].shape[1]
    header = ("router", "logit mean", "spread", "offset", *(f"changed by {kind}" for kind in KINDS), *(f"{kind}, moved" for kind in KINDS))
    rows = []
    for router in range(routers):
        changed = [summary(arrays[kind]["changed"][:, router]) for kind in KINDS]
        texts = [f"{number(found.mean, 2)} {interval_text(found.interval, 2)}" for found in changed]
        moved = [number(arrays[kind]["changed_moved"][:, router].mean(), 2) for kind in KINDS]
        rows.append((str(router), *(f"{clean[name][:, router].mean():.3f}" for name in ("mean", "std", "offset")), *texts, *moved))
    note = (
        "Logit mean and spread (standard deviation) are over the experts of a token, averaged over tokens; offset is abs(mean) / "
        f"spread. Changed: % of the chosen experts that noise of scale {SCALE} changes on clean inputs, with its 95 % t interval over "
        "seeds; moved: after five standard deviations were added to all logits of each token, which changes no route."
    )
    return Table(f"The routers, in the order of their layers, and noise of scale {SCALE}", header, tuple(rows), notes=(note,))


def _figure(arrays: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Left the offset by router; right the experts that each kind changes, as they are (filled) and moved (open)."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = canvas.subplots(1, 2)
    offset = arrays["relative"]["offset"]
    routers = np.arange(offset.shape[1])
    left.plot(routers, offset.mean(0), "o-", color=PALETTE[0])
    left.fill_between(routers, offset.min(0), offset.max(0), color=PALETTE[0], alpha=0.15, linewidth=0)
    left.set_title("offset of the clean logits, abs(mean) / std", fontsize=10)
    for kind, colour, marker in zip(KINDS, PALETTE, "os^", strict=False):
        right.plot(routers, arrays[kind]["changed"].mean(0), f"{marker}-", color=colour, label=kind)
        right.plot(
            routers, arrays[kind]["changed_moved"].mean(0), f"{marker}:", color=colour, markerfacecolor="white", label=f"{kind}, moved"
        )
    right.set_title(f"experts changed by noise of scale {SCALE} (%)", fontsize=10)
    for ax in (left, right):
        ax.set_xlabel("router", fontsize=9)
        ax.set_xticks(routers if len(routers) <= 12 else routers[:: len(routers) // 8])
        ax.set_ylim(bottom=0)
        ax.grid(axis="y", color=RULE, linewidth=0.8)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.tick_params(colors=GREY)
    canvas.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    caption = (
        "By router, mean over seeds. Left: the offset (band: range over seeds). Right: chosen experts that each kind of noise changes "
        "at equal scale, as the logits are (full lines) and moved by five standard deviations, which changes no route (dotted, open). "
        "Where a dotted line leaves its full one, the kind depends on something that routing ignores."
    )
    return Figure("routers", caption, buffer.getvalue())
