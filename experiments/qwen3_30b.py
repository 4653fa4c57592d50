"""The studies of a 30B mixture of experts under noise, and the same studies on a mixture that two CPU cores train in a minute.

Seed study 004 saw reinforcement learning of Qwen3-30B-A3B collapse under 5 % relative error and blamed the router. It ran one noisy run, had no baseline
at hand, did not noise the experts, and measured no logit. Three declared studies, each in a file of its own, ask what it left open:

sensitivity   which part of the damage is due to experts that routers choose otherwise: the causal decomposition, on real text
e7b_matrix    the seed's noise as it ran and as it was described, each operator alone, and each proposal of its authors, beside the clean baseline
logit_offset  what relative noise on router logits is relative to, and how many experts it changes

What they share is here: the recipe of the seed's run, the shapes and lengths of the presets, the checkpoint that all begin with, and the launch lines.

smoke  no download, made-up text, seconds and compilation: shows that everything works, and nothing about noise
mini   4 layers, 16 experts, 4 of them per token, trained on real text for a minute first: minutes on two CPU cores
full   Qwen3-30B-A3B, from a folder of its published weights: one host of accelerators to measure, a slice to train
"""

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_jax.config_tools import config_dict, differences
from moe_jax.errors import ConfigError
from moe_jax.model import DTypePolicy, Model, ModelConfig
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.studies.run import Experiment, Workshop, describe_devices
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.data import DataConfig
from moe_jax.train.loop import run
from moe_jax.train.run_config import RunConfig
from moe_jax.train.run_folder import RunFolder, some
from moe_jax.train.saved import Saved, load_model
from moe_jax.train.writers import Transfer

STUDIES = ("sensitivity", "e7b_matrix", "logit_offset")  # in the order in which they run; file experiments/qwen3_30b_STUDY.py
PRESETS = ("smoke", "mini", "full")
WEIGHTS = "models/Qwen3-30B-A3B"  # a folder as Hugging Face publishes it: config.json, tokenizer.json, *.safetensors
WEIGHTS_BASE = "models/Qwen3-30B-A3B-Base"  # what the seed's run began with
WARM_UP = "start"  # stands for the checkpoint of the warm-up run, and is its folder's name


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The seed's 30B reinforcement learning run, as its scripts and the defaults of its framework set it (not as its report tells it).

    Source of every field: scripts/run_e7{a,b}_qwen3_30b.sh of the seed's repository, where no other is named. The supervised studies here take the
    optimizer and the number of updates; the reinforcement learning part takes all of it.
    """

    model: str = WEIGHTS_BASE  # actor_rollout_ref.model.path: the Base model, not Instruct
    dataset: str = "gsm8k"  # 7,473 problems to train on, 1,319 of the test split to evaluate on
    epochs: int = 1
    steps: int = 58  # 7,473 // 128, the last partial batch dropped
    prompts: int = 128  # data.train_batch_size, prompts per step
    samples: int = 16  # actor_rollout_ref.rollout.n, answers per prompt
    prompts_per_update: int = 32  # ppo_mini_batch_size: 4 updates per step, 232 in all
    advantage: str = "grpo"  # (reward - group mean) / (group std + 1e-6)
    clip_low: float = 0.2  # of the importance ratio
    clip_high: float = 0.28
    dual_clip: float = 10.0  # clip_ratio_c
    loss_reduction: str = "token_mean"  # over all tokens of a mini-batch
    kl_weight: float = 0.0  # neither in the loss nor in the reward
    entropy_weight: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    prompt_tokens: int = 2048  # at most; longer prompts lose their beginning
    response_tokens: int = 8192  # at most
    overlong_from: int = 4096  # reward falls linearly from 0 here ...
    overlong_penalty: float = -1.0  # ... to this at response_tokens
    reward: str = "strict #### number in the last 300 characters: 1, else 0"  # the DAPO reward manager
    learning_rate: float = 1e-6  # AdamW, constant after the warm-up
    warmup_updates: int = 10
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = (
        1.0  # the framework's default. The seed's report says that there was no clipping: the norm it shows is taken before it
    )
    balance_weight: float = 0.0  # mbridge sets load balancing to "none" for reinforcement learning
    router_dtype: str = "float32"  # moe_router_dtype
    noise_scale: float = 0.05  # VERL_NOISY_OPS_SCALE, relative, matmuls only
    test_every: int = 10  # steps, none before the first
    test_temperature: float = 1.0  # noise on
    test_top_p: float = 0.7

    @property
    def updates(self) -> int:
        return self.steps * (self.prompts // self.prompts_per_update)

    def optimizer(self, rate: float | None = None) -> OptimizerConfig:
        """AdamW on everything, no decay on norms and biases as in Megatron; rate: another peak than the recipe's, for a model that is not 30B."""
        return OptimizerConfig(
            variant="moonlight",
            matrices="adamw",
            router="adamw",
            adamw_learning_rate=self.learning_rate if rate is None else rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            schedule="warmup_constant",
            warmup=self.warmup_updates,
            total=self.updates,
        )


RECIPE = Recipe()

_STUDY = ".venv/bin/python -m launch.study --experiment=qwen3_30b.{study}:full --workdir=$RUNS/qwen3_30b/{study}"
_ON_ALL = 'gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all --command="cd moe_jax && {command}"'
_MEASURE: Mapping[str, str] = {
    "v5p slice: 4 chips of one host (2x2x1, 380 GB); 61 GB of bfloat16 weights": _ON_ALL.format(command=f"{_STUDY} --mesh=fsdp=4"),
    "v6e slice: 8 chips of one host (2x4, 256 GB)": _ON_ALL.format(command=f"{_STUDY} --mesh=fsdp=8"),
    "8 H100 of one host (640 GB)": f"{_STUDY} --mesh=fsdp=8",
}
_TRAIN: Mapping[str, str] = {
    "v5p slice: 16 chips, 4 hosts (2x2x4, 1,520 GB); 16 bytes per parameter are 488 GB, 31 a chip": _ON_ALL.format(
        command=f"{_STUDY} --mesh=fsdp=16 --connect_timeout=120"
    ),
    "v6e slice: 32 chips, 8 hosts (4x8, 1,024 GB); 15 GB a chip": _ON_ALL.format(command=f"{_STUDY} --mesh=fsdp=32 --connect_timeout=120"),
    "8 H100 of one host (640 GB); 61 GB a GPU before activations, 63 of 68 GiB with them by the memory model: tight, not tried": f"{_STUDY} --mesh=fsdp=8",
}
# study -> machine -> the command that runs it there, again after every interruption. $TPU and $ZONE name the slice, $RUNS a folder that
# all hosts share
LAUNCH: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        study: {machine: line.format(study=study) for machine, line in (_TRAIN if study == "e7b_matrix" else _MEASURE).items()}
        for study in STUDIES
    }
)


def experiment(preset: str, study: str) -> Experiment:
    """One of STUDIES, in one of PRESETS."""
    found = importlib.import_module(f"experiments.qwen3_30b_{study}").experiment(preset)
    return dataclasses.replace(found, launch=LAUNCH[study] if preset == "full" else {})


def warm_up(preset: str) -> RunConfig | None:
    """The clean run whose checkpoint every study of the preset begins with; None where published weights are there."""
    updates = {"smoke": 20, "mini": 500}.get(preset)
    if updates is None:
        return None
    return RunConfig(
        model=_MODELS[preset],
        data=_TEXTS[preset],
        optimizer=OptimizerConfig(warmup=updates // 20, total=updates, learning_rate=0.04, adamw_learning_rate=0.01),
        updates=updates,
        eval_batch=_TEXTS[preset].batch_size,
        checkpoint_every=max(1, updates // 4),
    )


def base(preset: str, weights: str = WEIGHTS, params: str = "bfloat16") -> RunConfig:
    """A run of the preset, before a study changes it: shape, text and where it begins.

    weights, params: of the 30B model, a folder and the type it has.
    """
    before, text, model = warm_up(preset), _TEXTS[preset], _MODELS[preset]
    if before is None:
        model, text = model.replace(dtypes=DTypePolicy(params, "bfloat16")), text.replace(tokenizer=f"{weights}/tokenizer.json")
    return RunConfig(
        model=model,
        data=text,
        optimizer=RECIPE.optimizer(),
        updates=1,
        start=weights if before is None else WARM_UP,
        eval_batch=text.batch_size,
        balance_weight=RECIPE.balance_weight,
    )


_MODELS: Mapping[str, ModelConfig] = {
    "smoke": ModelConfig.preset("qwen3_tiny", num_layers=2, d_model=16, head_dim=8, num_experts=8, experts_per_token=2, d_expert=8),
    "mini": ModelConfig.preset("qwen3_tiny", vocab_size=2048),
    "full": ModelConfig.preset("qwen3_30b_a3b", remat="full", loss_chunk_size=512),
}
_TEXTS: Mapping[str, DataConfig] = {
    "smoke": DataConfig(source="synthetic", tokenizer="bytes", seq_len=16, batch_size=8, eval_windows=32),
    "mini": DataConfig(source="wiki", tokenizer="bpe:2048", seq_len=128, batch_size=8, eval_windows=128),
    "full": DataConfig(source="wiki", tokenizer=f"{WEIGHTS}/tokenizer.json", seq_len=512, batch_size=32, eval_windows=256),
}


def prepare(preset: str, shop: Workshop, config: RunConfig) -> RunConfig:
    """The run with the checkpoint that it begins with: the warm-up's, trained here where it is not there yet, or the published one."""
    before = warm_up(preset)
    if before is None:
        if not Path(config.start).is_dir():
            raise ConfigError(f"no folder {config.start}: put the published checkpoint there (config.json, tokenizer.json, *.safetensors)")
        return config
    home = shop.folder / WARM_UP
    if Checkpoints(home / "checkpoints", before, "").latest() != before.updates:
        print(f"training the checkpoint that all runs begin with: {before.updates} updates", file=sys.stderr)
        with RunFolder(home) as folder:
            folder.start(before, sys.argv, describe_devices())
            run(before, shop.program(before), shop.data(before), home, stop=shop.stop)
    return dataclasses.replace(config, start=str(home))


def checkpoint(config: RunConfig) -> Saved:
    """What a prepared run begins with, as the model of the run. Raises ConfigError when another model is there."""
    saved = load_model(config.start)
    if changed := differences(saved.config.what(), config.model.what()):
        raise ConfigError(f"the model in {config.start} is another one than this study's: {some(changed, 8)}")
    return dataclasses.replace(saved, config=config.model)


def loaded(shop: Workshop, config: RunConfig) -> tuple[Model, Any]:
    """The model of a prepared run and its parameters, read once and on the study's devices."""

    def read() -> tuple[Model, Any]:
        model = Model(config.model, shop.mesh)
        return model, checkpoint(config).load(model, Transfer("read"))

    return shop.once(("model", config.start), read)


def settings(preset: str, config: RunConfig, *names: str) -> dict[str, Any]:
    """What is the same in every run of a study, for its design: these fields of the config, and the run that made the checkpoint."""
    fixed = {name: value for name, value in config_dict(config).items() if name in names}
    before = warm_up(preset)
    return {"split": config.data.split, **fixed, **({} if before is None else {"warm_up": before})}


SCOPE: Mapping[str, tuple[str, ...]] = {
    "smoke": ("The text is made up and the model is hardly trained: no number here says anything about noise.",),
    "mini": (
        "One checkpoint, of a mixture with 4 layers and 16 experts that was trained without noise for 500 updates. An interval holds "
        "for this checkpoint: another one, or 30 billion parameters, can behave otherwise.",
    ),
    "full": ("One checkpoint, the published one. An interval holds for this checkpoint.",),
}
