"""Does noise on the gate hurt, does load balancing help, and how sure can we be? Gate noise x balance weight, three seeds.

The small seed study, done again: Gaussian noise of standard deviation noise_std on the gate's logits while training, read by the
selection, the combine weights and the balance loss. Presets:

smoke      no download, made-up text, seconds: shows that everything works, and nothing about noise
quick      the seed's shape, small: all 18 runs in minutes on two CPU cores; real text, own BPE, clean split
small      the same, larger: one to two hours on two cores
seed       as it was run: 79 M parameters, 400 micro-batches that make 100 updates, windows that leak into validation
corrected  the seed's size with 400 updates of one whole cosine, clean split
followups  what the seed recommended next: balance weights .002 to .01, top-1, the gate under AdamW or frozen; six seeds, quick size
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config_tools import config_dict
from moe_jax.model import DTypePolicy, ModelConfig
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.studies import USAGE_CV_ROUTED, USAGE_CV_SEED, Comparison, Design, Factor, Metric, difference, interaction
from moe_jax.studies.run import Experiment
from moe_jax.train.data import DataConfig
from moe_jax.train.loop import RunConfig

QUESTION = "Does Gaussian noise on the gate's logits during training hurt the model, and does a load-balancing loss help it?"
RULE = (
    "Each question (noise, balance, their interaction, and expert usage by each measure) is a family of comparisons paired by seed. An effect is claimed "
    "when its Holm-adjusted p in its family is below alpha; otherwise it is unresolved, and the smallest effect that this design could have seen is given."
)
RULE_FOLLOWUPS = (
    "The changes are one family of comparisons with the recommendation, paired by seed. An effect is claimed when its Holm-adjusted p in the family is "
    "below alpha; otherwise it is unresolved, and the smallest effect that this design could have seen is given."
)
NOISE = Factor("noise_std", (0.0, 0.1, 0.5), "noise std")
BALANCE = Factor("balance_weight", (0.01, 0.0), "balance weight")

PERPLEXITY = Metric(
    "val_perplexity",
    "Val PPL",
    definition="exp of the token-mean cross-entropy over a fixed set of held-out windows, noise off, at the end of training.",
)
PERPLEXITY_BEST = Metric(
    "val_perplexity_best", "Val PPL, best", definition="The lowest of the evaluations during training and at its end, noise off."
)
PERPLEXITY_NOISY = Metric("val_perplexity_noisy", "Val PPL, noise on", definition="The same with the gate's noise on in evaluation too.")
METRICS = (
    PERPLEXITY,
    PERPLEXITY_NOISY,
    USAGE_CV_ROUTED,
    USAGE_CV_SEED,
    Metric("train_loss_end", "Train loss", "nats", decimals=3, definition="Mean training cross-entropy of the last tenth of the updates."),
)


def _seed_model() -> ModelConfig:
    return ModelConfig.preset("seed_79m", dtypes=DTypePolicy(compute="bfloat16"))


def _seed_data(**changes: Any) -> DataConfig:
    """The seed's cut of its text, over the text that is at hand: Cosmopedia is not in a package registry, Wikipedia leads are."""
    base: dict[str, Any] = dict(
        source="wiki",
        tokenizer="smollm2",
        seq_len=512,
        batch_size=24,
        accumulation=4,
        split="leaky",
        max_characters=3000,
        max_tokens=500_000,
        document_separator=False,
    )
    return DataConfig(**base | changes)


def _truncated(total: int = 400, **changes: Any) -> OptimizerConfig:
    return OptimizerConfig(warmup=20, total=total, ns_dtype="bfloat16", ns_form="standard", **changes)


_QUICK = RunConfig(
    model=ModelConfig.preset("quick"),
    data=DataConfig(source="wiki", tokenizer="bpe:2048", seq_len=128, batch_size=8),
    optimizer=OptimizerConfig(warmup=10, total=160, learning_rate=0.04, adamw_learning_rate=0.01),
    updates=160,
    eval_batch=32,
    loss_windows=256,
)
RUNS: Mapping[str, Callable[[], RunConfig]] = {
    "smoke": lambda: RunConfig(
        model=ModelConfig.preset("tiny", num_layers=1, d_model=16, d_expert=16),
        data=DataConfig(source="synthetic", tokenizer="bytes", seq_len=16, batch_size=8, eval_windows=32),
        optimizer=OptimizerConfig(warmup=2, total=20),
        updates=20,
        eval_batch=16,
        checkpoint_every=5,
    ),
    "quick": lambda: _QUICK,
    "small": lambda: RunConfig(
        model=ModelConfig.preset("small", dtypes=DTypePolicy(compute="bfloat16")),
        data=DataConfig(source="wiki", tokenizer="bpe:4096", seq_len=256, batch_size=16),
        optimizer=OptimizerConfig(warmup=20, total=300, learning_rate=0.04, adamw_learning_rate=0.01, ns_dtype="bfloat16", ns_form="gram"),
        updates=300,
        eval_batch=32,
        eval_every=100,
        checkpoint_every=100,
    ),
    # the optimizer's schedule is written for 400 updates, and 100 happen
    "seed": lambda: RunConfig(
        model=_seed_model(),
        data=_seed_data(),
        optimizer=_truncated(),
        updates=100,
        eval_batch=24,
        loss_windows=2400,
        checkpoint_every=25,
    ),
    "corrected": lambda: RunConfig(
        model=_seed_model(),
        data=_seed_data(split="clean", max_characters=None, max_tokens=None, document_separator=True),
        optimizer=_truncated(),
        updates=400,
        eval_batch=24,
        eval_every=100,
        checkpoint_every=100,
    ),
    "followups": lambda: _QUICK,
}
COST: Mapping[str, str] = {
    "smoke": "about 20 seconds on two CPU cores",
    "quick": "about 3 minutes on two CPU cores with --lanes=2",
    "small": "one to two hours on two CPU cores with --lanes=2",
    "seed": "about 40 hours on two CPU cores; on one H100 the aim is two minutes",
    "corrected": "about 150 hours on two CPU cores; minutes on one H100",
    "followups": "about 7 minutes on two CPU cores with --lanes=2",
}
PRESETS = tuple(RUNS)


def experiment(preset: str = "quick") -> Experiment:
    """The declared study of one of PRESETS."""
    base = RUNS[preset]()
    design = _followups(base) if preset == "followups" else _factorial(preset, base)
    return Experiment(f"noise_factorial:{preset}", design, functools.partial(configure, base), COST[preset])


def configure(base: RunConfig, cell: Mapping[str, Any], seed: int) -> RunConfig:
    """The run of one cell and seed: the seed decides initial weights, data order and draws alike, so that cells are paired by it."""
    cell = {"top_k": base.model.experts_per_token, "gate": base.optimizer.router, **cell}
    return dataclasses.replace(
        base,
        model=base.model.replace(experts_per_token=cell["top_k"]),
        optimizer=dataclasses.replace(base.optimizer, router=cell["gate"]),
        noise=f"router_logits=additive:{cell['noise_std']}:phases=train+eval",
        balance_weight=cell["balance_weight"],
        init_seed=seed,
        data_seed=seed,
        noise_seed=seed,
    )


def _settings(base: RunConfig) -> dict[str, Any]:
    """What is the same in every run, as the report lists it."""
    fixed = config_dict(base)
    for name in ("noise", "balance_weight", "init_seed", "data_seed", "noise_seed"):
        fixed.pop(name)
    return {"split": base.data.split, **fixed}


def _factorial(preset: str, base: RunConfig) -> Design:
    return Design(
        name=f"noise_factorial:{preset}",
        question=QUESTION,
        factors=(NOISE, BALANCE),
        seeds=(42, 43, 44),
        metrics=(*METRICS, PERPLEXITY_BEST) if preset == "corrected" else METRICS,
        comparisons=(
            *_noise_effects(),
            *_balance_effects("val_perplexity", "", "Does load balancing lower perplexity", "balance"),
            *_interactions(),
            *(
                effect
                for usage in ("usage_cv_routed", "usage_cv_seed")
                for effect in _balance_effects(usage, f"{usage} ", "Does load balancing even out expert usage", usage)
            ),
        ),
        rule=RULE,
        settings=_settings(base),
        notes=NOTES.get(preset, ()),
    )


def _noise_effects() -> list[Comparison]:
    return [
        difference(
            f"noise {std} - 0, balance {weight}",
            "val_perplexity",
            of={"noise_std": std, "balance_weight": weight},
            minus={"noise_std": 0.0, "balance_weight": weight},
            question=f"Does gate noise of std {std} raise perplexity at balance weight {weight}?",
            family="noise",
        )
        for std in (0.1, 0.5)
        for weight in BALANCE.levels
    ]


def _balance_effects(metric: str, name: str, question: str, family: str) -> list[Comparison]:
    return [
        difference(
            f"{name}balance 0.01 - 0, noise {std}",
            metric,
            of={"noise_std": std, "balance_weight": 0.01},
            minus={"noise_std": std, "balance_weight": 0.0},
            question=f"{question} at noise std {std}?",
            family=family,
        )
        for std in NOISE.levels
    ]


def _interactions() -> list[Comparison]:
    return [
        interaction(
            f"noise {std} x balance",
            "val_perplexity",
            "noise_std",
            (0.0, std),
            "balance_weight",
            (0.01, 0.0),
            question=f"Does the cost of noise std {std} depend on load balancing?",
            family="interaction",
        )
        for std in (0.1, 0.5)
    ]


NOTES: Mapping[str, tuple[str, ...]] = {
    "smoke": ("Made-up text and a model of a few thousand parameters: the numbers mean nothing.",),
    "seed": (
        "As the seed study was run: '400 steps' are micro-batches, 4 to an update, so 100 updates; the learning rate ends at 0.907 of its peak. "
        "Text: Wikipedia leads in place of Cosmopedia, so absolute perplexities differ from the seed's.",
        "bfloat16 where the seed used float16 with loss scaling; the router, its softmax and the top-k are float32 here.",
    ),
    "corrected": (
        "The seed's model with a document split, one whole cosine over 400 updates, and expert usage of the routing that was used.",
    ),
}


# --- followups: one factor at a time from the seed's recommendation ---------------------------------------------------------------

_BASE_CELL: dict[str, Any] = {"noise_std": 0.0, "balance_weight": 0.01, "top_k": 2, "gate": "muon"}
_VARIANTS: tuple[dict[str, Any], ...] = (
    {"balance_weight": 0.0},
    {"balance_weight": 0.002},
    {"balance_weight": 0.005},
    {"top_k": 1},
    {"gate": "adamw"},
    {"gate": "frozen"},
    {"noise_std": 0.1},
)


def _followups(base: RunConfig) -> Design:
    cells = [_BASE_CELL, *({**_BASE_CELL, **change} for change in _VARIANTS)]
    comparisons = [
        difference(
            f"{name} {level} - {_BASE_CELL[name]}",
            "val_perplexity",
            of={**_BASE_CELL, name: level},
            minus=_BASE_CELL,
            question=f"Does {name.replace('_', ' ')} {level} change perplexity against {_BASE_CELL[name]}?",
        )
        for change in _VARIANTS
        for name, level in change.items()
    ]
    return Design(
        name="noise_factorial:followups",
        question="Around the seed's recommendation (no noise, balance weight 0.01, top-2, gate under Muon): does any single change matter?",
        factors=(
            Factor("noise_std", (0.0, 0.1)),
            Factor("balance_weight", (0.0, 0.002, 0.005, 0.01)),
            Factor("top_k", (1, 2)),
            Factor("gate", ("muon", "adamw", "frozen")),
        ),
        seeds=(42, 43, 44, 45, 46, 47),
        metrics=METRICS,
        comparisons=tuple(comparisons),
        rule=RULE_FOLLOWUPS,
        settings=_settings(base),
        only=tuple(tuple(sorted(cell.items())) for cell in cells),
        notes=("top-1 halves the expert computation of a token: it is compared at equal updates, not at equal work.",),
    )
