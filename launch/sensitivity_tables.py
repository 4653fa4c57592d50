"""What a sensitivity report is made of: the named arms, their tests, its tables and the text of its appendix."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from launch.common import listed
from launch.sensitivity_figures import margin_labels
from launch.sensitivity_logits import EXAMPLE_CHOSEN, EXAMPLE_EXPERTS, SCALES, SHIFTS, example
from moe_jax import routing_stats
from moe_jax.sensitivity import CLEAN, OPPOSITE, Ratio, Sensitivity
from moe_jax.studies.analysis import interval_text, number, p_text
from moe_jax.studies.document import Block, Table, Text
from moe_jax.studies.stats import Contrast, holm

WORDS = {"all": "all noise", "router": "noise in the router alone", "own": "each router's own noise, clean inputs"}
MOVED = ("as they are", "2 less", "8 more", "each token's mean taken away")  # SHIFTS in words
SHOWN_EXPERTS = 3


@dataclasses.dataclass(frozen=True)
class About:
    """What was measured, in words."""

    model: str
    text: str
    noise: str  # as it was given
    table: str  # sites by phases
    kinds: tuple[str, ...]
    phase: str
    experts: int
    top_k: int
    recorded: str = "clean"  # whose experts are replayed: "clean", or "recorded" when they were read from a folder
    source: str = "a clean pass of the same model on the same tokens"
    settings: tuple[tuple[str, str], ...] = ()


Arm = tuple[str, str, tuple[str, ...]]  # name in words, routes, noisy factors


def named_arms(found: Sensitivity, recorded: str = "clean") -> list[Arm]:
    """The arms that the report speaks of."""
    everything = tuple(found.factors)
    replays = {"ids": f"all noise, {recorded} experts replayed", "ids+weights": f"all noise, {recorded} experts and weights"}
    arms: list[Arm] = [("all noise", "live", everything)]
    arms += [(name, routes, everything) for routes, name in replays.items() if (routes, everything) in found.arms]
    arms += [("no noise, experts of the noisy pass", OPPOSITE, ())]
    if len(everything) > 1:
        alone: list[Arm] = [(f"noise in the {name} alone", "live", (name,)) for name in everything]
        same: Arm = (f"noise in the router alone, {recorded} experts", "ids", ("router",))
        arms += [alone[0], same, *alone[1:]] if everything[0] == "router" else alone
    if len(everything) > 2:
        arms += [(f"all noise but in the {name}", "live", tuple(x for x in everything if x != name)) for name in everything]
    return arms


def damages(found: Sensitivity) -> dict[tuple[str, ...], Contrast]:
    """The loss damage of all noise and of each factor's noise alone, by noisy factors, with p corrected by Holm for this family."""
    tested = {
        noisy: found.damage("loss", "live", noisy) for noisy in dict.fromkeys([tuple(found.factors), *((name,) for name in found.factors)])
    }
    corrected = holm([contrast.p for contrast in tested.values()])
    return {noisy: dataclasses.replace(contrast, holm_p=p) for (noisy, contrast), p in zip(tested.items(), corrected, strict=True)}


def arms_table(found: Sensitivity, arms: Sequence[Arm]) -> Table:
    """Each named arm with its damage and intervals over seeds and text; those of the tested family with their verdict."""
    rows, tested = [], damages(found)
    for name, routes, noisy in arms:
        loss, text = found.damage("loss", routes, noisy), found.damage("loss", routes, noisy, "batches") if len(found.tokens) > 1 else None
        test = tested.get(noisy) if routes == "live" else None
        test = None if test is not None and drawless(test) else test
        verdict = "-" if test is None else ("higher" if test.mean > 0 else "lower") if test.resolved else "unresolved"
        over_text = "-" if text is None else interval_text(text.interval, 5, True)
        kl = with_interval(found.damage("kl", routes, noisy), 5)
        rows.append((name, with_interval(loss, 5, True), over_text, kl, "-" if test is None else p_text(test.holm_p), verdict))
    header = ("arm", "loss - clean [over seeds]", "[over text]", "KL to clean [over seeds]", "p (Holm)", "loss is")
    notes = (
        "In brackets: 95 % t intervals. p and verdict: of all noise and of each factor alone, where they draw, corrected for this family. "
        "The other arms enter the shares. "
        "Perplexity and the share of tokens with the same likeliest word: in the table of every arm.",
    )
    return Table(f"Damage by arm, nats per token, {len(found.seeds)} noise seeds", header, tuple(rows), last_words=1, notes=notes)


def drawless(found: Contrast) -> bool:
    """Whether every seed gave the same number: noise that draws nothing, of which seeds are copies and no sample."""
    return found.sd <= 1e-12 * abs(found.mean)


def shares_table(found: Sensitivity, about: About) -> Table:
    """The shares that flips explain, with intervals over seeds and over text."""
    rows, everything = [], tuple(found.factors)
    inside = tuple(name for name in everything if name != "rest")
    words = {
        "ids": f"taken away by the {about.recorded} experts",
        "ids+weights": f"by the {about.recorded} experts and weights",
        OPPOSITE: "done by the noisy pass's experts alone",
    }
    for noisy in dict.fromkeys((everything, inside) if inside else (everything,)):
        for routes, what in words.items():
            if (routes, noisy) in found.arms or routes == OPPOSITE:
                cells = [ratio_text(found.share(routes, metric, noisy, over)) for metric in ("loss", "kl") for over in ("seeds", "batches")]
                rows.append((f"noise in {listed(noisy)}: {what}", *cells))
    header = ("share of the damage", "loss [95 % over seeds]", "loss [95 % over text]", "KL [95 % over seeds]", "KL [95 % over text]")
    return Table(
        "The share of the damage that flips explain",
        header,
        tuple(rows),
        notes=("undefined: the damage itself is not above 0 with 95 % confidence.",),
    )


def ratio_text(share: Ratio) -> str:
    return "undefined" if share.undefined else f"{percent(share.value)} {percents(share.interval)}"


def every_arm(found: Sensitivity) -> Table:
    """All arms, named ones or not."""
    rows, clean = [], clean_loss(found)
    for routes, noisy in found.arms:
        loss, kl, agreement = (found.damage(metric, routes, noisy) for metric in CLEAN)
        cells = (
            with_interval(loss, 5, True),
            f"{math.exp(clean + loss.mean):.3f}",
            with_interval(kl, 5),
            f"{100 * (1 + agreement.mean):.2f} %",
        )
        rows.append((routes, " + ".join(noisy) or "none", *cells))
    header = ("routes", "noisy", "loss - clean", "perplexity", "KL to clean", "same likeliest word")
    notes = (
        "live: the routers choose; ids, ids+weights: recorded experts, or these with their weights; noisy ids: the experts of the pass with all noise.",
    )
    return Table("Means and 95 % t intervals over noise seeds", header, tuple(rows), 2, notes=notes)


def layers_table(found: Sensitivity, predicted: np.ndarray | None) -> Table:
    """Each pass against the clean one, layer by layer and pooled."""
    measures = {
        "router/set_overlap": "overlap",
        "router/tokens_changed": "changed",
        "router/moved_mass": "moved mass",
        "router/order_changed": "order",
        "router/kl": "KL",
    }
    columns: list[tuple[str, np.ndarray, bool]] = []
    for name, word in measures.items():
        there = [of for of in WORDS if of in found.routers and name in found.routers[of]]
        columns += [(f"{word}, {of}", found.routers[of][name].mean(0), word != "KL") for of in there]
        if name == "router/tokens_changed" and predicted is not None:
            columns.append(("changed, exact prediction of own", predicted, True))
    rows = []
    for index, layer in [*enumerate(map(str, found.layers)), (slice(None), "all layers")]:
        rows.append((layer, *(percent(x[index].mean()) if share else f"{x[index].mean():.5f}" for _, x, share in columns)))
    notes = (
        "overlap: shared experts / K. changed: tokens with another set of experts; order: the same set in another "
        "order. moved mass: half the L1 "
        "distance of the weights. KL: of the routers' distributions. Means over tokens and seeds.",
        _passes(found),
    )
    return Table("Routes against the clean pass", ("layer", *(name for name, *_ in columns)), tuple(rows), notes=notes)


def _passes(found: Sensitivity) -> str:
    return "; ".join(f"{of}: {words}" for of, words in WORDS.items() if of in found.routers) + "."


def first_table(found: Sensitivity) -> Table:
    """In which layer a token first has other experts."""
    rows = []
    for of, words in WORDS.items():
        if of in found.routers and of != "own":
            share = found.routers[of]["first"].sum(0) / found.routers[of]["first"].sum()
            rows.append((words, *map(percent, share)))
    return Table("First layer in which a token's experts differ, share of tokens", ("noise", *map(str, found.layers), "none"), tuple(rows))


def amplification_table(found: Sensitivity) -> Table:
    """Growth from layer to layer."""
    rows = []
    for of, words in WORDS.items():
        for name, what in (
            ("router/tokens_changed", "changed sets"),
            ("router/logit_error_variance", "rms error of the logits"),
            ("router/kl", "KL of the router"),
        ):
            if of in found.routers and of != "own":
                values = found.routers[of][name].mean(0)
                growth = np.asarray(routing_stats.amplification(np.sqrt(values) if "variance" in name else values))
                rows.append((f"{words}: {what}", *(f"{x:.2f}" if np.isfinite(x) else "-" for x in growth)))
    steps = [f"{a} to {b}" for a, b in zip(found.layers[:-1], found.layers[1:], strict=True)]
    return Table(
        "Amplification: each layer's value over the one before",
        ("quantity", *steps),
        tuple(rows),
        notes=("Above 1: the error grows on its way through the network.",),
    )


def margins_table(found: Sensitivity) -> Table:
    """Observed and predicted flips by margin / sigma."""
    header, columns, explained = ["margin / sigma"], [], []
    for of in WORDS:
        if of in found.routers:
            tokens, flips, predicted = (found.routers[of][f"margin/{name}"].sum((0, 1)) for name in ("tokens", "flips", "predicted"))
            header += [f"tokens: {of}", f"flipped: {of}", f"predicted: {of}"]
            share = float(routing_stats.explained_share({"flips": flips, "predicted": predicted}))
            explained.append(f"{of} {percent(share) if flips.sum() else '-'}")
            part = np.maximum(tokens, 1)
            columns += [
                [percent(x) for x in tokens / tokens.sum()],
                *([percent(x) if n else "-" for x, n in zip(y / part, tokens, strict=True)] for y in (flips, predicted)),
            ]
    rows = tuple(zip(margin_labels(), *columns, strict=True))
    notes = (
        "margin: how far the last chosen expert leads the next in the clean pass; sigma: rms change of that lead "
        "in the layer; predicted: Phi(-margin / sigma), by these two experts alone. "
        f"{_passes(found)}",
        "Share of all flips that the prediction accounts for, bin by bin: " + ", ".join(explained) + ".",
    )
    return Table("Share of tokens whose set of experts changed, by margin", tuple(header), rows, notes=notes)


def logits_table(found: Sensitivity) -> Table:
    clean, noisy = (
        {name: x.mean(0) for name, x in found.routers[of].items() if x.shape[1:] == (len(found.layers),)} for of in ("clean", "all")
    )
    rows = []
    for index, layer in [*enumerate(map(str, found.layers)), (slice(None), "all")]:
        cells = [
            f"{side[f'router/{name}'][index].mean():.4f}"
            for name in ("logit_mean", "logit_std", "logit_offset", "margin", "entropy")
            for side in (clean, noisy)
        ]
        error = math.sqrt(noisy["router/logit_error_variance"][index].mean()) / clean["router/logit_std"][index].mean()
        rows.append((layer, *cells, f"{error:.4f}"))
    header = (
        "layer",
        *(f"{name}, {side}" for name in ("mean", "std", "offset", "margin", "entropy") for side in ("clean", "noisy")),
        "rms error / std",
    )
    notes = (
        "Over the experts of a token, averaged over tokens. offset: abs(mean) / std; noise relative to a logit "
        "grows with it, routing ignores it. entropy: of the softmax over the experts, in nats. "
        "rms error: of the logits with all noise, without the shift that all experts of a token share.",
    )
    return Table("Router logits, clean and with all noise", header, tuple(rows), notes=notes)


def load_table(found: Sensitivity) -> Table:
    """How evenly the experts are used in each layer, clean and with all noise."""
    passes = {"clean": found.routers["clean"]["load"], "all noise": found.routers["all"]["load"]}
    numbers = {
        f"{what}, {of}": np.asarray(measure(load)).mean(0)
        for what, measure in (("load CV", routing_stats.load_cv), ("dead experts", routing_stats.dead_experts))
        for of, load in passes.items()
    }
    rows = tuple(
        (layer, *(f"{x[index].mean():.{2 if name.startswith('dead') else 4}f}" for name, x in numbers.items()))
        for index, layer in [*enumerate(map(str, found.layers)), (slice(None), "mean of the layers")]
    )
    notes = ("load CV: standard deviation over mean of the assignments of a layer's experts; dead: experts without any; means over seeds.",)
    return Table("Load of the experts", ("layer", *numbers), rows, notes=notes)


def experts_table(found: Sensitivity) -> Table:
    """The experts that gained and lost most tokens in each layer."""
    gained, lost = (found.routers["all"][name].mean(0) for name in ("gained", "lost"))
    tokens, rows = sum(found.tokens), []
    for index, layer in enumerate(found.layers):
        net = gained[index] - lost[index]
        order = np.argsort(-net, kind="stable")
        cells = [
            ", ".join(f"{e} ({100 * net[e] / tokens:+.2f} %)" for e in some if net[e] * sign > 0) or "none"
            for some, sign in ((order[:SHOWN_EXPERTS], 1), (order[::-1][:SHOWN_EXPERTS], -1))
        ]
        rows.append((str(layer), percent(gained[index].sum() / tokens), *cells))
    notes = ("net change in percent of the tokens; the mean over seeds. exchanged: assignments that moved to another expert, per token.",)
    return Table(
        "Experts that gained and lost most with all noise", ("layer", "exchanged", "gained most", "lost most"), tuple(rows), 1, 2, notes
    )


def appendix(redone: np.ndarray, about: About) -> list[Block]:
    """Relative noise on this model's clean logits, beside the printed example that claims that 5 % replaces half of the experts."""
    kept, drawn = example()
    pooled, scale = redone.mean(2), SCALES.index(0.05)
    same = (about.experts, about.top_k) == (EXAMPLE_EXPERTS, EXAMPLE_CHOSEN)
    shape = "the shape that the claim is about" if same else f"this is not the {EXAMPLE_EXPERTS}/{EXAMPLE_CHOSEN} case of the claim"
    cases = [(i, j) for i in range(len(SHIFTS)) for j in range(len(SCALES))]
    rows = tuple(
        (f"{MOVED[i]}, {100 * SCALES[j]:g} %", *(cell for values in (pooled, drawn) for cell in map(percent, values[i, j])))
        for i, j in cases
    )
    by_layer = tuple(
        (str(index), *(cell for j in range(len(SCALES)) for cell in map(percent, redone[0, j, index]))) for index in range(redone.shape[2])
    )
    return [
        Text(
            "A published analysis of a 30B model holds that 5 % relative noise on the router's logits replaces about "
            f"half of the {EXAMPLE_CHOSEN} chosen of {EXAMPLE_EXPERTS} experts, and shows twelve logits "
            f"before and after. Those printed numbers keep {kept} of {EXAMPLE_CHOSEN}. Here the same noise acts on "
            f"the clean logits of this model, which chooses {about.top_k} of {about.experts}: {shape}."
        ),
        Text(
            f"On this model's logits 5 % keeps {percent(pooled[0, scale, 0])} of the chosen experts on average and changes the set of "
            f"{percent(pooled[0, scale, 1])} of the tokens in a layer (exact: {percent(pooled[0, scale, 2])}). On the printed example, continued downward "
            f"to {EXAMPLE_EXPERTS} at its own mean step, it keeps {percent(drawn[0, scale, 0])} and changes {percent(drawn[0, scale, 1])} "
            f"(exact: {percent(drawn[0, scale, 2])})."
        ),
        Text(
            f"Moved by a number that changes no route, the same logits keep from {percent(pooled[:, scale, 0].min())} to "
            f"{percent(pooled[:, scale, 0].max())} here, and from {percent(drawn[:, scale, 0].min())} to {percent(drawn[:, scale, 0].max())} in the "
            f'example: "5 % noise on the logits" says little without their offset.'
        ),
        Table(
            "Relative noise on logits that were moved by a number which changes no route",
            ("logits, noise", "kept: model", "changed: model", "exact: model", "kept: example", "changed: example", "exact: example"),
            rows,
            notes=(
                "kept: mean share of the chosen experts that stay; changed: tokens with another set, one draw per token; "
                "exact: the chance of another set by integration. Layers pooled.",
            ),
        ),
        Table(
            "The same by layer, logits as they are",
            ("routing layer", *(f"{what}, {100 * s:g} %" for s in SCALES for what in ("kept", "changed", "exact"))),
            by_layer,
        ),
    ]


# --- words ---------------------------------------------------------------------------------------------------------------------


def clean_loss(found: Sensitivity) -> float:
    return float(np.average(found.clean, weights=found.tokens))


def name_of(found: Sensitivity, factor: str) -> str:
    return f"the {factor}" + (f" ({', '.join(found.factors['rest'])})" if factor == "rest" else "")


def with_interval(found: Contrast, decimals: int, sign: bool = False) -> str:
    return f"{number(found.mean, decimals, sign)} {interval_text(found.interval, decimals, sign)}"


def lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def percent(share: float) -> str:
    return "<0.01 %" if 0 < share < 5e-5 else f"{number(100 * share, 2)} %"


def percents(interval: tuple[float, float]) -> str:
    return f"[{number(100 * interval[0], 2)}, {number(100 * interval[1], 2)}]"


def columns_of(line: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in line.split("  ") if part.strip())
