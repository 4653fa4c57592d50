"""What a run of reinforcement learning refuses, in one line with the numbers; and what follows from its config."""

import math

import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.rl.config import RLConfig
from moe_jax.rl.grpo import Policy
from tests.rl.small import CONFIG, MODEL, replace

DENSE = MODEL.replace(num_layers=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        *((dict([(name, 0)]), f"{name} must be at least 1, got 0") for name in ("steps", "prompts", "mini_batches", "accumulation")),
        *(
            (dict([(name, 0)]), f"{name} must be at least 1, got 0")
            for name in ("prompt_tokens", "response_tokens", "eval_problems", "eval_every")
        ),
        *((dict([(name, -1)]), f"{name} must be at least 0, got -1") for name in ("eval_samples", "checkpoint_every", "overlong_from")),
        (dict(samples=1), "samples must be at least 2, got 1"),
        (dict(prompts=10**22), r"prompts x samples = .*0000 answers in a step; lower one of them"),
        (dict(mini_batches=5), r"prompts x samples = 12 answers do not divide into 5 mini-batches of 1 parts"),
        (dict(accumulation=3), r"12 answers do not divide into 3 mini-batches of 3 parts"),
        (dict(sample_rows=5), "sample_rows=5 does not divide the 12 answers of a step"),
        (dict(eval_problems=13), "eval_problems=13 must be a multiple of the 12 answers"),
        (dict(response_tokens=7), r"prompt_tokens \+ response_tokens = 13 exceeds model.max_seq_len=12; raise it or lower them"),
        (dict(overlong_from=6), "overlong_from=6 must be below response_tokens=6"),
        (dict(parse="lax"), "unknown parse 'lax'.*; known: strict, last"),
        (dict(replay="rollouts"), r"unknown replay 'rollouts' \(did you mean 'rollout'\?\); known: self, rollout, reference"),
        (dict(replay_what="weights"), "unknown replay_what 'weights'.*; known: ids, ids.weights"),
        (dict(eval_split="train"), "unknown eval_split 'train'.*; known: test, tune"),
        *((dict(temperature=value), "temperature must be finite and above 0") for value in (0.0, -1.0, math.inf, math.nan)),
        (dict(eval_temperature=0.0), "eval_temperature must be finite and above 0, got 0.0"),
        *((dict(top_p=value), r"top_p must be in \(0, 1\]") for value in (0.0, 1.1, math.nan)),
        (dict(eval_top_p=0.0), r"eval_top_p must be in \(0, 1\], got 0.0"),
        (dict(balance_weight=-0.1), "balance_weight must be finite and not negative"),
        (dict(z_weight=math.nan), "z_weight must be finite and not negative"),
        (dict(sample_seed=-1), r"sample_seed must be from 0 to 2\*\*32 - 1, got -1"),
        (dict(noise_seed=1 << 32), r"noise_seed must be from 0 to 2\*\*32 - 1"),
        (dict(model=DENSE, replay="self"), "this model has no router, so there are no routes to replay"),
        (dict(replay="reference"), "replay=reference and policy.kl_weight need a checkpoint to compare with: set start"),
        (dict(policy=Policy(kl_weight=0.1)), "replay=reference and policy.kl_weight need a checkpoint"),
        (dict(noise="router_logit=additive:0.1"), "did you mean 'router_logits'"),
        (dict(noise="router_logits=additive:0.1:layers=5"), r"layers \[5\], the model has layers 0 to 1"),
        (dict(noise="router_logits=additive:0.1", model=DENSE), "this model has no noise site 'router_logits'"),
        (dict(aqn="start=-1"), "AQN start must be positive"),
        (
            dict(aqn="targets=norm_moe", noise="norm_moe=additive:0.1", steps=10),
            "noise and aqn both act at norm_moe; take it out of one of them",
        ),
        (dict(aqn="targets=norm_moe"), "AQN cuts a run into 10 intervals and this one has 2 steps"),
    ],
)
def test_bad_configs_are_one_clear_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        replace(CONFIG, **changes)
    assert "\n" not in str(caught.value)


def test_sizes():
    config = replace(CONFIG, accumulation=2)
    assert (config.answers, config.rows, config.length, config.updates) == (12, 2, 12, 6)
    assert replace(CONFIG, eval_problems=24).eval_problems == 24 and replace(CONFIG, eval_problems=5).eval_problems == 5


def test_the_defaults_are_a_run():
    config = RLConfig(model=MODEL.replace(max_seq_len=28))
    assert config.answers == 256 and config.rows == 128 and config.load_task().parse == "strict"
    assert replace(config, parse="last").load_task().parse == "last"


def test_aqn_is_noise_of_the_rollout_by_stages():
    """Three stages in six steps: 0, then 0.01, then 0.0001, on the norm before the experts, beside other noise; no other phase has it."""
    config = replace(CONFIG, steps=6, aqn="targets=norm_moe:stages=3", noise="router_logits=additive:0.1:phases=train")
    scales = []
    for step in range(6):
        noise = config.noise_of(step)
        assert {site for site, _ in noise.in_phase("rollout").structure} == {"norm_moe"}
        assert {site for site, _ in noise.in_phase("train").structure} == {"router_logits"} and noise.in_phase("eval") is None
        scales.append(float(np.asarray(noise.scales["norm_moe"]).max()))
    np.testing.assert_allclose(scales, [0, 0, 0.01, 0.01, 0.0001, 0.0001], rtol=1e-6)
    assert CONFIG.noise_of(0) is None and replace(config, aqn=config.aqn) == config


def test_what_shares_a_program():
    """Values do not compile again; the policy and the draws do."""
    same = (dict(sample_seed=1), dict(temperature=0.5), dict(noise="lm_head=relative:0.1"), dict(steps=3), dict(replay="self"))
    assert all(replace(CONFIG, **changes).structure() == CONFIG.structure() for changes in same)
    other = (dict(shared_draws=True), dict(policy=Policy(normalise=False)), dict(response_tokens=5), dict(model=DENSE))
    assert all(replace(CONFIG, **changes).structure() != CONFIG.structure() for changes in other)
