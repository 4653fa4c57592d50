"""The objective of reinforcement learning from rewards of whole answers, as functions of one answer or one group of them.

G answers to one prompt, S positions of an answer; masks are 1 on its sampled tokens. d log-ratios new - old, in nats.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.errors import ConfigError, check_known

LEVELS = ("token", "sequence", "sequence_token")
REDUCTIONS = ("token_mean", "sequence_mean")
LARGEST = 20.0  # a log-ratio further from 0 is cut off here, so that its exponential is finite


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is maximised: static choices. The defaults are those of study 004 (DAPO's, arXiv 2503.14476, without resampling of groups)."""

    normalise: bool = True  # advantages over their group's standard deviation (GRPO); False: Dr. GRPO
    clip_low: float = 0.2  # ratios below 1 - clip_low gain nothing
    clip_high: float = 0.28  # nor those above 1 + clip_high
    dual_clip: float | None = 10.0  # the largest multiple of a bad advantage that counts; None: none
    level: str = "token"  # of the ratio: each "token"'s; the "sequence"'s (GSPO); "sequence_token": its value with each token's gradient
    reduction: str = "token_mean"  # over all tokens of a mini-batch, or "sequence_mean": over each answer's, then over answers
    kl_weight: float = 0.0  # of k3 to the reference
    importance_cap: float = 0.0  # truncated importance weights between sampler and trainer, at most this; 0: none

    def __post_init__(self):
        for field, known in (("level", LEVELS), ("reduction", REDUCTIONS)):
            check_known(field, getattr(self, field), known)
        if not 0 <= self.clip_low < 1 or not 0 <= self.clip_high < math.inf:
            raise ConfigError(f"clip_low must be in [0, 1) and clip_high finite and not negative, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise ConfigError(f"dual_clip must be finite and above 1, or none, got {self.dual_clip}")
        for field in ("kl_weight", "importance_cap"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(f"{field} must be finite and not negative, got {getattr(self, field)}")


def group_advantages(rewards: Float[Array, "G"], normalise: bool = True, eps: float = 1e-6) -> Float[Array, "G"]:
    """How much better each answer is than its group: r - mean, over the sample standard deviation + eps (GRPO, arXiv 2402.03300, 4.1.2).

    normalise=False leaves the deviation out (Dr. GRPO, arXiv 2503.20783). 0 for a group of equal rewards, and of one.
    """
    rewards = rewards - rewards[:1]  # else the mean of equal numbers may not be that number, and the deviation is as small as that error
    centred = rewards - rewards.mean()
    return centred / (jnp.std(rewards, ddof=min(1, rewards.size - 1)) + eps) if normalise else centred


def ratio(log_ratio: Float[Array, "S"]) -> Float[Array, "S"]:
    """exp(d), d cut off at ±LARGEST."""
    return jnp.exp(jnp.clip(log_ratio, -LARGEST, LARGEST))


def sequence_log_ratio(log_ratio: Float[Array, "S"], mask: Float[Array, "S"], token_gradient: bool = False) -> Float[Array, "S"]:
    """The mean of an answer's log-ratios, at each of its tokens (GSPO, arXiv 2507.18071, eq. 7).

    token_gradient: the same value, with the gradient of each token's own log-ratio (GSPO-token, eq. 14).
    """
    mean = (log_ratio * mask).sum() / jnp.maximum(mask.sum(), 1)
    stop = jax.lax.stop_gradient
    return stop(mean) + log_ratio - stop(log_ratio) if token_gradient else jnp.broadcast_to(mean, log_ratio.shape)


def clipped_loss(
    log_ratio: Float[Array, "S"], advantage: Float[Array, ""], clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Float[Array, "S"], Float[Array, "S"]]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) of each token (PPO, arXiv 1707.06347, eq. 7), and 1 where the clip decides.

    Two bounds: DAPO, arXiv 2503.14476, eq. 10. dual_clip: where A < 0 at most -dual_clip A (dual-clip PPO, arXiv 1912.09729, eq. 5); decides counts too.
    """
    r = ratio(log_ratio)
    free, held = -r * advantage, -jnp.clip(r, 1 - clip_low, 1 + clip_high) * advantage
    decided = held > free
    loss = jnp.where(decided, held, free)  # not their maximum, whose gradient is shared out where they are equal
    if dual_clip is not None:
        worst = -dual_clip * advantage
        decided |= (advantage < 0) & (loss > worst)
        loss = jnp.where(advantage < 0, jnp.minimum(loss, worst), loss)
    return loss, decided.astype(jnp.float32)


def k3(log_probs: Float[Array, "S"], reference: Float[Array, "S"]) -> Float[Array, "S"]:
    """exp(c) - c - 1, c = reference - log_probs: never negative, on average the KL to the reference (Schulman 2020, joschu.net/blog/kl-approx.html)."""
    c = jnp.clip(reference - log_probs, -LARGEST, LARGEST)
    return jnp.exp(c) - c - 1


def importance_weights(trainer: Float[Array, "S"], sampler: Float[Array, "S"], cap: float) -> Float[Array, "S"]:
    """min(exp(trainer - sampler), cap) of the log-probabilities before the update, no gradient (truncated importance sampling, arXiv 2510.11370, 2.3)."""
    return jax.lax.stop_gradient(jnp.minimum(ratio(trainer - sampler), cap))


def token_losses(policy: Policy, log_probs: Float[Array, "S"], answer: dict[str, Any]) -> tuple[Float[Array, "S"], dict[str, Any]]:
    """The loss of each token of one answer, and {"clipped"}: 1 where the clip decided.

    answer: "advantage" [], and of each token "mask", "old" (log-probability before the updates), "sampler" and "reference" (where they are used).
    """
    log_ratio = log_probs - answer["old"]
    if policy.level != "token":
        log_ratio = sequence_log_ratio(log_ratio, answer["mask"], policy.level == "sequence_token")
    loss, clipped = clipped_loss(log_ratio, answer["advantage"], policy.clip_low, policy.clip_high, policy.dual_clip)
    if policy.importance_cap:
        loss = loss * importance_weights(answer["old"], answer["sampler"], policy.importance_cap)
    if policy.kl_weight:
        loss = loss + policy.kl_weight * k3(log_probs, answer["reference"])
    return loss, {"clipped": clipped}


def total(losses: Float[Array, "S"], mask: Float[Array, "S"], reduction: str) -> Float[Array, ""]:
    """What one answer adds before the division by `count`: the sum over its tokens, or their mean."""
    summed = jnp.where(mask > 0, losses, 0).sum()
    return summed if reduction == "token_mean" else summed / jnp.maximum(mask.sum(), 1)


def count(mask: Float[Array, "S"], reduction: str) -> Float[Array, ""]:
    """What one answer adds to the number by which the sum of `total` is divided: its tokens, or 1 if it has any."""
    return mask.sum() if reduction == "token_mean" else (mask.sum() > 0).astype(jnp.float32)
