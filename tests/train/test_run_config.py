"""The config of a run: AQN as text and as knobs that change without a new program, and what cannot be."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.model import ModelConfig
from moe_jax.noise.aqn import AQN
from moe_jax.train.data import DataConfig
from moe_jax.train.run_config import RunConfig, aqn_text, parse_aqn

CONFIG = RunConfig(
    model=ModelConfig.preset("tiny", num_layers=2, d_model=16, d_expert=16),
    data=DataConfig(source="synthetic", tokenizer="bytes", seq_len=16, batch_size=4),
    updates=20,
)


@pytest.mark.parametrize(
    "text, aqn",
    [
        ("qerl_code", AQN()),
        ("qerl_code:1e-2:1e-4:10:reach=experts", AQN(1e-2, 1e-4, 10, reach=("experts",))),
        ("qerl_paper:0.05:0.0005:4", AQN(0.05, 0.0005, 4, "qerl_paper")),
        ("epochs:0.05:0.0005:5:epochs=2", AQN(0.05, 0.0005, variant="epochs", epochs=2, stages_per_epoch=5)),
        (
            "qerl_code:0.01:0.001:3:targets=norm_moe+norm_final:reach=experts+router",
            AQN(0.01, 0.001, 3, targets=("norm_moe", "norm_final")),
        ),
    ],
)
def test_aqn_as_text_and_back(text, aqn):
    assert parse_aqn(text) == aqn
    assert parse_aqn(aqn_text(aqn)) == aqn


@pytest.mark.parametrize(
    "text, message",
    [
        ("qerl_cod", "did you mean 'qerl_code'"),
        ("qerl_code:ten", "start=ten: needs a number"),
        ("qerl_code:1e-2:1e-4:2", "from 3 up, got 2"),
        ("qerl_code:1e-2:1e-4:10:7", "unknown config field 'a fifth value'"),
        ("qerl_code:reach=expert", "did you mean 'experts'"),
        ("qerl_code:rech=experts", "did you mean 'reach'"),
        ("qerl_code:reach=router:reach=experts", "reach is given twice"),
        ("qerl_code:1e-2:start=1e-3", "start is given twice"),
        ("", "write VARIANT:START:END:STAGES"),
    ],
)
def test_bad_aqn_is_one_clear_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_aqn(text)
    assert "\n" not in str(caught.value) and "--set" not in str(caught.value)


def test_a_config_says_aqn_in_one_way():
    """Two spellings of a schedule are the same run."""
    one, other = (dataclasses.replace(CONFIG, aqn=text) for text in ("qerl_code:1e-2", "qerl_code:0.01:1e-4:10:reach=router+experts"))
    assert one.aqn.startswith("qerl_code:0.01:0.0001:10:targets=norms") and parse_aqn(one.aqn).reach == ("experts", "router")
    assert dataclasses.replace(one, aqn=one.aqn) == dataclasses.replace(one, aqn="qerl_code:1e-2:reach=both") == one
    assert parse_aqn(other.aqn) == AQN(reach=("router", "experts"))


def test_knobs_follow_the_schedule_in_one_structure():
    aqn = AQN(1e-1, 1e-3, 5, reach=("experts",))
    config = dataclasses.replace(CONFIG, aqn=aqn_text(aqn), noise="experts=relative:0.05:phases=train")
    knobs = [config.knobs(update) for update in range(20)]
    assert len({jax.tree.structure(k) for k in knobs}) == 1
    for update, found in enumerate(knobs):
        scales = found.noise.scales
        sigma = np.float32([value for first, value in aqn.stage_table(20) if first <= update][-1])
        np.testing.assert_array_equal(scales["norm_moe"], np.full(2, sigma))
        assert scales["norm_final"] == sigma and (np.asarray(scales["expert_up"]) == np.float32(0.05)).all()
        assert config.knobs(config.stage(update)).noise.scales["norm_moe"][0] == scales["norm_moe"][0]
    assert sorted({config.stage(update) for update in range(20)}) == [0, 4, 8, 12, 16]
    structure = dict(knobs[0].noise.structure)
    assert structure["norm_moe"].reach == ("experts",) and structure["norm_moe"].phases == ("train",)
    assert knobs[0].noise.in_phase("eval") is None


def test_structures_of_what_changes_the_program():
    """Replay, what is replayed, recording, a freeze and the sites of AQN are programs of their own; the folders and AQN's values are not."""

    def structure(**changes):
        return dataclasses.replace(CONFIG, **changes).structure()

    frozen = dataclasses.replace(CONFIG.objective, freeze=("freeze_params",))
    different = [
        structure(),
        structure(replay="a"),
        structure(replay="a", replay_what="ids+weights"),
        structure(record="a"),
        structure(objective=frozen),
        structure(aqn="qerl_code"),
        structure(aqn="qerl_code:reach=experts"),
    ]
    assert len(set(different)) == len(different)
    assert structure(replay="a") == structure(replay="b", start="c", compare="d")
    assert structure(aqn="qerl_code") == structure(aqn="qerl_paper:0.5:0.1:4") and structure(replay_what="ids+weights") == structure()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(aqn="qerl_code:1e-2:1e-4:21"), "cuts a run into 21 intervals and this one has 20 steps"),
        (dict(aqn="qerl_code", noise="norm_moe=additive:0.1"), "noise and aqn both act at norm_moe"),
        (dict(aqn="qerl_code:targets=norm_q"), "no noise site 'norm_q'"),
        (dict(replay_what="id"), "unknown replay_what 'id'"),
        (dict(record_what="weights"), "unknown record_what 'weights'"),
        (dict(replay="a", record="a"), "record into another folder"),
        (dict(compare="a", record="a"), "record into another folder"),
        (dict(record="a", model=CONFIG.model.replace(num_experts=0)), "this model has no router"),
    ],
)
def test_what_cannot_be_is_one_clear_line(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        dataclasses.replace(CONFIG, **change)
    assert "\n" not in str(caught.value)
