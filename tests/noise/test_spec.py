"""A spec is read, refused in one clear line, or resolved into one scale per layer and site; its structure is static and its scales are leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.keys import PASSES, PHASES
from moe_jax.noise import NoiseSpec, SiteNoise
from moe_jax.noise.spec import DECLARED_KINDS, DECLARED_SITES, KINDS, REACHES, SITES

# --- reading --------------------------------------------------------------------------------------------------------------------


def test_defaults():
    noise = SiteNoise("additive", 0.1)
    assert (noise.passes, noise.layers, noise.phases, noise.reach) == (PASSES, None, PHASES, REACHES)


def test_parse_the_whole_grammar():
    text = " router_logits=additive:0.1:phases=train+eval:reach=selection+weights:layers=0-2+5:passes=forward, router_input=jitter:1e-2 ,"
    expected = {
        "router_logits": SiteNoise("additive", 0.1, ("forward",), (0, 1, 2, 5), ("train", "eval"), ("selection", "weights")),
        "router_input": SiteNoise("jitter", 0.01),
    }
    assert NoiseSpec.parse(text) == NoiseSpec(expected)
    assert NoiseSpec.parse("") == NoiseSpec() == NoiseSpec({})
    assert NoiseSpec.parse("router_logits=additive:0.1") != NoiseSpec.parse("router_logits=additive:0.2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", SITES)
def test_every_kind_at_every_site(site, kind):
    assert NoiseSpec.parse(f"{site}={kind}:0.5").sites == {site: SiteNoise(kind, 0.5)}


def test_single_names_and_ranges_become_tuples():
    noise = SiteNoise("additive", 0, passes="forward", layers=range(1, 3), phases="train", reach="weights")
    assert (noise.passes, noise.layers, noise.phases, noise.reach) == (("forward",), (1, 2), ("train",), ("weights",))


def test_preset():
    assert NoiseSpec.preset("seed_gate_0.1") == NoiseSpec({"router_logits": SiteNoise("additive", 0.1, phases=("train",))})
    with pytest.raises(ConfigError, match="unknown noise preset 'sed_gate_0.1'; known: seed_gate_S"):
        NoiseSpec.preset("sed_gate_0.1")
    with pytest.raises(ConfigError, match="'high' .* is not a number"):
        NoiseSpec.preset("seed_gate_high")


# --- refusing -------------------------------------------------------------------------------------------------------------------

BAD = {
    "router_logit=additive:0.1": r"unknown noise site 'router_logit' \(did you mean 'router_logits'\?\); known: router_input, router_logits",
    "=additive:0.1": "unknown noise site ''",
    "router_logits=aditive:0.1": r"unknown noise kind 'aditive' \(did you mean 'additive'\?\); known: additive, relative",
    "router_logits=additive:0.1:phases=trian": r"unknown name 'trian' in phases \(did you mean 'train'\?\); known: rollout, .*eval",
    "router_logits=additive:0.1:phases": "unknown name '' in phases",
    "router_logits=additive:0.1:passes=forwards": r"unknown name 'forwards' in passes \(did you mean 'forward'\?\)",
    "router_logits=additive:0.1:reach=weight": r"unknown name 'weight' in reach \(did you mean 'weights'\?\); known: selection, weights, balance",
    "router_logits=additive:0.1:layer=1": r"unknown option 'layer' in noise 'router_logits.*' \(did you mean 'layers'\?\); known: passes",
    "router_logits=additive:0.1:layers=one": "cannot read layers 'one' in noise 'router_logits.*'; write e.g. 0-3\\+7",
    "router_logits=additive:0.1:layers=": "cannot read layers ''",
    "router_logits=additive:0.1:layers=3-1": "cannot read layers '3-1'",
    "router_logits=additive:much": "noise scale 'much' in 'router_logits=additive:much' is not a number",
    "router_logits=additive:-0.1": "must be finite and not negative, got -0.1",
    "router_logits=additive:nan": "must be finite and not negative, got nan",
    "router_logits=additive:inf": "must be finite and not negative, got inf",
    "router_logits=additive": r"cannot read noise 'router_logits=additive'; write site=kind:scale, e.g. router_logits=additive:0.1",
    "router_logits": "cannot read noise 'router_logits'; write site=kind:scale",
    "router_logits=": "cannot read noise 'router_logits='",
    "router_logits=additive:0.1,router_logits=relative:0.2": "'router_logits' is given twice, the second time as 'router_logits=relative:0.2'",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[-30:])
def test_bad_text_is_one_clear_line(text):
    with pytest.raises(ConfigError, match=BAD[text]) as caught:
        NoiseSpec.parse(text)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("scale", [-1, np.float32(np.nan), np.array([0.1, -0.1]), np.array([0.1, np.inf])], ids=str)
def test_bad_scales(scale):
    with pytest.raises(ConfigError, match="a noise scale must be finite and not negative"):
        SiteNoise("additive", scale)


@pytest.mark.parametrize("site", DECLARED_SITES)
def test_sites_that_programs_do_not_perturb_say_so(site):
    with pytest.raises(NotImplementedError, match=f"noise site '{site}' .* usable: router_input, router_logits"):
        NoiseSpec({site: SiteNoise("additive", 0.1)})


@pytest.mark.parametrize("kind", DECLARED_KINDS)
def test_kinds_that_no_site_offers_say_so(kind):
    with pytest.raises(NotImplementedError, match=f"noise kind '{kind}' .* usable: additive"):
        SiteNoise(kind, 0.1)


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
