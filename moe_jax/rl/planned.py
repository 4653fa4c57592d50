"""A run of reinforcement learning as a plan sees it: the programs that its loop calls, on abstract arrays."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.errors import ConfigError
from moe_jax.plan.steps import Shapes, any_sampling, draw_of
from moe_jax.rl.config import RLConfig
from moe_jax.rl.program import RLProgram
from moe_jax.train.data import DataConfig
from moe_jax.train.run_config import RunConfig


class PolicyShapes(Shapes):
    """Whole answers are sampled in one program, as many as `at_once`; `score` is the pass before the updates, over a micro-batch of them."""

    steps = ("train", "score", "sample")
    among_training = ("score", "sample")
    config: "PolicyRun"
    program: RLProgram

    @staticmethod
    def batches(config: RunConfig) -> str:
        rl = config.rl  # type: ignore[attr-defined]
        return (
            f"sampling: {rl.at_once} of {rl.answers} answers of at most {rl.response_tokens} tokens to prompts of {rl.prompt_tokens}; "
            f"scoring: {config.data.batch_size} answers"
        )

    def beside(self, step: str) -> int:
        """The optimizer's state, and the reference policy where there is one."""
        rl = self.config.rl
        reference = self._bytes(self._state.params) if rl.replay == "reference" or rl.policy.kl_weight else 0
        return reference + super().beside(step)

    def score(self) -> Any:
        tokens = self._tokens((self.config.data.batch_size, self.config.data.seq_len))
        return self.program.score.lower(self.model.abstract(), tokens, self._knobs().noise, draw_of("old_logprob"), None)

    def sample(self) -> Any:
        rl = self.config.rl
        prompts, lengths = self._tokens((rl.at_once, rl.prompt_tokens)), self._tokens((rl.at_once,))
        return self.program.sample.lower(self.model.abstract(), prompts, lengths, self._knobs().noise, draw_of("rollout"), any_sampling())


@dataclasses.dataclass(frozen=True)
class PolicyRun(RunConfig):
    """What moe_jax.plan compiles of an RLConfig: its train step is the policy's update, its batch the answers of one micro-batch after the other."""

    rl: RLConfig = RLConfig()
    shapes: ClassVar = PolicyShapes

    def __post_init__(self):
        object.__setattr__(self, "eval_batch", self.data.batch_size)  # answers that are scored at a time; it has no other evaluation
        if self.data.seq_len != self.rl.length:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len}: a sequence of this run is a prompt and its answer, {self.rl.prompt_tokens} + "
                f"{self.rl.response_tokens} tokens; leave --seq out"
            )
        super().__post_init__()

    @classmethod
    def of(cls, rl: RLConfig) -> "PolicyRun":
        """The run of an RLConfig. AQN, which acts in sampling alone, is left out."""
        tokenizer = rl.tokenizer or "bytes"
        data = DataConfig("synthetic", tokenizer, seq_len=rl.length, batch_size=rl.rows, accumulation=rl.accumulation)
        shared = {name: getattr(rl, name) for name in ("model", "optimizer", "objective", "updates", "start", "balance_weight", "z_weight")}
        return cls(**shared, data=data, noise=rl.noise, rl=rl)

    def program(self, mesh: Mesh | None = None) -> RLProgram:
        return dataclasses.replace(self.rl, model=self.model, optimizer=self.optimizer, objective=self.objective).program(mesh)

    def train_batch(self) -> dict[str, Any]:
        data = self.data
        parts, rows = (data.accumulation,), (data.accumulation, data.batch_size)
        each = jax.ShapeDtypeStruct((*rows, data.seq_len), jnp.float32)
        count = jax.ShapeDtypeStruct(parts, jnp.int32)
        batch: dict[str, Any] = {"tokens": jax.ShapeDtypeStruct(each.shape, jnp.int32), "mask": each, "old": each}
        batch |= {"sampler": each} if self.rl.policy.importance_cap else {}
        batch |= {"reference": each} if self.rl.policy.kl_weight else {}
        divisor = jax.ShapeDtypeStruct(parts, jnp.float32)
        return batch | {"advantage": jax.ShapeDtypeStruct(rows, jnp.float32), "divisor": divisor, "draw": (count, count)}
