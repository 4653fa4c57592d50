"""What decides the numbers of one run of reinforcement learning, as one frozen config."""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.errors import ConfigError, check_known
from moe_jax.model import ModelConfig
from moe_jax.noise import Noise, NoiseSpec
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.replay import WHAT
from moe_jax.rl import tasks
from moe_jax.rl.grpo import Policy
from moe_jax.rl.program import RLProgram
from moe_jax.rl.replay import SOURCES
from moe_jax.rl.rewards import PARSES
from moe_jax.train import tokenizers
from moe_jax.train.run_config import aqn_text, check_numbers, parse_aqn, with_aqn
from moe_jax.train.state import Knobs
from moe_jax.train.step import Objective

SPLITS = ("test", "tune")  # what an evaluation may read: problems that are reported, and others to choose learning rates and warm starts on


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Everything that decides the numbers of one run.

    Each of `steps` has `prompts` problems, `samples` answers to each, their rewards, log-probabilities before the updates, then `mini_batches` updates, each
    of `accumulation` parts. noise: by phase, "rollout" while sampling, "old_logprob" in the pass before the updates, "train" in the updates, "eval" in
    evaluations. aqn, as in RunConfig, acts in the phase rollout alone, drawn once for each step: the sampling copy is noisy, the trained parameters are clean.
    replay: which routes the passes of the trainer take; see moe_jax.rl.replay.
    """

    model: ModelConfig = ModelConfig()
    task: str = "chain_sum"  # moe_jax.rl.tasks.load
    tokenizer: str = ""  # of tasks in words: a tokenizer.json; chain_sum has its own
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: Objective = Objective()
    policy: Policy = Policy()
    steps: int = 80
    prompts: int = 32
    samples: int = 8
    mini_batches: int = 2
    accumulation: int = 1
    prompt_tokens: int = 10  # longer prompts lose their beginning
    response_tokens: int = 18
    sample_rows: int = 0  # answers sampled at a time, which decides the memory and no number; 0: all of a step
    temperature: float = 1.0
    top_p: float = 1.0  # below 1 the importance ratios are of another distribution than was sampled from
    parse: str = "strict"  # how an answer is read; see moe_jax.rl.rewards
    overlong_from: int = 0  # tokens of an answer from which its reward falls, to -1 less at response_tokens; 0: no penalty
    start: str = ""  # a run folder, whose newest parameters the run begins with
    noise: str = ""  # a NoiseSpec in its grammar
    aqn: str = ""
    replay: str = ""
    replay_what: str = "ids"  # or ids+weights
    shared_draws: bool = False  # the updates meet the same noise as the pass before them, instead of fresh noise
    balance_weight: float = 0.0
    z_weight: float = 0.0
    init_seed: int = 0
    data_seed: int = 0  # of the problems' order
    sample_seed: int = 0
    noise_seed: int = 0
    eval_split: str = "test"
    eval_problems: int = 512
    eval_samples: int = 1  # answers at eval_temperature to each problem; beside the greedy one
    eval_temperature: float = 1.0
    eval_top_p: float = 1.0
    eval_every: int = 20  # steps between evaluations; there is one before the first and one after the last
    checkpoint_every: int = 0  # updates between checkpoints, and one at the end; 0: none

    def __post_init__(self):
        least = {"steps": 1, "prompts": 1, "samples": 2, "mini_batches": 1, "accumulation": 1, "prompt_tokens": 1, "response_tokens": 1}
        least |= {"eval_problems": 1, "eval_samples": 0, "eval_every": 1, "checkpoint_every": 0, "overlong_from": 0, "sample_rows": 0}
        check_numbers(self, least)
        if self.answers >= 1 << 31:
            raise ConfigError(f"prompts x samples = {self.answers} answers in a step; lower one of them")
        if self.answers % (self.mini_batches * self.accumulation):
            raise ConfigError(
                f"prompts x samples = {self.answers} answers do not divide into {self.mini_batches} mini-batches of {self.accumulation} parts"
            )
        if self.sample_rows and self.answers % self.sample_rows:
            raise ConfigError(f"sample_rows={self.sample_rows} does not divide the {self.answers} answers of a step")
        if self.eval_problems > self.answers and self.eval_problems % self.answers:
            raise ConfigError(f"eval_problems={self.eval_problems} must be a multiple of the {self.answers} answers of a step")
        if self.length > self.model.max_seq_len:
            raise ConfigError(
                f"prompt_tokens + response_tokens = {self.length} exceeds model.max_seq_len={self.model.max_seq_len}; raise it or lower them"
            )
        if self.overlong_from >= self.response_tokens:
            raise ConfigError(f"overlong_from={self.overlong_from} must be below response_tokens={self.response_tokens}")
        choices = {"parse": PARSES, "replay": ("", *SOURCES), "replay_what": WHAT, "eval_split": SPLITS}
        for field, known in choices.items():
            check_known(field, getattr(self, field), known)
        for field in ("temperature", "eval_temperature"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be finite and above 0, got {getattr(self, field)}")
        for field in ("top_p", "eval_top_p"):
            if not 0 < getattr(self, field) <= 1:
                raise ConfigError(f"{field} must be in (0, 1], got {getattr(self, field)}")
        if self.replay and not self.model.moe_layers:
            raise ConfigError("this model has no router, so there are no routes to replay")
        if (self.replay == "reference" or self.policy.kl_weight) and not self.start:
            raise ConfigError("replay=reference and policy.kl_weight need a checkpoint to compare with: set start")
        if self.aqn:
            object.__setattr__(self, "aqn", aqn_text(parse_aqn(self.aqn)))
        self.noise_of(0)

    @property
    def answers(self) -> int:
        """Of one step."""
        return self.prompts * self.samples

    @property
    def at_once(self) -> int:
        """Answers that are sampled by one call of the program."""
        return self.sample_rows or self.answers

    @property
    def rows(self) -> int:
        """Answers in one forward pass of the trainer."""
        return self.answers // (self.mini_batches * self.accumulation)

    @property
    def length(self) -> int:
        """Tokens of a prompt and an answer."""
        return self.prompt_tokens + self.response_tokens

    @property
    def updates(self) -> int:
        return self.steps * self.mini_batches

    def noise_of(self, step: int) -> Noise | None:
        """The noise of a step in all its phases."""
        spec = NoiseSpec.parse(self.noise)
        if self.aqn:
            table = parse_aqn(self.aqn).stage_table(self.steps)
            spec = with_aqn(spec, parse_aqn(self.aqn).spec([sigma for first, sigma in table if first <= step][-1]))
        return self.model.resolve(spec) if spec.sites else None

    def knobs(self, noise: Noise | None) -> Knobs:
        """The values that an update's program takes."""
        return Knobs(noise, jnp.uint32(self.noise_seed), jnp.float32(self.balance_weight), jnp.float32(self.z_weight))

    def load_task(self) -> tasks.Task:
        """The problems. Raises ConfigError and DataError as `tasks.load`."""
        tokenizer = tokenizers.load(self.tokenizer) if self.tokenizer else None
        return dataclasses.replace(tasks.load(self.task, tokenizer), parse=self.parse)

    def program(self, mesh: Mesh | None = None) -> RLProgram:
        return RLProgram(*self.structure(), mesh=mesh)

    def structure(self) -> tuple:
        """What a program depends on: runs with equal structures share one. (jax compiles again for another structure of noise or another shape.)"""
        return self.model, self.optimizer, self.objective, self.policy, self.response_tokens, self.shared_draws
