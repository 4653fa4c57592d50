"""Which operator's noise does the damage: the declared cells, their programs and contrasts, and that noise hits where a cell says."""

import dataclasses
import math

import pytest

from experiments.catalogue import load
from experiments.noise_sites import CLEAN, PASSES, PRESETS, SCALES, SITES, noise_of
from launch.preview import preview
from moe_jax.errors import ConfigError
from moe_jax.keys import PHASES
from moe_jax.noise import NoiseSpec
from moe_jax.noise.sites import GROUPS
from moe_jax.studies import Ledger, report
from moe_jax.studies.run import run_study
from moe_jax.train.data import build
from moe_jax.train.loop import run


def few(*cells, seeds=(42, 43)):
    """The smoke study with some of its cells, and the comparisons that these allow."""
    experiment = load("noise_sites:smoke")
    kept = {tuple(sorted(cell.items())) for cell in cells}
    comparisons = tuple(c for c in experiment.design.comparisons if {cell for _, cell in c.terms} <= kept)
    design = dataclasses.replace(experiment.design, only=tuple(kept), comparisons=comparisons, seeds=seeds)
    return dataclasses.replace(experiment, design=design)


def cell(site, scale, passes="forward"):
    return {"site": site, "passes": passes, "scale": scale}


@pytest.mark.parametrize("preset, seeds", [("smoke", 2), ("quick", 3)])
def test_a_clean_cell_beside_the_whole_factorial_in_eleven_programs(preset, seeds):
    experiment = load(f"noise_sites:{preset}")
    design, cells = experiment.design, experiment.design.cells()
    assert cells[0] == CLEAN and len(cells) == 1 + len(SITES) * len(SCALES) * len(PASSES) == 31
    assert {tuple(c.values()) for c in cells[1:]} == {(site, passes, scale) for site in SITES for passes in PASSES for scale in SCALES}
    configs = experiment.configs()
    assert len(configs) == 31 * seeds == len(design.runs())
    structures = [config.structure() for config in configs]
    assert len(set(structures)) == 11
    assert structures[0] not in structures[1:31]  # the clean run of a seed has a program of its own
    assert all(len(set(structures[1 + i : 4 + i])) == 1 for i in range(0, 30, 3))  # the scales of a site and pass share one
    assert all(config.init_seed == config.data_seed == config.noise_seed for config in configs)
    assert type(design).from_json(design.to_json()) == design


def test_what_a_cell_perturbs():
    spec = NoiseSpec.parse(noise_of(cell("experts", 0.05, "forward+backward"))).by_site()
    assert set(spec) == set(GROUPS["experts"])
    for noise in spec.values():
        assert (noise.kind, noise.scale, noise.phases) == ("relative", 0.05, ("train", "eval"))
        assert noise.passes == ("forward", "grad_input", "grad_weight")
    assert NoiseSpec.parse(noise_of(cell("head", 0.1))).by_site()["lm_head"].passes == ("forward",)
    model = load("noise_sites:quick").configs()[0].model
    hit = {site: {name for name, _ in model.resolve(NoiseSpec.parse(noise_of(cell(site, 0.1)))).structure} for site in SITES}
    assert hit["all"] == hit["router"] | hit["experts"] | hit["attention"] | hit["head"]
    assert sum(map(len, hit.values())) == 2 * len(hit["all"])  # the four sites do not overlap
    clean = model.resolve(NoiseSpec.parse(noise_of(CLEAN)))
    assert [phase for phase in PHASES if clean.in_phase(phase)] == ["eval"] and not any(s.any() for s in clean.scales.values())


def test_the_comparisons_are_those_declared():
    """Families by question and scale, every comparison in it of the cells that its question names; the digest stands for all of them."""
    design = load("noise_sites:quick").design
    families = {}
    for c in design.comparisons:
        families.setdefault(c.family, []).append(c)
    sizes = {name: len(members) for name, members in families.items()}
    per_scale = {f"{name} at {s}": n for name, n in (("site", 5), ("backward", 5), ("router against", 3)) for s in SCALES}
    assert sizes == {**per_scale, "usage_cv_routed": 5}
    for c in design.comparisons:
        (plus, new), (minus, old) = ((sign, dict(key)) for sign, key in c.terms)
        assert (plus, minus) == (1.0, -1.0)
        if c.family.startswith("backward"):
            assert new == {**old, "passes": "forward+backward"} and old["passes"] == "forward"
        elif c.family.startswith("router against"):
            assert old["site"] != "router" and new == {**old, "site": "router"}
        else:
            assert old == CLEAN and new["passes"] == "forward"
        assert c.metric == (c.family if c.family.startswith("usage") else "val_perplexity")
    fewer = dataclasses.replace(design, comparisons=design.comparisons[1:])
    assert fewer.digest() != design.digest() == load("noise_sites:quick").design.digest() != load("noise_sites:smoke").design.digest()


def test_the_preview_says_what_would_run():
    text = preview(load("noise_sites:smoke"))
    assert "62 = 31 cells x seeds 42, 43" in text and "11 structure(s)" in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sites")
    cells = (CLEAN, cell("router", 0.1), cell("router", 0.01), cell("router", 0.1, "forward+backward"))
    return workdir, few(*cells), run_study(few(*cells), workdir)


@pytest.mark.slow
def test_scales_share_a_program_and_every_cell_is_another_run(finished):
    workdir, experiment, outcome = finished
    assert (outcome.done, outcome.failed) == (8, 0)
    assert outcome.compiled == {"train": 3, "evaluate": 3, "init": 3}
    runs = Ledger.read(workdir).finished()
    assert len({row.metrics["val_perplexity"] for row in runs.values()}) == 8
    for row in runs.values():
        clean = row.cell["site"] == "none"
        assert math.isfinite(row.metrics["val_perplexity"])
        assert (row.metrics["val_perplexity_noisy"] == row.metrics["val_perplexity"]) == clean


@pytest.mark.slow
def test_the_clean_cell_is_the_run_without_noise(finished):
    workdir, experiment, _ = finished
    config = dataclasses.replace(experiment.config(CLEAN, 42), noise="")
    bare = run(config, config.program(), build(config.data, 42)).metrics
    (row,) = [row for row in Ledger.read(workdir).finished().values() if row.cell["site"] == "none" and row.seed == 42]
    assert {name: row.metrics[name] for name in ("val_perplexity", "usage_cv_routed", "train_loss_end")} == {
        name: bare[name] for name in ("val_perplexity", "usage_cv_routed", "train_loss_end")
    }


@pytest.mark.slow
def test_gradient_noise_leaves_the_first_forward_pass_alone(finished):
    """The first loss shows the forward noise of its scale; noise in the gradients shows from the next on."""
    workdir, _, _ = finished
    runs = [row for row in Ledger.read(workdir).finished().values() if row.seed == 42]
    losses = {(row.cell["passes"], row.cell["scale"]): [loss for _, loss in row.series["train/loss"]] for row in runs}
    forward, both = losses["forward", 0.1], losses["forward+backward", 0.1]
    assert forward[0] == pytest.approx(both[0], rel=1e-6) and forward[-1] != both[-1]
    assert len({losses[key][0] for key in (("forward", 0.0), ("forward", 0.1), ("forward", 0.01))}) == 3


@pytest.mark.slow
def test_the_report_says_which_site_in_words(finished):
    workdir, _, _ = finished
    text = report.build(workdir).markdown.read_text()
    assert "Which operator's relative error during training raises perplexity" in text
    assert "site router instead of none and scale 0.1 instead of 0.0 at passes forward" in text
    assert "passes forward+backward instead of forward at site router, scale 0.1" in text


@pytest.mark.parametrize(
    "name, message", [("noise_sites:quik", "did you mean 'quick'"), ("noise_site:quick", "did you mean 'noise_sites'")]
)
def test_unknown_names_get_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        load(name)


def test_every_preset_has_a_cost():
    assert all(load(f"noise_sites:{preset}").cost for preset in PRESETS)
