"""The memory model and the roofline against sums done by hand and against what XLA allocates; the search; the lowered step with and without noise."""

import dataclasses
import os

import jax
import pytest

from moe_jax.errors import ConfigError
from moe_jax.mesh import MeshSpec
from moe_jax.model.layers import Scope
from moe_jax.plan.chips import CHIPS
from moe_jax.plan.costs import best, describe, fitted, preset_run
from moe_jax.plan.memory import estimate, exchange_of
from moe_jax.plan.plan import make_plan
from moe_jax.plan.roofline import DRAW, roofline
from moe_jax.plan.search import judged, meshes, search, why
from moe_jax.plan.steps import Compiled, compile_step, lower
from moe_jax.plan.topology import topology
from moe_jax.platforms import tracing_for

GIB = 2**30


def test_parameters_and_optimizer_of_30b_by_hand():
    """30,532,122,624 parameters in float32, experts and matrices with one momentum, the rest with two moments, over 64 devices."""
    config = preset_run("qwen3_30b_a3b", 64)
    found = estimate(config, MeshSpec(fsdp=64))
    words = 2 * 151_936 * 2048
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    heads = 48 * 2 * 128  # the norms of queries and keys have no model width, and lie whole on each device
    divided = 30_532_122_624 - heads
    assert found.parameters == 4 * (divided / 64 + heads)
    assert found.optimizer == 4 * ((divided - norms + heads - words) / 64 + 2 * (words + norms - heads) / 64 + 2 * heads)
    assert found.gradients == found.parameters


def test_arguments_are_those_of_the_compiler():
    """Parameters and optimizer to the byte, batch and counters apart."""
    config, mesh = preset_run("tiny", 8), MeshSpec(fsdp=2, expert=4)
    compiled = compile_step("train", config, mesh.build(jax.devices()[:8]), "gpu")
    model = estimate(config, mesh)
    rest = 2 * config.data.batch_size // 8 * config.data.seq_len * 4
    assert 0 <= compiled.arguments - (model.parameters + model.optimizer) - rest < 200
    assert compiled.temporaries > 0 and compiled.donated > 0.9 * (model.parameters + model.optimizer)


def test_what_was_compiled_before_is_looked_up(tmp_path, monkeypatch):
    config, mesh = preset_run("tiny", 2, batch=2), MeshSpec(data=2).build(jax.devices()[:2])
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda name, path: written.append(str(name)) or replace(name, path))
    first = compile_step("evaluate", config, mesh, "gpu", tmp_path)
    written = [name for name in written if name.startswith(str(tmp_path))]
    assert len(list(tmp_path.iterdir())) == len(written) == 1
    assert not written[0].endswith(f".{os.getpid()}")  # which repeats among the machines that share a cache
    monkeypatch.setattr("moe_jax.plan.steps._measured", lambda *_: pytest.fail("compiled again"))
    again = compile_step("evaluate", config, mesh, "gpu", tmp_path)
    assert dataclasses.replace(again, always={}, overflowing={}) == dataclasses.replace(first, always={}, overflowing={})
    assert {kind: tuple(value) for kind, value in again.always.items()} == dict(first.always)
    monkeypatch.undo()
    other = dataclasses.replace(config, model=config.model.replace(norm_eps=1e-5))
    compile_step("evaluate", other, mesh, "gpu", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


STEPS = ("evaluate", "record", "prefill", "sample")


def over_experts():
    return preset_run("tiny", 4, batch=4), MeshSpec(expert=4).build(jax.devices()[:4])


@pytest.mark.parametrize("step", STEPS)
def test_noise_is_in_every_step(step):
    config, mesh = over_experts()
    noisy = dataclasses.replace(config, noise="matmuls=relative:0.05")
    with tracing_for("gpu"):
        texts = [lower(step, each, mesh).as_text() for each in (config, noisy)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("step", [pytest.param(step, marks=[] if step == "sample" else pytest.mark.slow) for step in STEPS])
def test_every_step_compiles(step):
    assert compile_step(step, *over_experts(), "gpu").arguments > 0


def test_the_lowered_step_with_noise_off_is_that_without_the_noise_code(monkeypatch):
    """At 30B, for a mesh of 8, as an accelerator traces it: the text is equal when every place that noise has in the model is taken out."""
    config, mesh = preset_run("qwen3_30b_a3b", 8), MeshSpec(fsdp=2, expert=4).build(jax.devices()[:8])

    def text(noise=""):
        with tracing_for("tpu"):
            return lower("train", dataclasses.replace(config, noise=noise), mesh).as_text()

    off, on = text(), text("matmuls=relative:0.05")
    for name, without in (("operator", lambda *_: None), ("noise", lambda *_: None), ("perturb", lambda scope, y, *_: y)):
        monkeypatch.setattr(Scope, name, without)
    jax.clear_caches()
    assert text() == off != on


def test_the_exchange_is_that_of_the_dispatch():
    model = preset_run("tiny", 8).model.replace(num_experts=64, experts_per_token=2)
    assert [exchange_of(model, size) for size in (1, 4, 8)] == ["", "all_gather", "all_to_all"]
    assert exchange_of(model.replace(dispatch="all_gather"), 8) == "all_gather" and exchange_of(model.replace(dispatch="ragged"), 8) == ""


def test_the_operations_of_a_step_are_six_for_each_active_parameter_and_token():
    """Attention's scores and the router's share come on top; the embedding is looked up, not multiplied."""
    config = preset_run("qwen3_30b_a3b", 64)
    found = roofline(config, MeshSpec(fsdp=64))
    active, embedding = 3_353_032_704, 151_936 * 2048
    assert 1.0 < found.model_flops / (6 * (active - embedding) * 4096) < 1.35


@pytest.mark.parametrize("remat, passes", [("none", 3), ("full", 4)])
def test_the_operations_of_attention_by_hand(remat, passes):
    """Each projection in every pass. Of the two products over positions, half of which are seen: two forward, five backward, two more where it is repeated."""
    config = preset_run("tiny", 2, batch=4)
    config = dataclasses.replace(config, model=config.model.replace(remat=remat))
    c, tokens, length = config.model, 4 * config.data.seq_len // 2, config.data.seq_len
    query, key = c.num_heads * c.head_width, c.kv_heads * c.head_width
    product = 2 * tokens * (length / 2) * query
    projections = 2 * tokens * c.d_model * (2 * query + 2 * key)
    found = roofline(config, MeshSpec(data=2))
    part = next(part for part in found.components if part.name == "attention")
    assert part.flops == pytest.approx(c.num_layers * (passes * projections + (7 if remat == "none" else 9) * product))
    rest = sum(part.flops + part.exact for part in found.components if part.name not in ("attention", "optimizer", "embedding and head"))
    head = next(part.flops for part in found.components if part.name == "embedding and head")
    assert found.model_flops == pytest.approx(c.num_layers * 3 * (projections + 2 * product) + rest * 3 / passes + head)


@pytest.mark.parametrize("gated", [True, False])
def test_a_dense_feed_forward_by_hand(gated):
    """Two micro-batches on a tensor group of two: each device has half of the width. Noise on what each product gives, its input and its weights."""
    config = preset_run("tiny", 4, batch=4)
    config = dataclasses.replace(
        config,
        model=config.model.replace(num_experts=0, experts_per_token=1, gated=gated),
        data=config.data.replace(accumulation=2),
        noise="mlp=relative:0.05",
    )
    c, tokens, width = config.model, 2 * 2 * config.data.seq_len, config.model.dense_width / 2
    part = next(part for part in roofline(config, MeshSpec(data=2, tensor=2)).components if part.name == "dense feed-forward")
    matrices = 3 if gated else 2
    assert part.flops == c.num_layers * 3 * 2 * tokens * matrices * c.d_model * width
    perturbed = matrices * (tokens * (c.d_model + width) + 2 * c.d_model * width)
    assert part.vector == c.num_layers * DRAW * perturbed
    weights = 3 * 2 * matrices * c.d_model * width
    assert part.traffic == c.num_layers * 2 * (3 * tokens * (4 * c.d_model + 4 * width) + weights)


@pytest.mark.parametrize("frozen, by_muon", [((), 45_312), (("expert",), 8_448)])
def test_the_bytes_of_the_optimizer_by_hand(frozen, by_muon):
    """Muon reads a parameter, its gradient and a momentum and writes two of them, AdamW has one state more; what is frozen is not touched."""
    config = preset_run("tiny", 2, batch=4)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, freeze_roles=frozen))
    part = next(part for part in roofline(config, MeshSpec(fsdp=2)).components if part.name == "optimizer")
    assert part.traffic == 4 * (5 * by_muon + 7 * (260 * 32 + 5 * 32)) / 2


def test_the_operations_of_newton_schulz_are_those_of_its_form():
    """In the type asked for, of the seed's 96 expert matrices and a few of its attention."""
    found = {}
    for form, dtype in (("auto", "float32"), ("auto", "bfloat16"), ("gram", "bfloat16"), ("standard", "float32")):
        config = preset_run("seed_79m", 1)
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ns_form=form, ns_dtype=dtype))
        part = next(part for part in roofline(config, MeshSpec()).components if part.name == "optimizer")
        found[form, dtype] = part.flops, part.exact
    assert found["auto", "float32"][0] == found["standard", "float32"][0] == found["auto", "bfloat16"][1] == 0
    assert found["standard", "float32"][1] == found["auto", "bfloat16"][0] > found["auto", "float32"][1]
    done, exact = found["gram", "bfloat16"]
    experts = 96 * 384**2 * (4 * 1536 + 34 * 384)
    assert experts < done < 1.3 * experts and exact == 0


def test_noise_adds_arithmetic_and_nothing_that_is_sent():
    config = preset_run("qwen3_30b_a3b", 64)
    clean, noisy = (
        roofline(dataclasses.replace(config, noise=noise), MeshSpec(fsdp=8, expert=8)) for noise in ("", "matmuls=relative:0.05")
    )
    for before, after in zip(clean.components, noisy.components, strict=True):
        assert (before.flops, before.sent, before.traffic) == (after.flops, after.sent, after.traffic)
        assert (after.vector > 0) == (before.name != "optimizer") and before.vector == 0


def test_all_meshes_are_looked_at_and_none_twice():
    found = list(meshes(8))
    assert {mesh.size for mesh in found} == {8} and len(found) == len(set(found)) == 20


def test_the_search_is_no_worse_than_meshes_chosen_by_hand():
    """Three cases; by its own measures, and it says why."""
    cases = (
        ("qwen3_30b_a3b", "v5p", 64, MeshSpec(fsdp=4, expert=16)),
        ("olmoe_1b_7b", "v6e", 16, MeshSpec(expert=16)),
        ("seed_79m", "h100", 8, MeshSpec(data=8)),
    )
    for preset, chip, size, hand in cases:
        config = preset_run(preset, size)
        found = search(config, CHIPS[chip], size)
        by_hand = judged(dataclasses.replace(config, model=found[0].config.model), hand)
        assert found[0].fits(CHIPS[chip]) and by_hand.roofline is not None and found[0].roofline is not None
        assert found[0].roofline.seconds(CHIPS[chip])[1] <= by_hand.roofline.seconds(CHIPS[chip])[1]
        words = why(found, CHIPS[chip])
        assert str(found[0].mesh) in words and "traffic" in words


def test_what_does_not_divide_is_refused_with_the_numbers():
    config = preset_run("qwen3_30b_a3b", 64)
    assert "num_kv_heads=4 does not divide over tensor=8" in judged(config, MeshSpec(fsdp=8, tensor=8)).refused
    assert "batch_size=64 does not divide over data x fsdp=128" in judged(config, MeshSpec(fsdp=128)).refused
    assert "128" in judged(config, MeshSpec(fsdp=1, expert=256)).refused


def test_nothing_fits_is_said():
    assert best(preset_run("mixtral_8x7b", 8), "v5e:2x4") is None
    words = describe(preset_run("qwen3_30b_a3b", 8), ("v5e:2x4", "v5p:4x4x4"))
    assert "no mesh of it holds the step" in words.splitlines()[0] and "GiB of 93" in words.splitlines()[1]


def test_a_mesh_that_is_refused_with_noise_gives_way_to_the_next(monkeypatch):
    config, tried = dataclasses.replace(preset_run("tiny", 8), noise="matmuls=relative:0.05"), []

    def compiles_the_second(step, config, mesh, platform, cache):
        tried.append((MeshSpec(**{name: mesh.shape[name] for name in ("data", "fsdp", "expert", "tensor")}), bool(config.noise)))
        return Compiled(step, refused="needs 17 of 16 G" if config.noise and len(tried) == 2 else "")

    monkeypatch.setattr("moe_jax.plan.plan.compile_step", compiles_the_second)
    found = make_plan(config, topology("h100:8"), steps=("train",))
    meshes = [mesh for mesh, _ in tried]
    assert [noisy for _, noisy in tried] == [False, True, False, True] and meshes[0] == meshes[1] != meshes[2] == meshes[3] == found.mesh
    assert f"The compiler refused {meshes[0]} with noise: needs 17 of 16 G" in found.explanation and not found.noisy["train"].refused


def test_small_batches_become_a_sequence_for_each_device():
    config = fitted(preset_run("tiny", 3, batch=3), 8)
    assert config.data.batch_size == config.eval_batch == 8
    with pytest.raises(ConfigError, match="unknown model preset"):
        preset_run("qwen", 8)


def test_noise_on_the_experts_takes_memory_and_other_noise_none():
    """By hand: ten float32 rows of the model's width for each row that a device's experts compute at a time, where the layers decide the peak."""
    config, mesh = preset_run("qwen3_30b_a3b", 64), MeshSpec(fsdp=16, expert=4)
    config = dataclasses.replace(config, model=config.model.replace(remat="full", dispatch="all_gather", dispatch_chunks=4))

    def layer(noise):
        return estimate(dataclasses.replace(config, noise=noise), mesh).layer

    rows = 4096 * 8 * 4 / 4  # tokens of a device, experts of a token, devices that gather, chunks
    assert layer("matmuls=relative:0.05") - layer("") == rows * 2048 * 10 * 4
    assert layer("router_gemm=relative:0.05") == layer("experts=relative:0.05:phases=eval") == layer("")
