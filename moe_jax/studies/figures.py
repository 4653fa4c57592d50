"""The figures of a study, drawn by matplotlib into PNG bytes: cells, paired differences, expert load, learning curves.

Colours are those of Okabe and Ito (2008), distinguishable with every common form of colour blindness; no meaning rests on colour
alone. Importing this module does not import matplotlib; drawing does.
"""

from __future__ import annotations

import functools
import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.studies.analysis import Analysis, cell_text, heading_of, interval_text, number
from moe_jax.studies.design import Cell, Design, Metric, cell_key
from moe_jax.studies.document import Figure
from moe_jax.studies.findings import subject
from moe_jax.studies.stats import Contrast, Summary

BANDS = 8  # cells, up to which a figure of curves shows the range over seeds
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "v", "P", "X", "<", ">", "*", "h")
LINES = ("-", "--", ":", "-.")
GREY, RULE = "#6b7280", "#d5d9de"
DPI = 150
WIDTH = 9.0  # inches, every figure
SEED_MARK: dict[str, Any] = {"color": GREY, "markersize": 4.5, "markerfacecolor": "white", "linewidth": 0}
_wrap = functools.partial(textwrap.fill, width=44, break_long_words=False, break_on_hyphens=False)
BESIDE: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9}  # text at the height of a row


def cells_figure(analysis: Analysis, metric: Metric) -> Figure:
    """One metric: every seed of every cell, their mean and its t interval; thin lines join the cells of a seed."""
    figure, ((ax,),) = grid(1, 1, 0.45 * len(analysis.design.cells()), margin=1.1)
    _cells_panel(ax, analysis, metric, numbers=True)
    caption = (
        f"{metric.label} by cell. Diamond and bar: mean and {analysis.confidence} t interval over seeds. Small marks: single seeds, each joined "
        "across cells by a thin line. Where the lines run parallel, the cells differ by the same amount in every seed, and the "
        "paired differences resolve what these intervals, which contain the spread between seeds, do not."
    )
    return Figure(f"cells_{metric.name}", caption, png(figure))


def others_figure(analysis: Analysis) -> Figure | None:
    """The other metrics and the time, one panel each; None when there are none to show."""
    metrics = [m for m in (*analysis.design.metrics[1:], analysis.time) if analysis.values.get(m.name)]
    if not metrics:
        return None
    figure, axes = grid(len(metrics), min(2, len(metrics)), 1.1 + 0.3 * len(analysis.design.cells()), sharey=True)
    for ax, metric in zip(axes.flat, metrics, strict=False):
        _cells_panel(ax, analysis, metric, numbers=False)
    caption = "The other metrics by cell. Diamond and bar: mean and t interval over seeds; small marks: single seeds."
    return Figure("cells_others", caption, png(figure))


def differences_figure(analysis: Analysis, metric: Metric) -> Figure | None:
    """The tested comparisons of one metric: every seed's difference, the mean, its interval; None when none could be tested."""
    design = analysis.design
    tested = [(c, found) for c in design.comparisons if c.metric == metric.name and (found := analysis.contrasts[c.name])]
    if not tested:
        return None
    figure, ((ax,),) = grid(1, 1, 0.62 * len(tested), margin=1.0)
    ax.axvline(0, color=GREY, linewidth=1.2, zorder=1)
    for y, (_, found) in enumerate(tested):
        colour = PALETTE[0] if found.resolved else GREY
        ax.fill_betweenx([y - 0.34, y + 0.34], -found.smallest, found.smallest, color="#eceff3", linewidth=0, zorder=0)
        _estimate(ax, y, found, colour, filled=found.resolved)
        for seed, value in zip(found.seeds, found.differences, strict=True):
            ax.plot(value, y + 0.25, _marker(design, seed), zorder=3, **SEED_MARK)
        text = f"{number(found.mean, metric.decimals, True)} {interval_text(found.interval, metric.decimals)}"
        ax.annotate(text, (1.01, y), color=colour, **BESIDE)
    _rows_axis(ax, [_wrap(subject(design, c)) for c, _ in tested], metric, "difference in ")
    _seed_legend(figure, design)
    caption = (
        f"Paired differences in {metric.label}: mean (diamond) and {analysis.confidence} interval of each comparison, with the "
        "difference of every seed. Blue and filled: resolved after Holm's correction; grey and open: unresolved. Grey band: "
        "effects smaller than the smallest resolvable one, which this design would miss more than one time in five."
    )
    return Figure(f"differences_{metric.name}", caption, png(figure))


def load_figure(analysis: Analysis) -> Figure | None:
    """Expert load by layer, one panel per cell, averaged over seeds by rank; None when no run recorded `load`."""
    design = analysis.design
    panels = [(cell, load) for cell in design.cells() if (load := mean_load(analysis, cell)) is not None]
    if not panels:
        return None
    from matplotlib import colors

    last = len(design.factors[-1].levels)
    columns = last if design.only is None and 1 < last <= 3 and len(panels) > 1 else min(2, len(panels))
    layers = max(load.shape[0] for _, load in panels)
    alike = len({load.shape for _, load in panels}) == 1
    figure, axes = grid(len(panels), columns, min(3.2, 0.75 + 0.2 * layers), 0.8, sharex=alike, sharey=alike)
    top = max(1.5, *(float(load.max()) for _, load in panels))
    scale, image = colors.TwoSlopeNorm(1.0, 0.0, top), None
    for ax, (cell, load) in zip(axes.flat, panels, strict=False):
        image = ax.imshow(load, cmap="PuOr_r", norm=scale, aspect="auto", interpolation="nearest")
        ax.set_title(_wrap(cell_text(design, cell), width=84 // columns), fontsize=10)
        ax.set_yticks(_ticks(load.shape[0]))
        ax.set_xticks(_ticks(load.shape[1]), [str(i + 1) for i in _ticks(load.shape[1])])
        for (layer, expert), share in np.ndenumerate(load if load.size <= 96 else np.empty(0)):
            strong = share < 0.4 or share > 1 + 0.6 * (top - 1)
            ax.text(expert, layer, f"{share:.2f}", ha="center", va="center", fontsize=7, color="white" if strong else "#222222")
    figure.supxlabel("experts of a layer, busiest first", fontsize=10)
    figure.supylabel("layer", fontsize=10)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("load / equal share")
    caption = (
        "Expert load by layer: tokens an expert receives, relative to an equal share (1). An expert's number means nothing across seeds, "
        "so experts are sorted by load within each layer and seed, then averaged over seeds."
    )
    return Figure("load", caption, png(figure))


def curves_figure(analysis: Analysis) -> Figure | None:
    """Every series by step, the mean and the range over seeds of each cell; None when no run recorded one."""
    names = sorted({name for run in analysis.finished.values() for name in run.series if len(run.series[name]) > 1})
    if not names:
        return None
    legend_lines = math.ceil(len(analysis.design.cells()) / 2)
    figure, axes = grid(2 * len(names), 2, 3.3, margin=0.2 * legend_lines)
    for (whole, end), name in zip(axes, names, strict=True):
        _curves_panel(whole, analysis, name, 0.0)
        _curves_panel(end, analysis, name, 0.5)
        whole.set_ylabel(name.replace("_", " "))
        end.set_title("second half", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    band = " and the range from the lowest to the highest seed (band)" if len(analysis.design.cells()) <= BANDS else ""
    caption = f"Learning curves. Mean over seeds (line){band}; on the right the second half of the same steps, on its own scale."
    return Figure("curves", caption, png(figure))


# ---------------------------------------------------------------- what is drawn, as numbers


def mean_load(analysis: Analysis, cell: Cell) -> np.ndarray | None:
    """[layer, rank] load relative to an equal share, sorted within each layer and seed, then averaged over seeds."""
    loads = [np.asarray(run.arrays["load"], np.float64) for run in analysis.runs_of(cell) if "load" in run.arrays]
    if not loads:
        return None
    shares = [load / np.maximum(load.mean(1, keepdims=True), np.finfo(np.float64).tiny) for load in loads]
    return np.mean([-np.sort(-share, axis=1) for share in shares], axis=0)


def common_curve(series: Sequence[Any]) -> tuple[list[float], np.ndarray] | None:
    """Steps that every seed has, and [seed, step] values; None when there are none. A mean over changing seeds would jump."""
    curves = [dict(map(tuple, points)) for points in series]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return (steps, np.array([[curve[step] for step in steps] for curve in curves])) if steps else None


def cell_styles(design: Design) -> list[tuple[str, str]]:
    """(colour, line style) of each cell: the first factor chooses the colour, the rest the line, so that a pair is seen as one; where there are more of those
    than lines, every colour with one line, then with the next: as many cells as colours times lines can be told apart."""
    first, cells = design.factors[0], design.cells()
    others = [cell_key({name: level for name, level in cell.items() if name != first.name}) for cell in cells]
    distinct = list(dict.fromkeys(others))
    pairs = [(first.levels.index(cell[first.name]), distinct.index(other)) for cell, other in zip(cells, others, strict=True)]
    if len(distinct) > len(LINES):
        pairs = [(index, index // len(PALETTE)) for index in range(len(cells))]
    return [(PALETTE[colour % len(PALETTE)], LINES[line % len(LINES)]) for colour, line in pairs]


# ---------------------------------------------------------------- drawing


def _cells_panel(ax: Any, analysis: Analysis, metric: Metric, numbers: bool) -> None:
    design = analysis.design
    cells, styles = design.cells(), cell_styles(design)
    values = analysis.values.get(metric.name, {})
    for seed in design.seeds:
        points = [(values[cell_key(c)][seed], y + 0.24) for y, c in enumerate(cells) if seed in values.get(cell_key(c), {})]
        if points and numbers:
            ax.plot(*zip(*points, strict=True), "-", color=RULE, linewidth=0.9, zorder=1)
        if points:
            ax.plot(*zip(*points, strict=True), _marker(design, seed), zorder=2, **SEED_MARK)
    for y, (cell, (colour, _)) in enumerate(zip(cells, styles, strict=True)):
        found = analysis.summary(metric, cell)
        if found is None:
            ax.annotate("no finished run", (0.5, y), ha="center", color=GREY, **BESIDE)
            continue
        _estimate(ax, y, found, colour)
        if numbers:
            text = number(found.mean, metric.decimals) + (f" ± {number(found.sd, metric.decimals)}" if found.n > 1 else "")
            ax.annotate(text, (1.01, y), **BESIDE)
    _rows_axis(ax, [cell_text(design, cell) for cell in cells], metric)
    if numbers:
        _seed_legend(ax.figure, design)


def _estimate(ax: Any, y: float, found: Summary | Contrast, colour: str, filled: bool = True) -> None:
    """The mean as a diamond and its interval, where there is one, as a bar."""
    if found.n > 1:
        ax.plot(found.interval, [y, y], color=colour, linewidth=2.4, solid_capstyle="butt", zorder=3)
    ax.plot(found.mean, y, "D", color=colour, markersize=7, markerfacecolor=colour if filled else "white", zorder=4)


def _curves_panel(ax: Any, analysis: Analysis, name: str, start: float) -> None:
    """The curves of every cell from the given share of the steps on."""
    design = analysis.design
    for cell, (colour, line) in zip(design.cells(), cell_styles(design), strict=True):
        curve = common_curve([run.series[name] for run in analysis.runs_of(cell) if name in run.series])
        if curve is not None:
            at = int(start * (len(curve[0]) - 1))
            steps, values = curve[0][at:], curve[1][:, at:]
            if len(design.cells()) <= BANDS:
                ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            ax.plot(steps, values.mean(0), line, color=colour, linewidth=1.6, label=cell_text(design, cell))
    ax.set_xlabel("step")
    ax.grid(color=RULE, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _rows_axis(ax: Any, labels: Sequence[str], metric: Metric, of: str = "") -> None:
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel(of + heading_of(metric) + (f": {metric.better} is better" if metric.better else ""))


def _marker(design: Design, seed: int) -> str:
    return MARKERS[design.seeds.index(seed) % len(MARKERS)]


def _seed_legend(figure: Any, design: Design) -> None:
    from matplotlib.lines import Line2D

    style = {**SEED_MARK, "markersize": None}
    handles = [Line2D([], [], marker=_marker(design, seed), label=f"seed {seed}", **style) for seed in design.seeds]
    figure.legend(handles=handles, loc="outside upper right", ncols=min(6, len(handles)), frameon=False, fontsize=9)


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, math.ceil(count / 8))))


def grid(count: int, columns: int, row_height: float, margin: float = 0.0, **share: Any) -> tuple[Any, np.ndarray]:
    """A figure and its [line, column] axes for `count` panels; those beyond are left empty. `margin` is for the figure's own labels."""
    from matplotlib.figure import Figure as Canvas

    lines = math.ceil(count / columns)
    figure = Canvas(figsize=(WIDTH, max(2.2, margin + lines * row_height)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, **share)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, axes


def tidy(ax: Any, axis: str) -> None:
    """Faint lines behind what is drawn, across `axis`, and no frame above and on the right."""
    ax.grid(axis=axis, color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def png(figure: Any) -> bytes:
    """The figure as PNG without the version of the program that drew it, so that the same ledger gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
