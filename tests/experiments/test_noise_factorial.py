"""The declared study: its cells, its pairing, its seed preset as it was run."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.catalogue import load
from experiments.noise_factorial import PRESETS
from launch.preview import preview, training_flops
from moe_jax.errors import ConfigError


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_declares_a_study_whose_configs_are_valid(preset):
    experiment = load(f"noise_factorial:{preset}")
    configs = experiment.configs()
    assert len(configs) == len(experiment.design.runs())
    assert {config.init_seed for config in configs} == set(experiment.design.seeds)
    assert all(config.init_seed == config.data_seed == config.noise_seed for config in configs)
    if preset != "followups":
        assert len(configs) == 18 and len({config.structure() for config in configs}) == 1
    assert type(experiment.design).from_json(experiment.design.to_json()) == experiment.design


def test_best_and_final_are_both_given_where_a_study_evaluates_while_it_trains():
    """But for `small`, whose published design has the final one alone."""
    for preset in set(PRESETS) - {"small"}:
        experiment = load(f"noise_factorial:{preset}")
        asked = {metric.name for metric in experiment.design.metrics}
        assert "val_perplexity" in asked and ("val_perplexity_best" in asked) == (experiment.configs()[0].eval_every > 0) == (
            preset == "corrected"
        )


def test_followups_change_one_thing_at_a_time():
    experiment = load("noise_factorial:followups")
    base = experiment.design.cells()[0]
    for cell in experiment.design.cells()[1:]:
        assert sum(cell[name] != base[name] for name in cell) == 1
    assert {config.optimizer.router for config in experiment.configs()} == {"muon", "adamw", "frozen"}
    assert {config.model.experts_per_token for config in experiment.configs()} == {1, 2}


def test_the_seed_preset_is_the_seed_study():
    """The numbers of the study as it was run: sizes, micro-batches, updates, the truncated schedule, who gets Muon, the leaking windows."""
    text = preview(load("noise_factorial:seed"))
    for expected in (
        "79,059,840 parameters, 36,592,512 active",
        "400 micro-batches of 24 x 512 tokens, 100 updates",
        "rate at update            0          20          50          99",
        "muon             0.000000    0.010000    0.009862    0.009074",
        "adamw            0.000000    0.001000    0.000986    0.000907",
        "1 structure(s)",
        "leaky: windows of one token stream at every offset",
    ):
        assert expected in text
    router = next(line for line in text.splitlines() if line.startswith("layers/feed_forward/router"))
    assert router.split()[4] == "muon"
    assert "muon       5 leaves       60,180,480 parameters" in text


def test_training_flops_of_a_known_shape():
    """6 per active parameter and token, plus attention: checked against a count by hand for the seed."""
    config = load("noise_factorial:seed").configs()[0]
    from moe_jax.model import Model

    tokens = 400 * 24 * 512
    by_hand = tokens * (6 * 36_592_512 + 6 * 6 * 384 * 512)
    assert training_flops(config, Model(config.model)) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    "name, message",
    [
        ("noise_factorail:quick", "did you mean 'noise_factorial'"),
        ("noise_factorial:quik", "did you mean 'quick'"),
        ("noise_factorial", "needs a preset: noise_factorial:smoke"),
    ],
)
def test_unknown_names_get_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        load(name)


@pytest.mark.slow
def test_updates_of_the_seed_preset_at_a_micro_batch_of_two():
    """The 79 M model itself, on made-up tokens: the first loss is that of a uniform guess plus the balance term, and it falls.

    The first update has learning rate 0, as in the seed, so the fall shows from the third loss on.
    """
    config = load("noise_factorial:seed").configs()[0]
    program, rng = config.program(), np.random.default_rng(0)
    windows = rng.integers(0, config.model.vocab_size, (1, 2, 513)).astype(np.int32)
    batch = {"tokens": windows[..., :-1], "targets": windows[..., 1:]}
    state, losses = program.init(jnp.uint32(42)), []
    for _ in range(4):
        state, metrics, flags = program.train(state, batch, config.knobs())
        assert not flags.any()
        losses.append(float(metrics["loss"][0] / metrics["loss"][1] + config.balance_weight * metrics["balance_loss"][0]))
    print("losses with the balance term:", losses)
    balance = 0.01 * config.model.num_layers
    assert abs(losses[0] - (math.log(49_152) + balance)) < 0.3
    assert losses[3] < losses[2] < losses[0]
