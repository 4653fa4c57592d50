"""The matrix that study 004 proposed and never ran: reinforcement learning under 5 % operator error, each remedy beside the run without it, paired by seed.

A 30B mixture fell from 79 % to 34 % on GSM8K in one such run; no clean run stood beside it, and none of the five remedies had been tried. Here every arm begins
with the same warm policy of its seed and takes the same problems; a dense twin of equal active size shows what is the mixture's own. Presets: `mini` for two
cores, `smollm2` for one GPU, `qwen3_30b` with the recipe of that run for a pod. experiments/e7b_verdicts.py reads the claims off the contrasts declared here.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import e7b_verdicts
from experiments.e7b_sizes import PRESETS as PRESETS
from experiments.e7b_sizes import SIZES, Size
from experiments.qwen3_30b import RECIPE
from moe_jax.config_tools import config_dict
from moe_jax.errors import ConfigError
from moe_jax.rl import loop
from moe_jax.rl.config import RLConfig
from moe_jax.rl.warmup import WarmUp, warm_up
from moe_jax.studies import Comparison, Design, Factor, Metric, difference
from moe_jax.studies.design import cell_key
from moe_jax.studies.run import Experiment, Runner, Workshop, describe_devices
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.loop import Result
from moe_jax.train.run_folder import RunFolder
from moe_jax.train.step import Objective
from moe_jax.train.writers import Progress

_S = RECIPE.noise_scale
_ALL = f"matmuls=relative:{_S}"
_NONE = "matmuls=relative:0"  # a scale of 0 keeps a site in the program, so that the arms that differ in scales alone share one
_AQN = "qerl_code:5e-2:5e-4:10:targets=norm_moe"  # the values of the authors' 30B script, on the norm that they chose
# arm -> what of the run differs
MOE_ARMS: Mapping[str, Mapping[str, Any]] = {
    "clean": {"noise": _NONE},
    "as run": {"noise": "e7b_as_run"},
    "as described": {"noise": _ALL},
    "router only": {"noise": f"{_NONE},router_gemm=relative:{_S}"},
    "experts only": {"noise": f"{_NONE},experts=relative:{_S}"},
    "attention only": {"noise": f"{_NONE},attention=relative:{_S}"},
    "lm_head only": {"noise": f"{_NONE},lm_head=relative:{_S}"},
    "freeze": {"noise": _ALL, "objective": Objective(freeze=("freeze_params",))},
    "replay self": {"noise": _ALL, "replay": "self"},
    "replay rollout": {"noise": _ALL, "replay": "rollout"},
    "replay reference": {"noise": _ALL, "replay": "reference"},
    "router 1 %": {"noise": f"{_ALL},router_gemm=relative:0.01"},
    "router left out": {"noise": f"{_ALL},router_gemm=relative:0"},
    "AQN both": {"noise": _ALL, "aqn": _AQN},
    "AQN experts": {"noise": _ALL, "aqn": f"{_AQN}:reach=experts"},
}
_NO_ROUTER = f"attention=relative:{_S}:passes=forward:phases=rollout+eval,lm_head=relative:{_S}:passes=forward"  # of e7b_as_run
DENSE_ARMS: Mapping[str, Mapping[str, Any]] = {
    "clean": MOE_ARMS["clean"],
    "as run": {"noise": _NO_ROUTER},
    "as described": MOE_ARMS["as described"],
    "experts only": {"noise": f"{_NONE},mlp=relative:{_S}"},
    "attention only": MOE_ARMS["attention only"],
    "lm_head only": MOE_ARMS["lm_head only"],
    "AQN both": MOE_ARMS["AQN both"],
}
ARMS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"moe": MOE_ARMS, "dense": DENSE_ARMS}

QUESTION = "What does 5 % operator error do to reinforcement learning of a mixture of experts, is its router the weak point, and which remedy helps?"
RULE = (
    "The headline is accuracy on held-out problems, sampled at temperature 1, with the arm's own noise on, after the last step. Every claim of "
    "study 004 has one contrast, paired by seed; the table of verdicts names it. A claim that something takes away most of the damage is put as: "
    "what it takes away, less half of the damage. CONFIRMED: the contrast is resolved (Holm-adjusted p below alpha in its family) on the side that "
    "the claim says. REFUTED: it is resolved on the other side. A claim that names a size is confirmed when its interval lies at or above the size "
    "and refuted when it lies below; that one thing is as good as another, confirmed when the interval lies above -2 points and refuted when it "
    "lies below; that something does harm, refuted when the interval lies above -2 points. All else is UNRESOLVED, with the smallest effect that "
    "this design could have seen."
)
_POINTS = {"unit": "", "better": "higher", "decimals": 3}
NOISY = Metric(
    "sampled_noisy",
    "Accuracy, noise on",
    **_POINTS,
    definition="Share of held-out problems answered right, at temperature 1, with the noise that the arm has in evaluation.",
)
CLEAN = Metric(
    "sampled", "Accuracy, noise off", **_POINTS, definition="The same without any noise: what the noise in training left behind."
)
METRICS: tuple[Metric, ...] = (
    NOISY,
    CLEAN,
    Metric("greedy_noisy", "Greedy, noise on", **_POINTS, definition="The likeliest answer instead of a sampled one."),
    Metric("greedy", "Greedy, noise off", **_POINTS, definition="The same without noise."),
    Metric(
        "policy_entropy_before",
        "Policy entropy",
        "nats",
        "",
        4,
        "Of the next-token distribution over sampled tokens, before the updates. Study 004 took it for the router's.",
    ),
    Metric(
        "router_entropy",
        "Router entropy",
        "nats",
        "",
        4,
        "Of the softmax over experts, mean over layers and sampled tokens; 0 for a dense model.",
    ),
    Metric("optimizer_gradient_norm", "Gradient norm", "", "", 3, "Global, before clipping, mean over updates."),
    Metric("answers_length", "Answer length", "tokens", "", 2, "Of sampled answers, the end token included."),
    Metric(
        "sampler_kl",
        "Sampler KL",
        "nats",
        "lower",
        5,
        "k3 of the trainer's log-probabilities before the updates to the sampler's, per sampled token.",
    ),
    Metric(
        "sampler_extreme",
        "Extreme tokens",
        "",
        "lower",
        5,
        "Share of sampled tokens whose probability in trainer and sampler differs by more than a factor e.",
    ),
    Metric(
        "route_changed_experts",
        "Changed experts",
        "",
        "lower",
        4,
        "Share of the experts that the sampler used and the trainer's pass before the updates did not; 0 for a dense model.",
    ),
    Metric("route_growth", "Growth of changes", "", "lower", 4, "Changed experts in the last layer that routes less those in the first."),
    Metric("policy_clip_fraction", "Clip fraction", "", "lower", 4, "Share of tokens whose ratio the clipping decided."),
)
SERIES = (
    *(
        "eval/sampled_noisy",
        "eval/sampled",
        "eval/greedy",
        "eval/greedy_noisy",
        "reward/mean",
        "policy/entropy_before",
        "router/entropy",
        "optimizer/gradient_norm",
        "answers/length",
    ),
    *("sampler/kl", "route/changed_experts", "policy/clip_fraction"),
)
NOTES = (
    "Noise is y (1 + 0.05 n) on the result of a matmul. 'As described' and the arms of one operator have it forward and in both backward passes, in "
    "sampling, in the pass before the updates, in the updates and in evaluation. 'As run' is what that run's code did: attention and router while "
    "sampling and evaluating, the head in every forward pass, nothing backward, no experts.",
    "Clean has no noise anywhere. 'Router 1 %' has 5 % everywhere else, 'router left out' too; both save in use as well as in training.",
    "Replayed are: 'self', the trainer's own routes of the pass before the updates; 'rollout', the sampler's, in that pass and in the updates; "
    "'reference', those of the warm policy without noise over the sampled tokens, in both. Sampling and evaluation route live, so a replay cannot "
    "save what noise costs in use.",
    "AQN perturbs the scale of the norm before the experts while sampling; 'both' is what the 30B port did (the router reads that norm too), "
    "'experts' what its authors meant by sparing the router. Sigma is 0 in the first tenth of the steps and falls from 0.05 to 0.0005.",
    "The dense twin has the mixture's active width, so a quarter of its feed-forward parameters. 'Experts only' is its feed-forward there.",
    "Every arm of a seed begins with the same warm policy, trained without noise on worked answers and then on imperfect ones, and meets the same "
    "problems.",
)


def experiment(preset: str = "mini") -> Experiment:
    """The declared study of one of PRESETS."""
    size = SIZES[preset]
    return Experiment(
        f"e7b:{preset}",
        _design(preset, size),
        functools.partial(configure, size),
        size.cost,
        functools.partial(prepare, size),
        pages=e7b_verdicts.write,
        runner=Runner(run, problems, SERIES, lanes=False),
    )


def run(*arguments: Any) -> Result:
    """A run; what a dense model has no number for is 0."""
    found = loop.run(*arguments)
    routers = dict.fromkeys(("router_entropy", "route_changed_experts", "route_growth"), 0.0)
    return dataclasses.replace(found, metrics=routers | found.metrics)


def problems(shop: Workshop, config: RLConfig) -> Any:
    """The task of a run, made once."""
    return shop.once(("task", config.task, config.tokenizer, config.parse), config.load_task)


def configure(size: Size, cell: Mapping[str, Any], seed: int) -> RLConfig:
    """The run of one model, arm and seed, with the name of a folder where `prepare` puts a path."""
    model = size.models[cell["model"]]
    seeds = {"init_seed": seed, "data_seed": seed, "sample_seed": seed, "noise_seed": seed}
    start = size.run.start or f"warm/{cell['model']}"
    return dataclasses.replace(size.run, model=model, start=start, **seeds, **ARMS[cell["model"]][cell["arm"]])


def prepare(size: Size, shop: Workshop, config: RLConfig) -> RLConfig:
    """The run with the warm policy of its model and seed, trained where it is not there yet."""
    if not size.stages:
        if not Path(config.start).is_dir():
            raise ConfigError(f"no folder {config.start}: put the published checkpoint there (config.json, tokenizer.json, *.safetensors)")
        return config
    name = config.start.split("/")[1]
    begin = size.begin.get(name, "")
    warm = WarmUp(config.model, size.stages[name], config.task, size.batch_size, config.length, seed=config.init_seed, start=begin)
    home, task = shop.folder / config.start / f"seed-{config.init_seed}", problems(shop, config)
    if Checkpoints(home / "checkpoints", warm, task.fingerprint).latest() != warm.updates:
        with RunFolder(home) as folder, Progress(warm.updates, label=f"{config.start}, seed {config.init_seed}") as progress:
            folder.start(warm, sys.argv, describe_devices())
            warm_up(warm, task, home, progress, shop.stop, shop.mesh)
    return dataclasses.replace(config, start=str(home))


def _design(preset: str, size: Size) -> Design:
    varied = ("noise", "aqn", "replay", "start", "init_seed", "data_seed", "sample_seed", "noise_seed", "model", "objective", "sample_rows")
    fixed = {name: value for name, value in config_dict(size.run).items() if name not in varied}
    cells = [{"model": model, "arm": arm} for model in size.models for arm in ARMS[model]]
    return Design(
        name=f"e7b:{preset}",
        question=QUESTION,
        factors=(Factor("model", tuple(size.models)), Factor("arm", tuple(MOE_ARMS))),
        seeds=size.seeds,
        metrics=METRICS,
        comparisons=(*_claims("dense" in size.models), *_damage(size.models), *_remedies(), *_mismatch()),
        rule=RULE,
        settings={"split": "clean", "models": size.models, "arms": ARMS, "warm_up": size.stages, "warm_up_batch": size.batch_size, **fixed},
        only=tuple(cell_key(cell) for cell in cells),
        notes=(*size.notes, *NOTES),
    )


def _cell(model: str, arm: str) -> dict[str, str]:
    return {"model": model, "arm": arm}


def _less_half(arm: str) -> Comparison:
    """What an arm takes away of the damage, less half of it."""
    terms = ((1.0, arm), (-0.5, "as described"), (-0.5, "clean"))
    name, question = e7b_verdicts.half_name(arm), f"Does '{arm}' take away more than half of what noise on every matmul costs?"
    return Comparison(
        name, question, NOISY.name, tuple((weight, cell_key(_cell("moe", cell))) for weight, cell in terms), "half of the damage"
    )


def _claims(dense: bool) -> list[Comparison]:
    changed, growth = "route_changed_experts", "route_growth"
    asked = "How many of the sampler's experts does noise in its router and attention change, beside the trainer's clean pass?"
    found = [_less_half(arm) for arm in ("router left out", "freeze", "replay reference", "router 1 %")]
    found += [
        difference(e7b_verdicts.CHANGED, changed, _cell("moe", "as run"), _cell("moe", "clean"), asked, "routes"),
        difference(
            e7b_verdicts.GROWTH, growth, _cell("moe", "as run"), _cell("moe", "clean"), "Do more routes change in later layers?", "routes"
        ),
    ]
    if dense:
        terms = ((1.0, "moe", "router left out"), (-1.0, "moe", "clean"), (-1.0, "dense", "as described"), (1.0, "dense", "clean"))
        question = "Does a mixture whose router is spared lose as little to noise as its dense twin?"
        cells = tuple((weight, cell_key(_cell(model, arm))) for weight, model, arm in terms)
        found.append(Comparison(e7b_verdicts.DENSE_LEVEL, question, NOISY.name, cells, "mixture and twin"))
        terms = ((1.0, "moe", "as described"), (-1.0, "moe", "clean"), (-1.0, "dense", "as described"), (1.0, "dense", "clean"))
        cells = tuple((weight, cell_key(_cell(model, arm))) for weight, model, arm in terms)
        question = "Does noise on every matmul cost a mixture more than its dense twin?"
        found.append(Comparison("damage of the mixture less that of the twin", question, NOISY.name, cells, "mixture and twin"))
    return found


def _against(model: str, arm: str, other: str, metric: Metric, question: str, family: str) -> Comparison:
    name = e7b_verdicts.against_name(model, arm, other, metric.label)
    return difference(name, metric.name, _cell(model, arm), _cell(model, other), question, f"{family}, {metric.label}")


def _damage(models: Sequence[str] | Mapping[str, Any]) -> list[Comparison]:
    asked = "What does this noise cost, in training and use together (noise on), and what does it leave behind (noise off)?"
    noisy = ("as run", "as described", "router only", "experts only", "attention only", "lm_head only")
    return [
        _against(model, arm, "clean", metric, asked, f"damage, {model}")
        for metric in (NOISY, CLEAN)
        for model in models
        for arm in noisy
        if arm in ARMS[model]
    ]


def _remedies() -> list[Comparison]:
    arms = [arm for arm in MOE_ARMS if arm.startswith(("freeze", "replay", "AQN", "router 1", "router left"))]
    asked = "Is this better than the same noise without a remedy?"
    return [_against("moe", arm, "as described", metric, asked, "remedy") for metric in (NOISY, CLEAN) for arm in arms]


def _mismatch() -> list[Comparison]:
    asked = "How far are sampler and trainer from each other?"
    pairs = (("as run", "clean"), ("as described", "clean"), ("replay rollout", "as described"), ("freeze", "as described"))
    by_name = {metric.name: metric for metric in METRICS}
    wanted = (by_name["sampler_kl"], by_name["route_changed_experts"], by_name["optimizer_gradient_norm"])
    return [_against("moe", arm, other, metric, asked, "mismatch") for metric in wanted for arm, other in pairs]
