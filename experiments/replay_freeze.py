"""What protects a router from noise? Fine-tuning a trained checkpoint under 5 % relative error on every matmul, with each remedy that was proposed.

Router study 004 blamed a collapse on the router and proposed to freeze it, to replay clean routes, to spare it the noise, wholly or to 1 %, and to
give adaptive quantisation noise (AQN) to the experts alone; none was tried. Here each is an arm beside `noisy`, paired by seed. A seed's arms begin with
the same checkpoint, trained without noise, and read the same batches with the same draws. Presets:

smoke   no download, made-up text, minutes of compilation: shows that everything works, and nothing about noise
quick   the small seed study's shape, small, on real text, five seeds: minutes on two CPU cores
small   the same, larger: hours on two cores
seed    the small seed study's size, 79 M parameters, for a GPU
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import noise_factorial
from moe_jax.config_tools import config_dict
from moe_jax.errors import TraceError
from moe_jax.studies import USAGE_CV_ROUTED, Comparison, Design, Factor, Metric, difference
from moe_jax.studies.run import Experiment, Workshop, describe_devices
from moe_jax.trace_store import TraceReader
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.loop import run
from moe_jax.train.record import record
from moe_jax.train.run_config import RunConfig
from moe_jax.train.run_folder import RunFolder
from moe_jax.train.saved import load_model
from moe_jax.train.step import Objective

SCALE = 0.05
_ON, _REST = "phases=train+eval", f"matmuls=relative:{SCALE}:phases=train+eval"
_AQN = "qerl_code:5e-2:5e-4:10:targets=norm_moe"  # the 30B scripts' values, on the norm that they chose
# arm -> what of the run differs. A scale of 0 keeps a site in the program, so the arms that differ in scales alone share one.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "clean": {"noise": f"matmuls=relative:{SCALE}:phases=eval"},
    "noisy": {"noise": _REST},
    "freeze": {"noise": _REST, "objective": Objective(freeze=("freeze_params",))},
    "replay ids": {"noise": _REST, "replay": "routes"},
    "replay ids+weights": {"noise": _REST, "replay": "routes", "replay_what": "ids+weights"},
    "router excluded": {"noise": f"{_REST},router_gemm=relative:0:{_ON}"},
    "router 1%": {"noise": f"{_REST},router_gemm=relative:0.01:{_ON}"},
    "router only": {"noise": f"matmuls=relative:0:{_ON},router_gemm=relative:{SCALE}:{_ON}"},
    "experts only": {"noise": f"matmuls=relative:0:{_ON},experts=relative:{SCALE}:{_ON}"},
    "AQN both": {"noise": _REST, "aqn": f"{_AQN}:reach=experts+router"},
    "AQN experts": {"noise": _REST, "aqn": f"{_AQN}:reach=experts"},
}
PROPOSALS: Mapping[str, str] = {
    "freeze": "Does freezing the router's weights help a model that is fine-tuned, and then run, on noisy hardware?",
    "replay ids": "Does training on the clean checkpoint's choice of experts, weighted by the live router, help?",
    "replay ids+weights": "Does training on the clean checkpoint's choice of experts and its weights help?",
    "router excluded": "Does it help to spare the router's matmul all noise, in training and in use?",
    "router 1%": "Does it help to give the router's matmul 1 % of error instead of 5 %, in training and in use?",
    "router only": "Is there less damage when of all matmuls the router's alone is noisy?",
    "experts only": "Is there less damage when of all matmuls the experts' alone are noisy?",
    "AQN both": "Does AQN on the scale of the norm before the experts, which the router reads too, help?",
    "AQN experts": "Does AQN that reaches the experts and spares the router help?",
}
QUESTION = "A trained mixture of experts is fine-tuned under 5 % relative error on every matmul: which of the proposed remedies helps, and by how much?"
RULE = (
    "Each proposal is a question and a family of two comparisons with `noisy`, paired by seed: perplexity with the noise on, which decides, and off, which "
    "says what training alone left behind. An effect is claimed when its Holm-adjusted p in its family is below alpha; otherwise it is unresolved, and the "
    "smallest effect that this design could have seen is given. The premises (what noise in training does, whether it moves the router) and the reach of AQN "
    "are families of their own. Thirteen families at 5 % each would make a false claim in every second such study if nothing had any effect: a remedy is "
    "taken as shown to help only with an adjusted p below 0.004 (0.05 / 13); a claim above that is a candidate for new seeds."
)
NOISY = Metric(
    "val_perplexity_noisy",
    "Val PPL, noise on",
    definition="exp of the token-mean cross-entropy over a fixed set of held-out windows at the end of fine-tuning, routed live, on the noisy hardware: "
    "all matmuls at 5 %, and where an arm changes which matmuls are noisy, those.",
)
CLEAN = dataclasses.replace(
    noise_factorial.PERPLEXITY, label="Val PPL, noise off", definition="The same windows and routing without any noise."
)
OVERLAP = Metric(
    "val_reference_overlap",
    "Routes kept",
    better="",
    decimals=4,
    definition="Share of the experts chosen by the checkpoint from which fine-tuning began that each fine-tuned router would still choose, on the held-out "
    "windows, noise off, all layers routed as that checkpoint did.",
)
TRAIN = Metric(
    "train_loss_end",
    "Train loss",
    "nats",
    decimals=3,
    definition="Mean training cross-entropy of the last tenth of the updates, with the noise and the routes of the arm.",
)
NOTES = (
    "Noise is y (1 + 0.05 n) on every matmul, router included, in the forward pass and in both backward passes, as study 004 described it. `clean` trains "
    "without noise and is evaluated on the noisy hardware. The whole damage of the noise is the PPL of `noisy` with noise on minus that of `clean` with "
    "noise off.",
    "The arms that change which matmuls are noisy (router excluded, router 1%, router only, experts only) have that noise in evaluation too, so their PPL "
    "with noise on holds what they save in use. In 'router 1%' the experts, attention and the head have 5 %.",
    "Replayed are the routes of the checkpoint that fine-tuning began with, recorded without noise on its very batches. Evaluation routes live.",
    "AQN in reinforcement learning perturbs the sampling copy alone and trains clean parameters. This fine-tune samples nothing: AQN acts on the norm's scale "
    "in the forward and backward pass of every update, with a new draw in each, so what is tested is training under it. Its sigma is 0 in the first tenth "
    "of the updates, then falls from 0.05 to 0.0005. 'AQN both' is the norm that the 30B port perturbed, 'AQN experts' what its authors meant by sparing the "
    "router. Evaluation has no AQN.",
    "Supervised, next-token fine-tuning on the text of pre-training in another order, without dropout, with the balance loss on: study 004 collapsed in "
    "reinforcement learning, where sampling and training disagree; nothing here shows that part.",
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How long a preset trains and how fast it learns."""

    pretraining: int  # updates before
    updates: int  # of fine-tuning
    rate: float  # peak learning rates of fine-tuning, as a share of those of pre-training
    seeds: tuple[int, ...]
    checkpoint_every: int  # of the fine-tuning runs
    cost: str
    notes: tuple[str, ...] = ()


_FIVE = (42, 43, 44, 45, 46)
_CHOSEN = (
    "Length and learning rate of the fine-tune were chosen on seed 41, which is not among those reported, so that `clean` still improves."
)
SIZES: Mapping[str, Size] = {
    "smoke": Size(
        20, 20, 0.15, (42, 43), 5, "about 5 minutes on two CPU cores, nearly all of it compilation", noise_factorial.NOTES["smoke"]
    ),
    "quick": Size(400, 100, 0.15, _FIVE, 0, "about 17 minutes on two CPU cores, the five checkpoints included", (_CHOSEN,)),
    "small": Size(800, 150, 0.15, _FIVE, 50, "an estimate: three hours on two CPU cores, the five checkpoints included"),
    "seed": Size(
        200,
        100,
        0.15,
        _FIVE,
        50,
        "an estimate: a week on two CPU cores; on one H100, 3 minutes of matmuls at 40 % of its peak (7e16 FLOPs with the checkpoints), not measured",
        (
            "Pre-training passes over the text at hand ten times before the fine-tune begins: its perplexity is that of a model that has begun to repeat it.",
        ),
    ),
}
PRESETS = tuple(SIZES)
_BASES: Mapping[str, str] = {"seed": "corrected"}  # the preset of noise_factorial that gives model and text, where its name differs
_PRETRAINING_SEEDS = 1000  # added to the data seed, so that fine-tuning reads the text in another order


def experiment(preset: str = "quick") -> Experiment:
    """The declared study of one of PRESETS."""
    before, base = pretraining(preset), _base(preset)
    return Experiment(
        f"replay_freeze:{preset}",
        _design(preset, before, base),
        functools.partial(configure, base),
        SIZES[preset].cost,
        functools.partial(prepare, before),
    )


def pretraining(preset: str) -> RunConfig:
    """The run that makes the checkpoint: without noise, and what is evaluated is always the same windows."""
    base, size = noise_factorial.RUNS[_BASES.get(preset, preset)](), SIZES[preset]
    return dataclasses.replace(
        base,
        model=base.model.replace(dropout=0.0),
        updates=size.pretraining,
        optimizer=dataclasses.replace(base.optimizer, total=size.pretraining),
        data=base.data.replace(eval_windows=base.loss_windows or base.data.eval_windows or 8 * base.eval_batch),
        loss_windows=None,
        eval_every=0,
        checkpoint_every=max(1, size.pretraining // 4),
    )


def _base(preset: str) -> RunConfig:
    """Fine-tuning, before an arm changes it."""
    before, size = pretraining(preset), SIZES[preset]
    rates = {name: size.rate * getattr(before.optimizer, name) for name in ("learning_rate", "adamw_learning_rate")}
    optimizer = dataclasses.replace(before.optimizer, warmup=max(1, size.updates // 10), total=size.updates, **rates)
    return dataclasses.replace(before, updates=size.updates, optimizer=optimizer, checkpoint_every=size.checkpoint_every)


def configure(base: RunConfig, cell: Mapping[str, Any], seed: int) -> RunConfig:
    """The run of one arm and seed, with names of folders where `prepare` puts paths."""
    shared = {"start": "checkpoint", "compare": "routes_validation", "init_seed": seed, "data_seed": seed, "noise_seed": seed}
    return dataclasses.replace(base, **shared, **ARMS[cell["arm"]])


def prepare(before: RunConfig, shop: Workshop, config: RunConfig) -> RunConfig:
    """The run with the checkpoint of its seed and that one's routes, made where they are not there yet."""
    seed = config.init_seed
    home = shop.folder / "pretrained" / f"seed-{seed}"
    before = dataclasses.replace(before, init_seed=seed, noise_seed=seed, data_seed=seed + _PRETRAINING_SEEDS)
    if Checkpoints(home / "checkpoints", before, "").latest() != before.updates:
        print(f"training the checkpoint of seed {seed}: {before.updates} updates", file=sys.stderr)
        with RunFolder(home) as folder:
            folder.start(before, sys.argv, describe_devices())
            run(before, shop.program(before), shop.data(before), home, stop=shop.stop)
    places = {split: home / name for split, name in (("train", "routes"), ("validation", "routes_validation"))}
    for split, place in places.items():
        if not is_recorded(place):
            steps = config.updates if split == "train" else sys.maxsize
            record(
                shop.program(before).model,
                load_model(home).params,
                shop.data(config),
                place,
                steps,
                split=split,
                eval_batch=config.eval_batch,
            )
    replay = str(places["train"]) if config.replay else ""
    return dataclasses.replace(config, start=str(home), replay=replay, compare=str(places["validation"]))


def is_recorded(place: Path) -> bool:
    """Whether a folder holds a whole recording of routes."""
    try:
        return bool(TraceReader(place).steps)
    except TraceError:
        return False


def _design(preset: str, before: RunConfig, base: RunConfig) -> Design:
    varied = "noise aqn start replay replay_what record record_what compare init_seed data_seed noise_seed".split()
    fixed = {name: value for name, value in config_dict(base).items() if name not in varied}
    return Design(
        name=f"replay_freeze:{preset}",
        question=QUESTION,
        factors=(Factor("arm", tuple(ARMS)),),
        seeds=SIZES[preset].seeds,
        metrics=(NOISY, CLEAN, OVERLAP, USAGE_CV_ROUTED, TRAIN),
        comparisons=(*_premises(), *(c for arm in PROPOSALS for c in _against(arm, "noisy", PROPOSALS[arm], arm)), *_reach()),
        rule=RULE,
        settings={
            "split": base.data.split,
            "arms": ARMS,
            "pretraining": before,
            "pretraining_data_seed": f"seed + {_PRETRAINING_SEEDS}",
            **fixed,
        },
        notes=(*SIZES[preset].notes, *NOTES),
    )


def _against(arm: str, other: str, question: str, family: str, metrics: tuple[Metric, ...] = (NOISY, CLEAN)) -> list[Comparison]:
    return [
        difference(f"{arm} - {other}, {metric.label}", metric.name, {"arm": arm}, {"arm": other}, question=question, family=family)
        for metric in metrics
    ]


def _premises() -> list[Comparison]:
    damage = "What does noise in training, on every matmul or on some, leave behind when it is off?"
    return [
        *(c for arm in ("noisy", "router only", "experts only") for c in _against(arm, "clean", damage, "damage", (CLEAN,))),
        *_against("noisy", "clean", "Does training on noisy hardware adapt a model to it?", "adaptation", (NOISY,)),
        *_against(
            "noisy", "clean", "Does noise in training move the router, or the load of the experts?", "drift", (OVERLAP, USAGE_CV_ROUTED)
        ),
    ]


def _reach() -> list[Comparison]:
    return _against("AQN experts", "AQN both", "Is AQN better when it spares the router?", "AQN reach")
