"""What decides the numbers of one run, as one frozen config: model, text, optimizer, noise, AQN, seeds, where it begins, what it replays."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.config_tools import apply_overrides
from moe_jax.errors import ConfigError, check_known
from moe_jax.model import ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.noise.aqn import AQN
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.replay import WHAT
from moe_jax.train.data import DataConfig
from moe_jax.train.program import Program
from moe_jax.train.state import Knobs
from moe_jax.train.step import Objective


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of one run.

    aqn, written as VARIANT:START:END:STAGES[:targets=…][:reach=…][:epochs=…], e.g. qerl_code:1e-2:1e-4:10:reach=experts (of the variant epochs,
    STAGES counts those of an epoch), is added to the norms' scales in the forward and backward pass of every update, with a new draw in each. RL
    perturbs its sampling copy alone and trains clean parameters on what that copy wrote; a supervised run samples nothing, so here training itself
    sees the noise, and the parameters learn under it. Evaluation does not.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: Objective = Objective()
    updates: int = 100
    start: str = ""  # a run folder, whose newest parameters the run begins with; the optimizer begins anew
    noise: str = ""  # a NoiseSpec in its grammar, e.g. router_logits=additive:0.1:phases=train
    aqn: str = ""  # adaptive quantisation noise on the norms
    replay: str = ""  # a folder of recorded routes, those of the update with the same number
    replay_what: str = "ids"  # or ids+weights
    record: str = ""  # a folder that the routes of every update are written to
    record_what: str = "ids"  # or ids+weights
    compare: str = (
        ""  # a folder of routes over the validation batches: an evaluation says how many of their experts the routers still choose
    )
    balance_weight: float = 0.01
    z_weight: float = 0.0
    init_seed: int = 0
    data_seed: int = 0
    noise_seed: int = 0  # of noise and dropout
    eval_every: int = 0  # updates between evaluations; 0: once, at the end
    eval_batch: int = 32  # windows at a time
    loss_windows: int | None = None  # an evaluation's loss is over the first so many windows; None: all. Expert usage is over all
    log_every: int = 1  # updates between rows of metrics.jsonl
    checkpoint_every: int = 0  # updates between checkpoints, and one at the end; 0: none

    def __post_init__(self):
        check_numbers(self, {"updates": 1, "eval_every": 0, "eval_batch": 1, "log_every": 1, "checkpoint_every": 0})
        if self.data.seq_len > self.model.max_seq_len:
            raise ConfigError(f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}")
        if self.loss_windows is not None and (self.loss_windows < 1 or self.loss_windows % self.eval_batch):
            raise ConfigError(f"loss_windows={self.loss_windows} must be a positive multiple of eval_batch={self.eval_batch}")
        for field in ("replay_what", "record_what"):
            check_known(field, getattr(self, field), WHAT)
        if (self.replay or self.record or self.compare) and not self.model.moe_layers:
            raise ConfigError("this model has no router, so there are no routes to replay, record or compare")
        if self.record and self.record in (self.replay, self.compare):
            raise ConfigError(f"routes would be recorded into {self.record!r}, which the run also reads; record into another folder")
        if self.aqn:
            object.__setattr__(self, "aqn", aqn_text(parse_aqn(self.aqn)))  # one text for one meaning
        self.model.resolve(self.spec())

    def _stages(self) -> list[tuple[int, float]]:
        return parse_aqn(self.aqn).stage_table(self.updates) if self.aqn else [(0, 0.0)]

    def stage(self, update: int) -> int:
        """The first update of the stage of AQN that `update` (from 0) is in; 0 without AQN. The knobs change with it alone."""
        return max(first for first, _ in self._stages() if first <= update)

    def spec(self, update: int = 0) -> NoiseSpec:
        """The noise of an update: `noise`, and AQN as its schedule has it then."""
        noise = NoiseSpec.parse(self.noise)
        if not self.aqn:
            return noise
        aqn = parse_aqn(self.aqn)
        sites = aqn.spec(dict(self._stages())[self.stage(update)]).sites
        added = NoiseSpec({site: dataclasses.replace(value, phases=("train",)) for site, value in sites.items()})
        return with_aqn(noise, added)

    def knobs(self, update: int = 0) -> Knobs:
        """The values that the compiled program takes in an update, numbered from 0."""
        spec = self.spec(update)
        noise = self.model.resolve(spec) if spec.sites else None
        return Knobs(noise, jnp.uint32(self.noise_seed), jnp.float32(self.balance_weight), jnp.float32(self.z_weight))

    def train_batch(self) -> dict[str, Any]:
        """Shapes of what an update's program is given, [A, B, S], of whole batches."""
        data = self.data
        tokens = jax.ShapeDtypeStruct((data.accumulation, data.batch_size, data.seq_len), jnp.int32)
        return {"tokens": tokens, "targets": tokens}

    def program(self, mesh: Mesh | None = None) -> Program:
        return Program(self.model, self.optimizer, self.objective, mesh, record=bool(self.record))

    def structure(self) -> tuple:
        """What a program depends on: runs with equal structures share one compilation."""
        noise = self.knobs().noise
        shape = (self.data.accumulation, self.data.batch_size, self.data.seq_len, self.eval_batch)
        routes = (self.replay_what if self.replay else "", bool(self.record))
        return self.model, self.optimizer, self.objective, shape, routes, None if noise is None else noise.structure


def check_numbers(config: Any, least: Mapping[str, int]) -> None:
    """Raises ConfigError for a field that is less than it must be at `least`, a weight that is not finite or negative, and a seed that is not of 32 bits."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in least and value < least[name]:
            raise ConfigError(f"{name} must be at least {least[name]}, got {value}")
        if name.endswith("_weight") and not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be finite and not negative, got {value}")
        if name.endswith("_seed") and not 0 <= value < 1 << 32:
            raise ConfigError(f"{name} must be from 0 to 2**32 - 1, got {value}")


def parse_aqn(text: str) -> AQN:
    """The schedule that `aqn_text` writes, or a shorter text of it: what is not said is AQN's default. Raises ConfigError."""
    names = iter(("variant", "start", "end", "stages_per_epoch" if text.startswith("epochs:") else "stages"))
    settings = [part.replace("+", ",") if "=" in part else f"{next(names, 'a fifth value')}={part}" for part in text.split(":")]
    fields = [setting.partition("=")[0] for setting in settings]
    twice = [field for field in fields if fields.count(field) > 1]
    try:
        if twice:
            raise ConfigError(f"{twice[0]} is given twice")
        return apply_overrides(AQN(), settings)
    except ConfigError as error:
        why = str(error).removeprefix("--set ")
        raise ConfigError(
            f"cannot read AQN {text!r}: {why}; write VARIANT:START:END:STAGES, e.g. qerl_code:1e-2:1e-4:10:reach=experts"
        ) from None


def with_aqn(noise: NoiseSpec, added: NoiseSpec) -> NoiseSpec:
    """Both. Raises ConfigError where they share a site."""
    twice = sorted(noise.by_site().keys() & added.by_site().keys())
    if twice:
        raise ConfigError(f"noise and aqn both act at {', '.join(twice)}; take it out of one of them")
    return NoiseSpec(noise.sites | added.sites)


def aqn_text(aqn: AQN) -> str:
    """All of a schedule as text that `parse_aqn` reads."""
    by_epoch = aqn.variant == "epochs"
    parts = [
        aqn.variant,
        aqn.start,
        aqn.end,
        aqn.stages_per_epoch if by_epoch else aqn.stages,
        *([f"epochs={aqn.epochs}"] if by_epoch else []),
    ]
    return ":".join([*map(str, parts), f"targets={'+'.join(aqn.targets)}", f"reach={'+'.join(aqn.reach)}"])
