"""`launch.noise`: what it measures is what the library does, what it counts is what is drawn, and what it says fits the spec."""

import jax
import numpy as np
import pytest

from launch.noise_measure import MeasuredModel, Tally, measure
from launch.noise_report import Config, errors_table, explain, read_spec, words
from moe_jax.errors import ConfigError
from moe_jax.keys import Draw
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.train.data import DataConfig
from tests.launch.here import call

CONFIG = ModelConfig.preset("tiny", dispatch="dense")  # which compiles in a third of the time of blocked
B, S, D, F, E, K, V, L = 2, 24, 32, 48, 4, 2, 260, 2
T = B * S


@pytest.fixture(scope="module")
def params():
    return Model(CONFIG).init(0)


@pytest.fixture(scope="module")
def batch():
    ids = np.random.default_rng(0).integers(0, V, (B, S + 1), np.int32)
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:]}


def measured(params, batch, spec: str, phase: str = "train", **changes):
    config = CONFIG.replace(**changes)
    return measure(config, params, batch, config.resolve(NoiseSpec.parse(spec)), Draw(seed=np.uint32(3), phase=phase))


def ratio(found, site: str, pass_: str = "forward") -> float:
    error, size, _ = sum(found.tally.layers(site, pass_).values())
    return float(np.sqrt(error / size))


def counts(found) -> dict[tuple[str, str], int]:
    totals: dict[tuple[str, str], int] = {}
    for (site, pass_, _), sums in found.tally.sums.items():
        totals[site, pass_] = totals.get((site, pass_), 0) + int(sums[2])
    return totals


@pytest.fixture(scope="module")
def everywhere(params, batch):
    return measured(params, batch, "relative:0.1,embedding=jitter:0.2,norm_moe=additive:0.01,router_logits=additive:0.02")


def test_every_element_of_every_product_is_counted_once(everywhere):
    """By the shapes of the products; padding of tiles and chunks is not counted."""
    rows, expected = {"expert_gate": (T * K, D, F, E), "expert_up": (T * K, D, F, E), "expert_down": (T * K, F, D, E)}, {}
    rows |= {f"attention_{name}": (T, D, D, 1) for name in "qkvo"} | {"router_gemm": (T, D, E, 1)}
    for site, (count, inner, outer, groups) in rows.items():
        expected |= {(site, "forward"): L * count * outer, (site, "grad_input"): L * count * inner}
        expected[site, "grad_weight"] = L * groups * inner * outer
    expected |= {("lm_head", "forward"): T * V, ("lm_head", "grad_input"): T * D, ("lm_head", "grad_weight"): V * D}
    expected |= {("embedding", "forward"): T * D, ("norm_moe", "forward"): L * D, ("router_logits", "forward"): L * T * E}
    assert counts(everywhere) == expected


def test_relative_noise_has_its_scale_as_error(everywhere):
    """Of N normals squared the mean is 1 +- sqrt(2/N), more where few large elements hold the norm; 20 % of the scale is far outside that here."""
    for site, pass_ in counts(everywhere):
        if site not in ("embedding", "norm_moe", "router_logits"):
            assert ratio(everywhere, site, pass_) == pytest.approx(0.1, rel=0.2), (site, pass_)
    assert ratio(everywhere, "embedding") == pytest.approx(0.2 / np.sqrt(3), rel=0.05)
    assert ratio(everywhere, "norm_moe") == pytest.approx(0.01, rel=0.3)  # the scales are 1


@pytest.mark.slow
def test_measuring_changes_no_number(params, batch):
    noise, draw = CONFIG.resolve(NoiseSpec.parse("relative:0.1,embedding=jitter:0.2")), Draw(seed=np.uint32(3), phase="train")

    def loss(params, model):
        return model.loss(params, batch["tokens"], batch["targets"], noise=noise, draw=draw)[0]

    def run(model):
        value, gradients = jax.jit(jax.value_and_grad(lambda params: loss(params, model)))(params)
        return value, gradients

    plain, watched = run(Model(CONFIG)), run(MeasuredModel(CONFIG, Tally()))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(watched), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_padding_of_a_tile_is_left_out(params, batch):
    """Dense dispatch has no tiles: the same elements, the same errors."""
    spec, few = "experts=additive:0.01", {name: ids[:1, :12] for name, ids in batch.items()}  # few tokens: few sizes of tiles to compile
    dense, blocked = (measured(params, few, spec, dispatch=name) for name in ("dense", "blocked"))
    assert counts(dense) == counts(blocked)
    assert dense.tally.sums.keys() == blocked.tally.sums.keys()
    for key, sums in blocked.tally.sums.items():
        np.testing.assert_allclose(sums, dense.tally.sums[key], rtol=1e-3, err_msg=str(key))


def test_a_quantised_weight_gradient_is_compared_with_the_exact_one(params, batch):
    found = measured(params, batch, "expert_up=quantise:fp8_e5m2,lm_head=quantise:fp8_e4m3")
    for site in ("expert_up", "lm_head"):
        for pass_ in ("forward", "grad_input", "grad_weight"):
            assert 0.001 < ratio(found, site, pass_) < 0.2, (site, pass_)
    assert set(errors_table(found.tally, CONFIG.resolve(NoiseSpec.parse("expert_up=quantise:fp8_e5m2")), T)[-1].split()) == {
        "in",
        "all",
        "0",
    }


def test_a_block_computed_again_is_counted_once(params, batch):
    sizes = {"forward": L * T * E, "grad_input": L * T * D, "grad_weight": L * D * E}
    found = measured(params, batch, "router_gemm=relative:0.1", remat="full")
    assert counts(found) == {("router_gemm", pass_): size for pass_, size in sizes.items()}


def test_layers_that_are_not_hit_do_not_dilute_the_error(params, batch):
    found = measured(params, batch, "router_gemm=relative:0.1:layers=1:passes=forward")
    noise = CONFIG.resolve(NoiseSpec.parse("router_gemm=relative:0.1:layers=1:passes=forward"))
    lines = errors_table(found.tally, noise, T)
    assert "(layer 1)" in lines[1] and float(lines[1].split()[5]) == pytest.approx(0.1, rel=0.2)
    assert lines[2].split() == ["in", "all", f"{T * E}", f"{E}"] and f"{2 * T * E} numbers" in lines[3]
    assert not found.changed[0].any()


def test_no_gradient_outside_training(params, batch):
    assert set(counts(measured(params, batch, "router_gemm=relative:0.1", phase="eval"))) == {("router_gemm", "forward")}


def test_what_the_noise_did(params, batch):
    small, large = (measured(params, batch, f"router_gemm=relative:{scale}:passes=forward") for scale in (0.0, 2.0))
    assert small.loss == pytest.approx(small.noisy_loss, abs=1e-5) and not small.changed.any()
    assert large.loss == small.loss and large.noisy_loss != large.loss and large.changed.mean() > 0.2


def test_the_words_of_a_spec():
    spec = "experts=relative:0.05:layers=1,expert_down=quantise:int8,lm_head=additive:0.1:phases=eval+train:draws=fixed,norm_moe=jitter:0.1:reach=experts"
    text = " ".join(" ".join(words(NoiseSpec.parse(spec), CONFIG)).split())
    for part in (
        "experts: the matmuls expert_gate and expert_up. Each element y of the result, dX and dW becomes y*(1 + s*n)",
        "s = 0.05, each with its own draws; layer 1 (of 0 to 1); all phases; a fresh draw each step.",
        "expert_down: the matmul expert_down. Both operands are rounded to int8 in the products for the result, dX and dW; every layer; all phases; "
        "int8 is integers -127 to 127, a float32 scale amax/127 per row, nearest even.",
        "s = 0.1, each with its own draws; once, outside the layers; phases train and eval; the same draw in every step.",
        "u uniform from 1-s to 1+s, s = 0.1, the same for all tokens; every layer; all phases; read so by experts alone;",
        "Not hit: router_gemm, attention, router_input, router_logits, embedding, norm_attention, norm_final.",
    ):
        assert part in text
    assert "mlp" not in text  # the model has none


def test_a_phase_in_which_nothing_acts_is_not_measured(batch):
    config = Config(CONFIG, DataConfig(source="synthetic", tokenizer="bytes", seq_len=S))
    text = explain(NoiseSpec.parse("experts=relative:0.1:phases=eval"), config, batch, "words", "train", "tiny")
    assert text.endswith("In the phase train nothing acts (it acts in eval): its program is that of a model without noise.")


@pytest.mark.parametrize(
    ("text", "message"), [("e7b_as_rn", "did you mean 'e7b_as_run'"), ("  ", "unknown noise preset"), (",=", "cannot read")]
)
def test_a_spec_that_is_none(text, message):
    with pytest.raises(ConfigError, match=message):
        read_spec(text)


def test_a_preset_by_name():
    assert read_spec("e7b_as_run_0.01") == NoiseSpec.preset("e7b_as_run_0.01")


# --- the command --------------------------------------------------------------------------------------------------------------


def test_the_command_prints_all_parts_and_falls_back_to_synthetic_text(tmp_path):
    """With an empty cache and a registry that is not there."""
    unreachable = {
        "MOE_JAX_CACHE": str(tmp_path),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_EXTRA_INDEX_URL": "",
    }
    flags = ("--noise=e7b_as_run", "--seq_len=16", "--phase=rollout", "--set", "model.num_experts=8")
    done = call("noise", "--preset=tiny", *flags, **unreachable)
    assert done.returncode == 0, done.stderr
    heads = ("What is hit", "How often, and how large: one step in the phase rollout", "The routers' logits", "What it does")
    positions = [done.stdout.index(head) for head in heads]
    assert positions == sorted(positions)
    assert "16 tokens of synthetic, tokenizer bytes, since wiki is not to be had" in done.stdout
    assert "8 experts of which 2 per token" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise=experts=relativ:0.1"], "did you mean 'relative'"),
        (["--noise=experts=relative:0.1:layers=7"], "layers [7]"),
        (["--noise=dense7b_as_run"], "no noise site 'mlp'"),
        (["--noise=experts=relative:0.1", "--phase=trian"], "--phase=trian"),
        (["--noise=experts=relative:0.1", "--seq_len=4096"], "seq_len=4096 exceeds model.max_seq_len=64"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message):
    done = call("noise", "--preset=tiny", "--data=synthetic", *arguments)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr and done.stderr.count("\n") == 1


def test_help_is_a_manual():
    done = call("noise", "--help")
    assert done.returncode == 0 and done.stdout.startswith("python -m launch.noise [--flag=value ...]")
    assert "--phase=rollout|old_logprob|train|eval" in done.stdout and "sets changed" in done.stdout
    examples = [
        dict(word[2:].split("=", 1) for word in line.split()[3:]) for line in done.stdout.splitlines() if line.startswith("  python -m")
    ]
    assert len(examples) == 3
    for example in examples:
        ModelConfig.preset(example.get("preset", "quick")).resolve(read_spec(example["noise"]))
