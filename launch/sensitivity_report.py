"""The report of a sensitivity run: report.html, report.md, report.json and figures. The same numbers give the same files."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch import sensitivity_figures as figures
from launch.common import listed
from launch.sensitivity_logits import EXAMPLE_CHOSEN, SCALES, Logits, example
from launch.sensitivity_tables import (
    MOVED,
    WORDS,
    About,
    amplification_table,
    appendix,
    arms_table,
    clean_loss,
    columns_of,
    damages,
    drawless,
    every_arm,
    experts_table,
    first_table,
    layers_table,
    load_table,
    logits_table,
    lower,
    margins_table,
    name_of,
    named_arms,
    percent,
    percents,
    shares_table,
    with_interval,
)
from moe_jax import routing_stats
from moe_jax.config_tools import config_dict
from moe_jax.files import write_atomic
from moe_jax.sensitivity import CLEAN, OPPOSITE, ROUTES, Sensitivity
from moe_jax.studies import document
from moe_jax.studies.analysis import interval_text, number, p_words
from moe_jax.studies.document import Block, Bullets, Heading, Table, Text
from moe_jax.studies.report import NO_FIGURES
from moe_jax.studies.stats import Contrast, summary

DRAWLESS = ("quantise", "bias")


def build(found: Sensitivity, about: About, logits: Logits, folder: Path) -> tuple[Path, Table]:
    """Writes the report into the folder; returns the path of the HTML page and the table of arms."""
    arms = named_arms(found, about.recorded)
    table, findings, title = arms_table(found, arms), sentences(found, about, logits), f"What noise does to {about.model}: {about.noise}"
    blocks: list[Block] = [Text(_measured(found, about)), *_warnings(found, about), Heading("What was found"), Bullets(findings)]
    drawn = importlib.util.find_spec("matplotlib") is not None

    def draw(function, *what) -> list[Block]:
        return [function(*what)] if drawn else []

    blocks += [] if drawn else [Text(NO_FIGURES, "note")]
    blocks += [
        Heading("Damage by arm"),
        table,
        *draw(figures.damage_figure, found, arms),
        shares_table(found, about),
        Text("What the arms mean:"),
        Bullets(_meanings(found, about)),
    ]
    blocks += [Heading("What the noise did to the routers"), layers_table(found, logits.predicted)]
    blocks += draw(figures.layers_figure, found, WORDS, logits.predicted)
    blocks += [first_table(found), amplification_table(found), Heading("Which tokens flip"), margins_table(found)]
    blocks += [*draw(figures.margins_figure, found, WORDS), Heading("The routers' logits"), logits_table(found)]
    blocks += [Heading("The experts"), load_table(found), experts_table(found)]
    if not logits.selection_bias:  # it works on bare logits, which then do not say the routes
        blocks += [Heading("Appendix: what x % noise on the logits does to the chosen experts"), *appendix(logits.redone, about)]
        blocks += draw(figures.appendix_figure, logits.redone, example()[1], MOVED, example()[0] / EXAMPLE_CHOSEN)
    blocks += [Heading("Every arm"), every_arm(found), Heading("How it was measured"), *_method(found, about)]
    numbers = to_json(found, about, logits) | {"findings": findings}
    write_atomic(folder / "report.json", json.dumps(config_dict(numbers), indent=1) + "\n")
    return document.write(folder, "report", title, blocks)[0], table


# --- sentences ----------------------------------------------------------------------------------------------------------------


def sentences(found: Sensitivity, about: About, logits: Logits) -> tuple[str, ...]:
    """What was found, each claim with its interval; what the seeds do not resolve is called so."""
    tested, clean = damages(found), clean_loss(found)
    everything = tuple(found.factors)
    whole = "All noise together" if len(everything) > 1 else f"Noise in {name_of(found, next(iter(everything)))}"
    kl, agreement = found.damage("kl"), found.damage("agreement")
    said = [
        _damage_sentence(whole, tested[everything], clean),
        f"With it the distribution over words is {with_interval(kl, 5)} nats per token (KL) from the clean pass's, and the "
        "likeliest word is another "
        f"one for {percent(-agreement.mean)} {percents((-agreement.interval[1], -agreement.interval[0]))} of the tokens.",
    ]
    said += [_share_sentence(found, about, routes, metric, everything) for metric in ("loss", "kl") for routes in ("ids", OPPOSITE)]
    inside = tuple(name for name in everything if name != "rest")
    if inside != everything and inside:
        said.append(_share_sentence(found, about, "ids", "kl", inside))
    if len(everything) > 1:
        said += [_damage_sentence(f"Noise in {name_of(found, name)} alone", tested[name,], clean) for name in everything]
    return (*said, *_router_sentences(found, about, logits))


def _damage_sentence(what: str, found: Contrast, clean: float) -> str:
    if found.mean == 0 and found.sd == 0:
        return f"{what} changes nothing: the loss is the clean pass's in each of {found.n} seeds."
    if drawless(found):
        return (
            f"{what} changes the loss by {number(found.mean, 5, True)} nats per token in each of {found.n} seeds: it draws nothing, "
            "so that the seeds do not say how sure that is."
        )
    evidence = f"95 % t interval over {found.n} noise seeds; {p_words(found.holm_p)} after Holm"
    change = f"{number(found.mean, 5, True)} nats per token {interval_text(found.interval, 5, True)}"
    if not found.resolved:
        seen = f"the smallest effect that these seeds could have seen is {number(found.smallest, 5)}"
        return f"Unresolved: whether {lower(what)} changes the loss. The difference is {change} ({evidence}); {seen}."
    before, after = math.exp(clean), math.exp(clean + found.mean)
    words = "raises" if found.mean > 0 else "lowers"
    ratio = f"perplexity {before:.3f} to {after:.3f}, {100 * (after / before - 1):+.2f} %"
    return f"{what} {words} the loss: {change} ({evidence}); {ratio}."


def _share_sentence(found: Sensitivity, about: About, routes: str, metric: str, noisy: tuple[str, ...]) -> str:
    """How much of the damage replay takes away, or (OPPOSITE) how much the flips do alone."""
    share, alone = found.share(routes, metric, noisy), routes == OPPOSITE
    of = {"loss": "the damage in loss", "kl": "the KL"}[metric] + (
        " of all noise" if noisy == tuple(found.factors) else f" of the noise in {listed(noisy)}"
    )
    replay = f"replaying the {about.recorded} experts"
    asked = f"how much of {of} flips alone would do" if alone else f"which part of {of} {replay} takes away"
    if share.undefined:
        return f"Undefined: {asked}; {share.undefined}."
    value = f"{percent(share.value)} {percents(share.interval)}"
    if share.interval[0] <= 0 <= share.interval[1]:
        return f"Unresolved: {asked}. It is {value}, which cannot be told from nothing."
    if alone:
        return f"The experts of the noisy pass in the clean model, flips without any other error, do {value} of {of}."
    if share.value < 0:
        return f"{replay.capitalize()} makes it worse: it takes away {value} of {of}."
    return f"{replay.capitalize()} takes away {value} of {of}: that much is due to flips, the rest is plain error."


def _router_sentences(found: Sensitivity, about: About, logits: Logits) -> list[str]:
    noisy, clean = found.routers["all"], found.routers["clean"]
    overlap, changed = (summary(noisy[name].mean(1)) for name in ("router/set_overlap", "router/tokens_changed"))
    first = noisy["first"] / noisy["first"].sum(1, keepdims=True)
    touched = summary(1 - first[:, -1])
    often = int(first[:, :-1].mean(0).argmax())
    said = [
        f"With all noise a token keeps {percent(overlap.mean)} {percents(overlap.interval)} of its "
        f"{about.top_k} experts in a layer; "
        f"{percent(changed.mean)} {percents(changed.interval)} of the (token, layer) pairs have another set, "
        f"and {percent(touched.mean)} "
        f"{percents(touched.interval)} of the tokens in at least one of {len(found.layers)} layers"
        + (f", first in layer {found.layers[often]} more often than in any other." if touched.mean else ".")
    ]
    if logits.predicted is not None and "own" in found.routers:
        own = summary(found.routers["own"]["router/tokens_changed"].mean(1))
        more = (
            f"; with all noise, what comes from other layers included, {percent(changed.mean)} do"
            if len(found.factors) > 1 or len(found.layers) > 1
            else ""
        )
        said.append(
            f"The routers' own noise should change the set of {percent(logits.predicted.mean())} of the (token, layer) "
            "pairs, by the exact integral over the "
            f"clean logits; on clean inputs it changed {percent(own.mean)} {percents(own.interval)}{more}."
        )
    offset = clean["router/logit_offset"].mean()
    if logits.selection_bias:
        return said
    said.append(
        f"The offset of the clean router logits, abs(mean) / std of a token's logits, is {offset:.2f} on average, "
        "so that noise relative to a logit is about "
        f"{math.sqrt(1 + offset**2):.2f} times as large against their spread as it would be without offset, which changes no route."
    )
    return said


def _measured(found: Sensitivity, about: About) -> str:
    return (
        f"{about.model}, {len(found.layers)} routing layers with {about.top_k} of {about.experts} experts per "
        f"token; {sum(found.tokens):,} tokens of {about.text} in "
        f"{len(found.tokens)} batches; {len(found.seeds)} noise seeds; phase {about.phase}. The clean loss is "
        f"{clean_loss(found):.5f} nats per token, "
        f"perplexity {math.exp(clean_loss(found)):.3f}."
    )


def _warnings(found: Sensitivity, about: About) -> list[Block]:
    said = []
    if set(about.kinds) <= set(DRAWLESS):
        said.append(
            f"Noise of kind {' and '.join(about.kinds)} draws nothing, so all seeds give the same numbers and the "
            "intervals over seeds have no width. Only the intervals over batches of text say how sure a number is."
        )
    if found.live_rows:
        said.append(f"{percent(found.live_rows)} of the replayed rows hold no recorded route and were routed live in every arm.")
    if about.recorded != "clean":
        said.append(
            f"The replayed experts are not the clean pass's: {about.source}. With the noise off they give another "
            "loss than the clean pass, and the shares below count that in."
        )
    return [Text(text, "warning") for text in said]


def _meanings(found: Sensitivity, about: About) -> tuple[str, ...]:
    factors = "; ".join(f"{name}: {', '.join(sites)}" for name, sites in found.factors.items())
    return (
        f"Noise is switched by factor ({factors}). Every arm sees the same tokens, and each noise seed the same draws in every arm.",
        f"All noise: every factor on, the routers choose. {about.recorded.capitalize()} experts replayed: the "
        f"same, but each token goes to the experts of {about.source}; their "
        "weights still come from the noisy router. Experts and weights: these weights too, so that the router "
        "does nothing. What replay takes away is the damage of flips; what "
        "stays is plain error.",
        "No noise, experts of the noisy pass: the clean model with each seed's experts of the arm with all noise, "
        "weights from the clean router. Flips without any other error.",
        "Noise alone in a factor, and all noise but a factor's: the two ways to ask what a factor does; they "
        "agree when the factors do not act on each other.",
        "KL is of the words' distribution, KL(clean || arm), in nats per token. It is never negative, so that "
        "it resolves changes whose effect on the loss goes both ways and cancels.",
    )


def _method(found: Sensitivity, about: About) -> list[Block]:
    head, *body = map(columns_of, about.table.splitlines())
    rows = (*about.settings, ("replayed routes", about.source), ("noise seeds", ", ".join(map(str, found.seeds))))
    return [
        Text(
            "Damage is an arm's mean loss per token minus the clean pass's. An interval over seeds holds for this "
            "text: it contains the spread between draws of the noise alone. An "
            "interval over text is over batches, with the mean over seeds as one value each, and says how far other "
            "text of this kind may differ. Shares are ratios of paired means with "
            "Fieller's interval; where the damage itself is not distinguishable from 0 a share is undefined. p values "
            "of the arms above are corrected by Holm for their family. "
            "Shares have no correction."
        ),
        Table("Settings", ("setting", "value"), rows, words=2),
        Table("The noise", head, tuple(body), words=5),
    ]


# --- numbers ------------------------------------------------------------------------------------------------------------------


def to_json(found: Sensitivity, about: About, logits: Logits) -> dict[str, Any]:
    """Every number with damages, shares and intervals; routers' values are means over seeds."""
    plain: dict[str, Any] = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    overs, everything = ("seeds", "batches")[: 1 + (len(found.tokens) > 1)], tuple(found.factors)
    plain["arms"] = [
        {"routes": routes, "noisy": noisy}
        | {f"{metric} over {over}": found.damage(metric, routes, noisy, over) for metric in CLEAN for over in overs}
        for routes, noisy in found.arms
    ]
    known = [routes for routes in (*ROUTES[1:], OPPOSITE) if any(routes == arm[0] for arm in found.arms)]
    plain["shares"] = [
        {"routes": routes, "metric": metric, "over": over, "share": found.share(routes, metric, everything, over)}
        for routes in known
        for metric in ("loss", "kl")
        for over in overs
    ]
    plain["routers"] = {of: {name: x.mean(0) for name, x in values.items()} for of, values in found.routers.items()}
    plain |= {"about": dataclasses.asdict(about), "predicted": logits.predicted, "margin_edges": routing_stats.MARGIN_EDGES}
    plain["relative_noise"] = {
        "scales": SCALES,
        "shifts": MOVED,
        "model": logits.redone,
        "example": example()[1],
        "example_kept": example()[0],
    }
    return jax.tree.map(lambda x: x.tolist() if isinstance(x, np.ndarray | np.generic) else x, plain)
