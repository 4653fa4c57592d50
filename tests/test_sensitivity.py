"""The causal decomposition: its arms, its shares, its programs, and what it says of routers, on a model small enough to check by other means."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax as mj
from moe_jax import routing_stats, sensitivity
from moe_jax.errors import ConfigError, TraceError
from moe_jax.keys import Draw
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec, SiteNoise
from moe_jax.replay import Replay
from moe_jax.routing import RoutingTrace
from moe_jax.sensitivity import OPPOSITE, arms_of, factor_of, ratio

CONFIG = ModelConfig.preset("tiny", dispatch="dense")
MODEL = Model(CONFIG)
B, S, L, E, K, R, N = 2, 12, 2, 4, 2, 3, 2
SPEC = NoiseSpec.parse("relative:0.2")
FACTORS = ("router", "experts", "attention", "rest")


@pytest.fixture(scope="module")
def params():
    """Fresh parameters with routers and head strong enough for noise to matter."""
    params = MODEL.init(0)
    params["layers"]["feed_forward"]["router"] = 20.0 * params["layers"]["feed_forward"]["router"]
    return jax.tree.map(lambda x: 3.0 * x if x.ndim > 2 else x, params)


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (N, B, S + 1), np.int32)


@pytest.fixture(scope="module")
def found(params, windows):
    return sensitivity.sensitivity(MODEL, params, iter(windows), SPEC, range(R))


# --- shares and arms, without a model -----------------------------------------------------------------------------------------


def test_ratio_is_fiellers_interval():
    """The ends are those ratios r at which the t statistic of part - r * whole is at its critical value."""
    whole, part = np.array([1.0, 1.2, 0.9, 1.4]), np.array([0.5, 0.7, 0.3, 0.6])
    found, critical = ratio(part, whole), 3.182446305284263  # t of 3 degrees of freedom, two-sided 5 %
    assert found.value == pytest.approx(2.1 / 4.5) and not found.undefined
    for end in found.interval:
        rest = part - end * whole
        assert abs(rest.mean() / (rest.std(ddof=1) / 2)) == pytest.approx(critical)
    assert found.interval[0] < found.value < found.interval[1]


@pytest.mark.parametrize(
    "whole, why",
    [
        ([1.0, -1.1, 0.9], "not distinguishable"),
        ([-1.0, -1.1, -0.9], "did no damage"),
        ([1.0], "one value"),
        ([0.0, 0.0], "not distinguishable"),
    ],
)
def test_a_ratio_without_damage_is_undefined(whole, why):
    found = ratio([0.1] * len(whole), whole)
    assert why in found.undefined and np.isnan([found.value, *found.interval]).all()


def test_a_ratio_without_spread_has_an_interval_without_width():
    assert ratio([0.25, 0.25], [0.5, 0.5]) == sensitivity.Ratio(0.5, (0.5, 0.5))


def test_factors_and_arms():
    factors, arms = arms_of(CONFIG.resolve(SPEC))
    assert tuple(factors) == FACTORS and factors["rest"] == ("lm_head",) and factors["attention"][0] == "attention_k"
    assert len(arms) == 3 * 2**4 + 1 and len(set(arms)) == len(arms) and arms[-1] == (OPPOSITE, ())
    factors, arms = arms_of(CONFIG.resolve(NoiseSpec.parse("experts=relative:0.1")))
    assert tuple(factors) == ("experts",)
    assert [arm for arm in arms if arm[0] == "live"] == [("live", ()), ("live", ("experts",))]


def test_a_norm_that_one_reader_sees_goes_with_that_reader():
    assert factor_of("norm_moe", SiteNoise("additive", 0.1, reach="router")) == "router"
    assert factor_of("norm_moe", SiteNoise("additive", 0.1)) == "rest" and factor_of("embedding", SiteNoise("additive", 0.1)) == "rest"


# --- what the arms compute ----------------------------------------------------------------------------------------------------


@jax.jit
def by_hand(params, window, noise, seed, row, replay=None):
    """(loss per token, words' log-probabilities, trace, router logits) of one batch through the public model."""
    draw = Draw(seed, 0, "eval", row)
    out = MODEL.apply(params, window[:, :-1], noise, draw, capture=("trace", "router_logits"), replay=replay)
    log_q = jax.nn.log_softmax(out.logits)
    return -jnp.take_along_axis(log_q, window[:, 1:, None], -1)[..., 0], log_q, out.trace, out.router_logits


def test_the_clean_loss_is_that_of_a_model_without_noise(found, params, windows):
    losses = [by_hand(params, window, None, 0, 0)[0].mean() for window in windows]
    np.testing.assert_allclose(found.clean, losses, rtol=1e-6)
    assert found.tokens == (B * S,) * N and found.layers == (0, 1)


def test_arms_without_noise_are_the_clean_pass_to_the_bit(found):
    for routes in sensitivity.ROUTES:
        for metric in sensitivity.CLEAN:
            assert (found.at(metric, routes, ()) == 0).all(), (routes, metric)


@pytest.mark.parametrize(
    "routes, sites", [("live", FACTORS), ("live", ("experts",)), ("ids", ("router", "attention")), ("ids+weights", FACTORS)]
)
def test_an_arm_is_the_pass_that_its_name_says(found, params, windows, routes, sites):
    """A spec with just these sites, and the clean trace replayed, give the arm's loss and KL."""
    spec = NoiseSpec({site: SPEC.sites["matmuls"] for name in sites for site in found.factors[name]})
    for index, window in enumerate(windows):
        _, log_p, trace, _ = by_hand(params, window, None, 0, 0)
        replay = None if routes == "live" else Replay(trace, routes)
        for number in range(R):
            loss, log_q, _, _ = by_hand(params, window, spec, number, index * B, replay)
            at = found.arms.index((routes, sites)), number, index
            assert found.values["loss"][at] == pytest.approx(float(loss.mean()), rel=1e-5)
            assert found.values["kl"][at] == pytest.approx(float((jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()), rel=1e-3, abs=1e-7)
            assert found.values["agreement"][at] == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).mean()))


def test_the_opposite_arm_is_the_clean_model_with_the_noisy_experts(found, params, windows):
    noisy = by_hand(params, windows[1], SPEC, 2, B)[2]
    loss = by_hand(params, windows[1], None, 0, 0, Replay(noisy, "ids"))[0].mean()
    at = found.arms.index((OPPOSITE, ())), 2, 1
    assert found.values["loss"][at] == pytest.approx(float(loss), rel=1e-6) and found.values["loss"][at] != found.clean[1]


def test_replaying_all_of_a_router_silences_its_noise(found):
    """With ids and weights replayed, router noise changes nothing; with ids alone it moves the weights."""
    assert (found.at("kl", "ids+weights", ("router",)) == 0).all()
    assert (found.at("kl", "ids", ("router",)) > 0).all()
    assert (found.at("kl", "ids", ("router",)) < found.at("kl", "live", ("router",))).all()


def test_shares_are_ratios_of_paired_means(found):
    whole, replayed = found.at("kl"), found.at("kl", "ids")
    assert found.share("ids", "kl").value == pytest.approx(1 - replayed.mean() / whole.mean())
    assert found.share(OPPOSITE, "kl").value == pytest.approx(found.at("kl", OPPOSITE, ()).mean() / whole.mean())
    inside = ("router", "experts")
    assert found.share("ids", "kl", inside).value == pytest.approx(
        1 - found.at("kl", "ids", inside).mean() / found.at("kl", "live", inside).mean()
    )
    per_batch = found.values["kl"][found.arms.index(("live", FACTORS))].mean(0)
    np.testing.assert_allclose(found.at("kl", over="batches"), per_batch)
    damage = found.damage("kl")
    assert damage.n == R and damage.mean == pytest.approx(whole.mean()) and damage.interval[0] < damage.mean < damage.interval[1]


def test_the_same_call_gives_the_same_bits(found, params, windows):
    again = mj.sensitivity(MODEL, params, iter(windows), SPEC, range(R))  # the name that users call
    for metric, values in found.values.items():
        assert np.array_equal(values, again.values[metric]), metric
    for of, name in ((of, name) for of, names in found.routers.items() for name in names):
        assert np.array_equal(found.routers[of][name], again.routers[of][name]), (of, name)


def test_all_arms_of_one_structure_are_one_program(params, windows, monkeypatch):
    """One program for live and replayed ids, one for ids and weights, one for the words, whatever the scales, seeds and batches."""
    chex.clear_trace_counter()
    for name, programs in (("_forward", 2), ("_measure", 1)):
        counted = chex.assert_max_traces(getattr(sensitivity, name).__wrapped__, n=programs)
        monkeypatch.setattr(sensitivity, name, jax.jit(counted, static_argnames="model"))
    sensitivity.sensitivity(MODEL, params, iter(windows), SPEC, (5, 6))
    sensitivity.sensitivity(MODEL, params, iter(windows), NoiseSpec.parse("relative:0.01"), (7, 8))


# --- the routers --------------------------------------------------------------------------------------------------------------


def test_routers_are_compared_with_the_clean_pass(found, params, windows):
    """Overlap, first layer that differs, experts gained and lost, against routing by hand."""
    overlap, first, gained = np.zeros(L), np.zeros(L + 1), np.zeros((L, E))
    for index, window in enumerate(windows):
        clean, noisy = (np.asarray(by_hand(params, window, spec, 1, index * B)[2].ids).reshape(L, -1, K) for spec in (None, SPEC))
        sets = [[set(row) for row in layer] for layer in clean], [[set(row) for row in layer] for layer in noisy]
        for token in range(B * S):
            differs = [sets[0][layer][token] != sets[1][layer][token] for layer in range(L)]
            first[differs.index(True) if any(differs) else L] += 1
            for layer in range(L):
                overlap[layer] += len(sets[0][layer][token] & sets[1][layer][token]) / K / (N * B * S)
                for expert in sets[1][layer][token] - sets[0][layer][token]:
                    gained[layer, expert] += 1
    noisy = found.routers["all"]
    np.testing.assert_allclose(noisy["router/set_overlap"][1], overlap, rtol=1e-6)
    np.testing.assert_array_equal(noisy["first"][1], first)
    np.testing.assert_array_equal(noisy["gained"][1], gained)
    np.testing.assert_array_equal(noisy["load"][1] - found.routers["clean"]["load"][0], gained - noisy["lost"][1])
    assert 0 < first[:L].sum() < first.sum() and gained.sum() == noisy["lost"][1].sum() > 0
    assert (found.routers["clean"]["router/set_overlap"] == 1).all() and found.routers["clean"]["gained"].sum() == 0


def test_own_noise_is_that_of_each_router_on_clean_inputs(found, params, windows):
    """In the first layer it is all the router's noise there is; in later ones it lacks what earlier flips bring."""
    own, router = found.routers["own"], found.routers["router"]
    np.testing.assert_array_equal(own["router/tokens_changed"][:, 0], router["router/tokens_changed"][:, 0])
    assert own["router/tokens_changed"][:, 1].mean() < router["router/tokens_changed"][:, 1].mean()
    assert "router/moved_mass" not in own and (router["router/moved_mass"] > 0).all()
    spec, flips = NoiseSpec.parse("router_gemm=relative:0.2"), 0
    for index, window in enumerate(windows):
        _, _, trace, clean = by_hand(params, window, None, 0, 0)
        noisy = by_hand(params, window, spec, 0, index * B, Replay(trace, "ids+weights"))[3]
        flips += np.asarray(routing_stats.explained_by_margin(clean[1].reshape(-1, E), noisy[1].reshape(-1, E), K)["flips"])
    assert flips.sum() > 0
    np.testing.assert_array_equal(own["margin/flips"][0, 1], flips)


def test_router_noise_under_replay_uses_the_clean_experts(params, windows):
    """The set overlap of the experts that worked is 1 in every layer; without replay it is not."""
    trace = by_hand(params, windows[0], None, 0, 0)[2]
    spec = NoiseSpec.parse("router_logits=additive:5.0")
    overlaps = []
    for replay in (Replay(trace, "ids"), None):
        used = by_hand(params, windows[0], spec, 0, 0, replay)[2].ids
        pairs = jax.vmap(routing_stats.compare)(trace.ids.reshape(L, -1, K), used.reshape(L, -1, K))
        total, count = pairs["router/set_overlap"]
        overlaps.append(np.asarray(total / count))
    assert (overlaps[0] == 1).all() and (overlaps[1] < 0.95).all()


def test_tokens_of_weight_0_do_not_count(params, windows):
    """A batch with rows that only fill it up says the same as its real rows alone."""
    window = windows[0]
    whole = {"tokens": window[:, :-1], "targets": window[:, 1:], "weight": np.repeat([[1.0], [0.0]], S, 1).astype(np.float32)}
    padded, real = (sensitivity.sensitivity(MODEL, params, batch, SPEC, (0, 1)) for batch in ([whole], window[:1]))
    assert padded.tokens == real.tokens == (S,)
    for metric in sensitivity.CLEAN:
        np.testing.assert_allclose(padded.values[metric], real.values[metric], rtol=2e-4, atol=1e-6)
    for name in ("router/set_overlap", "router/logit_mean", "first", "lost", "margin/tokens"):
        np.testing.assert_allclose(padded.routers["all"][name], real.routers["all"][name], rtol=1e-5, err_msg=name)


def test_recorded_routes_take_the_place_of_the_clean_pass(params, windows):
    """One's own clean routes from outside give the same numbers; ids alone leave out the arms that need weights; unrecorded rows are counted."""
    traces = [jax.device_get(by_hand(params, window, None, 0, 0)[2]) for window in windows]
    own = sensitivity.sensitivity(MODEL, params, iter(windows), SPEC, (0, 1))
    given = sensitivity.sensitivity(MODEL, params, iter(windows), SPEC, (0, 1), routes=lambda index, tokens: traces[index])
    assert np.array_equal(own.values["loss"], given.values["loss"]) and "own" not in given.routers
    some = [RoutingTrace(trace.ids.copy(), None, trace.layer_index) for trace in traces]
    some[0].ids[:, 0] = 255
    ids_only = sensitivity.sensitivity(MODEL, params, iter(windows), SPEC, (0, 1), routes=lambda index, tokens: some[index])
    assert {arm[0] for arm in ids_only.arms} == {"live", "ids", OPPOSITE} and ids_only.live_rows == 1 / (B * N)
    assert np.array_equal(ids_only.at("loss", "ids", FACTORS).shape, (2,))
    bad = RoutingTrace(np.full_like(traces[0].ids, 200), None, traces[0].layer_index)
    with pytest.raises(TraceError, match="4 experts"):
        sensitivity.sensitivity(MODEL, params, windows[0], SPEC, (0, 1), routes=lambda index, tokens: bad)


def test_look_and_progress(params, windows):
    seen, parts = [], []
    sensitivity.sensitivity(
        MODEL, params, iter(windows), NoiseSpec.parse("experts=relative:0.1"), (0, 1), look=lambda logits, weight: seen.append(logits.shape),
        progress=lambda done, share: parts.append(done + share),
    )  # fmt: skip
    assert seen == [(L, B * S, E)] * N and parts == sorted(parts) and parts[-1] == N


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["relative:0.3", "additive:0.1", "rms_relative:0.1", "quantise:int8", "bit_flip:0.01", "bias:0.1", "accumulation:0.1"]
)
def test_every_kind_is_off_at_scale_0(params, windows, kind):
    """An arm without noise is the clean pass for each kind that a matmul can have; with it, it is not."""
    found = sensitivity.sensitivity(MODEL, params, windows[0], NoiseSpec.parse(f"router_gemm={kind},lm_head={kind}"), (0, 1))
    assert all((found.at("kl", routes, ()) == 0).all() for routes in sensitivity.ROUTES) and (found.at("kl", "live", ("rest",)) > 0).all()


# --- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": (0,)}, "at least 2 noise seeds"),
        ({"seeds": (3, 3)}, "each given once"),
        ({"noise": NoiseSpec.parse("experts=relative:0.1:phases=train")}, "does not act in the phase 'eval'"),
        ({"batches": []}, "no batch"),
        ({"batches": np.zeros(7, np.int32)}, r"windows of S tokens"),
        ({"model": Model(CONFIG.replace(num_experts=0))}, "dense model has no routes"),
        ({"batches": np.full((2, 9), 999)}, "token ids go from 999 to 999"),
    ],
)
def test_bad_input(params, windows, change, message):
    call = {"model": MODEL, "params": params, "batches": windows[0], "noise": SPEC, "seeds": (0, 1)} | change
    with pytest.raises(ConfigError, match=message):
        sensitivity.sensitivity(**call)


def test_an_unknown_arm_is_named(found):
    for asked in itertools.product(("loss",), ("replayed", "live"), (("routers",),)):
        with pytest.raises(ConfigError, match="there is no arm"):
            found.at(*asked)
    with pytest.raises(ConfigError, match="perplexity"):
        found.at("perplexity")
    with pytest.raises(ConfigError, match="over 'batch'; .*over: seeds, batches"):
        found.at(over="batch")
