"""The page of the logit_offset study that goes router by router, and that applies its rule: built from the ledger, without jax."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_jax.studies import Ledger, Run, document, summary
from moe_jax.studies.analysis import analyse, interval_text, number
from moe_jax.studies.document import Block, Figure, Heading, Table, Text
from moe_jax.studies.figures import PALETTE, grid, png, tidy
from moe_jax.studies.report import NO_FIGURES
from moe_jax.studies.stats import Contrast

SCALE = 0.05  # of the noise that table and figure show
KINDS = ("relative", "centred_relative", "rms_relative")


def write_page(contrast: str, claimed: float, workdir: Path) -> Sequence[Path]:
    """routers.md, routers.html and their figure, beside the report; nothing while a cell that they show has fewer than two seeds."""
    ledger = Ledger.read(workdir)
    analysis = analyse(ledger.design, ledger.runs())
    of_kind = {kind: analysis.runs_of({"kind": kind, "scale": SCALE}) for kind in KINDS}
    found = analysis.contrasts.get(contrast)
    if found is None or any(len(runs) < 2 for runs in of_kind.values()):
        return ()
    arrays = {kind: _stacked(runs) for kind, runs in of_kind.items()}
    blocks: list[Block] = [Heading("What the rule says"), Text(decision(found, claimed))]
    blocks += [Text(_offset(arrays["relative"])), Heading("Router by router"), _table(arrays)]
    blocks += [_figure(arrays)] if importlib.util.find_spec("matplotlib") else [Text(NO_FIGURES, "note")]
    return document.write(workdir, "routers", "What relative noise on the routers' logits is relative to", blocks)[:2]


def decision(found: Contrast, claimed: float) -> str:
    """'Refuted', 'Confirmed' or 'Unresolved': the claim, by the interval of experts changed, in %."""
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
    canvas, ((left, right),) = grid(2, 2, 3.6)
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
        tidy(ax, "y")
    canvas.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    caption = (
        "By router, mean over seeds. Left: the offset (band: range over seeds). Right: chosen experts that each kind of noise changes "
        "at equal scale, as the logits are (full lines) and moved by five standard deviations, which changes no route (dotted, open). "
        "Where a dotted line leaves its full one, the kind depends on something that routing ignores."
    )
    return Figure("routers", caption, png(canvas))
