"""What protects a router: the declared arms, the programs they share, what a run starts from, and a study that is killed and goes on."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments import replay_freeze
from experiments.catalogue import load
from experiments.replay_freeze import ARMS, PRESETS, PROPOSALS
from launch.preview import preview
from moe_jax.errors import ConfigError, Stopped
from moe_jax.noise import NoiseSpec
from moe_jax.noise.sites import GROUPS
from moe_jax.studies import Ledger, report
from moe_jax.studies.run import run_study
from moe_jax.trace_store import TraceReader
from moe_jax.train.data import build
from moe_jax.train.saved import load_model

NOT_SAVED = {"replay ids", "replay ids+weights"}


def few(*arms, seeds=(42, 43)):
    """The smoke study with some of its arms, and the comparisons that these allow."""
    experiment = load("replay_freeze:smoke")
    kept = [(("arm", arm),) for arm in arms]
    comparisons = tuple(c for c in experiment.design.comparisons if {cell for _, cell in c.terms} <= set(kept))
    return dataclasses.replace(
        experiment, design=dataclasses.replace(experiment.design, only=tuple(kept), comparisons=comparisons, seeds=seeds)
    )


def scales(arm, preset="quick"):
    """Site -> scale of an arm's noise, in training and in evaluation."""
    config = load(f"replay_freeze:{preset}").config({"arm": arm}, 42)
    noise = config.model.resolve(NoiseSpec.parse(config.noise))
    phases = (noise.in_phase("train"), noise.in_phase("eval"))
    return [{} if acting is None else {site: float(np.max(scale)) for site, scale in acting.scales.items()} for acting in phases]


@pytest.mark.parametrize("preset", PRESETS)
def test_eleven_arms_in_seven_programs(preset):
    experiment = load(f"replay_freeze:{preset}")
    design, configs = experiment.design, experiment.configs()
    seeds = 2 if preset == "smoke" else 5
    assert len(configs) == 11 * seeds == len(design.runs()) and experiment.cost
    assert len({config.structure() for config in configs}) == 7
    assert all(config.init_seed == config.data_seed == config.noise_seed for config in configs)
    assert type(design).from_json(design.to_json()) == design
    before = replay_freeze.pretraining(preset)
    assert all(config.model == before.model and config.model.dropout == 0 for config in configs)
    assert before.noise == "" and before.checkpoint_every
    assert before.data.eval_windows % before.eval_batch == 0  # no padding in what is compared with recorded routes


def test_what_an_arm_perturbs():
    matmuls = set(scales("noisy")[0])
    assert {"router_gemm", "lm_head", "expert_up", "expert_down", "attention_q"} <= matmuls
    assert scales("clean") == [{}, dict.fromkeys(matmuls, pytest.approx(0.05))]
    for arm in ("noisy", "freeze", *NOT_SAVED, "AQN both", "AQN experts"):
        assert scales(arm) == [dict.fromkeys(matmuls, pytest.approx(0.05))] * 2
    hit = {arm: {site: scale for site, scale in scales(arm)[0].items() if scale} for arm in ARMS}
    assert hit["router excluded"].keys() == matmuls - {"router_gemm"}
    assert hit["router 1%"] == {**hit["noisy"], "router_gemm": pytest.approx(0.01)}
    assert hit["router only"] == {"router_gemm": pytest.approx(0.05)}
    assert hit["experts only"].keys() == matmuls & set(GROUPS["experts"])
    for arm in ARMS:
        trained, evaluated = scales(arm)
        assert arm == "clean" or trained == evaluated  # the hardware of an arm is the same in use


def test_what_an_arm_does_besides():
    experiment = load("replay_freeze:quick")
    configs = {arm: experiment.config({"arm": arm}, 42) for arm in ARMS}
    assert {arm for arm, config in configs.items() if config.replay} == NOT_SAVED
    assert configs["replay ids+weights"].replay_what == "ids+weights" and configs["replay ids"].replay_what == "ids"
    assert {arm for arm, config in configs.items() if config.objective.freeze} == {"freeze"}
    assert {arm for arm, config in configs.items() if config.aqn} == {"AQN both", "AQN experts"}
    for arm, reach in (("AQN both", ("experts", "router")), ("AQN experts", ("experts",))):
        sites = configs[arm].spec().by_site()
        assert sites["norm_moe"].reach == reach and sites["norm_moe"].phases == ("train",) and "norm_attention" not in sites


def test_every_proposal_is_one_question_against_noisy():
    """One family for each, with noise on and off; thirteen families as the rule says."""
    design = load("replay_freeze:quick").design
    families = {}
    for c in design.comparisons:
        families.setdefault(c.family, []).append(c)
    for arm in PROPOSALS:
        on, off = families[arm]
        for c, metric in ((on, "val_perplexity_noisy"), (off, "val_perplexity")):
            assert c.metric == metric and c.terms == ((1.0, (("arm", arm),)), (-1.0, (("arm", "noisy"),))) and c.question == PROPOSALS[arm]
    assert set(PROPOSALS) == set(ARMS) - {"clean", "noisy"}
    assert len(families) == 13 and "Thirteen families" in design.rule and {len(members) for members in families.values()} == {1, 2, 3}
    assert 41 not in design.seeds


def test_a_preview_says_what_would_run():
    text = preview(load("replay_freeze:smoke"))
    assert "11 cells x seeds 42, 43" in text and "7 structure(s)" in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("protect")
    experiment = few("noisy", "router excluded", "replay ids", "freeze")
    return workdir, experiment, run_study(experiment, workdir)


@pytest.mark.slow
def test_the_arms_of_a_seed_share_a_checkpoint_and_their_text(finished):
    workdir, experiment, outcome = finished
    assert (outcome.done, outcome.failed) == (8, 0)
    assert outcome.compiled["train"] == 4  # three structures of four arms, and the run before them
    rows = {(run.cell["arm"], run.seed): run for run in Ledger.read(workdir).finished().values()}
    assert len({run.metrics["val_perplexity_noisy"] for run in rows.values()}) == 8
    for seed in (42, 43):
        first = {arm: rows[arm, seed].series["train/loss"][0][1] for arm in ("noisy", "router excluded", "replay ids", "freeze")}
        assert first["noisy"] == pytest.approx(first["freeze"], rel=1e-6) and first["noisy"] != first["router excluded"]
        assert "replay/set_overlap" in rows["replay ids", seed].series and "replay/set_overlap" not in rows["noisy", seed].series
        assert all(0 < rows[arm, seed].metrics["val_reference_overlap"] < 1 for arm in first)
        before = load_model(workdir / "pretrained" / f"seed-{seed}")
        assert (before.step, before.run.noise, before.run.init_seed, before.run.data_seed) == (20, "", seed, seed + 1000)
        assert json.loads((workdir / "pretrained" / f"seed-{seed}" / "config.json").read_text())["updates"] == 20
    assert rows["noisy", 42].series["train/loss"][0][1] < math.log(260) - 0.01  # it has learnt before


@pytest.mark.slow
def test_the_reference_routes_are_those_of_the_checkpoint_on_the_very_batches(finished):
    workdir, experiment, _ = finished
    home = workdir / "pretrained" / "seed-42"
    config = experiment.config({"arm": "replay ids"}, 42)
    reader, text, before = TraceReader(home / "routes"), build(config.data, 42), load_model(home)
    assert reader.steps == tuple(range(config.updates)) and reader.info.source == "reference" and reader.info.weights
    model = replay_freeze.Workshop(workdir).program(config).model
    for step in (0, config.updates - 1):
        tokens = text.batch(step)["tokens"][0]
        live = model.features(before.params, tokens, capture=("trace",)).trace
        np.testing.assert_array_equal(reader.read(step, tokens).ids, live.ids)


@pytest.mark.slow
def test_a_frozen_router_keeps_every_bit_and_others_do_not(finished):
    """Fine-tuned by hand from the prepared checkpoint, noise and weight decay on."""
    workdir, experiment, _ = finished
    shop = replay_freeze.Workshop(workdir)
    for arm, still in (("freeze", True), ("noisy", False)):
        config = experiment.prepare(shop, experiment.config({"arm": arm}, 42))
        program, data = shop.program(config), shop.data(config)
        params = load_model(config.start).params
        state = dataclasses.replace(program.init(np.uint32(42)), params=jax.tree.map(lambda x: x.copy(), params))
        for step in range(3):
            state, _, _ = program.train(state, data.batch(step), config.knobs(step))
        router = [tree["layers"]["feed_forward"]["router"] for tree in (params, state.params)]
        assert bool((router[0] == router[1]).all()) == still
        assert not (params["layers"]["feed_forward"]["up"] == state.params["layers"]["feed_forward"]["up"]).all()


@pytest.mark.slow
def test_stopped_anywhere_it_ends_in_the_same_numbers(finished, tmp_path):
    """Stopped while the checkpoint is trained, and in a run; what is there is not made again."""
    workdir, _, _ = finished
    experiment = few("replay ids")
    for after in (7, 30):
        polls = iter(range(1000))
        with pytest.raises(Stopped):
            run_study(experiment, tmp_path, stop=lambda polls=polls, after=after: next(polls) >= after)
    made = (tmp_path / "pretrained" / "seed-42" / "routes" / "trace.json").stat().st_mtime_ns
    assert run_study(experiment, tmp_path).failed == 0
    assert (tmp_path / "pretrained" / "seed-42" / "routes" / "trace.json").stat().st_mtime_ns == made
    rows = [{run.key: (run.metrics, run.series) for run in Ledger.read(place).finished().values()} for place in (workdir, tmp_path)]
    assert len(rows[1]) == 2 and all(rows[0][key] == found for key, found in rows[1].items())


@pytest.mark.slow
def test_routes_that_were_cut_off_are_made_again(finished, tmp_path):
    """A killed recording leaves a part without its manifest."""
    experiment, shop = few("replay ids"), replay_freeze.Workshop(tmp_path)
    config = experiment.config({"arm": "replay ids"}, 42)
    ready = experiment.prepare(shop, config)
    (tmp_path / "pretrained" / "seed-42" / "routes" / "part-0.json").unlink()
    assert experiment.prepare(shop, config) == ready
    assert TraceReader(ready.replay).steps == tuple(range(20)) and ready.start.endswith("pretrained/seed-42")


@pytest.mark.slow
def test_the_report_says_what_each_remedy_did_in_words(finished):
    workdir, _, _ = finished
    text = report.build(workdir).markdown.read_text()
    assert "arm freeze instead of noisy" in text and "arm router excluded instead of noisy" in text
    assert "AQN in reinforcement learning perturbs the sampling copy alone" in text


@pytest.mark.parametrize(
    "name, message", [("replay_freeze:quik", "did you mean 'quick'"), ("replay_frieze:quick", "did you mean 'replay_freeze'")]
)
def test_unknown_names_get_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        load(name)
