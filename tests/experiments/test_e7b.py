"""The matrix of seed 004: its arms, what they noise and replay, that its claims are read off as the rule says, and a run of it end to end."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import e7b, e7b_verdicts
from experiments.catalogue import load
from experiments.e7b_verdicts import CLAIMS, Claim, verdict
from launch.preview import preview
from moe_jax.config_tools import config_dict
from moe_jax.errors import ConfigError, Unsupported
from moe_jax.rl.planned import PolicyRun
from moe_jax.studies import Ledger, report, stats
from moe_jax.studies.ledger import Run
from moe_jax.studies.run import Workshop, run_study

RESULTS = Path(__file__).parents[2] / "results" / "e7b_mini"


def scales(model, arm, phase):
    """Site -> scale of what acts in a phase."""
    config = load("e7b:mini").config({"model": model, "arm": arm}, 2)
    acting = config.noise_of(config.steps - 1)
    acting = None if acting is None else acting.in_phase(phase)
    found = {} if acting is None else {site: float(np.max(scale)) for site, scale in acting.scales.items()}
    return {site: round(scale, 6) for site, scale in found.items() if scale}


@pytest.mark.parametrize("preset", e7b.PRESETS)
def test_presets_are_whole(preset):
    experiment = load(f"e7b:{preset}")
    design, configs = experiment.design, experiment.configs()
    arms = 15 + 7 * ("dense" in e7b.SIZES[preset].models)
    assert len(configs) == arms * len(design.seeds) and experiment.cost
    assert len({config.structure() for config in configs}) == (3 if "dense" in e7b.SIZES[preset].models else 2)
    assert type(design).from_json(design.to_json()) == design
    names = {comparison.name for comparison in design.comparisons}
    assert {claim.contrast for claim in CLAIMS if "dense" not in claim.contrast} <= names
    text = preview(experiment)
    assert design.rule in text and "cost" in text and ("repeated questions left out" in text or "problems not counted" in text)
    assert PolicyRun.of(configs[0]).data.seq_len == configs[0].length


def test_the_committed_study_can_be_gone_on_with():
    assert Ledger.read(RESULTS).design.digest() == load("e7b:mini").design.digest()


def test_seeds_that_were_tuned_on_are_not_reported():
    assert not {0, 1} & set(load("e7b:mini").design.seeds)
    assert len(load("e7b:mini").design.seeds) >= 5


def test_what_an_arm_perturbs():
    every = {site: 0.05 for site in scales("moe", "as described", "train")}
    assert {"router_gemm", "expert_up", "attention_q", "lm_head"} <= set(every)
    for phase in ("rollout", "old_logprob", "train", "eval"):
        assert scales("moe", "clean", phase) == {}
        assert scales("moe", "as described", phase) == every
        assert scales("moe", "router only", phase) == {"router_gemm": 0.05}
        assert scales("moe", "router left out", phase) == {site: scale for site, scale in every.items() if site != "router_gemm"}
        assert scales("moe", "router 1 %", phase) == every | {"router_gemm": 0.01}
        assert scales("dense", "experts only", phase) == {f"mlp_{part}": 0.05 for part in ("gate", "up", "down")}
    assert scales("moe", "as run", "train") == scales("moe", "as run", "old_logprob") == {"lm_head": 0.05}
    assert "router_gemm" in scales("moe", "as run", "rollout") and "expert_up" not in scales("moe", "as run", "rollout")
    assert set(scales("dense", "as run", "rollout")) == set(scales("moe", "as run", "rollout")) - {"router_gemm"}
    assert scales("moe", "AQN experts", "train") == every
    assert scales("moe", "AQN experts", "rollout") == every | {"norm_moe": 0.0005}  # of the last stage


def test_a_replay_is_of_its_source_and_a_freeze_is_one():
    configs = {cell["arm"]: load("e7b:mini").config(cell, 2) for cell in load("e7b:mini").design.cells() if cell["model"] == "moe"}
    assert [configs[f"replay {source}"].replay for source in ("self", "rollout", "reference")] == ["self", "rollout", "reference"]
    assert configs["freeze"].objective.freeze == ("freeze_params",)
    assert {arm for arm, config in configs.items() if config.replay or config.objective.freeze} == {
        "freeze",
        *(a for a in configs if "replay" in a),
    }


def contrast(*differences, holm=None):
    found = stats.paired([0.0] * len(differences), [-value for value in differences])
    return dataclasses.replace(found, holm_p=found.p if holm is None else holm)


@pytest.mark.parametrize(
    "reading, value, differences, expected",
    [
        ("resolved", 0, (0.05, 0.06, 0.05, 0.055), "CONFIRMED"),
        ("resolved", 0, (-0.05, -0.06, -0.05, -0.055), "REFUTED"),
        ("resolved", 0, (0.05, -0.06, 0.03, -0.02), "UNRESOLVED"),
        ("at_least", 0.5, (0.04, 0.05, 0.045, 0.05), "REFUTED"),
        ("at_least", 0.5, (0.6, 0.62, 0.61, 0.63), "CONFIRMED"),
        ("at_least", 0.5, (0.3, 0.7, 0.4, 0.6), "UNRESOLVED"),
        ("as_good", 0, (0.0, 0.005, -0.005, 0.0), "CONFIRMED"),
        ("as_good", 0, (-0.1, -0.11, -0.1, -0.105), "REFUTED"),
        ("as_good", 0, (-0.1, 0.1, -0.05, 0.02), "UNRESOLVED"),
        ("harm", 0, (-0.1, -0.11, -0.1, -0.105), "CONFIRMED"),
        ("harm", 0, (0.0, 0.005, -0.005, 0.0), "REFUTED"),
        ("harm", 0, (-0.1, 0.1, -0.05, 0.02), "UNRESOLVED"),
    ],
)
def test_a_verdict_is_what_the_rule_says(reading, value, differences, expected):
    claim = Claim("x", "", "", reading, value)
    assert verdict(claim, contrast(*differences)) == expected
    if reading == "resolved" and expected != "UNRESOLVED":  # what the family takes away is unresolved
        assert verdict(claim, contrast(*differences, holm=0.2)) == "UNRESOLVED"


def test_a_claim_that_was_not_run_says_so():
    assert verdict(CLAIMS[0], None) == "not run"


def test_pages_of_a_part_of_the_study(tmp_path):
    """Two seeds of four arms: the claims that they decide have numbers, the others say that they were not run."""
    experiment = load("e7b:mini")
    ledger = Ledger.open(tmp_path, experiment.design)
    accuracy = {"clean": 0.8, "as described": 0.6, "router left out": 0.75, "freeze": 0.6}
    for seed, shift in ((2, 0.0), (3, 0.004)):
        for arm, value in accuracy.items():
            metrics = dict.fromkeys((metric.name for metric in e7b.METRICS), 0.0)
            metrics |= {"sampled_noisy": value + shift * (arm == "freeze"), "sampled": value}
            series = {
                "eval/sampled_noisy": [[0, 0.4], [40, 0.5]],
                "eval/sampled": [[0, 0.4], [40, 0.5]],
                "reward/mean": [[1, 0.4], [39, 0.6]],
            }
            ledger.append(Run({"model": "moe", "arm": arm}, seed, "finished", metrics, series, {}, 1.0, {}))
    page, markdown = e7b_verdicts.write(tmp_path)
    text = markdown.read_text()
    assert "PARTIAL" in text and page.stat().st_size > 5000
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| 004-")}
    assert len(rows) == 9
    assert "CONFIRMED" in rows["004-a"] and "+0.050" in rows["004-a"]
    assert "+0.098" not in rows["004-e"] and "-0.098" in rows["004-e"]
    assert "not run" in rows["004-b"] and "not run" in rows["004-f"]
    steps = text[text.index("**moe, clean (2 seeds)**") :].splitlines()
    assert steps[4].startswith("| 0 | 0.400 | 0.400 | 0.400 |") and steps[5].startswith("| 20 | 0.500 | 0.500 | 0.600 |")
    assert report.build(tmp_path).markdown.exists()


def test_a_study_of_reinforcement_learning_has_no_lanes(tmp_path):
    with pytest.raises(Unsupported, match="one after the other"):
        run_study(load("e7b:smoke"), tmp_path, lanes=2)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="did you mean 'mini'"):
        load("e7b:mimi")


def test_the_folder_of_a_warm_policy_says_what_ran(tmp_path, monkeypatch):
    """Also where an earlier version has begun it and said nothing; a launch that goes on adds a line."""
    made = []
    monkeypatch.setattr(e7b, "warm_up", lambda config, task, home, *_: made.append((config_dict(config), home)))
    experiment, shop = load("e7b:smoke"), Workshop(tmp_path)
    (tmp_path / "warm" / "moe" / "seed-1").mkdir(parents=True)
    for launch in (1, 2):
        home = Path(experiment.prepare(shop, experiment.config({"model": "moe", "arm": "clean"}, 1)).start)
        assert made[-1] == (json.loads((home / "config.json").read_text()), home) and home.name == "seed-1"
        assert json.loads((home / "versions.json").read_text())["device"].endswith("(cpu)")
        assert len((home / "command.txt").read_text().splitlines()) == len(made) == launch


@pytest.mark.slow
def test_one_arm_of_the_smoke_study(tmp_path):
    """The warm policy, two steps and their evaluations through the study's own path; the same call again does nothing."""
    experiment = load("e7b:smoke")
    small = e7b.SIZES["smoke"]
    models = {
        name: model.replace(dispatch="dense" if model.num_experts else None) for name, model in small.models.items()
    }  # compiles in a third
    small = dataclasses.replace(small, models=models, run=dataclasses.replace(small.run, steps=2, eval_every=2))
    experiment = dataclasses.replace(
        experiment,
        config=lambda cell, seed: e7b.configure(small, cell, seed),
        prepare=lambda shop, config: e7b.prepare(small, shop, config),
    )

    def only(cell, seed):
        return cell in ({"model": "moe", "arm": "replay rollout"}, {"model": "dense", "arm": "clean"}) and seed == 1

    done = run_study(experiment, tmp_path, only=only)
    assert (done.done, done.failed) == (2, 0) and done.compiled["train"] == 2
    run, dense = Ledger.read(tmp_path).runs()
    assert dense.metrics["route_changed_experts"] == 0 and dense.metrics["sampler_kl"] < 1e-9
    assert run.metrics["route_changed_experts"] == 0 < run.metrics["sampler_kl"]  # replayed routes agree, noise differs
    assert 0 <= run.metrics["sampled_noisy"] <= 1 and len(run.series["eval/sampled"]) == 2
    assert run_study(experiment, tmp_path, only=only).done == 0
