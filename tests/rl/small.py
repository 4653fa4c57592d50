"""The smallest run of reinforcement learning that routes: two layers, one of them dense, sums of two terms, programs that every test shares.

Fresh parameters are never right, so what differs between answers is the penalty on long ones: `overlong_from`.
"""

import functools
from dataclasses import replace

import jax
import numpy as np

from moe_jax.model import ModelConfig
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.rl import tasks
from moe_jax.rl.config import RLConfig
from moe_jax.rl.program import RLProgram
from moe_jax.train.checkpoint import Checkpoints

# wide weights, so that tokens and routes depend on what was read; dense dispatch compiles fastest
MODEL = ModelConfig(
    vocab_size=18,
    d_model=16,
    num_layers=2,
    dense_layers=(0,),
    num_heads=2,
    max_seq_len=12,
    num_experts=4,
    d_expert=8,
    gated=False,
    init_std=0.3,
    dispatch="dense",
)
OPTIMIZER = OptimizerConfig(
    matrices="adamw", router="adamw", adamw_learning_rate=0.01, weight_decay=0.0, schedule="warmup_constant", warmup=0, total=100
)
CONFIG = RLConfig(
    model=MODEL,
    task="chain_sum:terms=2",
    optimizer=OPTIMIZER,
    steps=2,
    prompts=3,
    samples=4,
    mini_batches=3,
    prompt_tokens=6,
    response_tokens=6,
    overlong_from=1,
    eval_problems=12,
    eval_every=1,
    checkpoint_every=1,
)
NOISY = replace(CONFIG, noise="matmuls=relative:0.05:phases=rollout")
TASK = CONFIG.load_task()

assert TASK.vocab_size == MODEL.vocab_size and len(TASK.encode("29+29=")) == CONFIG.prompt_tokens


@functools.cache
def _program(structure) -> RLProgram:
    return RLProgram(*structure)


def program_of(config: RLConfig) -> RLProgram:
    """One for each structure, which compiles once for each noise and shape in a session."""
    return _program(config.structure())


def bits(tree) -> list[bytes]:
    """Every leaf's bytes."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def rows_of(result) -> dict:
    """The series of a run without what a clock said."""
    return {name: values for name, values in result.series.items() if not name.startswith("seconds/")}


def saved(folder, config: RLConfig) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", config, TASK.fingerprint)


__all__ = ["CONFIG", "MODEL", "NOISY", "OPTIMIZER", "TASK", "bits", "program_of", "replace", "rows_of", "saved", "tasks"]
