"""AQN: the published lists of sigma, one program for every step, noise while sampling alone, and a copy that equals the noisy forward."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import keys
from moe_jax.errors import ConfigError, Unsupported
from moe_jax.keys import PHASES, Draw
from moe_jax.model import Model, ModelConfig
from moe_jax.model.transformer import layer_plan
from moe_jax.noise import draws
from moe_jax.noise.aqn import AQN, VARIANTS
from moe_jax.noise.sites import NORMS
from moe_jax.paths import flatten

# --- the schedule ---------------------------------------------------------------------------------------------------------------

CODE = (0, 0.01, 0.00562, 0.00316, 0.00178, 0.001, 0.000562, 0.000316, 0.000178, 0.0001)
PAPER = (0, 0.01, 0.0060, 0.0036, 0.00215, 0.00129, 0.00077, 0.00046, 0.00028, 0.00017)
EPOCH_30B = (0, 0.05, 0.0158, 0.005, 0.00158, 0.0005)  # one epoch of 58 steps
TWO_EPOCHS = (0, 0.05, 0.02812, 0.01581, 0.00889, 0.005, 0, 0.005, 0.00281, 0.00158, 0.00089, 0.0005)


@pytest.mark.parametrize("variant, published", [("qerl_code", CODE), ("qerl_paper", PAPER)])
def test_published_stages(variant, published):
    """The ten values of either formula to the digits they were published with, in ten equal intervals."""
    firsts, sigmas = zip(*AQN(variant=variant).stage_table(200), strict=True)
    assert firsts == tuple(range(0, 200, 20))
    np.testing.assert_allclose(sigmas, published, rtol=0.02)  # the last is given to two digits
    assert sigmas[0] == 0 and (sigmas[-1] == pytest.approx(1e-4, rel=1e-12)) == (variant == "qerl_code")


def test_the_epoch_of_58_steps():
    firsts, sigmas = zip(*AQN(0.05, 0.0005, variant="epochs").stage_table(58), strict=True)
    assert firsts == (0, 10, 20, 29, 39, 49)  # 29 exactly: 3 * 58 / 6, which a float may miss
    np.testing.assert_allclose(sigmas, EPOCH_30B, rtol=0.005)


def test_two_epochs():
    """The noise-free interval comes again, and the second epoch begins at .005, the geometric middle."""
    table = AQN(0.05, 0.0005, variant="epochs", epochs=2).stage_table(120)
    assert [first for first, _ in table] == list(range(0, 120, 10))
    np.testing.assert_allclose([sigma for _, sigma in table], TWO_EPOCHS, rtol=0.005)


def test_stages_is_not_used_by_epochs_nor_epochs_by_the_others():
    assert AQN(variant="epochs", stages=1).stage_table(12) == AQN(variant="epochs").stage_table(12)
    assert AQN(epochs=0, stages_per_epoch=0).stage_table(12) == AQN().stage_table(12)


@pytest.mark.parametrize("aqn", [AQN(stages=3), AQN(stages=2, variant="qerl_paper"), AQN(variant="epochs", epochs=3, stages_per_epoch=2)])
def test_fewest_stages(aqn):
    sigmas = [sigma for _, sigma in aqn.stage_table(9)]
    assert sigmas[:2] == [0, aqn.start] and all(math.isfinite(sigma) for sigma in sigmas)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("total_steps", [20, 58, 997])
def test_the_stage_of_a_step(variant, total_steps):
    """Each step is in the interval floor(step * intervals / total)."""
    firsts, sigmas = zip(*AQN(0.05, 0.0005, variant=variant, epochs=3).stage_table(total_steps), strict=True)
    for step in range(total_steps):
        assert sum(first <= step for first in firsts) - 1 == step * len(sigmas) // total_steps


# --- refusing -------------------------------------------------------------------------------------------------------------------

BAD = [
    (dict(stages=2), "variant qerl_code needs stages to be a whole number from 3 up, got 2"),
    (dict(stages=1, variant="qerl_paper"), "variant qerl_paper needs stages to be a whole number from 2 up, got 1"),
    (dict(stages=10.5), "needs stages to be a whole number from 3 up, got 10.5"),
    (dict(variant="epochs", epochs=0), "variant epochs needs epochs to be a whole number from 1 up, got 0"),
    (dict(variant="epochs", stages_per_epoch=1), "needs stages_per_epoch to be a whole number from 2 up, got 1"),
    (dict(start=0.0), "AQN start must be positive and finite, got 0.0"),
    (dict(end=-1e-4), "AQN end must be positive and finite, got -0.0001"),
    (dict(end=math.nan), "AQN end must be positive and finite, got nan"),
    (dict(start=math.inf), "AQN start must be positive and finite, got inf"),
    (
        dict(variant="qerl_cod"),
        r"unknown AQN variant 'qerl_cod' \(did you mean 'qerl_code'\?\); known: qerl_code, qerl_paper, epochs",
    ),
    (dict(targets=("norm_moe", "norm_atention")), r"unknown AQN targets 'norm_atention' \(did you mean 'norm_attention'\?\)"),
    (dict(targets=()), "unknown AQN targets ''; known: norms, norm_attention"),
    (dict(reach=("expert",)), r"unknown AQN reach 'expert' \(did you mean 'experts'\?\); known: experts, router"),
]


@pytest.mark.parametrize("fields, message", BAD, ids=[next(iter(fields)) + str(index) for index, (fields, _) in enumerate(BAD)])
def test_bad_input(fields, message):
    with pytest.raises(ConfigError, match=message):
        AQN(**fields)


def test_a_run_shorter_than_its_stages_is_refused():
    with pytest.raises(ConfigError, match="into 12 intervals and this one has 11 steps"):
        AQN(variant="epochs", epochs=2).stage_table(11)
    with pytest.raises(ConfigError, match="20000000000000000 intervals and this one has 11 steps"):
        AQN(stages=2 * 10**16).stage_table(11)  # at once, without a list of them


# --- the noise ------------------------------------------------------------------------------------------------------------------


def test_both_readers_have_a_word():
    assert AQN(reach="both") == AQN(reach=["both"]) == AQN(reach=("experts", "router")) == AQN()


@pytest.mark.parametrize("reach", [("experts",), ("router",), ("experts", "router")])
def test_spec(reach):
    """Additive noise in the forward pass at the targets alone; the reach is that of norm_moe."""
    sites = AQN(targets=("norm_moe", "norm_final"), reach=reach).spec(0.25).sites
    assert set(sites) == {"norm_moe", "norm_final"} and sites["norm_moe"].reach == reach
    assert all(
        (n.kind, n.scale, n.passes, n.phases, n.draws) == ("additive", 0.25, ("forward",), ("rollout",), "fresh") for n in sites.values()
    )


@pytest.mark.parametrize("phase", PHASES)
def test_sampling_only(phase):
    acting = AQN().spec(0.1).resolve(4).in_phase(phase)
    assert acting is None if phase != "rollout" else [site for site, _ in acting.structure] == sorted(NORMS)


def test_a_traced_sigma_is_one_program():
    aqn = AQN(targets="norm_moe")

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def scales(sigma):
        return aqn.spec(sigma).resolve(3).scales["norm_moe"]

    sigmas = np.float32([0, 1e-2, 1e-4])
    np.testing.assert_array_equal([scales(sigma) for sigma in sigmas], np.outer(sigmas, np.ones(3)))


# --- the sampling copy ----------------------------------------------------------------------------------------------------------

WIDTH, LAYERS = 1024, {"odd": (1, 3), "even": (0, 2)}
SCALES = {
    "odd/norm_moe/scale": "norm_moe",
    "even/norm_moe/scale": "norm_moe",
    "even/attention/q_norm/scale": "norm_q",
    "end/scale": "norm_final",
}


@pytest.fixture
def params():
    def stack():
        scale = {"scale": jnp.ones((2, WIDTH))}
        return {"norm_moe": scale, "attention": {"q_norm": {"scale": jnp.full((2, WIDTH), 2.0)}, "q": jnp.ones((2, 3, 3))}}

    return {"odd": stack(), "even": stack(), "end": {"scale": jnp.ones(WIDTH, jnp.bfloat16)}}


def copy(params, aqn=None, sigma=0.01, draw=None, scales=None, layers=None):
    key = (draw or Draw(3, 7, "rollout")).key()
    return (aqn or AQN(targets=("norm_moe", "norm_q", "norm_final"))).sampling_copy(params, scales or SCALES, layers or LAYERS, sigma, key)


def test_copy_draws_by_absolute_layer_and_site(params):
    """scale + sigma * n, n drawn by the absolute layer (-1 outside), the site and the column; the trained parameters stay as they were."""
    before = jax.tree.map(np.array, params)
    got = copy(params)
    key = Draw(3, 7, "rollout").key()
    for path, site, base in (("odd", "norm_moe", 1.0), ("even", "norm_moe", 1.0), ("even", "norm_q", 2.0)):
        for index, layer in enumerate(LAYERS[path]):
            noise = draws.normal(keys.stream(key, layer, site, "forward"), jnp.zeros(1, jnp.int32), WIDTH)[0]
            scale = (got[path]["attention"]["q_norm"] if site == "norm_q" else got[path]["norm_moe"])["scale"][index]
            np.testing.assert_allclose(scale, base + 0.01 * noise, rtol=1e-6)
            assert abs(float(noise.std()) - 1) < 0.1
    noise = draws.normal(keys.stream(key, -1, "norm_final", "forward"), jnp.zeros(1, jnp.int32), WIDTH)[0]
    assert (got["end"]["scale"] == (1 + jnp.float32(0.01) * noise).astype(jnp.bfloat16)).mean() > 0.99  # one rounding of float32 apart
    chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
    chex.assert_trees_all_equal(got["odd"]["attention"], params["odd"]["attention"])  # a norm that has no path
    chex.assert_trees_all_equal(params, before)


def test_copy_is_clean_at_sigma_zero_and_new_at_each_sync(params):
    chex.assert_trees_all_equal(copy(params, sigma=0.0), params)
    chex.assert_trees_all_equal(copy(params), copy(params))
    assert (copy(params)["odd"]["norm_moe"]["scale"] != copy(params, draw=Draw(3, 8, "rollout"))["odd"]["norm_moe"]["scale"]).mean() > 0.99


def test_copy_touches_the_targets_alone(params):
    got = copy(params, AQN(targets="norm_q"))
    assert (got["even"]["attention"]["q_norm"]["scale"] != 2.0).mean() > 0.99
    chex.assert_trees_all_equal((got["odd"], got["end"]), (params["odd"], params["end"]))


def test_copy_refuses(params):
    with pytest.raises(ConfigError, match="AQN targets norm_attention, norm_k, which no path of scale_sites has"):
        copy(params, AQN(targets=("norm_attention", "norm_k", "norm_q")))
    with pytest.raises(ConfigError, match=r"no parameter 'odd/norm_mo/scale' \(did you mean 'odd/norm_moe/scale'\?\)"):
        copy(params, AQN(targets="norm_moe"), scales={"odd/norm_mo/scale": "norm_moe"})
    for layers in ({"odd": (1, 3)}, {"odd": (1, 3), "even": (0, 2, 4)}):
        with pytest.raises(ConfigError, match=r"'even/norm_moe/scale' has the shape \(2, 1024\), and its stack the layers"):
            copy(params, layers=layers)
    with pytest.raises(Unsupported, match="reaches .'experts',. alone needs two scales at norm_moe, and a copy holds one"):
        copy(params, AQN(targets="norm_moe", reach="experts"))


def test_copy_equals_the_noisy_forward():
    """The clean forward on the copy is the rollout forward of the spec on the trained parameters; layers 0 and 2, and 1 and 3, are stacked."""
    config = dataclasses.replace(ModelConfig.preset("tiny"), qk_norm="head", num_layers=4, dense_layers=(0, 2))
    model, tokens = Model(config), jnp.arange(16).reshape(1, 16)
    params = model.init(0)
    layers = {stack.name: stack.layers for segment in layer_plan(config) for stack in segment}
    parents = {path: path.split("/")[-2] for path in flatten(params) if path.endswith("/scale")}
    scales = {path: {"q_norm": "norm_q", "k_norm": "norm_k"}.get(parent, parent) for path, parent in parents.items()}
    assert set(scales.values()) == set(NORMS)

    @jax.jit
    def logits(params, noise=None):
        return model.apply(params, tokens, noise=noise, draw=Draw(3, 7, "rollout")).logits

    clean, copied = logits(params), logits(copy(params, AQN(), 0.1, scales=scales, layers=layers))
    size = float(jnp.abs(clean).max())
    np.testing.assert_allclose(logits(params, AQN().spec(0.1)), copied, atol=1e-5 * size)
    assert float(jnp.abs(copied - clean).max()) > 0.01 * size
