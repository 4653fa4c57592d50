"""Is the router the weak point? The causal decomposition of the damage that 5 % relative error on every matmul does to a trained mixture.

Seed study 004 saw a collapse under noise and took the router for its cause, without any run in which only routes, or only arithmetic, were disturbed. Here
one model reads real text clean and noisy in every way: routers live, or held to the clean pass's experts; noise in one operator alone; and the noisy pass's
experts in the clean model. Every arm has the same tokens and the same draws. Nothing is trained. Beside the study's report stands the fuller one
that launch.sensitivity writes (folder decomposition).
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import qwen3_30b
from moe_jax.sensitivity import OPPOSITE
from moe_jax.studies import Comparison, Design, Factor, Metric, difference
from moe_jax.studies.design import cell_key
from moe_jax.studies.run import Experiment, Workshop
from moe_jax.train.run_config import RunConfig

NOISE = f"matmuls=relative:{qwen3_30b.RECIPE.noise_scale}:passes=forward"
_ALL = ("router", "experts", "attention", "rest")  # the factors of moe_jax.sensitivity; "rest" is the head
# arm -> (whose experts, which factors are noisy), as in Sensitivity.arms
ARMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "clean": ("live", ()),
    "all noise": ("live", _ALL),
    "clean experts": ("ids", _ALL),
    "clean experts and weights": ("ids+weights", _ALL),
    "flips alone": (OPPOSITE, ()),
    "router alone": ("live", ("router",)),
    "experts alone": ("live", ("experts",)),
    "attention alone": ("live", ("attention",)),
    "head alone": ("live", ("rest",)),
    "all but router": ("live", ("experts", "attention", "rest")),
}
QUESTION = "Which part of the damage that 5 % relative error on every matmul does is due to experts that the routers choose otherwise?"
RULE = (
    "The router is the weak point, as seed study 004 holds, if 'taken away by clean experts, less half of the damage' is resolved "
    "above 0 in loss: holding the noisy model to the clean pass's experts then takes away more than half of the damage. It is not, if "
    "that contrast is resolved below 0. Else the question is unresolved, and the smallest effect that this design could have seen is "
    "given. The other comparisons say which operators do the damage; each of their families has its own error rate, and an effect in "
    "them is claimed when its Holm-adjusted p is below alpha."
)
LOSS = Metric("loss", "Loss", "nats", decimals=4, definition="Token-mean cross-entropy over the windows, with the arm's noise and routes.")
KL = Metric(
    "kl",
    "KL to clean",
    "nats",
    decimals=4,
    definition="Mean over tokens of KL(clean || arm) of the distribution over words; never negative.",
)
SAME = Metric(
    "agreement",
    "Same likeliest word",
    better="higher",
    decimals=4,
    definition="Share of the tokens whose likeliest word is the clean pass's.",
)
NOTES = (
    "Noise is y (1 + 0.05 n), n ~ N(0,1) per element, on the result of every matmul, in the forward pass. A seed is a draw of it; the "
    "text is the same for all.",
    "'Clean experts': the noisy model, each token sent to the experts of the clean pass, weighted by the noisy router. 'Clean experts "
    "and weights': these too. 'Flips alone': the clean model with the experts that the pass with all noise chose.",
    "All arms of all seeds come out of one call, whose time stands in the first run's row. The folder decomposition has every "
    "combination of noisy operators and routes, intervals over text as well as over draws, the routers layer by layer, and the share "
    "of the damage with Fieller's interval.",
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much a preset measures."""

    seeds: tuple[int, ...]  # of the noise
    windows: int
    batch: int  # windows at a time
    cost: str


SIZES: Mapping[str, Size] = {
    "smoke": Size((0, 1), 16, 8, "about 30 seconds on two CPU cores, nearly all of it compilation"),
    "mini": Size(tuple(range(8)), 32, 8, "about 2 minutes on two CPU cores, the checkpoint not counted"),
    "full": Size(
        tuple(range(8)),
        64,
        8,
        "2,700 forward passes of 8 x 512 tokens, 7e16 FLOPs of matmuls: a minute at 40 % of the peak of 8 H100, a quarter of an hour "
        "as an estimate that counts noise, diagnostics and the reading of 61 GB; not measured",
    ),
}


def experiment(preset: str) -> Experiment:
    """The declared study of a preset of qwen3_30b."""
    size = SIZES[preset]
    config = qwen3_30b.base(preset)
    config = dataclasses.replace(config, noise=NOISE, data=config.data.replace(eval_windows=size.windows), eval_batch=size.batch)
    return Experiment(
        f"qwen3_30b.sensitivity:{preset}",
        _design(preset, config),
        functools.partial(configure, config),
        size.cost,
        functools.partial(qwen3_30b.prepare, preset),
        functools.partial(measure, size),
    )


def configure(config: RunConfig, cell: Mapping[str, Any], seed: int) -> RunConfig:
    """The same for every arm; the seed is that of the noise."""
    del cell
    return dataclasses.replace(config, noise_seed=seed)


def measure(size: Size, shop: Workshop, config: RunConfig, cell: Mapping[str, Any], seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """An arm's numbers under one draw, out of the decomposition, which is made where it is not there yet."""
    found = shop.once("decomposition", lambda: _decompose(size, shop, config))
    arms = [(arm["routes"], tuple(arm["noisy"])) for arm in found["arms"]]
    tokens, arm, draw = np.array(found["tokens"]), arms.index(ARMS[cell["arm"]]), found["seeds"].index(seed)
    return {name: float(np.average(found["values"][name][arm][draw], weights=tokens)) for name in ("loss", "kl", "agreement")}, {}


def _decompose(size: Size, shop: Workshop, config: RunConfig) -> dict[str, Any]:
    """Everything that launch.sensitivity finds, out of its report; written there if it is not whole yet."""
    from launch import sensitivity_run  # a study whose report is there needs none of it

    folder = shop.study / "decomposition"
    if not (folder / "report.html").exists():  # of its files the last one
        name = config.start.rsplit("/", 1)[-1]  # the report says what was measured, not where it lay
        asked = sensitivity_run.Config(
            name, config.noise, config.data, seeds=len(size.seeds), first_seed=size.seeds[0], windows=size.windows, batch=size.batch
        )
        folder.mkdir(parents=True, exist_ok=True)
        sensitivity_run.measure(asked, qwen3_30b.checkpoint(config), folder, shop.mesh)
    return json.loads((folder / "report.json").read_text())


def _design(preset: str, config: RunConfig) -> Design:
    return Design(
        name=f"qwen3_30b.sensitivity:{preset}",
        question=QUESTION,
        factors=(Factor("arm", tuple(ARMS)),),
        seeds=SIZES[preset].seeds,
        metrics=(LOSS, KL, SAME),
        comparisons=(*_half(), *_damage(), *_replay(), *_which()),
        rule=RULE,
        settings={**qwen3_30b.settings(preset, config, "model", "data", "noise", "start"), "arms": ARMS},
        notes=(*qwen3_30b.SCOPE[preset], *NOTES),
    )


def _half() -> list[Comparison]:
    terms = tuple((weight, cell_key({"arm": arm})) for weight, arm in ((0.5, "all noise"), (0.5, "clean"), (-1.0, "clean experts")))
    question = "Does holding the noisy model to the clean pass's experts take away more than half of the damage?"
    return [
        Comparison(
            f"taken away by clean experts, less half of the damage, {m.label}", question, m.name, terms, f"half of the damage, {m.name}"
        )
        for m in (LOSS, KL)
    ]


def _against(arm: str, other: str, question: str, family: str, metric: Metric) -> Comparison:
    return difference(f"{arm} - {other}, {metric.label}", metric.name, {"arm": arm}, {"arm": other}, question=question, family=family)


def _damage() -> list[Comparison]:
    arms = [arm for arm in ARMS if arm not in ("clean", "clean experts", "clean experts and weights")]
    return [_against(arm, "clean", f"Does the arm '{arm}' raise the loss?", "damage", LOSS) for arm in arms]


def _replay() -> list[Comparison]:
    asked = {
        "clean experts": "Does holding the noisy model to the clean pass's experts help?",
        "clean experts and weights": "Does holding it to their weights as well help?",
        "all but router": "Does sparing the router's matmul help?",
    }
    return [_against(arm, "all noise", question, f"remedy, {m.name}", m) for m in (LOSS, KL) for arm, question in asked.items()]


def _which() -> list[Comparison]:
    others = ("experts alone", "attention alone", "head alone")
    return [
        _against("router alone", other, f"Does noise in the router do more than in '{other}'?", f"operator, {m.name}", m)
        for m in (LOSS, KL)
        for other in others
    ]
