"""What did the noise of the 30B run do, and would its authors' remedies have helped? Every arm of seed study 004, beside the baseline that it left out.

The run named E7b trained a 30B mixture under 5 % relative error and collapsed; its text has no clean run beside it (the authors' files have one: 92.7 %
against 33.6 %). What was noised is not what was described: the experts never were, the router while sampling alone, the head in every forward pass (as_run);
the text says every matmul (as_described). None of the proposals had been run. Here each is an arm of continued training from one checkpoint, paired by seed:
supervised, on text, with the optimizer of that run. The reinforcement learning itself is a study of its own.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import qwen3_30b, replay_freeze
from experiments.qwen3_30b import RECIPE
from experiments.replay_freeze import is_recorded
from moe_jax.distributed import on_all
from moe_jax.noise import NoiseSpec
from moe_jax.studies import USAGE_CV_ROUTED, Comparison, Design, Factor, Metric, difference
from moe_jax.studies.design import cell_key
from moe_jax.studies.run import Experiment, Workshop
from moe_jax.train.record import record
from moe_jax.train.run_config import RunConfig
from moe_jax.train.step import Objective

_S = RECIPE.noise_scale
_AQN = "qerl_code:5e-2:5e-4:10:targets=norm_moe:reach=experts"  # the values of the authors' 30B script, on the norm that they chose
# arm -> what of the run differs. A scale of 0 keeps a site in the program, so that the arms that differ in scales alone share one.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "clean": {"noise": "router_gemm=relative:0:passes=forward:phases=eval"},
    "as run": {"noise": "e7b_as_run"},
    "as described": {"noise": f"matmuls=relative:{_S}"},
    "router only": {"noise": f"matmuls=relative:0,router_gemm=relative:{_S}"},
    "experts only": {"noise": f"matmuls=relative:0,experts=relative:{_S}"},
    "attention only": {"noise": f"matmuls=relative:0,attention=relative:{_S}"},
    "lm_head only": {"noise": f"matmuls=relative:0,lm_head=relative:{_S}"},
    "freeze": {"noise": f"matmuls=relative:{_S}", "objective": Objective(freeze=("freeze_params",))},
    "replay": {"noise": f"matmuls=relative:{_S}", "replay": "routes"},
    "router 1 %": {"noise": f"matmuls=relative:{_S},router_gemm=relative:0.01"},
    "router left out": {"noise": f"matmuls=relative:{_S},router_gemm=relative:0"},
    "AQN experts": {"noise": f"matmuls=relative:{_S}", "aqn": _AQN},
}
if NoiseSpec.parse(ARMS["as described"]["noise"]) != NoiseSpec.preset("e7b_as_described"):
    raise AssertionError("the arm 'as described' is not the noise that the library calls e7b_as_described")
NOISY = ("as run", "as described", "router only", "experts only", "attention only", "lm_head only")
REMEDIES: Mapping[str, str] = {
    "freeze": "Does freezing the router's weights help?",
    "replay": "Does training on the clean checkpoint's choice of experts, weighted by the live router, help?",
    "router 1 %": "Does it help to give the router's matmul 1 % of error instead of 5 %, in training and in use?",
    "router left out": "Does it help to spare the router's matmul all noise, in training and in use?",
    "AQN experts": "Does adaptive noise on the norm before the experts, which the router does not see, help?",
}
QUESTION = (
    "Which operator's noise did the damage in the 30B run, as it was run and as it was described, and which of the proposed remedies helps?"
)
RULE = (
    "Two questions, each a family of comparisons paired by seed for each metric. Damage: a noisy arm against clean, with the arm's own "
    "noise on in use (what training and use under that noise cost together) and off (what training left behind). Remedy: an arm "
    "against 'as described', on and off. An effect is claimed when its Holm-adjusted p in its family is below alpha, else it is "
    "unresolved, and the smallest effect that this design could have seen is given; a remedy counts as shown only with noise on. The "
    "router is the weak point, as seed study 004 holds, if 'taken away by router left out, less half of the damage' is resolved above "
    "0 with noise on: sparing it then saves more than half of what all noise costs. It is not, if that contrast is resolved below 0."
)
PERPLEXITY_ON = dataclasses.replace(
    replay_freeze.NOISY,
    definition="exp of the token-mean cross-entropy over a fixed set of held-out windows at the end of training, routed live, with the "
    "forward noise that the arm has in evaluation; of clean, without any.",
)
PERPLEXITY_OFF = replay_freeze.CLEAN
OVERLAP = dataclasses.replace(
    replay_freeze.OVERLAP,
    definition="Share of the experts chosen by the checkpoint from which training began that each trained router would still choose, "
    "on the held-out windows, noise off, all layers routed as that checkpoint did.",
)
METRICS: tuple[Metric, ...] = (PERPLEXITY_ON, PERPLEXITY_OFF, OVERLAP, USAGE_CV_ROUTED, replay_freeze.TRAIN)
NOTES = (
    "Noise is y (1 + 0.05 n) on the result of a matmul. 'As described' and the arms of one operator have it in the forward pass and in "
    "both backward passes, in training and in evaluation. 'As run' has what the code of that run did: attention and router while "
    "sampling and evaluating, the head in every forward pass, nothing in the backward pass, no experts. Supervised training samples "
    "nothing, so there 'as run' trains with a noisy head alone.",
    "Clean has no noise in training or in use: it is the baseline that the seed's text left out. 'Router 1 %' has 5 % everywhere else; "
    "'router left out' too.",
    "Replayed are the routes of the checkpoint that training began with, recorded without noise on its very batches. Evaluation routes live.",
    "'AQN experts' is AQN on the scale of the norm before the experts and the router, as its authors meant it: the router reads the "
    "clean scale. Its sigma is 0 in the first tenth of the updates and falls from 0.05 to 0.0005 after that, with a new draw in every "
    "update. The authors' own code would have reached the router.",
    "Supervised, next-token training on text with the optimizer, the clipping and the missing balance loss of the seed's recipe. The "
    "collapse was one of reinforcement learning, where sampling and training disagree, importance ratios are noisy and rewards feed "
    "back; nothing here shows that part.",
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How long a preset trains."""

    seeds: tuple[int, ...]  # of data order and noise
    updates: int
    rate: float | None  # of AdamW; None: the recipe's
    cost: str
    notes: tuple[str, ...] = ()


SIZES: Mapping[str, Size] = {
    "smoke": Size((42, 43), 10, 1e-3, "about 5 minutes on two CPU cores, nearly all of it compilation"),
    "mini": Size(
        (42, 43, 44, 45),
        60,
        2e-3,
        "about 6 minutes on two CPU cores, half of it compilation, the checkpoint not counted",
        ("The learning rate is 2,000 times the recipe's, for a model of a hundred thousandth of the size, so that 60 updates move it.",),
    ),
    "full": Size(
        (42, 43, 44),
        RECIPE.updates,
        None,
        "36 runs of 232 updates of 32 x 512 tokens, 3e18 FLOPs of matmuls: a quarter of an hour at 40 % of the peak of 8 H100. An "
        "estimate of 8 hours, most of it reading 61 GB of weights 36 times, moving parameters and the optimizer's state, and drawing "
        "noise; not measured",
    ),
}


def experiment(preset: str) -> Experiment:
    """The declared study of a preset of qwen3_30b."""
    size, config = SIZES[preset], qwen3_30b.base(preset, qwen3_30b.WEIGHTS_BASE, "float32")
    optimizer = dataclasses.replace(RECIPE.optimizer(size.rate), warmup=min(RECIPE.warmup_updates, size.updates // 5), total=size.updates)
    config = dataclasses.replace(config, updates=size.updates, optimizer=optimizer)
    return Experiment(
        f"qwen3_30b.e7b_matrix:{preset}",
        _design(preset, config),
        functools.partial(configure, config),
        size.cost,
        functools.partial(prepare, preset),
    )


def configure(config: RunConfig, cell: Mapping[str, Any], seed: int) -> RunConfig:
    """The run of one arm and seed, with names of folders where `prepare` puts paths."""
    seeds = {"init_seed": seed, "data_seed": seed, "noise_seed": seed}
    return dataclasses.replace(config, compare="routes_validation", **seeds, **ARMS[cell["arm"]])


def prepare(preset: str, shop: Workshop, config: RunConfig) -> RunConfig:
    """The run with the common checkpoint and that one's routes on the text of its seed, recorded where they are not there yet."""
    config = qwen3_30b.prepare(preset, shop, config)
    home = shop.study / "routes"
    replay = _recorded(shop, config, home / f"seed-{config.data_seed}", "train", config.updates) if config.replay else ""
    return dataclasses.replace(config, replay=replay, compare=_recorded(shop, config, home / "validation", "validation", sys.maxsize))


def _recorded(shop: Workshop, config: RunConfig, place: Path, split: str, steps: int) -> str:
    """The folder of the checkpoint's routes on this text. The validation windows are those of every seed, so that one recording serves all."""
    if not on_all(lambda: is_recorded(place)):
        model, params = qwen3_30b.loaded(shop, config)
        rows = {"split": split, "eval_batch": config.eval_batch}
        on_all(
            lambda: record(model, params, shop.data(config), place, steps, weights=False, **rows)
        )  # all parts are there before one is read
    return str(place)


def _design(preset: str, config: RunConfig) -> Design:
    fixed = ("model", "data", "optimizer", "objective", "updates", "start", "balance_weight", "z_weight", "eval_batch")
    return Design(
        name=f"qwen3_30b.e7b_matrix:{preset}",
        question=QUESTION,
        factors=(Factor("arm", tuple(ARMS)),),
        seeds=SIZES[preset].seeds,
        metrics=METRICS,
        comparisons=(_half(), *_damage(), *_remedies(), *_routers()),
        rule=RULE,
        settings={**qwen3_30b.settings(preset, config, *fixed), "arms": ARMS, "recipe": RECIPE},
        notes=(*qwen3_30b.SCOPE[preset], *SIZES[preset].notes, *NOTES),
    )


def _against(arm: str, other: str, metric: Metric, question: str, family: str) -> Comparison:
    name = f"{arm} - {other}, {metric.label}"
    return difference(name, metric.name, {"arm": arm}, {"arm": other}, question=question, family=f"{family}, {metric.label}")


def _half() -> Comparison:
    terms = tuple((weight, cell_key({"arm": arm})) for weight, arm in ((0.5, "as described"), (0.5, "clean"), (-1.0, "router left out")))
    name = "taken away by router left out, less half of the damage"
    question = "Does sparing the router save more than half of what noise on every matmul costs?"
    return Comparison(name, question, PERPLEXITY_ON.name, terms, "half of the damage")


def _damage() -> list[Comparison]:
    asked = f"Does training and use under 5 % noise raise perplexity, and by how much for each operator? The scale is {_S}."
    return [_against(arm, "clean", metric, asked, "damage") for metric in (PERPLEXITY_ON, PERPLEXITY_OFF) for arm in NOISY]


def _remedies() -> list[Comparison]:
    return [_against(arm, "as described", m, asked, "remedy") for m in (PERPLEXITY_ON, PERPLEXITY_OFF) for arm, asked in REMEDIES.items()]


def _routers() -> list[Comparison]:
    asked = "Does the noise move the routers, or the load of the experts, away from where clean training takes them?"
    return [_against(arm, "clean", metric, asked, "drift") for metric in (OVERLAP, USAGE_CV_ROUTED) for arm in ("as run", "as described")]
