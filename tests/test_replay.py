"""Replay against the live router, bit for bit and by hand; and what each freeze stops."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax as mj
from moe_jax import paths
from moe_jax.errors import ConfigError, TraceError
from moe_jax.keys import Draw
from moe_jax.noise import NoiseSpec
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.replay import Replay, check_trace, empty_trace
from moe_jax.routing import RoutingTrace, unrecorded
from moe_jax.train.program import Program
from moe_jax.train.state import Knobs
from moe_jax.train.step import Objective

CONFIG = mj.ModelConfig.preset("tiny", dispatch="dense")  # which compiles in a third of the time of blocked
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 17)), jnp.int32)
NOISE = "router_gemm=relative:0.3,experts=relative:0.1"
DRAW = Draw(seed=3, step=5, phase="train")
ROUTER = "layers/feed_forward/router"


def loss_of(model, params, noise=None, replay=None, balance=0.01, freeze=()):
    total, metrics, out = model.loss(
        params, TOKENS[:, :-1], TOKENS[:, 1:], noise=noise, draw=DRAW, replay=replay, freeze=freeze, capture=("trace",)
    )
    return total / metrics["loss"][1] + balance * (out.aux["balance_loss"][0] + 0.1 * out.aux["z_loss"][0]), out


@functools.cache
def compiled(model, freeze=(), options=(), differentiated=False):
    """(params, noise, replay, balance) -> (loss, out), and perhaps gradients: one function for all tests of a model."""
    function = functools.partial(loss_of, model, freeze=freeze)
    if differentiated:
        function = jax.value_and_grad(function, has_aux=True)
    return jax.jit(function, compiler_options=dict(options))


def gradients(model, params, noise=None, replay=None, freeze=(), balance=0.01, options=()):
    """((loss, out), gradients by path), compiled."""
    found, grads = compiled(model, freeze, options, differentiated=True)(params, noise, replay, balance)
    return found, paths.flatten(grads)


def forward(model, params, noise=None, replay=None):
    """(loss, out), compiled."""
    return compiled(model)(params, noise, replay, 0.01)


def spec(text):
    return NoiseSpec.parse(text) if text else None


@functools.cache
def setting(**changes):
    model = mj.Model(CONFIG.replace(**changes))
    return model, model.init(1)


# --- 1. one's own trace ------------------------------------------------------------------------------------------------------


# the tests' level 0 sums the dense dispatch's noisy dW in another order in the two programs (5e-10)
AS_USERS_COMPILE = (("xla_backend_optimization_level", 3),)
CASES = [("ids", d, n, r) for d in ("dense", "blocked", "ragged") for n in ("", NOISE) for r in ("none", "full")]


OFTEN = (("ids", "dense", NOISE, "full"),)


def marked(case):
    """One of the cases in every run, the others with the slow tests: a case compiles two whole training programs."""
    return case if case in OFTEN else pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize("what, dispatch, noise, remat", [marked(case) for case in (*CASES, ("ids+weights", "blocked", NOISE, "full"))])
def test_own_trace_equals_live_to_the_bit(what, dispatch, noise, remat, force_ragged):
    """Loss and, under ids, every gradient; under ids+weights the gate's share of them is gone."""
    model, params = setting(remat=remat, dispatch=None if dispatch == "ragged" else dispatch)
    (live, out), grads = gradients(model, params, spec(noise), options=AS_USERS_COMPILE)
    (again, replayed), same = gradients(model, params, spec(noise), Replay(out.trace, what), options=AS_USERS_COMPILE)
    np.testing.assert_array_equal(live, again)
    chex.assert_trees_all_equal(out.trace, replayed.trace)
    if what == "ids":
        chex.assert_trees_all_equal(grads, same)
    assert replayed.aux["replay/live_rows"][0] == 0 and replayed.aux["replay/set_overlap"][0] == replayed.aux["replay/set_overlap"][1] > 0


@pytest.fixture
def force_ragged(request, monkeypatch):
    """The grouped matmul refuses a CPU unless forced; here its slowness does not matter."""
    if request.getfixturevalue("dispatch") == "ragged":
        from moe_jax.dispatch import dispatch as original
        from moe_jax.model import moe

        monkeypatch.setattr(moe, "dispatch", lambda x, d, e, _, tokens, **__: original(x, d, e, "ragged", tokens, force=True))


def test_the_two_programs_differ():
    model, params = setting()
    _, out = forward(model, params)
    texts = [compiled(model).lower(params, None, replay, 0.01).as_text() for replay in (None, Replay(out.trace))]
    assert texts[0] != texts[1]


def test_scan_and_unrolled_and_dense_layers_replay_the_same_trace():
    """Layer numbers are absolute: a dense layer in front shifts none of them."""
    model, params = setting(num_layers=4, dense_layers=(0, 2))
    live, out = forward(model, params)
    np.testing.assert_array_equal(out.trace.layer_index, [1, 3])
    other = dataclasses.replace(out.trace, ids=(np.asarray(out.trace.ids) + 1) % CONFIG.num_experts)
    moved, used = forward(model, params, replay=Replay(other))
    np.testing.assert_array_equal(used.trace.ids, other.ids)
    unrolled = mj.Model(model.config.replace(scan_layers=False))
    same, _ = forward(unrolled, params, replay=Replay(other))
    np.testing.assert_allclose(moved, same, rtol=1e-6)
    assert moved != live


# --- 2. gradients under replay and freeze -----------------------------------------------------------------------------------


def nonzero(leaf) -> bool:
    return bool(np.asarray(leaf).any())


def test_who_gets_a_gradient():
    """The router learns under ids; under ids+weights nothing of the language loss reaches it, and the trunk loses exactly the gate's share."""
    model, params = setting()
    run = functools.partial(gradients, model, params, balance=0.0)
    (_, out), live = run()
    trace = out.trace
    grads = {
        "ids": run(replay=Replay(trace))[1],
        "ids+weights": run(replay=Replay(trace, "ids+weights"))[1],
        "stop_gate_gradient": run(freeze=("stop_gate_gradient",))[1],
    }
    assert nonzero(grads["ids"][ROUTER]) and not nonzero(grads["ids+weights"][ROUTER])
    # the gate's own weights still learn when it is cut from the trunk
    np.testing.assert_array_equal(grads["stop_gate_gradient"][ROUTER][-1], live[ROUTER][-1])
    # without a gradient through the gate, the trunk's is the same whether the weights are constants or the gate's input is
    for path in ("embedding", "layers/attention/q", "layers/norm_moe/scale"):
        np.testing.assert_allclose(grads["ids+weights"][path], grads["stop_gate_gradient"][path], rtol=1e-5, atol=1e-8)
        assert (grads["ids+weights"][path] != live[path]).any()
    # experts see the same weights on the same rows
    last = "layers/feed_forward/down"
    np.testing.assert_array_equal(grads["stop_gate_gradient"][last][-1], live[last][-1])


def test_stop_aux_gradient_leaves_the_language_loss_alone():
    model, params = setting()
    _, without = gradients(model, params, balance=0.0)
    _, stopped = gradients(model, params, balance=0.5, freeze=("stop_aux_gradient",))
    _, pressed = gradients(model, params, balance=0.5)
    for path, grad in without.items():
        np.testing.assert_allclose(stopped[path], grad, rtol=1e-6, atol=1e-9)
    assert (pressed[ROUTER] != without[ROUTER]).any()


def test_stop_gate_gradient_also_stops_the_aux_losses_way_into_the_trunk():
    """With the gate cut, all that the balance loss can move is the gate."""
    model, params = setting()
    _, quiet = gradients(model, params, balance=0.0, freeze=("stop_gate_gradient",))
    _, loud = gradients(model, params, balance=0.5, freeze=("stop_gate_gradient",))
    for path in quiet:
        if path == ROUTER:
            assert (quiet[path] != loud[path]).any()
        else:
            np.testing.assert_allclose(loud[path], quiet[path], rtol=1e-6, atol=1e-9)


@functools.cache
def program_of(objective, config, **optimizer):
    return Program(config, OptimizerConfig(weight_decay=0.1, clip_norm=0.5, warmup=0, total=100, **optimizer), objective)


def trained(objective, steps=20, replay=None, config=CONFIG, **optimizer):
    program = program_of(objective, config, **optimizer)
    state = program.init(jnp.uint32(0))
    before = jax.tree.map(np.asarray, state.params)
    knobs = Knobs(None, jnp.uint32(0), jnp.float32(0.01), jnp.float32(0.001))
    batch = {"tokens": TOKENS[None, :, :-1], "targets": TOKENS[None, :, 1:]}
    if replay is not None:
        batch["replay"] = replay
    metrics = {}
    for _ in range(steps):
        state, metrics, _ = program.train(state, batch, knobs)
    return paths.flatten(before), paths.flatten(jax.tree.map(np.asarray, state.params)), state, metrics


def test_a_frozen_gate_does_not_move_and_has_no_state():
    before, after, state, _ = trained(Objective(freeze=("freeze_params",)))
    np.testing.assert_array_equal(after[ROUTER], before[ROUTER])
    assert all((after[path] != before[path]).any() for path in before if path != ROUTER)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    assert before[ROUTER].shape not in shapes and before["layers/feed_forward/up"].shape in shapes
    free_before, free_after, free, _ = trained(Objective())
    assert (free_after[ROUTER] != free_before[ROUTER]).any()
    assert before[ROUTER].shape in [leaf.shape for leaf in jax.tree.leaves(free.opt_state)]


@pytest.mark.slow
def test_freezes_combine():
    before, after, _, _ = trained(Objective(freeze=("freeze_params", "stop_gate_gradient", "stop_aux_gradient", "freeze_bias")), steps=3)
    np.testing.assert_array_equal(after[ROUTER], before[ROUTER])


BIASED = CONFIG.replace(router_score="sigmoid", selection_bias=True)
BIAS = "layers/feed_forward/selection_bias"
ADAMW = {"matrices": "adamw", "router": "adamw"}  # where the bias alone is looked at: a program without Muon compiles faster


def test_the_selection_bias_moves_towards_balance_unless_frozen():
    """One step by hand: rate times the sign of mean load minus load, in every layer."""
    before, after, _, metrics = trained(Objective(bias_rate=0.01), steps=1, config=BIASED, **ADAMW)
    load = np.asarray(metrics["router/load"])
    np.testing.assert_allclose(after[BIAS], before[BIAS] + 0.01 * np.sign(load.mean(-1, keepdims=True) - load), rtol=1e-6)
    assert (after[BIAS] != before[BIAS]).any() and "router/bias_load" not in metrics
    for frozen in (*(Objective(bias_rate=0.01, freeze=(name,)) for name in ("freeze_bias", "freeze_params")), Objective()):
        before, after, _, _ = trained(frozen, steps=5, config=BIASED, **ADAMW)
        np.testing.assert_array_equal(after[BIAS], before[BIAS])


@pytest.mark.parametrize(
    "policy, moves", [("replayed", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("off", False), ("live", True)))]
)
def test_the_selection_bias_follows_its_policy_under_replay(policy, moves):
    ids = np.zeros((2, 2, 16, 2), np.uint8) + np.array([0, 1], np.uint8)
    trace = RoutingTrace(ids, None, np.arange(2, dtype=np.int32))
    replay = Replay(trace, selection_bias=policy).micro_batches(1)
    before, after, _, _ = trained(Objective(bias_rate=0.01), steps=1, replay=replay, config=BIASED, **ADAMW)
    assert (after[BIAS] != before[BIAS]).any() == moves
    if policy == "replayed":  # experts 0 and 1 took everything
        np.testing.assert_allclose(after[BIAS] - before[BIAS], np.tile([-0.01, -0.01, 0.01, 0.01], (2, 1)), rtol=1e-5)


def test_a_balance_loss_that_is_off_is_zero_over_the_global_batch_too():
    trace = RoutingTrace(np.zeros((2, 2, 16, 2), np.uint8) + np.array([0, 1], np.uint8), None, np.arange(2, dtype=np.int32))
    replay = Replay(trace, balance_loss="off").micro_batches(1)
    before, after, _, metrics = trained(Objective(balance_scope="global_batch"), steps=1, replay=replay)
    assert float(metrics["balance_loss"][0]) == 0.0 and all((after[path] != before[path]).any() for path in before)


# --- 3. rows without a route -------------------------------------------------------------------------------------------------


def test_a_mix_of_recorded_and_live_rows_is_the_mix_made_by_hand():
    """One layer, so that a row's live route does not depend on the others'."""
    model, params = setting(num_layers=1)
    _, out = forward(model, params)
    live, sentinel = np.asarray(out.trace.ids), unrecorded(np.uint8)
    shifted = (live + 1) % CONFIG.num_experts
    blank = np.random.default_rng(1).random(live.shape[:3]) < 0.5
    blank[:, 1, 10:] = True  # padding
    trace = RoutingTrace(np.where(blank[..., None], sentinel, shifted).astype(np.uint8), None, np.zeros(1, np.int32))
    expected = np.where(blank[..., None], live, shifted)
    whole = Replay(RoutingTrace(expected.astype(np.uint8), None, np.zeros(1, np.int32)))
    (by_hand, replayed), grads = gradients(model, params, replay=whole)
    (loss, mixed), same = gradients(model, params, replay=Replay(trace))
    np.testing.assert_array_equal(mixed.trace.ids, expected)
    np.testing.assert_array_equal(mixed.load, replayed.load)
    assert mixed.aux["replay/live_rows"] == (blank.sum(), blank.size)
    np.testing.assert_array_equal(loss, by_hand)
    chex.assert_trees_all_equal(grads, same)
    # padding is spread as the live router spreads it, not sent to one expert
    assert len(np.unique(mixed.trace.ids[0, 1, 10:])) > 1


def test_weights_of_unrecorded_rows_are_live():
    model, params = setting(num_layers=1)
    _, out = forward(model, params)
    ids, weights = np.asarray(out.trace.ids).copy(), np.asarray(out.trace.weights) * 0 + 0.25
    ids[:, 0, 3:9] = unrecorded(np.uint8)
    trace = RoutingTrace(ids, weights, np.zeros(1, np.int32))
    (_, mixed), grads = gradients(model, params, replay=Replay(trace, "ids+weights"), balance=0.0)
    np.testing.assert_array_equal(mixed.trace.weights[:, 0, 3:9], out.trace.weights[:, 0, 3:9])
    assert (np.asarray(mixed.trace.weights)[:, 1] == 0.25).all() and nonzero(grads[ROUTER])


def test_rows_that_hold_no_possible_route_are_live_and_counted_in_a_compiled_program():
    """Outside one they are refused (below); inside, where values cannot be checked, they are neither taken nor lost."""
    model, params = setting(num_layers=1)
    _, out = forward(model, params)
    ids = np.asarray(out.trace.ids).copy()
    ids[0, 0, 0], ids[0, 0, 1] = [7, 1], [2, 2]
    _, used = forward(model, params, replay=Replay(RoutingTrace(ids, None, np.zeros(1, np.int32))))
    np.testing.assert_array_equal(used.trace.ids, out.trace.ids)
    assert used.aux["replay/live_rows"][0] == 2


def test_a_trace_without_routes_is_the_live_model():
    model, params = setting()
    (live, out), grads = gradients(model, params, spec(NOISE))
    (same, used), again = gradients(model, params, spec(NOISE), Replay(empty_trace(CONFIG.moe_layers, 4, 2, 2, 16)))
    np.testing.assert_array_equal(live, same)
    chex.assert_trees_all_equal(grads, again)
    assert used.aux["replay/live_rows"][0] == used.aux["replay/live_rows"][1] == 2 * 32
    assert used.aux["replay/set_overlap"] == (0, 0)


# --- 4. a clean reference under noise ---------------------------------------------------------------------------------------


def test_a_clean_reference_holds_under_router_noise():
    model, params = setting()
    _, clean = forward(model, params)
    _, noisy = forward(model, params, spec("router_logits=additive:1"))
    _, held = forward(model, params, spec("router_logits=additive:1"), Replay(clean.trace))
    changed = (np.sort(noisy.trace.ids) != np.sort(clean.trace.ids)).any((1, 2, 3))
    assert changed.all()
    np.testing.assert_array_equal(held.trace.ids, clean.trace.ids)
    overlap, count = held.router["replay/set_overlap"]
    assert (overlap < count).all()  # the live choice would have differed, in each layer


# --- policies ------------------------------------------------------------------------------------------------------------------


def test_losses_and_loads_follow_their_policy():
    model, params = setting(num_layers=1)
    _, live = forward(model, params)
    ids = ((np.asarray(live.trace.ids) + 1) % CONFIG.num_experts).astype(np.uint8)
    trace = RoutingTrace(ids, None, np.zeros(1, np.int32))

    def aux(**policies):
        _, out = forward(model, params, replay=Replay(trace, **policies))
        return float(out.aux["balance_loss"][0]), float(out.aux["z_loss"][0]), np.asarray(out.load)

    balance, z, load = aux()
    np.testing.assert_allclose((balance, z), (live.aux["balance_loss"][0], live.aux["z_loss"][0]), rtol=1e-6)
    np.testing.assert_array_equal(load[0], np.bincount(ids.reshape(-1), minlength=4))
    np.testing.assert_array_equal(aux(load="live")[2], live.load)
    assert not aux(load="off")[2].any() and aux(balance_loss="off")[0] == 0 == aux(z_loss="off")[1]
    share = np.bincount(ids.reshape(-1), minlength=4) / ids.size
    logits = jax.jit(lambda p: model.apply(p, TOKENS[:, :-1], draw=DRAW, capture=("router_logits",)).router_logits)(params)
    mean = np.asarray(jax.nn.softmax(logits)).mean((0, 1, 2))
    np.testing.assert_allclose(aux(balance_loss="replayed")[0], 4 * (share * mean).sum(), rtol=1e-5)


# --- training steps --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_micro_batches_take_their_own_rows_and_a_step_records_them():
    """Four rows in two micro-batches: the recorded trace is in the order of the batch, and its replay gives the same update to the bit."""
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (2, 2, 17)).astype(np.int32)
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:]}
    program = Program(CONFIG, OptimizerConfig(warmup=0), Objective(), record=True)
    knobs = Knobs(CONFIG.resolve(NoiseSpec.parse(NOISE)), jnp.uint32(3), jnp.float32(0.01), jnp.float32(0))
    state, metrics, _ = program.train(program.init(jnp.uint32(0)), batch, knobs)
    trace = metrics["trace"]
    assert trace.ids.shape == (2, 4, 16, 2) and trace.ids.dtype == jnp.uint8 and trace.weights.shape == trace.ids.shape
    whole = program.model.apply(
        program.model.init(0), tokens[..., :-1].reshape(4, 16), noise=knobs.noise, draw=Draw(3, 0, "train"), capture=("trace",)
    )
    np.testing.assert_array_equal(trace.ids, whole.trace.ids)
    again, replayed, _ = program.train(program.init(jnp.uint32(0)), {**batch, "replay": Replay(trace).micro_batches(2)}, knobs)
    chex.assert_trees_all_equal(state, again)
    assert replayed["replay/live_rows"] == (0, 2 * 64)


# --- bad input --------------------------------------------------------------------------------------------------------------


def trace_like(shape=(2, 2, 16, 2), dtype=np.uint8, layers=None):
    ids = np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape)
    return RoutingTrace(ids, None, np.arange(shape[0]) if layers is None else np.asarray(layers))


@pytest.mark.parametrize(
    "trace, said",
    [
        (trace_like((2, 2, 12, 2)), "12 positions where the model and its text have 16"),
        (trace_like((3, 2, 16, 2)), "3 layers where the model and its text have 2"),
        (trace_like((2, 2, 16, 1)), "1 experts per token where"),
        (trace_like(dtype=np.uint16), "ids in uint16 where 4 experts need uint8"),
        (trace_like(layers=(1, 2)), "holds the layers 1, 2, the model routes in 0, 1"),
        (dataclasses.replace(trace_like(), ids=np.full((2, 2, 16, 2), 9, np.uint8)), "the model has 4 experts"),
        (dataclasses.replace(trace_like(), ids=np.full((2, 2, 16, 2), 1, np.uint8)), "no expert can be chosen twice"),
        (dataclasses.replace(trace_like(), ids=trace_like().ids + np.array([255, 0], np.uint8)), "recorded whole or not at all"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused_with_the_numbers(trace, said):
    with pytest.raises(TraceError, match=said):
        setting()[0].apply(setting()[1], TOKENS[:, :-1], replay=Replay(trace))


def test_shapes_are_refused_in_a_compiled_program_too():
    model, params = setting()
    with pytest.raises(TraceError, match="12 positions"):
        jax.jit(lambda r: model.apply(params, TOKENS[:, :-1], replay=r).logits)(Replay(trace_like((2, 2, 12, 2))))


def test_unknown_choices_are_refused():
    with pytest.raises(ConfigError, match="unknown replay what 'id'.*ids"):
        Replay(trace_like(), "id")
    with pytest.raises(ConfigError, match="unknown replay z_loss 'replayed'.*live, off"):
        Replay(trace_like(), z_loss="replayed")
    with pytest.raises(ConfigError, match="has none; record with weights"):
        Replay(trace_like(), "ids+weights")
    with pytest.raises(ConfigError, match="unknown freeze 'freeze_param'.*freeze_params"):
        Objective(freeze=("freeze_param",))
    with pytest.raises(ConfigError, match="bias_rate must be finite"):
        Objective(bias_rate=float("nan"))


def test_check_trace_accepts_what_a_model_made():
    model, params = setting()
    trace = forward(model, params)[1].trace
    check_trace(trace, CONFIG.moe_layers, 4, 2, 2, 16)


def test_the_routing_hash_is_of_what_is_computed():
    assert CONFIG.replace(dispatch="blocked", remat="full").routing_hash() == CONFIG.routing_hash()
    assert CONFIG.replace(num_experts=8).routing_hash() != CONFIG.routing_hash() != CONFIG.replace(rope_theta=5e5).routing_hash()
