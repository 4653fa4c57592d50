"""The objective of one answer and of one group, against numbers worked by hand in the comments."""

from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.rl import grpo
from moe_jax.rl.grpo import Policy

WIDE = Policy(clip_low=0.9, clip_high=9.0, dual_clip=None)  # clips nothing here


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected, np.float32), rtol=2e-6, atol=1e-6)


def logs(*values):
    return jnp.log(jnp.array(values, jnp.float32))


# ------------------------------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize(
    "rewards, normalised, centred",
    [
        # mean 1/2; deviations of 1/2 each; sample variance 4 * (1/4) / 3 = 1/3; 0.5 / 0.577350 = 0.866025
        ([1, 0, 0, 1], [0.866025, -0.866025, -0.866025, 0.866025], [0.5, -0.5, -0.5, 0.5]),
        # mean 1; deviations 2, -1, -1; sample variance 6 / 2 = 3; 2 / 1.732051 = 1.154701
        ([3, 0, 0], [1.154701, -0.577350, -0.577350], [2, -1, -1]),
        # mean 0, sample variance (1 + 1) / 1 = 2
        ([-1, 1], [-0.707107, 0.707107], [-1, 1]),
    ],
)
def test_group_advantages(rewards, normalised, centred):
    rewards = jnp.array(rewards, jnp.float32)
    np.testing.assert_allclose(grpo.group_advantages(rewards), normalised, rtol=5e-6)  # eps = 1e-6 of the deviation
    close(grpo.group_advantages(rewards, normalise=False), centred)


def test_eps_is_added_to_the_deviation():
    """Deviations of 1 and -1, sample deviation 1.414214; (1.414214 + 0.585786) = 2."""
    close(grpo.group_advantages(jnp.array([0.0, 2.0]), eps=0.585786), [-0.5, 0.5])


@pytest.mark.parametrize("size", [1, 7, 8])
@pytest.mark.parametrize("normalise", [True, False])
def test_equal_rewards_are_no_advantage(size, normalise):
    """Exactly 0, also where the mean of equal numbers is not the number: the deviation would then be as small as the error."""
    rewards = jnp.stack([jnp.full(size, value) for value in (0.0, 1.0, 0.7, -0.3, 1 / 3, -1e6)])
    assert not np.asarray(jax.vmap(lambda one: grpo.group_advantages(one, normalise))(rewards)).any()


# ------------------------------------------------------------------------------------------------------------------ ratios


@pytest.mark.parametrize(
    "ratio, advantage, loss, decided",
    [
        # bounds 0.8 and 1.5
        (0.5, 2.0, -1.0, 0),  # free: -0.5 * 2; held: -0.8 * 2 = -1.6 is less
        (1.25, 2.0, -2.5, 0),
        (1.75, 2.0, -3.0, 1),  # free -3.5; held -1.5 * 2
        (0.5, -2.0, 1.6, 1),  # free 1; held 0.8 * 2
        (1.25, -2.0, 2.5, 0),
        (1.75, -2.0, 3.5, 0),  # held 3: less than free
        (1.75, 0.0, 0.0, 0),
    ],
)
def test_two_bounds(ratio, advantage, loss, decided):
    d = logs(ratio)
    value, slope = jax.value_and_grad(lambda d: grpo.clipped_loss(d, jnp.float32(advantage), 0.2, 0.5)[0].sum())(d)
    close(value, loss)
    close(slope[0], 0.0 if decided else loss)  # d(-r A)/d(log r) = -r A, and 0 where the clip decides
    assert grpo.clipped_loss(d, jnp.float32(advantage), 0.2, 0.5)[1].tolist() == [decided]


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope, decided",
    [
        (2.5, -2.0, 5.0, 5.0, 0),  # 3 * 2 = 6 is more
        (5.0, -2.0, 6.0, 0.0, 1),  # 10 without
        (0.5, -2.0, 1.6, 0.0, 1),  # the lower bound, as before
        (5.0, 2.0, -3.0, 0.0, 1),  # the upper bound: dual clip is for bad answers
        (0.25, 2.0, -0.5, -0.5, 0),
    ],
)
def test_dual_clip(ratio, advantage, loss, slope, decided):
    def value(d):
        return grpo.clipped_loss(d, jnp.float32(advantage), 0.2, 0.5, 3.0)

    (found,), (counted,) = value(logs(ratio))
    close(found, loss)
    close(jax.grad(lambda d: value(d)[0].sum())(logs(ratio))[0], slope)
    assert counted == decided


def test_k3():
    """c = log(1/4) - log(1/2) = -log 2: 1/2 + 0.693147 - 1; c = log 2: 2 - 0.693147 - 1. Slope by the log-probability: 1 - exp(c)."""
    log_probs, reference = logs(0.5, 0.2, 0.3), logs(0.25, 0.4, 0.3)
    close(grpo.k3(log_probs, reference), [0.193147, 0.306853, 0])
    close(jax.grad(lambda x: grpo.k3(x, reference).sum())(log_probs), [0.5, -1.0, 0])


def test_k3_is_the_kl_on_average():
    """Over the whole vocabulary, weighted by the policy: sum p log(p / q), computed apart."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    found = (p * np.asarray(grpo.k3(logs(*p), logs(*q)))).sum()
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(), rtol=1e-5)


def test_importance_weights():
    """0.6 / 0.2 = 3, cut to 2; 0.2 / 0.4 = 1/2; no gradient to either side."""
    trainer, sampler = logs(0.6, 0.2), logs(0.2, 0.4)
    close(grpo.importance_weights(trainer, sampler, 2.0), [2, 0.5])
    slopes = jax.grad(lambda a, b: grpo.importance_weights(a, b, 2.0).sum(), (0, 1))(trainer, sampler)
    assert not any(np.asarray(slope).any() for slope in slopes)


# ------------------------------------------------------------------------------------------------------------------ sequences

RATIOS, MASK = logs(2.0, 8.0, 3.0), jnp.array([1.0, 1.0, 0.0])  # the mean over the mask is log 4


def test_sequence_ratio():
    """Both have the value log 4 everywhere; the first passes each gradient on in halves, the second each its own."""
    for token_gradient, expected in ((False, np.array([[0.5, 0.5, 0]] * 3)), (True, np.eye(3))):
        close(grpo.sequence_log_ratio(RATIOS, MASK, token_gradient), [log(4)] * 3)
        close(jax.jacobian(lambda x, t=token_gradient: grpo.sequence_log_ratio(x, MASK, t))(RATIOS), expected)
    close(grpo.sequence_log_ratio(RATIOS, jnp.zeros(3)), np.zeros(3))  # of no tokens


@pytest.mark.parametrize(
    "level, losses, jacobian",
    [
        ("token", [-2, -8, -3], np.diag([-2.0, -8, -3])),
        ("sequence", [-4, -4, -4], np.array([[-2.0, -2, 0]] * 3)),  # -4 in halves
        ("sequence_token", [-4, -4, -4], np.diag([-4.0] * 3)),
    ],
)
def test_levels(level, losses, jacobian):
    """Advantage 1, so the loss is minus the ratio; d loss / d(log-probability) by hand."""
    policy = Policy(level=level, clip_low=0.9, clip_high=9.0, dual_clip=None)
    answer = {"advantage": jnp.float32(1), "mask": MASK, "old": jnp.zeros(3)}
    close(grpo.token_losses(policy, RATIOS, answer)[0], losses)
    close(jax.jacobian(lambda x: grpo.token_losses(policy, x, answer)[0])(RATIOS), jacobian)


def test_a_sequence_is_clipped_as_one():
    """Ratios 2 and 8 make 4; a bound of 3 holds both, although one token is inside of it."""
    answer = {"advantage": jnp.float32(1), "mask": MASK, "old": jnp.zeros(3)}
    losses, found = grpo.token_losses(Policy(level="sequence", clip_high=2.0), RATIOS, answer)
    close(losses, [-3] * 3)
    assert found["clipped"].tolist() == [1, 1, 1]


# ------------------------------------------------------------------------------------------------------------------ tokens together


def test_token_losses():
    """Ratios 0.5 / 0.4 = 1.25 and 0.15 / 0.25 = 0.6, advantage 1, bounds 0.8 and 1.28: -1.25 and -0.6.

    Importance 0.4 / 0.2 = 2, cut to 1.5, and 0.25 / 0.5 = 0.5: -1.875 and -0.3. KL: c = log(0.25 / 0.5), 0.193147, and log(0.3 / 0.15), 0.306853.
    """
    new = logs(0.5, 0.15)
    answer = {
        "advantage": jnp.float32(1),
        "mask": jnp.ones(2),
        "old": logs(0.4, 0.25),
        "sampler": logs(0.2, 0.5),
        "reference": logs(0.25, 0.3),
    }
    close(grpo.token_losses(Policy(), new, answer)[0], [-1.25, -0.6])
    close(grpo.token_losses(Policy(importance_cap=1.5), new, answer)[0], [-1.875, -0.3])
    close(grpo.token_losses(Policy(kl_weight=0.1), new, answer)[0], [-1.25 + 0.0193147, -0.6 + 0.0306853])
    both, found = grpo.token_losses(Policy(importance_cap=1.5, kl_weight=0.1), new, answer)
    close(both, [-1.875 + 0.0193147, -0.3 + 0.0306853])  # the weights are the policy's, not the penalty's
    assert found["clipped"].tolist() == [0, 0]
    # d/d new: -ratio * importance + 0.1 * (1 - exp c)
    slope = jax.grad(lambda x: grpo.token_losses(Policy(importance_cap=1.5, kl_weight=0.1), x, answer)[0].sum())(new)
    close(slope, [-1.875 + 0.1 * 0.5, -0.3 + 0.1 * -1])


def test_reductions():
    """Two answers, of tokens 1, 2 and 6, and one that is masked: (1 + 2 + 6) / 3 = 3, or (1.5 + 6) / 2 = 3.75. A third has none and counts nowhere."""
    losses = jnp.array([[1, 2, jnp.nan], [6, jnp.inf, 0], [1, 1, 1]])
    masks = jnp.array([[1.0, 1, 0], [1, 0, 0], [0, 0, 0]])
    for reduction, totals, counts in (("token_mean", [3, 6, 0], [2, 1, 0]), ("sequence_mean", [1.5, 6, 0], [1, 1, 0])):
        close([grpo.total(*each, reduction) for each in zip(losses, masks, strict=True)], totals)
        close([grpo.count(mask, reduction) for mask in masks], counts)
        slope = jax.grad(lambda x, r=reduction: sum(grpo.total(*each, r) for each in zip(x, masks, strict=True)))(losses)
        close(slope, masks / (1 if reduction == "token_mean" else jnp.array([[2], [1], [1]])))


@pytest.mark.parametrize("level", grpo.LEVELS)
@pytest.mark.parametrize("dual_clip", [None, 10.0])
def test_extreme_log_ratios_stay_finite(level, dual_clip):
    """A token that was impossible a moment ago, and the other way round: of values, and of gradients too."""
    policy = Policy(level=level, dual_clip=dual_clip, importance_cap=2.0, kl_weight=0.1)
    far = jnp.array([1e4, -1e4, 1e30, -1e30, 80.0, -80.0, 0.0])
    answer = {"mask": jnp.ones(7), "old": jnp.zeros(7), "sampler": -far, "reference": far[::-1]}

    def loss(log_probs, advantage):
        return grpo.token_losses(policy, log_probs, answer | {"advantage": advantage})[0].sum()

    log_probs = jnp.stack([far, -far, jnp.full(7, 1e4), jnp.full(7, -1e4)])
    each = jax.vmap(jax.vmap(jax.value_and_grad(loss), (0, None)), (None, 0))
    value, slope = each(log_probs, jnp.array([-3.0, 0.0, 3.0]))
    assert np.isfinite(np.asarray(value)).all() and np.isfinite(np.asarray(slope)).all()


def test_the_cut_off_is_far_outside_of_what_counts():
    close(grpo.ratio(jnp.array([19.0, 25.0, -25.0])), [exp(19), exp(20), exp(-20)])
    assert not np.asarray(jax.grad(lambda x: grpo.ratio(x).sum())(jnp.array([25.0, -25.0]))).any()


# ------------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(level="tokens"), r"unknown level 'tokens' \(did you mean 'token'\?\); known: token, sequence, sequence_token"),
        (dict(reduction="mean"), "unknown reduction 'mean'"),
        (dict(clip_low=1.0), r"clip_low must be in \[0, 1\)"),
        (dict(clip_low=-0.1), r"clip_low must be in \[0, 1\)"),
        (dict(clip_high=-0.1), "clip_high finite and not negative, got 0.2 and -0.1"),
        (dict(clip_high=float("inf")), "clip_high finite"),
        (dict(clip_high=float("nan")), "clip_high finite"),
        (dict(dual_clip=1.0), "dual_clip must be finite and above 1, or none, got 1.0"),
        (dict(dual_clip=float("inf")), "dual_clip must be finite"),
        (dict(kl_weight=-1.0), "kl_weight must be finite and not negative, got -1.0"),
        (dict(kl_weight=float("nan")), "kl_weight must be finite"),
        (dict(importance_cap=float("inf")), "importance_cap must be finite"),
    ],
)
def test_bad_policies_are_one_clear_line(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Policy(**values)
    assert "\n" not in str(caught.value)
