"""`launch.sensitivity`: the numbers that follow from logits, the report's sentences and tables, and the command itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import sensitivity_logits as from_logits
from launch.sensitivity_logits import SCALES, SHIFTS, Logits, example, own_sigma, relative_noise
from launch.sensitivity_report import build, sentences
from launch.sensitivity_run import Config, make_config
from launch.sensitivity_tables import About, arms_table, damages, named_arms
from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.sensitivity import CLEAN, OPPOSITE, Sensitivity, sensitivity
from moe_jax.train.data import DataConfig
from moe_jax.train.saved import load_model
from tests.launch.here import call

CONFIG = ModelConfig.preset("tiny", dispatch="dense")
ABOUT = About("tiny, fresh", "made-up text", "all=relative:0.2", NoiseSpec.parse("relative:0.2").table(), ("relative",), "eval", 4, 2)


def measured(spec: str, batches: int = 2) -> tuple[Sensitivity, Logits]:
    windows = np.random.default_rng(0).integers(0, 260, (batches, 2, 13), np.int32)
    noise, model = NoiseSpec.parse(spec), Model(CONFIG)
    logits = Logits(CONFIG.resolve(noise), CONFIG.moe_layers, 2)
    params = model.init(0)
    params["layers"]["feed_forward"]["router"] *= 20.0
    return sensitivity(model, params, iter(windows), noise, range(3), look=logits), logits


@pytest.fixture(scope="module")
def found():
    return measured("relative:0.2")


# --- logits -------------------------------------------------------------------------------------------------------------------


def test_the_printed_example():
    """By hand: of the experts 0-7, numbers 4 and 6 fall behind 8 and 9, so 6 of 8 stay, not 4."""
    kept, drawn = example()
    assert kept == 6
    overlap, changed, exact = (drawn[SHIFTS.index(0.0), SCALES.index(0.05), i] for i in range(3))
    assert overlap == pytest.approx(0.86, abs=0.01) and changed == pytest.approx(exact, abs=0.02)
    assert drawn[SHIFTS.index(-2.0), 1, 0] > 0.999 and drawn[SHIFTS.index(8.0), 1, 0] == pytest.approx(0.45, abs=0.02)


def test_moved_logits_are_the_same_routing_function():
    """Moving logits leaves clean routes; relative noise grows with the offset, and without a mean it is what it is at any offset."""
    logits = jax.random.normal(jax.random.key(1), (1, 400, 16))
    here, there = relative_noise(logits, 4, 0), relative_noise(logits + 3.0, 4, 0)
    centred, more = SHIFTS.index(None), SHIFTS.index(8.0)
    np.testing.assert_allclose(here[centred], there[centred], atol=0.01)
    assert (here[more, :, 0, 0] < here[0, :, 0, 0]).all() and (np.diff(here[0, :, 0, 0]) < 0).all()
    np.testing.assert_allclose(here[..., 1], here[..., 2], atol=0.08)  # drawn against exact, 400 tokens
    y = np.asarray(logits[0])
    noisy = y * (1 + 0.1 * np.asarray(jax.random.normal(jax.random.key(0), (1, 400, 16)))[0])
    sets = [[set(row) for row in np.asarray(routing.select(jnp.asarray(x), 4))] for x in (y, noisy)]
    assert here[0, 2, 0, 1] == pytest.approx(np.mean([a != b for a, b in zip(*sets, strict=True)]))


@pytest.mark.parametrize(
    "spec, size",
    [
        ("router_logits=additive:0.3", 0.3),
        ("router_gemm=relative:0.1", [0.1, 0.2, 0.4]),
        ("router_gemm=relative:0.3,router_logits=additive:0.4", [0.5, np.hypot(0.6, 0.4), np.hypot(1.2, 0.4)]),
        ("router_logits=centred_relative:0.3:layers=0", [0.4, 0.7, 1.1]),
        ("router_logits=rms_relative:0.1:layers=1", 0.0),
        ("router_logits=additive:0.3:reach=weights", 0.0),
        ("router_gemm=relative:0.1:passes=grad_input", 0.0),
    ],
)
def test_the_spread_of_a_routers_own_noise(spec, size):
    noise = CONFIG.resolve(NoiseSpec.parse(spec))
    sigma = own_sigma(noise, (0,), jnp.array([[[1.0, 2.0, -4.0]]]))
    np.testing.assert_allclose(sigma[0, 0], np.broadcast_to(size, 3), rtol=1e-6)


def test_what_has_no_formula_has_no_prediction():
    for spec in ("router_input=relative:0.1", "router_gemm=quantise:int8", "experts=relative:0.1"):
        assert own_sigma(CONFIG.resolve(NoiseSpec.parse(spec)), (0,), jnp.ones((1, 1, 3))) is None


def test_only_tokens_that_count_are_sampled(monkeypatch):
    monkeypatch.setattr(from_logits, "SAMPLE", 4)
    logits = Logits(CONFIG.resolve(NoiseSpec.parse("router_logits=additive:1.0")), (0,), 1)
    values = jnp.zeros((1, 8, 2)).at[:, 2:].set(jnp.array([100.0, 0.0]))  # the others would flip half of the time
    logits(values, np.array([0, 0, 1, 1, 1, 1, 1, 1.0]))
    assert logits.predicted.tolist() == [0.0] and logits.redone.shape == (4, 3, 1, 3)


# --- the report ---------------------------------------------------------------------------------------------------------------


def test_the_report_holds_the_numbers_of_its_json(found, tmp_path):
    path, table = build(*_order(found), tmp_path)
    markdown, numbers, page = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text()), path.read_text()
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == ["appendix.png", "damage.png", "layers.png", "margins.png"]
    everything = next(arm for arm in numbers["arms"] if arm["routes"] == "live" and len(arm["noisy"]) == 4)
    for value in (everything["kl over seeds"]["mean"], *everything["kl over seeds"]["interval"], everything["loss over seeds"]["mean"]):
        assert f"{value:.5f}" in markdown and f"{value:.5f}" in page
    share = next(s["share"] for s in numbers["shares"] if (s["routes"], s["metric"], s["over"]) == ("ids", "kl", "seeds"))
    assert f"{100 * share['value']:.2f} %" in markdown
    overlap = np.mean(numbers["routers"]["all"]["router/set_overlap"])
    assert f"{100 * overlap:.2f} %" in markdown and len(numbers["arms"]) == 49 and len(numbers["findings"]) > 8
    replayed = next(arm for arm in numbers["arms"] if arm["routes"] == "ids" and len(arm["noisy"]) == 4)
    assert table.rows[1][0] == "all noise, clean experts replayed"
    assert table.rows[1][1].startswith(f"{replayed['loss over seeds']['mean']:+.5f}")
    assert table.rows[1][3].startswith(f"{replayed['kl over seeds']['mean']:.5f}")
    assert table.rows[0][0] == "all noise" and "6 of 8" in markdown and "which chooses 2 of 4: this is not the 128/8 case" in markdown
    before = [file.read_bytes() for file in sorted(tmp_path.rglob("*.*"))]
    build(*_order(found), tmp_path)
    assert before == [file.read_bytes() for file in sorted(tmp_path.rglob("*.*"))]


def _order(found):
    return found[0], ABOUT, found[1]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["experts=relative:0.2", "router_logits=additive:1.0", "norms=additive:0.1", "router_gemm=quantise:int8"])
def test_a_spec_of_one_factor_makes_a_report_too(spec, tmp_path):
    """One factor has no arms of factors; one batch has no interval over text; a spec that spares the router has no prediction."""
    result, logits = measured(spec, batches=1)
    about = About("tiny", "text", spec, NoiseSpec.parse(spec).table(), (spec.split("=")[1].split(":")[0],), "eval", 4, 2)
    build(result, about, logits, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "alone" not in text.split("## Damage by arm")[0].replace("flips alone", "") and "nan" not in text
    assert ("draws nothing" in text) == ("quantise" in spec) and ("exact prediction of own" in text) == ("router_logits" in spec)


def made(loss: dict[tuple[str, tuple[str, ...]], list[float]]) -> Sensitivity:
    """A result whose loss damages are given and whose other numbers say nothing."""
    arms = tuple(loss)
    values = {metric: np.array([[[x] for x in loss[arm]] for arm in arms]) + (2.0 if metric == "loss" else 0.0) for metric in CLEAN}
    ones = {f"router/{name}": np.ones((4, 1)) for name in ("set_overlap", "tokens_changed", "logit_offset")}
    routers = {of: ones | {"first": np.array([[1.0, 3.0]] * 4)} for of in ("clean", "all")}
    factors = {name: (f"{name}_site",) for name in dict.fromkeys(name for _, noisy in arms for name in noisy)}
    return Sensitivity(factors, (0,), tuple(range(len(next(iter(loss.values()))))), (4,), 0.0, arms, values, np.array([2.0]), routers)


@pytest.mark.parametrize(
    "live, replayed, said",
    [
        ([0.1, 0.12, 0.11, 0.09], [0.02, 0.03, 0.02, 0.02], ("raises the loss: +0.10500", "Replaying the clean experts takes away 78.57 % [")),
        ([0.1, 0.12, 0.11, 0.09], [0.1, 0.13, 0.09, 0.09], ("raises the loss", "Unresolved: which part")),
        ([0.1, -0.12, 0.11, -0.09], [0.0, 0.0, 0.0, 0.0], ("Unresolved: whether noise in the experts changes the loss", "Undefined: which part")),
        ([-0.1, -0.12, -0.11, -0.09], [0.0, 0.0, 0.0, 0.0], ("lowers the loss", "Undefined: which part of the damage in loss")),
        ([0.0] * 4, [0.0] * 4, ("changes nothing", "Undefined: which part")),
        ([0.1] * 4, [0.02] * 4, ("changes the loss by +0.10000 nats per token in each of 4 seeds: it draws nothing",)),
    ],
)  # fmt: skip
def test_a_claim_is_made_only_when_it_is_resolved(live, replayed, said):
    everything = ("experts",)
    result = made({("live", everything): live, ("ids", everything): replayed, (OPPOSITE, ()): [0.0] * 4})
    logits = Logits(CONFIG.resolve(NoiseSpec.parse("experts=relative:0.1")), (0,), 2)
    text = " ".join(sentences(result, ABOUT, logits))
    assert all(part in text for part in said), text


def test_copies_are_no_evidence():
    """A factor that draws nothing, beside one that draws: its seeds are copies, so that the table gives no p and no verdict."""
    both, experts = ("router", "experts"), ("experts",)
    result = made({("live", both): [0.3, 0.5, 0.1], ("live", experts): [0.1] * 3, ("live", ("router",)): [0.2, 0.3, 0.1]})
    rows = {row[0]: row[-2:] for row in arms_table(result, [("all", "live", both), ("experts", "live", experts)]).rows}
    assert rows["experts"] == ("-", "-") and rows["all"][0] != "-"


def test_what_bare_logits_say_is_left_out_with_a_selection_bias(found, tmp_path):
    """The routes are then those of sigmoid(logits) + bias."""
    result, logits = found
    biased = Logits(logits.noise, logits.layers, logits.k, selection_bias=True)
    biased._redone = logits._redone
    said = {name: " ".join(sentences(result, ABOUT, which)) for name, which in (("plain", logits), ("biased", biased))}
    assert "changes no route" in said["plain"] and "changes no route" not in said["biased"]
    build(result, ABOUT, biased, tmp_path)
    assert "Appendix: what" not in (tmp_path / "report.md").read_text()


def test_the_tested_family_is_corrected(found):
    """All noise and each factor alone: five tests, whose smallest p is multiplied by five."""
    tested = damages(found[0])
    smallest = min(tested.values(), key=lambda contrast: contrast.p)
    assert len(tested) == 5 and smallest.holm_p == pytest.approx(min(1.0, 5 * smallest.p))
    names = [name for name, *_ in named_arms(found[0])]
    assert len(set(names)) == len(names) == 4 + 5 + 4


# --- the command --------------------------------------------------------------------------------------------------------------


def test_all_stands_for_every_matmul():
    def spec(noise):
        return Config("tiny", noise, DataConfig("synthetic", "bytes")).spec()

    assert spec("all=relative:0.05") == spec("relative:0.05") == NoiseSpec.parse("matmuls=relative:0.05")
    assert spec("norms=additive:0.1, all=relative:0.05").sites.keys() == {"norms", "matmuls"}


def test_a_preset_gets_a_text_that_fits_and_a_bad_config_is_refused():
    given = {"noise": "relative:0.1", "seeds": 2, "windows": 4, "batch": None, "phase": "eval", "replay": None}
    config = make_config(load_model("tiny"), "tiny", "synthetic", None, given)
    assert (config.data.tokenizer, config.data.seq_len, config.batch) == ("bytes", 64, 8)
    assert make_config(load_model("quick"), "quick", None, None, given).data.seq_len == load_model("quick").config.max_seq_len
    with pytest.raises(ConfigError, match="--seq_len=65 is longer than the 64 positions of tiny"):
        make_config(load_model("tiny"), "tiny", "synthetic", 65, given)
    with pytest.raises(ConfigError, match="seeds must be at least 2"):
        Config("tiny", "relative:0.1", config.data, seeds=1)


def test_the_command_from_end_to_end(tmp_path):
    flags = [
        "--model=tiny",
        "--data=synthetic",
        "--noise=router_gemm=relative:0.2",
        "--windows=3",
        "--batch=2",
        "--seeds=2",
        "--seq_len=16",
    ]
    done = call("sensitivity", *flags, f"--workdir={tmp_path / 'a'}")
    assert done.returncode == 0, done.stderr
    assert "all noise, clean experts replayed" in done.stdout and "report.html" in done.stdout and "batch 2/2 (100%)" in done.stderr
    numbers = json.loads((tmp_path / "a" / "report.json").read_text())
    assert numbers["tokens"] == [32, 16] and numbers["about"]["phase"] == "eval"
    assert {"config.json", "versions.json", "command.txt"} <= {file.name for file in (tmp_path / "a").iterdir()}


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--model=tinny", "--noise=relative:0.1", "--workdir=x"], 2, "did you mean 'tiny'"),
        (["--model=tiny", "--noise=relatve:0.1", "--workdir=x"], 2, "relative"),
        (["--model=tiny", "--data=synthetic", "--noise=relative:0.1"], 2, "--workdir is needed"),
        (
            ["--model=tiny", "--data=synthetic", "--noise=relative:0.1", "--batch=3", "--mesh=data=8", "--workdir=x"],
            2,
            "does not divide over",
        ),
        (["--model=tiny", "--data=synthetic", "--noise=experts=relative:0.1:phases=train", "--dry_run"], 2, "acts in train"),
        (["--model=tiny", "--data=synthetic", "--noise=relative:0.1", "--replay=/no/such/routes", "--workdir=x"], 4, "/no/such/routes"),
    ],
)
def test_errors_are_one_line(flags, code, message, tmp_path):
    """And they come before there is a folder."""
    failed = call("sensitivity", *(flag.replace("=x", f"={tmp_path / 'x'}") for flag in flags))
    assert not (tmp_path / "x").exists()
    assert failed.returncode == code and message in failed.stderr, failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
