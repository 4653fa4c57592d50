"""The figures of a sensitivity report: damage by arm, routes by layer, flips by margin, and relative noise on the clean logits."""

from collections.abc import Sequence

import numpy as np

from launch.sensitivity_logits import SCALES
from moe_jax.routing_stats import MARGIN_EDGES
from moe_jax.sensitivity import Sensitivity
from moe_jax.studies.document import Figure
from moe_jax.studies.figures import GREY, PALETTE, grid, png, tidy

STYLES = {"all": (PALETTE[0], "o-"), "router": (PALETTE[1], "s--"), "own": (PALETTE[2], "^:")}


def damage_figure(found: Sensitivity, arms: Sequence[tuple[str, str, tuple[str, ...]]]) -> Figure:
    """Loss and KL of the named arms as bars with intervals over seeds and every seed's value."""
    figure, (axes,) = grid(2, 2, 0.42 * len(arms) + 1.3, sharey=True)
    for ax, metric, label in zip(
        axes, ("loss", "kl"), ("loss minus the clean pass's (nats per token)", "KL to the clean pass (nats per token)"), strict=True
    ):
        for y, (_, routes, noisy) in enumerate(arms):
            damage = found.damage(metric, routes, noisy)
            colour = {"live": PALETTE[0], "ids": PALETTE[1], "ids+weights": PALETTE[4]}.get(routes, PALETTE[2])
            ax.barh(y, damage.mean, height=0.62, color=colour, alpha=0.55, zorder=2)
            ax.plot(damage.interval, [y, y], color="black", linewidth=1.8, solid_capstyle="butt", zorder=4)
            ax.plot(damage.differences, [y] * damage.n, "|", color=GREY, markersize=9, zorder=3)
        ax.axvline(0, color=GREY, linewidth=1.0)
        ax.set_yticks(range(len(arms)), [name for name, *_ in arms], fontsize=9)
        ax.set_ylim(len(arms) - 0.4, -0.6)
        ax.set_title(label, fontsize=10)
        ax.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
        tidy(ax, "x")
    caption = (
        f"Damage by arm. Bar: mean over {len(found.seeds)} noise seeds; black line: 95 % t interval; grey ticks: single seeds. Blue: the routers choose; "
        "orange and yellow: the recorded experts, or these with their weights, are replayed; green: no noise, but the experts of the noisy pass."
    )
    return Figure("damage", caption, png(figure))


def layers_figure(found: Sensitivity, words: dict[str, str], predicted: np.ndarray | None) -> Figure:
    """By layer: set overlap with the clean pass, tokens whose set changed beside the exact prediction, and weight mass that moved."""
    figure, (axes,) = grid(3, 3, 3.4)
    panels = (("router/set_overlap", "experts shared with the clean pass"), ("router/tokens_changed", "tokens with another set"))
    for ax, (name, label) in zip(axes, (*panels, ("router/moved_mass", "router weight that moved")), strict=True):
        for of, (colour, style) in STYLES.items():
            values = found.routers.get(of, {}).get(name)
            if values is not None:
                ax.plot(found.layers, values.mean(0), style, color=colour, markersize=5, linewidth=1.5, label=words[of])
                ax.fill_between(found.layers, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        if name == "router/tokens_changed" and predicted is not None:
            ax.plot(found.layers, predicted, "kx", markersize=7, label="exact prediction for the router's own noise")
        ax.set_title(label, fontsize=10)
        ax.set_xlabel("layer", fontsize=9)
        ax.set_xticks(found.layers if len(found.layers) <= 12 else found.layers[:: len(found.layers) // 8])
        tidy(ax, "y")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    caption = "Routes by layer, against the clean pass of the same tokens. Line: mean over noise seeds; band: from the lowest to the highest seed."
    return Figure("layers", caption, png(figure))


def margins_figure(found: Sensitivity, words: dict[str, str]) -> Figure:
    """Observed flips by margin over the spread of its noise, beside what the normal distribution predicts."""
    figure, ((ax,),) = grid(1, 1, 3.6)
    for of, (colour, style) in STYLES.items():
        if of in found.routers:
            tokens, flips, predicted = (found.routers[of][f"margin/{name}"].sum((0, 1)) for name in ("tokens", "flips", "predicted"))
            seen = tokens > 0
            ax.plot(np.arange(tokens.size)[seen], (flips / np.maximum(tokens, 1))[seen], style, color=colour, markersize=5, label=words[of])
            ax.plot(np.arange(tokens.size)[seen], (predicted / np.maximum(tokens, 1))[seen], "x", color=colour, markersize=7)
    ax.plot([], [], "x", color=GREY, label="predicted from the margin alone, in the same colour")
    ax.set_xticks(range(len(MARGIN_EDGES) - 1), margin_labels())
    ax.set_xlabel("margin / sigma of the margin's change", fontsize=9)
    ax.set_ylabel("share of tokens whose set changed", fontsize=9)
    ax.legend(fontsize=9, frameon=False)
    tidy(ax, "y")
    caption = (
        "Which tokens flip. The margin is how far the last chosen expert leads the first that is not, in the clean pass; sigma is the rms change of this lead "
        "in a layer. The prediction looks at these two experts only and takes sigma to be the same for all tokens: it is low where others crowd "
        "around the two, and high near 0 where the noise of a token grows with its own logits."
    )
    return Figure("margins", caption, png(figure))


def appendix_figure(redone: np.ndarray, example: np.ndarray, shifts: Sequence[str], kept: float) -> Figure:
    """Set overlap against the scale of relative noise: on this model's logits and on the printed example, as they are and moved."""
    figure, (axes,) = grid(2, 2, 3.6, sharey=True)
    for ax, values, title in zip(
        axes, (redone.mean(2), example), ("this model's clean logits", "the printed example, continued to 128"), strict=True
    ):
        for index, shift in enumerate(shifts):
            ax.plot(100 * np.array(SCALES), values[index, :, 0], "os^D"[index] + "-", color=PALETTE[index], markersize=5, label=shift)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("relative noise on the logits (%)", fontsize=9)
        ax.set_ylim(0, 1.05)
        ax.set_xticks([100 * scale for scale in SCALES])
        tidy(ax, "y")
    axes[1].plot(5, 0.5, "*", color="black", markersize=11, label="claimed for the example: half")
    axes[1].plot(5, kept, "X", color="black", markersize=8, label="what its printed numbers say")
    axes[0].set_ylabel("share of chosen experts kept", fontsize=9)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    caption = (
        "Relative noise on router logits. All four lines of a panel are the same routing function: a number added to all logits of a token changes neither "
        "its experts nor, with softmax, their weights, but it changes the size of relative noise."
    )
    return Figure("appendix", caption, png(figure))


def margin_labels() -> list[str]:
    """The bins of `routing_stats.explained_by_margin`."""
    return [
        f"{low:g}-{high:g}" if np.isfinite(high) else f"over {low:g}" for low, high in zip(MARGIN_EDGES[:-1], MARGIN_EDGES[1:], strict=True)
    ]
