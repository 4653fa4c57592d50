"""Noise in the whole model: off is off, scales are data, and every way to compute it is the same network with the same draws."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import dispatch as dispatching
from moe_jax import keys
from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.errors import ConfigError, Unsupported
from moe_jax.keys import Draw
from moe_jax.mesh import MeshSpec
from moe_jax.model import Model, ModelConfig, moe
from moe_jax.model.attention import Attention
from moe_jax.model.bind import bind
from moe_jax.model.layers import MLP, Scope
from moe_jax.model.transformer import Block
from moe_jax.noise import NoiseSpec, Operator, draws
from moe_jax.products import matmul

DRAW = Draw(seed=7, step=3, phase="train")
EVERYWHERE = NoiseSpec.parse("relative:0.2")  # every matmul, all three passes
SMALL = dict(d_model=16, num_heads=2, d_expert=12, vocab_size=40, dispatch="dense")
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 40, (8, 6)))


@functools.cache
def step_of(**changes):
    """(params, tokens, noise, draw) -> (loss, ids, gradients), not jitted."""
    model = Model(ModelConfig.preset("tiny", **(SMALL | changes)))

    def step(params, tokens, noise, draw):
        def objective(params):
            total, _, out = model.loss(params, tokens, tokens[:, ::-1], noise=noise, draw=draw, capture=("trace",))
            assert out.trace is not None
            return total, out.trace.ids

        (loss, ids), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return loss, ids, gradients

    return step


@pytest.fixture(scope="module")
def small(make_params):
    return make_params(Model(ModelConfig.preset("tiny", **SMALL)))


@pytest.fixture(scope="module")
def run():
    """The step compiled: dense, scanned, nothing recomputed. It may be traced for the clean and for the noisy structure, each once."""
    return jax.jit(chex.assert_max_traces(n=2)(step_of()))


@pytest.fixture(scope="module")
def clean(run, small):
    return run(small, TOKENS, None, DRAW)


@pytest.fixture(scope="module")
def noisy(run, small):
    return run(small, TOKENS, EVERYWHERE, DRAW)


def assert_same(found, wanted):
    """The ids exactly; loss and gradients as near as other orders of float32 sums allow."""
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[2]), jax.tree.leaves(wanted[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(abs(b).max()))


# --- off is off -----------------------------------------------------------------------------------------------------------------


def test_noise_that_is_off_is_not_in_the_program(small):
    """Loss and gradients: no spec and one for other phases give the same text; noise that acts gives another."""

    def text(noise):
        return jax.jit(step_of()).lower(small, TOKENS, noise, DRAW).as_text()

    off = text(None)
    elsewhere = NoiseSpec.parse(
        "relative:0.1:phases=eval+rollout,router_logits=additive:0.3:phases=old_logprob,norms=additive:1:phases=eval"
    )
    assert text(elsewhere) == off
    assert text(ModelConfig.preset("tiny", **SMALL).resolve(elsewhere)) == off
    on, of_normals = text(EVERYWHERE), str(0x3F800000)  # a constant of the normal draws
    assert on != off and of_normals in on and of_normals not in off


def test_twelve_scales_are_one_program(run, small, clean, noisy):
    """Beside the clean one, one trace serves every scale, seed and step; other scales give other losses."""
    losses = [
        float(run(small, TOKENS, NoiseSpec.parse(f"relative:{scale}"), Draw(seed, seed + 1, "train"))[0])
        for seed, scale in enumerate(np.linspace(0.01, 0.3, 12))
    ]
    assert len(set(losses)) == 12
    with pytest.raises(AssertionError, match="is traced > 2 times"):
        run(small, TOKENS, NoiseSpec.parse("additive:0.1"), DRAW)


def test_scale_zero_is_clean_to_the_bit(run, small, clean, noisy):
    """Loss, ids and every gradient; and at 0.2 they all change."""
    chex.assert_trees_all_equal(run(small, TOKENS, NoiseSpec.parse("relative:0"), DRAW), clean)
    assert abs(noisy[0] / clean[0] - 1) > 1e-3 and (noisy[1] != clean[1]).mean() > 0.02
    for a, b in zip(jax.tree.leaves(noisy[2]), jax.tree.leaves(clean[2]), strict=True):
        assert abs(a - b).max() > 1e-3 * abs(b).max()


# --- the same network everywhere ------------------------------------------------------------------------------------------------

WAYS = {
    "blocked, unrolled": dict(dispatch="blocked", scan_layers=False),
    "blocked, full recomputation": dict(dispatch="blocked", remat="full"),
    "ragged, saved products, the loss whole": dict(dispatch="ragged", remat="dots", loss_chunk="none"),
}


@pytest.fixture
def quick_dispatch(monkeypatch):
    """Blocked with two tile sizes, which compile in a fraction of the time of its own; ragged also on a CPU."""

    def dispatch(x, decision, experts, implementation, tokens, **_):
        chosen = functools.partial(dispatch_blocked, unit=24, largest=48) if implementation == "blocked" else implementation
        return dispatching.dispatch(x, decision, experts, chosen, tokens, force=True)

    monkeypatch.setattr(moe, "dispatch", dispatch)


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if "unrolled" in way else []) for way in WAYS])
def test_every_way_to_compute_is_the_same_network(way, small, noisy, quick_dispatch):
    assert_same(jax.jit(step_of(**WAYS[way]))(small, TOKENS, EVERYWHERE, DRAW), noisy)


@pytest.mark.slow
def test_without_jit(small, noisy):
    assert_same(step_of()(small, TOKENS, EVERYWHERE, DRAW), noisy)


def test_a_batch_in_two_halves(small, noisy):
    """Draws go by global token numbers, and relative errors of dW add up as the gradients do."""
    half = jax.jit(step_of())
    parts = [half(small, TOKENS[at : at + 4], EVERYWHERE, dataclasses.replace(DRAW, row_offset=at)) for at in (0, 4)]
    total = jax.tree.map(jnp.add, *((loss, gradients) for loss, _, gradients in parts))
    assert_same((total[0], jnp.concatenate([ids for _, ids, _ in parts], axis=1), total[1]), noisy)
    unplaced = half(small, TOKENS[4:], EVERYWHERE, DRAW)  # without the offset: the first half's draws
    assert (unplaced[1] != noisy[1][:, 4:]).any()


def test_one_device_and_eight(small, noisy):
    mesh = MeshSpec(data=8).build()
    cut = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("data")))
    placed = jax.device_put(small, Model(ModelConfig.preset("tiny", **SMALL), mesh).shardings)
    assert cut.addressable_shards[0].data.shape == (1, 6)
    assert_same(jax.jit(step_of())(placed, cut, EVERYWHERE, DRAW), noisy)


def scope_of(text, tokens, layer=1, draw=DRAW, num_layers=2) -> Scope:
    """What a layer of a model with this noise knows."""
    noise = NoiseSpec.parse(text).resolve(num_layers).in_phase(draw.phase)
    if noise is None:
        return Scope(draw.key(), layer, tokens, {})
    return Scope(draw.key(), layer, tokens, {site: s[layer] if s.ndim else s for site, s in noise.scales.items()}, noise.structure)


def module_of(make, **changes):
    """(params, call) of one module of a small model."""
    specs, call = bind(make(ModelConfig.preset("tiny", **(SMALL | changes))))
    random = np.random.default_rng(1)
    return {name: jnp.asarray(0.3 * random.normal(size=spec.shape), spec.dtype) for name, spec in specs.items()}, call


X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 16)), "float32")
NUMBERS = 50 + jnp.arange(48).reshape(8, 6)


@pytest.mark.parametrize("dispatch", ["dense", "blocked"])
def test_rows_in_another_order(dispatch, quick_dispatch):
    """Draws belong to the row's own number, wherever in the batch it stands."""
    params, call = module_of(moe.MoE, dispatch=dispatch)
    dy = jnp.asarray(np.random.default_rng(5).normal(size=X.shape), "float32")

    @jax.jit
    def layer(params, x, dy, numbers):
        (y, router), pull = jax.vjp(lambda params, x: call(params, x, scope_of("relative:0.2", numbers)), params, x)
        d_params, dx = pull(
            (dy, jax.tree.map(lambda a: jnp.zeros(a.shape, jax.dtypes.float0 if a.dtype == jnp.uint8 else a.dtype), router))
        )
        return y, router["ids"], dx, d_params

    order = np.random.default_rng(2).permutation(8)
    y, ids, dx, d_params = layer(params, X, dy, NUMBERS)
    moved = layer(params, X[order], dy[order], NUMBERS[order])
    np.testing.assert_array_equal(moved[1], ids[order])
    chex.assert_trees_all_close((moved[0], moved[2], moved[3]), (y[order], dx[order], d_params), rtol=1e-4, atol=1e-4)
    assert abs(layer(params, X[order], dy[order], NUMBERS)[0] - y[order]).max() > 0.01  # by place, other draws


# --- draws: fresh and fixed -----------------------------------------------------------------------------------------------------


def test_fresh_draws_change_with_the_step_and_fixed_ones_do_not(small):
    """Two sites in one program, of which the scales turn one on at a time."""
    config = ModelConfig.preset("tiny", **SMALL)

    @jax.jit
    def features(step, fresh, fixed):
        noise = config.resolve(NoiseSpec.parse("attention=relative:0.2:draws=fixed,embedding=additive:0.1"))
        scales = {site: scale * (fresh if site == "embedding" else fixed) for site, scale in noise.scales.items()}
        return Model(config).features(small, TOKENS, dataclasses.replace(noise, scales=scales), Draw(7, step, "train")).hidden

    fixed = [features(step, 0.0, 1.0) for step in (3, 4)]
    np.testing.assert_array_equal(*fixed)
    assert abs(fixed[0] - features(3, 0.0, 0.0)).max() > 0.01
    assert abs(features(3, 1.0, 0.0) - features(4, 1.0, 0.0)).max() > 0.01


# --- sites ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", ["experts", "router", "both"])
def test_norm_moe_reaches_whom_it_says(reach, monkeypatch):
    """The router's input and the experts' input, each compared with that of the block at scale 0, which is the clean one."""
    seen = []

    def record(x, decision, experts, *_, **__):
        seen.append(x)
        return x, dispatching.DispatchStats(jnp.zeros(4), jnp.zeros((), int), jnp.zeros((), int))

    monkeypatch.setattr(moe, "dispatch", record)
    config = ModelConfig.preset("tiny", **SMALL)
    specs, call = bind(Block(config, True))
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda spec: jnp.asarray(random.normal(size=spec.shape), "float32"), specs, is_leaf=lambda leaf: hasattr(leaf, "role")
    )
    positions = jnp.broadcast_to(jnp.arange(6), (8, 6))

    @jax.jit
    def read(scope):
        logits = call(params, X, positions, scope, ())[1]["logits"]
        return seen.pop(), logits

    clean, noisy = (read(scope_of(f"norm_moe=additive:{scale}:reach={reach}", NUMBERS)) for scale in (0.0, 0.5))
    same = tuple(np.array_equal(*both) for both in zip(clean, noisy, strict=True))
    assert same == {"experts": (False, True), "router": (True, False), "both": (False, False)}[reach]


def test_fused_and_separate_projections_have_the_same_noise():
    """One matrix for q, k and v or three: each has its site's draws, and dW of the fused one is the three side by side."""
    params, separate = module_of(Attention, num_kv_heads=1, max_seq_len=8)
    _, fused = module_of(Attention, num_kv_heads=1, max_seq_len=8, fused_qkv=True)
    joined = {"qkv": jnp.concatenate([params[name] for name in "qkv"], axis=-1), "o": params["o"]}
    positions = jnp.broadcast_to(jnp.arange(6), (8, 6))

    @jax.jit
    def both(params, joined):
        scope = scope_of("attention=relative:0.2", NUMBERS)
        return [
            jax.value_and_grad(lambda p, f=f: jnp.sin(f(p, X, positions, scope)[0]).sum())(p)
            for f, p in ((separate, params), (fused, joined))
        ]

    (value, gradients), (other, others) = both(params, joined)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    np.testing.assert_allclose(others["qkv"], jnp.concatenate([gradients[name] for name in "qkv"], axis=-1), rtol=1e-4, atol=1e-4)


def test_the_dense_feed_forward_takes_its_sites():
    params, call = module_of(MLP)
    x = X.reshape(-1, 16)

    def product(x, name):
        operator = Operator(jnp.float32(0.2), keys.fold(DRAW.key(), 1), f"mlp_{name}", "relative", ("forward",))
        return matmul(x, params[name], operator, NUMBERS.reshape(-1))

    expected = product(jax.nn.silu(product(x, "gate")) * product(x, "up"), "down")
    y, _ = call(params, X, scope_of("mlp=relative:0.2", NUMBERS))
    np.testing.assert_allclose(y.reshape(-1, 16), expected, rtol=1e-5, atol=1e-5)
    assert abs(y - call(params, X, scope_of("", NUMBERS))[0]).max() > 0.01


def test_an_offset_of_all_logits_moves_relative_noise_alone():
    """A common offset changes nothing that a softmax sees: centred noise leaves it so, relative noise grows with it."""
    params, call = module_of(moe.MoE)
    x = X.at[..., 0].set(1.0)  # so that the router's first row is an offset
    offset = params | {"router": params["router"].at[0].add(50.0)}
    layer = jax.jit(lambda params, scope: call(params, x, scope)[1])
    for text, moves in (("", False), ("router_logits=relative:0.1", True), ("router_logits=centred_relative:0.1", False)):
        scope = scope_of(text, NUMBERS)
        before, after = layer(params, scope), layer(offset, scope)
        np.testing.assert_allclose((after["logits"] - before["logits"]).mean(), 50.0, rtol=0.05)
        assert (before["ids"] != after["ids"]).any() == moves
        assert (abs(before["weights"] - after["weights"]).max() > 1e-3) == moves


def test_learned_noise():
    """n * softplus(x W), whose gradient reaches W and not the scale; without noise here, and at scale 0, the clean logits."""
    params, call = module_of(moe.MoE, learned_noise=True)
    assert params["noise"].shape == (16, 4)
    layer = jax.jit(lambda params, scope: call(params, X, scope)[1]["logits"].reshape(-1, 4))
    scope = scope_of("router_logits=learned:0.5", NUMBERS)
    quiet, loud = layer(params, scope_of("", NUMBERS)), layer(params, scope)
    n = np.asarray(draws.normal(scope.stream("router_logits"), NUMBERS.reshape(-1), 4), np.float64)
    spread = np.log1p(np.exp(np.asarray(X, np.float64).reshape(-1, 16) @ np.asarray(params["noise"], np.float64)))
    np.testing.assert_allclose(loud, quiet + 0.5 * n * spread, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer(params, dataclasses.replace(scope, scales={"router_logits": jnp.float32(0.0)})), quiet)
    d_params, d_scope = jax.jit(jax.grad(lambda p, s: layer(p, s).sum(), (0, 1), allow_int=True))(params, scope)
    slope = 1 - np.exp(-spread)  # the derivative of softplus
    np.testing.assert_allclose(d_params["noise"], np.asarray(X).reshape(-1, 16).T @ (0.5 * n * slope), rtol=1e-4, atol=1e-4)
    assert not np.asarray(d_scope.scales["router_logits"]).any()


# --- bad input ------------------------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(num_experts=0), "router_gemm=relative:0.1", "this model has no noise site 'router_gemm'; it has attention_q"),
    (dict(num_experts=0), "experts=relative:0.1", "this model has no noise site 'experts'"),
    (dict(), "mlp_up=relative:0.1", "this model has no noise site 'mlp_up'"),
    (dict(gated=False), "expert_gate=relative:0.1", "this model has no noise site 'expert_gate'"),
    (dict(), "norm_q=additive:0.1", "this model has no noise site 'norm_q'"),
    (dict(), "router_logits=learned:0.1", "'learned' needs a model with learned_noise=True"),
    (dict(), "expert_up=relative:0.1:layers=1-3", r"names layers \[2, 3\], the model has layers 0 to 1"),
    (dict(), "expert_up=relative:0.1/0.2/0.3", r"scale of shape \(3,\); give one number or one per layer \(2,\)"),
    (dict(), "lm_head=relative:0.1/0.2", "noise at 'lm_head' .* stands outside the layers"),
]


@pytest.mark.parametrize("changes, text, message", REFUSED, ids=[f"{text[:12]}{index}" for index, (_, text, _) in enumerate(REFUSED)])
def test_noise_that_does_not_fit_the_model_is_one_clear_line(changes, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.preset("tiny", **changes).resolve(NoiseSpec.parse(text))
    assert "\n" not in str(caught.value)


def test_the_head_in_chunks_of_words_takes_no_noise(small):
    step = step_of(loss_chunk="vocabulary")
    with pytest.raises(Unsupported, match="noise at lm_head .* set loss_chunk to tokens or none"):
        jax.eval_shape(step, small, TOKENS, EVERYWHERE, DRAW)
    jax.eval_shape(step, small, TOKENS, NoiseSpec.parse("experts=relative:0.1"), DRAW)


def test_noise_resolved_for_another_model(small):
    other = ModelConfig.preset("tiny", num_layers=5).resolve(NoiseSpec.parse("experts=relative:0.1"))
    with pytest.raises(ConfigError, match="was resolved for 5 layers, the model has 2"):
        jax.eval_shape(step_of(), small, TOKENS, other, DRAW)
