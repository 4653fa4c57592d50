"""A spec is read, refused in one clear line, or resolved into one scale per layer and site; its structure is static and its scales are leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.keys import PASSES, PHASES
from moe_jax.noise import NoiseSpec, SiteNoise
from moe_jax.noise.kinds import KINDS
from moe_jax.noise.sites import GROUPS, MATMULS, OUTSIDE_LAYERS, SITES, VALUES

# --- reading --------------------------------------------------------------------------------------------------------------------


def test_defaults():
    noise = SiteNoise("additive", 0.1)
    assert (noise.passes, noise.layers, noise.phases, noise.reach) == (PASSES, None, PHASES, None)
    assert (SiteNoise("additive").scale, noise.draws, noise.format) == (1.0, "fresh", None)


def test_parse_the_whole_grammar():
    text = " router_logits=additive:0.1:phases=train+eval:reach=selection+weights:layers=0-2+5:passes=forward, router_input=jitter:1e-2 ,"
    expected = {
        "router_logits": SiteNoise("additive", 0.1, ("forward",), (0, 1, 2, 5), ("train", "eval"), ("selection", "weights")),
        "router_input": SiteNoise("jitter", 0.01),
    }
    assert NoiseSpec.parse(text) == NoiseSpec(expected)
    assert NoiseSpec.parse("") == NoiseSpec() == NoiseSpec({})
    assert NoiseSpec.parse("router_logits=additive:0.1") != NoiseSpec.parse("router_logits=additive:0.2")
    assert NoiseSpec.parse("relative:0.05:passes=forward") == NoiseSpec({"matmuls": SiteNoise("relative", 0.05, ("forward",))})
    assert NoiseSpec.parse("experts=relative:0.1/0.2:draws=fixed") == NoiseSpec(
        {"experts": SiteNoise("relative", (0.1, 0.2), draws="fixed")}
    )
    rounding = {"experts": SiteNoise("quantise", 1.0, format="mxfp4"), "mlp": SiteNoise("quantise", 0.5, format="int8")}
    assert NoiseSpec.parse("experts=quantise:mxfp4,mlp=quantise:0.5:format=int8") == NoiseSpec(rounding)
    assert NoiseSpec.parse("norms=additive:0.1, all=relative:0.1") == NoiseSpec.parse("norms=additive:0.1,matmuls=relative:0.1")


@pytest.mark.parametrize(
    "reach, kept", [("experts", ("experts",)), ("router", ("router",)), ("both", None), (("both",), None), (None, None)]
)
def test_the_reach_of_a_norm(reach, kept):
    """As text and as a value; "both" is what is meant without a reach, and the same structure."""
    noise = SiteNoise("additive", 0.1, reach=reach)
    assert noise.reach == kept and NoiseSpec({"norm_moe": noise}).resolve(2).structure[0][1].reach == kept
    text = "norm_moe=additive:0.1" + ("" if reach is None else f":reach={reach if isinstance(reach, str) else reach[0]}")
    assert NoiseSpec.parse(text) == NoiseSpec({"norm_moe": noise})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_site(kind):
    """accumulation needs a matmul, learned the router's logits; all else goes everywhere, groups too."""
    for site in (*SITES, *GROUPS):
        text, noise = (
            (f"{site}={kind}:int8", SiteNoise(kind, format="int8")) if kind == "quantise" else (f"{site}={kind}:0.5", SiteNoise(kind, 0.5))
        )
        if (kind == "accumulation" and site in (*VALUES, "norms")) or (kind == "learned" and site != "router_logits"):
            with pytest.raises(ConfigError, match=f"noise kind '{kind}' .*{site}") as caught:
                NoiseSpec.parse(text)
            assert "\n" not in str(caught.value)
        else:
            assert NoiseSpec.parse(text).sites == {site: noise}


def test_a_site_named_by_itself_overrides_its_group():
    spec = NoiseSpec.parse("relative:0.1,experts=relative:0.2,expert_up=relative:0.3,embedding=relative:0.4").by_site()
    assert set(spec) == {*MATMULS, "embedding"}
    scales = {site: noise.scale for site, noise in spec.items()}
    assert scales["expert_up"] == 0.3 and scales["expert_down"] == scales["expert_gate"] == 0.2 and scales["embedding"] == 0.4
    assert {scales[site] for site in MATMULS if not site.startswith("expert")} == {0.1}


def test_single_names_and_ranges_become_tuples():
    noise = SiteNoise("additive", 0, passes="forward", layers=range(1, 3), phases="train", reach="weights")
    assert (noise.passes, noise.layers, noise.phases, noise.reach) == (("forward",), (1, 2), ("train",), ("weights",))


def test_preset():
    assert NoiseSpec.preset("seed_gate_0.1") == NoiseSpec({"router_logits": SiteNoise("additive", 0.1, phases=("train",))})
    everywhere = {"matmuls": SiteNoise("relative", 0.05)}
    assert NoiseSpec.preset("e7b_as_described") == NoiseSpec(everywhere)
    sampling, forward = dict(passes=("forward",), phases=("rollout", "eval")), dict(passes=("forward",))
    for name, scale in (("e7b_as_run", 0.05), ("e7b_as_run_0.01", 0.01)):
        as_run = {"attention": SiteNoise("relative", scale, **sampling), "router_gemm": SiteNoise("relative", scale, **sampling)}
        assert NoiseSpec.preset(name) == NoiseSpec(as_run | {"lm_head": SiteNoise("relative", scale, **forward)})
    dense = {site: SiteNoise("relative", 0.05) for site in ("attention", "mlp", "lm_head")}
    assert NoiseSpec.preset("dense7b_as_run") == NoiseSpec(dense)
    with pytest.raises(ConfigError, match="unknown noise preset 'sed_gate_0.1'; known: seed_gate_S"):
        NoiseSpec.preset("sed_gate_0.1")
    with pytest.raises(ConfigError, match=r"unknown noise preset 'e7b_as_rum' \(did you mean 'e7b_as_run'\?\)"):
        NoiseSpec.preset("e7b_as_rum")
    with pytest.raises(ConfigError, match="'high' .* is not a number"):
        NoiseSpec.preset("seed_gate_high")


def test_the_table_says_where_and_when():
    spec = NoiseSpec.parse(
        "experts=relative:0.05:phases=rollout:passes=forward+grad_weight,norm_moe=additive:0.1/0.2:reach=router,lm_head=quantise:int8:draws=fixed"
    )
    lines = spec.table().splitlines()
    assert lines[0].split() == ["site", *PHASES]
    rows = {line.split("  ")[0]: line for line in lines[1:]}
    assert set(rows) == {*GROUPS["experts"], "norm_moe", "lm_head"}
    assert rows["expert_up"].count("relative 0.05 on y+dW") == 1 and rows["expert_up"].split()[-3:] == ["-", "-", "-"]
    assert rows["norm_moe"].count("additive 0.1/0.2 on y to router") == 4
    assert rows["lm_head"].count("quantise int8 on y+dX+dW fixed") == 4


# --- refusing -------------------------------------------------------------------------------------------------------------------

BAD = {
    "router_logit=additive:0.1": r"unknown noise site 'router_logit' \(did you mean 'router_logits'\?\); known: experts, .*router_input",
    "=additive:0.1": "unknown noise site ''",
    "router_logits=aditive:0.1": r"unknown noise kind 'aditive' \(did you mean 'additive'\?\); known: additive, relative.*accumulation",
    "router_logits=additive:0.1:phases=trian": r"unknown name 'trian' in phases \(did you mean 'train'\?\); known: rollout, .*eval",
    "router_logits=additive:0.1:phases": "unknown name '' in phases",
    "router_logits=additive:0.1:passes=forwards": r"unknown name 'forwards' in passes \(did you mean 'forward'\?\)",
    "router_logits=additive:0.1:reach=weight": r"unknown reach 'weight' of router_logits \(did you mean 'weights'\?\); known: selection, weights, balance",
    "router_logits=additive:0.1:layer=1": r"unknown option 'layer' in noise 'router_logits.*' \(did you mean 'layers'\?\); known: passes",
    "router_logits=additive:0.1:layers=one": "cannot read layers 'one' in noise 'router_logits.*'; write e.g. 0-3\\+7",
    "router_logits=additive:0.1:layers=": "cannot read layers ''",
    "router_logits=additive:0.1:layers=3-1": "cannot read layers '3-1'",
    "router_logits=additive:0.1:layers=0-99999999999": "cannot read layers '0-99999999999'",
    "router_logits=additive:much": "noise scale 'much' in 'router_logits=additive:much' is not a number",
    "router_logits=additive:-0.1": "the scale of additive must be finite and not negative, got -0.1",
    "router_logits=additive:nan": "must be finite and not negative, got nan",
    "router_logits=additive:inf": "must be finite and not negative, got inf",
    "expert_up=bit_flip:1.5": "the scale of bit_flip must be from 0 to 1, got 1.5",
    "experts=quantise:0.5": r"unknown format None to quantise to.*; known: fp8_e4m3",
    "experts=quantise:fp8_e4m4": r"unknown format 'fp8_e4m4' to quantise to \(did you mean 'fp8_e4m3'\?\); known: fp8_e4m3, .*int8",
    "experts=quantise:1:format=fp8_e4m4": r"unknown format 'fp8_e4m4' to quantise to \(did you mean 'fp8_e4m3'\?\); known: fp8_e4m3",
    "experts=relative:0.1:format=int8": "noise kind 'relative' has no format, got 'int8'",
    "experts=relative:0.1:draws=fix": r"unknown name 'fix' in draws \(did you mean 'fixed'\?\); known: fresh, fixed",
    "expert_up=relative:0.1:reach=router": "noise at 'expert_up' names a reach .*; only router_logits and norm_moe have one",
    "norm_moe=additive:0.1:reach=routers": r"unknown reach 'routers' of norm_moe \(did you mean 'router'\?\); known: experts, router",
    "embedding=relative:0.1:passes=grad_input": "'embedding' has passes .*acts in the pass forward alone",
    "matmul=relative:0.1": r"unknown noise site 'matmul' \(did you mean 'matmuls'\?\)",
    "router_logits=additive": r"cannot read noise 'router_logits=additive'; write site=kind:scale, e.g. router_logits=additive:0.1",
    "router_logits": "cannot read noise 'router_logits'; write site=kind:scale",
    "relative:0.1:phases=train:phases=eval": "noise 'relative:0.1:phases=train:phases=eval' gives an option twice",
    "seed_gate_0.1,experts=relative:0.05": "a noise preset stands alone, got 'seed_gate_0.1,.*'; write its sites out .*: router_logits=additive",
    "seed_gate_0.1:phases=eval": "a noise preset stands alone",
    "router_logits=additive:0.1:reach=": "unknown reach ''",
    "router_logits=": "cannot read noise 'router_logits='",
    "all=additive:0.1,matmuls=relative:0.2": "'matmuls' is given twice",
    "norm_moe=additive:0.1:reach=both+router": "unknown reach 'both' of norm_moe",
    "router_logits=additive:0.1,router_logits=relative:0.2": "'router_logits' is given twice, the second time as 'router_logits=relative:0.2'",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[-30:])
def test_bad_text_is_one_clear_line(text):
    with pytest.raises(ConfigError, match=BAD[text]) as caught:
        NoiseSpec.parse(text)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("scale", [-1, np.float32(np.nan), np.array([0.1, -0.1]), np.array([0.1, np.inf])], ids=str)
def test_bad_scales(scale):
    with pytest.raises(ConfigError, match="the scale of additive must be finite and not negative"):
        SiteNoise("additive", scale)


# --- resolving ------------------------------------------------------------------------------------------------------------------


def test_scales_per_layer():
    spec = NoiseSpec({"router_logits": SiteNoise("additive", 0.5, layers=(0, 2)), "router_input": SiteNoise("relative", [1.0, 2.0, 3.0])})
    scales = spec.resolve(3).scales
    np.testing.assert_array_equal(scales["router_logits"], [0.5, 0, 0.5])
    np.testing.assert_array_equal(scales["router_input"], [1, 2, 3])
    both = NoiseSpec({"router_input": SiteNoise("relative", jnp.array([1.0, 2.0, 3.0]), layers=(1,))}).resolve(3).scales
    np.testing.assert_array_equal(both["router_input"], [0, 2, 0])
    np.testing.assert_array_equal(NoiseSpec({"router_input": SiteNoise("relative", 1.0, layers=())}).resolve(2).scales["router_input"], 0)
    assert all(scale.dtype == jnp.float32 for scale in scales.values())


def test_layers_and_scales_that_do_not_fit_the_model():
    with pytest.raises(ConfigError, match=r"'router_logits' names layers \[3, 7\], the model has layers 0 to 2"):
        NoiseSpec.parse("router_logits=additive:0.1:layers=1+3+7").resolve(3)
    with pytest.raises(ConfigError, match=r"scale of shape \(2,\); give one number or one per layer \(3,\)"):
        NoiseSpec({"router_logits": SiteNoise("additive", np.array([0.1, 0.2]))}).resolve(3)
    for site in OUTSIDE_LAYERS:
        with pytest.raises(ConfigError, match=f"noise at '{site}' names layers .*, but stands outside the layers"):
            NoiseSpec({site: SiteNoise("relative", 0.1, layers=(0,))}).resolve(3)
        assert NoiseSpec({site: SiteNoise("relative", 0.5)}).resolve(3).scales[site].shape == ()


def test_sites_that_the_model_does_not_have():
    """A site by name is refused; a group means those of its sites that the model has."""
    has = [site for site in SITES if site not in (*GROUPS["experts"], "router_gemm")]
    with pytest.raises(ConfigError, match="this model has no noise site 'expert_up'; it has attention_q, .*lm_head") as caught:
        NoiseSpec.parse("expert_up=relative:0.1").resolve(2, has)
    assert "expert_down" not in str(caught.value)
    with pytest.raises(ConfigError, match="this model has no noise site 'experts'"):
        NoiseSpec.parse("experts=relative:0.1").resolve(2, has)
    assert set(NoiseSpec.parse("relative:0.1").resolve(2, has).scales) == {site for site in MATMULS if site in has}


def test_layers_of_a_group_leave_out_what_has_no_layer():
    """Every matmul of layer 1: the head, which is in no layer, is not meant; a site named by itself is refused (above)."""
    resolved = NoiseSpec.parse("relative:0.5:layers=1").resolve(2)
    assert set(resolved.scales) == {site for site in MATMULS if site != "lm_head"}
    assert all(scale.tolist() == [0, 0.5] for scale in resolved.scales.values())


def test_phases():
    noise = NoiseSpec.parse("router_logits=additive:0.1:phases=train,router_input=relative:0.2:phases=train+rollout").resolve(2)
    assert set(noise.in_phase("train").scales) == {"router_logits", "router_input"}
    assert set(noise.in_phase("rollout").scales) == {"router_input"} == {site for site, _ in noise.in_phase("rollout").structure}
    assert noise.in_phase("eval") is None and NoiseSpec().resolve(2).in_phase("train") is None


def test_scaled_changes_scales_alone():
    noise = NoiseSpec.parse("router_logits=additive:0.5:layers=0,router_input=relative:0.25").resolve(2)
    doubled = noise.scaled(2.0)
    assert doubled.structure == noise.structure
    np.testing.assert_array_equal(doubled.scales["router_logits"], [1, 0])
    np.testing.assert_array_equal(doubled.scales["router_input"], [0.5, 0.5])


# --- as pytrees -----------------------------------------------------------------------------------------------------------------


def test_leaves_are_scales_and_the_rest_is_structure():
    spec = NoiseSpec.parse("router_logits=additive:0.5:layers=0:phases=train,router_input=relative:0.25")
    assert jax.tree.leaves(spec) == [0.25, 0.5]
    assert jax.tree.map(lambda scale: scale, spec) == spec
    same = jax.tree.structure(spec)
    assert jax.tree.structure(NoiseSpec.parse("router_logits=additive:0.7:layers=0:phases=train,router_input=relative:0")) == same
    for other in ("router_logits=relative:0.5:layers=0:phases=train", "router_logits=additive:0.5:layers=1:phases=train"):
        assert jax.tree.structure(NoiseSpec.parse(f"{other},router_input=relative:0.25")) != same
    resolved = spec.resolve(2)
    assert jax.tree.structure(resolved) == jax.tree.structure(resolved.scaled(3.0))
    assert len(jax.tree.leaves(resolved)) == 2


def test_scales_per_layer_may_be_traced():
    spec = NoiseSpec(
        {"router_input": SiteNoise("relative", (1.0, 2.0, 3.0), layers=(0, 2)), "router_logits": SiteNoise("additive", [0.5, 0, 1])}
    )
    inside, outside = jax.jit(lambda spec: spec.resolve(3).scales)(spec), spec.resolve(3).scales
    assert all((inside[site] == outside[site]).all() for site in outside)


def test_a_reach_of_nobody_is_refused():
    with pytest.raises(ConfigError, match="reaches nobody; name who reads it"):
        NoiseSpec({"router_logits": SiteNoise("additive", 0.1, reach=())})


def test_new_scales_do_not_trace_again():
    traces = []

    @jax.jit
    def total(spec):
        traces.append(1)
        return sum(scale.sum() for scale in spec.resolve(4).scales.values())

    for scale in (0.0, 0.5, 2.0):
        assert total(NoiseSpec.parse(f"router_logits=additive:{scale}:layers=0-1")) == 2 * scale
    assert len(traces) == 1
    total(NoiseSpec.parse("router_logits=additive:0.5:layers=0-2"))
    assert len(traces) == 2
