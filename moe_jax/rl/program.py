"""The compiled programs of reinforcement learning: sample answers, score them as they are, update on them.

B answers, T positions of a prompt and its answer, L MoE layers, E experts, K experts per token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moe_jax.keys import Draw
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import Noise
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.replay import Replay
from moe_jax.rl import grpo
from moe_jax.rl.grpo import Policy
from moe_jax.rl.sample import sample
from moe_jax.routing import RoutingTrace
from moe_jax.train.program import Program
from moe_jax.train.state import Knobs
from moe_jax.train.step import Objective

EXTREME = 1.0  # a token whose log-ratio is further from 0 counts as extreme: e times as likely, or less


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """A pass over sampled tokens. At a position: of the token that follows."""

    log_probs: Float[Array, "B T"]
    entropy: Float[Array, "B T"]  # of the next-token distribution, in nats
    router_entropy: Float[Array, "B T"] | None  # of the softmax over experts, in nats, mean over layers
    trace: RoutingTrace | None  # that was used
    replay: dict[str, Any]  # replay/live_rows, replay/set_overlap: (sum, count) over all positions


class RLProgram(Program):
    """A `Program` whose update is that of the policy, with what samples and what scores."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        objective: Objective,
        policy: Policy,
        response_tokens: int,
        shared_draws: bool = False,
        mesh: Mesh | None = None,
    ):
        like = "old_logprob" if shared_draws else ""
        super().__init__(model, optimizer, objective, mesh, minimised=functools.partial(policy_loss, policy, like))
        # what these give is read on the host, and of an array that lies on several processes only a copy on each can be
        hosts = 1 if mesh is None else len({device.process_index for device in mesh.devices.flat})
        shared = {} if mesh is None or hosts == 1 else {"out_shardings": NamedSharding(mesh, PartitionSpec())}
        self.sample = self._jit("sample", functools.partial(sample, self.model, response_tokens), **shared)
        self.score = self._jit("score", functools.partial(score, self.model, objective.freeze), **shared)


def score(
    model: Model, freeze: tuple[str, ...], params: dict[str, Any], tokens: Array, noise: Noise | None, draw: Draw, replay: Replay | None
) -> Scored:
    """Log-probabilities of tokens [B, T] as `params` give them; the last position's is of token 0."""
    capture = ("trace", "router_logits") if model.config.moe_layers else ()
    log_probs, entropy, out = model.log_probs(params, tokens, following(tokens), noise, draw, capture, replay, freeze)
    routers = None
    if out.router_logits is not None:
        log_p = jax.nn.log_softmax(out.router_logits)
        routers = -(jnp.exp(log_p) * log_p).sum(-1).mean(0)
    return Scored(log_probs, entropy, routers, out.trace, {name: value for name, value in out.aux.items() if name.startswith("replay/")})


def following(tokens: Any) -> Any:
    """The token after each, 0 after the last."""
    return jnp.concatenate([tokens[:, 1:], jnp.zeros_like(tokens[:, :1])], axis=1)


def policy_loss(policy: Policy, like: str, model: Model, params, micro: dict[str, Any], knobs: Knobs, draw: Draw, **how: Any):
    """The loss of a micro-batch for `train.step.make_train_step`.

    micro: tokens [B, T]; mask, old, and where they are used sampler and reference [B, T], at the position before the token that they are of; advantage [B];
    divisor [], what the sum over the micro-batch's answers is divided by. like: the phase whose draws the noise has.
    """
    answers = {name: micro[name] for name in ("advantage", "mask", "old", "sampler", "reference") if name in micro}
    mask = micro["mask"]

    def value_of(log_probs):
        losses, found = jax.vmap(functools.partial(grpo.token_losses, policy))(log_probs, answers)
        summed = jax.vmap(functools.partial(grpo.total, reduction=policy.reduction))(losses, mask).sum()
        return summed / micro["divisor"], found

    def weigh(log_probs, entropy):
        (value, found), slope = jax.value_and_grad(value_of, has_aux=True)(log_probs)
        moved = jnp.where(mask > 0, jnp.abs(log_probs - micro["old"]), 0)
        by_token = {
            "policy/clip_fraction": found["clipped"],
            "policy/entropy": entropy,
            "policy/log_ratio_abs": moved,
            "policy/kl": jnp.where(mask > 0, micro["old"] - log_probs, 0),
            "policy/extreme": moved > EXTREME,
        }
        tokens = mask.sum()
        metrics = {name: (jnp.where(mask > 0, part, 0).sum(), tokens) for name, part in by_token.items()}
        return -slope * (mask > 0), metrics | {"loss": (value, jnp.ones(()))}

    draw = dataclasses.replace(draw, like=like)
    noise = None if knobs.noise is None else knobs.noise.in_phase("train")
    total, metrics, out = model.loss(params, micro["tokens"], following(micro["tokens"]), weigh, noise=noise, draw=draw, **how)
    metrics.pop("accuracy")  # of the weights, which are no shares of tokens here
    return total, metrics, out
