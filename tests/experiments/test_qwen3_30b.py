"""The 30B studies: what is declared for every preset, the recipe, the launch lines, and the three studies from end to end at the size of a test."""

import dataclasses
import json
import re
import time

import jax
import numpy as np
import pytest

from experiments import qwen3_30b, qwen3_30b_e7b_matrix, qwen3_30b_logit_offset, qwen3_30b_routers, qwen3_30b_sensitivity
from experiments.catalogue import load, load_all
from experiments.qwen3_30b import LAUNCH, PRESETS, RECIPE, STUDIES
from experiments.qwen3_30b_e7b_matrix import ARMS, NOISY, REMEDIES
from launch.preview import preview
from moe_jax.errors import ConfigError, Stopped
from moe_jax.mesh import MeshSpec
from moe_jax.model import ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.noise.sites import GROUPS
from moe_jax.studies import Ledger, cell_key, paired, report
from moe_jax.studies.run import Workshop, run_study
from moe_jax.trace_store import TraceReader
from moe_jax.train.saved import load_model

ALL = [(study, preset) for study in STUDIES for preset in PRESETS]


def few(study, *cells):
    """A smoke study with some of its cells, and the comparisons that these allow."""
    experiment = load(f"qwen3_30b.{study}:smoke")
    kept = {cell_key(cell) for cell in cells}
    comparisons = tuple(c for c in experiment.design.comparisons if {cell for _, cell in c.terms} <= kept)
    design = dataclasses.replace(experiment.design, only=tuple(cell_key(cell) for cell in cells), comparisons=comparisons)
    return dataclasses.replace(experiment, design=design)


def rows(workdir):
    return {run.key: (run.metrics, run.arrays) for run in Ledger.read(workdir).finished().values()}


# --- what is declared ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study, preset", ALL)
def test_a_study_is_declared_whole_before_it_runs(study, preset):
    experiment = load(f"qwen3_30b.{study}:{preset}")
    design, configs = experiment.design, experiment.configs()
    assert experiment.name == design.name == f"qwen3_30b.{study}:{preset}" and experiment.cost
    assert type(design).from_json(design.to_json()) == design and len(configs) == len(design.runs())
    assert len(design.seeds) >= (2 if preset == "smoke" else 3)
    assert (experiment.measure is None) == (study == "e7b_matrix") and experiment.prepare
    assert design.settings["model"]["num_layers"] == {"smoke": 2, "mini": 4, "full": 48}[preset]
    assert all(config.noise_seed == seed for config, (_, seed) in zip(configs, design.runs(), strict=True))
    assert all(config.data.eval_windows % config.eval_batch == 0 for config in configs)  # no padding in what is compared
    assert len({load(f"qwen3_30b.{study}:{other}").design.digest() for other in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("study", STUDIES)
def test_the_full_study_is_the_published_model_and_the_mini_one_trains_its_own(study):
    full, mini = (load(f"qwen3_30b.{study}:{preset}").configs()[0] for preset in ("full", "mini"))
    assert full.model.what() == ModelConfig.preset("qwen3_30b_a3b").what() and qwen3_30b.warm_up("full") is None
    assert full.start == ("models/Qwen3-30B-A3B-Base" if study == "e7b_matrix" else "models/Qwen3-30B-A3B")
    assert full.data.tokenizer == f"{full.start}/tokenizer.json" and full.model.dtypes.compute == "bfloat16"
    assert full.model.dtypes.params == ("float32" if study == "e7b_matrix" else "bfloat16")
    assert (mini.model.num_layers, mini.model.num_experts, mini.start) == (4, 16, "start")
    before = qwen3_30b.warm_up("mini")
    assert before.model == mini.model and before.noise == "" and before.checkpoint_every and before.data.source == "wiki"


def test_the_recipe_is_that_of_the_scripts():
    """Origins B5: 58 steps of 4 updates; AdamW at 1e-6 after 10 updates, decay 0.1, clipped at 1, no KL, no balance loss."""
    assert (RECIPE.updates, RECIPE.prompts * RECIPE.samples, 7_473 // RECIPE.prompts) == (232, 2048, RECIPE.steps)
    assert RECIPE.kl_weight == RECIPE.entropy_weight == RECIPE.balance_weight == 0
    config = load("qwen3_30b.e7b_matrix:full").configs()[0]
    optimizer = config.optimizer
    assert (optimizer.matrices, optimizer.router, optimizer.schedule) == ("adamw", "adamw", "warmup_constant")
    assert (optimizer.adamw_learning_rate, optimizer.warmup, optimizer.weight_decay, optimizer.betas) == (1e-6, 10, 0.1, (0.9, 0.999))
    assert (optimizer.clip_norm, config.updates, config.balance_weight) == (1.0, 232, 0.0)
    assert load("qwen3_30b.e7b_matrix:full").design.settings["recipe"]["response_tokens"] == 8192


@pytest.mark.parametrize("study", STUDIES)
def test_every_full_study_has_a_launch_line_for_each_machine(study):
    lines = load(f"qwen3_30b.{study}:full").launch
    assert lines == LAUNCH[study] and [machine.split()[0] for machine in lines] == ["v5p", "v6e", "8"]
    assert load(f"qwen3_30b.{study}:mini").launch == {}
    configs = load(f"qwen3_30b.{study}:full").configs()
    for machine, line in lines.items():
        mesh = MeshSpec.parse(re.search(r"--mesh=([^\s\"]+)", line)[1])
        chips = re.search(r"(\d+) (?:chips|H100)", machine)[1]
        assert mesh.size == int(chips) and f"--experiment=qwen3_30b.{study}:full" in line
        assert {config.eval_batch % mesh.size for config in configs} == {0}
        assert study != "e7b_matrix" or {config.data.batch_size % mesh.size for config in configs} == {0}


@pytest.mark.parametrize("study", STUDIES)
def test_the_plan_of_a_full_study_loads_nothing(study):
    began = time.monotonic()
    text = preview(load(f"qwen3_30b.{study}:full"))
    assert time.monotonic() - began < 30
    assert "30,532,122,624 parameters" in text and "8 H100" in text and "v6e slice" in text and "v5p slice" in text
    assert re.search("not counted: (no tokenizer at models/Qwen3-30B-A3B|wiki is not in the cache)", text)  # a fresh machine has neither
    assert ("optimizer (the first run's)" in text) == (study == "e7b_matrix")
    assert ("nothing is trained" in text) == (study != "e7b_matrix")


def test_the_name_without_a_study_is_all_three_and_wrong_names_get_the_nearest():
    assert list(load_all("qwen3_30b:mini")) == list(STUDIES) and list(load_all("qwen3_30b.sensitivity:mini")) == [""]
    assert load_all("noise_sites:smoke").keys() == {""}
    for name, message in (
        ("qwen3_30b:mini", "is 3 studies; name one: qwen3_30b.sensitivity:mini"),
        ("qwen3_30b.sensitvity:mini", "did you mean 'sensitivity'"),
        ("qwen3_30b.e7b_matrix:mni", "did you mean 'mini'"),
        ("qwen3_30:mini", "did you mean 'qwen3_30b'"),
        ("qwen3_30b.logit_offset", "needs a preset: qwen3_30b.logit_offset:smoke"),
        ("noise_sites.all:smoke", "known: none, it is one study"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(name)


# --- the arms -----------------------------------------------------------------------------------------------------------------


def acting(arm, phase):
    config = load("qwen3_30b.e7b_matrix:mini").config({"arm": arm}, 42)
    noise = config.model.resolve(NoiseSpec.parse(config.noise)).in_phase(phase)
    scales = {} if noise is None else {site: float(np.max(scale)) for site, scale in noise.scales.items()}
    return {site: round(scale, 6) for site, scale in scales.items() if scale}


def test_what_an_arm_perturbs():
    """Origins B2: as run attention, router and head in evaluation, the head alone in supervised training; as described every matmul."""
    described = acting("as described", "train")
    assert set(described) == {"router_gemm", "lm_head", *GROUPS["experts"], *GROUPS["attention"]} and set(described.values()) == {0.05}
    assert acting("clean", "train") == acting("clean", "eval") == {}
    assert acting("as run", "train").keys() == {"lm_head"} and not set(acting("as run", "eval")) & set(GROUPS["experts"])
    assert acting("as run", "eval").keys() == {"router_gemm", "lm_head", *GROUPS["attention"]}
    for arm, group in (("router only", ["router_gemm"]), ("experts only", GROUPS["experts"]), ("attention only", GROUPS["attention"])):
        assert acting(arm, "train") == acting(arm, "eval") == dict.fromkeys(group, 0.05)
    assert acting("lm_head only", "train") == {"lm_head": 0.05}
    assert acting("router 1 %", "train") == {**described, "router_gemm": 0.01}
    assert acting("router left out", "train") == {site: s for site, s in described.items() if site != "router_gemm"}
    assert all(acting(arm, "train") == described for arm in ("freeze", "replay", "AQN experts"))


def test_the_arms_share_six_programs():
    experiment = load("qwen3_30b.e7b_matrix:mini")
    configs = {arm: experiment.config({"arm": arm}, 42) for arm in ARMS}
    assert len({config.structure() for config in configs.values()}) == 6 and len(ARMS) == 12
    assert configs["AQN experts"].spec().by_site()["norm_moe"].reach == ("experts",)
    assert configs["freeze"].objective.freeze == ("freeze_params",) and configs["replay"].replay_what == "ids"
    assert {arm for arm, config in configs.items() if config.replay} == {"replay"}


def test_every_noisy_arm_is_compared_with_clean_and_every_remedy_with_as_described():
    families = {}
    for c in load("qwen3_30b.e7b_matrix:mini").design.comparisons:
        families.setdefault(c.family, {})[dict(c.terms[0][1])["arm"]] = dict(c.terms[1][1])["arm"]
    for metric in ("Val PPL, noise on", "Val PPL, noise off"):
        assert families[f"damage, {metric}"] == dict.fromkeys(NOISY, "clean")
        assert families[f"remedy, {metric}"] == dict.fromkeys(REMEDIES, "as described")
    assert {"clean", *NOISY, *REMEDIES} == set(ARMS)


@pytest.mark.parametrize(
    "study, name, arms",
    [
        ("sensitivity", "taken away by clean experts, less half of the damage, Loss", ("all noise", "clean", "clean experts")),
        ("e7b_matrix", "taken away by router left out, less half of the damage", ("as described", "clean", "router left out")),
    ],
)
def test_half_of_the_damage_is_a_contrast_of_three_arms(study, name, arms):
    """All noise at 4, clean at 2, the remedy at 2.5: 1.5 of 2 is taken away, half a unit more than half."""
    found = {c.name: c for c in load(f"qwen3_30b.{study}:mini").design.comparisons}[name]
    value = dict(zip(arms, (4.0, 2.0, 2.5), strict=True))
    assert sum(weight * value[dict(cell)["arm"]] for weight, cell in found.terms) == pytest.approx(0.5)
    assert "resolved above 0" in load(f"qwen3_30b.{study}:mini").design.rule


# --- the rule about experts changed -------------------------------------------------------------------------------------------


def test_the_claim_is_decided_by_the_interval():
    for values, word in (((7.0, 7.1, 7.2), "Refuted"), ((60.0, 60.5, 61.0), "Confirmed"), ((30.0, 50.0, 70.0), "Unresolved")):
        assert qwen3_30b_routers.decision(paired(values, (0.0, 0.0, 0.0)), 50.0).startswith(word)


def test_moving_all_logits_matters_to_relative_noise_and_not_to_centred():
    """Against independent draws of the same noise on the logits as they are."""
    logits = jax.random.normal(jax.random.key(0), (2, 2000, 32))
    key = np.array([1, 2], np.uint32)
    noisy = logits + 0.05 * abs(logits - logits.mean(-1, keepdims=True)) * jax.random.normal(jax.random.key(5), logits.shape)
    before, after = (np.asarray(jax.lax.top_k(y, 4)[1]).reshape(-1, 4) for y in (logits, noisy))
    kept = [np.isin(a, b).mean() for a, b in zip(before, after, strict=True)]
    found = {kind: np.asarray(qwen3_30b_logit_offset.changed_if_moved(logits, kind, 0.05, key, 4)) for kind in qwen3_30b_logit_offset.KINDS}
    assert all(value.shape == (2,) for value in found.values())
    assert found["centred_relative"].mean() == pytest.approx(1 - np.mean(kept), abs=0.01)
    assert found["relative"].mean() > 2 * found["centred_relative"].mean() < found["rms_relative"].mean()
    assert np.asarray(qwen3_30b_logit_offset.changed_if_moved(logits, "relative", 0.0, key, 4)).max() == 0


# --- from end to end ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One folder for the studies, which share a checkpoint there."""
    return tmp_path_factory.mktemp("qwen3")


@pytest.mark.slow
def test_sensitivity_finds_what_its_decomposition_says_and_is_not_made_twice(shared, monkeypatch):
    experiment, workdir = load("qwen3_30b.sensitivity:smoke"), shared / "sensitivity"
    outcome = run_study(experiment, workdir, shared=shared)
    assert (outcome.done, outcome.failed, outcome.compiled["train"]) == (20, 0, 1)
    full = json.loads((workdir / "decomposition" / "report.json").read_text())
    found = rows(workdir)
    arm = next(i for i, arm in enumerate(full["arms"]) if arm["routes"] == "ids" and arm["noisy"] == list(qwen3_30b_sensitivity._ALL))
    wanted = np.average(full["values"]["loss"][arm][1], weights=full["tokens"])
    assert found[cell_key({"arm": "clean experts"}), 1][0]["loss"] == pytest.approx(wanted, rel=1e-12)
    assert all(found[cell_key({"arm": "clean"}), seed][0]["kl"] == 0 for seed in (0, 1))
    assert str(shared) not in (workdir / "decomposition" / "report.json").read_text()  # what was measured, not where it lay
    page = report.build(workdir).markdown.read_text()
    assert "taken away by clean experts, less half of the damage" in page and (workdir / "decomposition" / "report.html").exists()

    ledger = workdir / "ledger.jsonl"
    ledger.write_text("\n".join(ledger.read_text().split("\n")[:-6]) + "\n")
    monkeypatch.setattr("launch.sensitivity_run.measure", None)  # it would fail
    assert run_study(experiment, workdir, shared=shared).done == 5 and rows(workdir) == found


@pytest.mark.slow
def test_logit_offset_measures_nothing_without_noise_and_writes_its_page(shared, tmp_path):
    cells = (qwen3_30b_logit_offset.CLEAN, *({"kind": kind, "scale": 0.05} for kind in qwen3_30b_logit_offset.KINDS))
    experiment, workdir = few("logit_offset", *cells), shared / "logit_offset"
    assert run_study(experiment, workdir, shared=shared).done == 8
    found = rows(workdir)
    for (cell, _), (metrics, arrays) in found.items():
        clean = dict(cell)["scale"] == 0
        assert all((metrics[name] == 0) == clean for name in ("changed", "changed_moved", "changed_all", "kl", "tokens_changed"))
        assert len(arrays["offset"]) == len(arrays["changed"]) == 2 and metrics["offset"] == pytest.approx(np.mean(arrays["offset"]))
    by_seed = {seed: {metrics["offset"] for (_, s), (metrics, _) in found.items() if s == seed} for seed in (0, 1)}
    assert all(len(values) == 1 for values in by_seed.values()) and by_seed[0] != by_seed[1]  # a block is other text
    (page, _) = experiment.pages(workdir)
    assert "Refuted: 5 % relative noise changes half" in page.read_text() and (workdir / "figures" / "routers.png").stat().st_size > 10_000

    polls = iter(range(100))
    with pytest.raises(Stopped):
        run_study(experiment, tmp_path, stop=lambda: next(polls) >= 3, shared=shared)
    done = len(rows(tmp_path))
    assert run_study(experiment, tmp_path, shared=shared).done == 8 - done and rows(tmp_path) == found


@pytest.mark.slow
def test_the_matrix_trains_every_arm_from_one_checkpoint(shared):
    cells = [{"arm": arm} for arm in ("clean", "as run", "as described", "replay", "AQN experts")]
    experiment, workdir = few("e7b_matrix", *cells), shared / "e7b_matrix"
    outcome = run_study(experiment, workdir, shared=shared)
    assert (outcome.done, outcome.failed) == (10, 0) and outcome.compiled["train"] in (
        5,
        6,
    )  # the checkpoint too, unless another test made it
    found = {(run.cell["arm"], run.seed): run for run in Ledger.read(workdir).finished().values()}
    start = load_model(shared / "start")
    assert start.step == 20 and start.run.noise == ""
    for (arm, _), run in found.items():
        assert (run.metrics["val_perplexity_noisy"] == run.metrics["val_perplexity"]) == (arm == "clean")
        assert 0.5 < run.metrics["val_reference_overlap"] < 1
    losses = {arm: found[arm, 42].series["train/loss"] for arm in ("clean", "as run", "as described", "replay", "AQN experts")}
    assert len({series[-1][1] for series in losses.values()}) == 5
    assert losses["as described"][0] == losses["AQN experts"][0]  # sigma is 0 in its first interval
    reader = TraceReader(workdir / "routes" / "seed-42")
    assert reader.steps == tuple(range(10)) and reader.info.source == "reference" and not reader.info.weights
    assert "arm as described instead of clean" in report.build(workdir).markdown.read_text()


@pytest.mark.slow
def test_a_study_on_a_mesh_finds_what_one_device_finds(shared, tmp_path):
    """Every matmul of the model over eight devices; the draws are those of one."""
    arms = [{"arm": arm} for arm in ("clean", "as described")]
    for name, experiment in (
        ("e7b_matrix", few("e7b_matrix", *arms)),
        ("logit_offset", few("logit_offset", {"kind": "relative", "scale": 0.05})),
        ("sensitivity", few("sensitivity", {"arm": "all noise"}, {"arm": "flips alone"})),
    ):
        alone, divided = tmp_path / f"{name}-1", tmp_path / f"{name}-8"
        run_study(experiment, alone, shared=shared)
        run_study(experiment, divided, shared=shared, mesh=MeshSpec.parse("fsdp=2,expert=4").build())
        one, eight = rows(alone), rows(divided)
        assert one.keys() == eight.keys()
        for key, (metrics, _) in one.items():
            for metric, value in metrics.items():
                assert eight[key][0][metric] == pytest.approx(value, rel=2e-3, abs=1e-5), (name, key, metric)


def test_published_weights_that_are_not_there_are_one_line(tmp_path):
    experiment = load("qwen3_30b.sensitivity:full")
    with pytest.raises(ConfigError, match="no folder models/Qwen3-30B-A3B: put the published checkpoint there"):
        experiment.prepare(Workshop(tmp_path), experiment.configs()[0])


def test_another_model_than_the_studys_is_refused(tmp_path):
    """A folder as published, of a mixture with other numbers."""
    values = {"model_type": "qwen3_moe", "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "num_experts": 4, "num_experts_per_tok": 2}
    values |= {"moe_intermediate_size": 8, "intermediate_size": 96, "rope_theta": 1e6, "norm_topk_prob": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # no tensor is looked for
    config = dataclasses.replace(qwen3_30b.base("smoke"), start=str(tmp_path))
    with pytest.raises(ConfigError, match="another one than this study's: num_experts: was 4, now 8"):
        qwen3_30b.checkpoint(config)


def test_the_matrix_is_declared_with_the_librarys_noise():
    assert qwen3_30b_e7b_matrix.ARMS["as run"]["noise"] == "e7b_as_run"
