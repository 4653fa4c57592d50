"""One contract for every dispatch implementation: values, gradients, counts, operators and mask against a NumPy loop over tokens and slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.dispatch import DispatchStats, dispatch
from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.errors import Unsupported
from moe_jax.experts import Experts
from moe_jax.routing import RoutingDecision, select
from tests.dispatch import reference

# Float32 against float64: sums of at most 32 products of numbers of order 1, a few of them one after the other; 2**-24 each, with room.
FLOAT32 = 2e-5
# bfloat16 against dense bfloat16: some five roundings of 2**-9 relative to the largest value, on each side.
BFLOAT16 = 2**-6


def problem(tokens=13, width=8, inner=12, experts=5, slots=2, gated=False, skew=1.0, seed=0, dtype=jnp.float32):
    """(x, decision, matrices, dy), routed by random logits of which each expert's have an offset of size `skew`."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    ids = select(normal(tokens, experts) + skew * normal(experts), slots)
    matrices = {"up": normal(experts, width, inner) * width**-0.5, "down": normal(experts, inner, width) * inner**-0.5}
    if gated:
        matrices["gate"] = normal(experts, width, inner) * width**-0.5
    weights = jax.nn.softmax(normal(tokens, slots))
    return normal(tokens, width).astype(dtype), RoutingDecision(ids, weights), matrices, normal(tokens, width).astype(dtype)


def assert_close(got, want, bound):
    """Every array within `bound` of the reference, relative to the reference's largest value."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=bound * (1e-30 + np.abs(b).max()))


class DispatchContract:
    """What all implementations owe. A subclass says how to call its own and what it refuses."""

    implementation: object = None

    def call(self, x, decision, experts, tokens=None):
        return dispatch(x, decision, experts, self.implementation, tokens=tokens, force=True)

    def __init_subclass__(cls):
        cls._compiled = {}  # of the class: pytest makes an instance for each test

    def value_and_gradients(self, x, decision, matrices, dy, activation="silu", operators=None, tokens=None, mask=None):
        """((y, dx, d_weights, d_matrices), stats), compiled once per structure."""

        @jax.jit
        def run(x, decision, matrices, dy, operators, tokens):
            def forward(x, weights, matrices):
                experts = Experts(matrices, operators, activation=activation, mask=mask)
                return self.call(x, RoutingDecision(decision.ids, weights), experts, tokens)

            y, pull, stats = jax.vjp(forward, x, decision.weights, matrices, has_aux=True)
            dx, d_weights, d_matrices = pull(dy)
            return (y, dx, d_weights, d_matrices), stats

        return self._compiled.setdefault((activation, mask), run)(x, decision, matrices, dy, operators or {}, tokens)

    @pytest.mark.parametrize(
        "sizes",
        [
            dict(tokens=1, experts=3),  # one token
            dict(tokens=9, experts=1, slots=1),  # one expert
            dict(tokens=6, experts=3, slots=3),  # every expert chosen
            dict(tokens=37, experts=5, skew=3.0),  # uneven
            dict(tokens=4, experts=16, slots=1),  # most experts empty
        ],
        ids=lambda sizes: "-".join(f"{name}{value}" for name, value in sizes.items()),
    )
    def test_values_and_gradients(self, sizes):
        x, decision, matrices, dy = problem(**sizes)
        (y, *gradients), stats = self.value_and_gradients(x, decision, matrices, dy)
        assert_close((y, *gradients), reference.moe(x, np.asarray(decision.ids), decision.weights, matrices, dy), FLOAT32)

        load = np.bincount(np.asarray(decision.ids).ravel(), minlength=matrices["up"].shape[0])
        assert isinstance(stats, DispatchStats)
        np.testing.assert_array_equal(stats.load, load)
        assert int(stats.dropped) == 0 and int(stats.padded) >= 0
        for d in gradients[-1].values():  # an expert without rows has no gradient, exactly
            assert not np.asarray(d)[load == 0].any()

    @pytest.mark.parametrize("activation, gated", [("silu", False), ("silu", True), ("gelu", True), ("relu", False)])
    def test_activations(self, activation, gated):
        x, decision, matrices, dy = problem(gated=gated)
        got, _ = self.value_and_gradients(x, decision, matrices, dy, activation)
        assert_close(got, reference.moe(x, np.asarray(decision.ids), decision.weights, matrices, dy, activation), FLOAT32)

    def test_all_tokens_to_one_expert(self):
        x, decision, matrices, dy = problem(tokens=50, slots=1)
        decision = RoutingDecision(jnp.full_like(decision.ids, 3), decision.weights)
        got, stats = self.value_and_gradients(x, decision, matrices, dy)
        assert_close(got, reference.moe(x, np.asarray(decision.ids), decision.weights, matrices, dy), FLOAT32)
        assert stats.load.tolist() == [0, 0, 0, 50, 0]

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.differing_executors])  # siblings inherit it
    @given(
        sizes=st.sampled_from([(17, 4, 2), (5, 9, 3), (30, 2, 1)]),
        skew=st.floats(0, 8),
        seed=st.integers(0, 2**32 - 1),
        twice=st.booleans(),
    )
    def test_any_routing(self, sizes, skew, seed, twice):
        tokens, experts, slots = sizes
        x, decision, matrices, dy = problem(tokens=tokens, experts=experts, slots=slots, skew=skew, seed=seed)
        if twice:  # an expert may be chosen twice by one token, when a decision says so
            decision = RoutingDecision(decision.ids.at[:, 0].set(decision.ids[:, -1]), decision.weights)
        got, _ = self.value_and_gradients(x, decision, matrices, dy)
        assert_close(got, reference.moe(x, np.asarray(decision.ids), decision.weights, matrices, dy), FLOAT32)

    def test_a_zero_weight_still_has_a_gradient(self):
        x, decision, matrices, dy = problem()
        decision = RoutingDecision(decision.ids, decision.weights.at[:, 1].set(0.0))
        (_, _, d_weights, _), _ = self.value_and_gradients(x, decision, matrices, dy)
        want = reference.moe(x, np.asarray(decision.ids), decision.weights, matrices, dy)[2]
        assert np.abs(want[:, 1]).min() > 1e-4
        assert_close(d_weights, want, FLOAT32)

    @pytest.mark.parametrize("gated", [False, True])
    def test_bfloat16_rows_with_float32_weights(self, gated):
        x, decision, matrices, dy = problem(tokens=40, gated=gated, dtype=jnp.bfloat16)
        got, _ = self.value_and_gradients(x, decision, matrices, dy)
        want, _ = TestDense().value_and_gradients(x, decision, matrices, dy)
        assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, (x, x, decision.weights, matrices))
        assert_close(got, want, BFLOAT16)

    def test_mask_by_logical_rows(self):
        x, decision, matrices, dy = problem(gated=True)
        got, _ = self.value_and_gradients(x, decision, matrices, dy, mask=reference.keep_mask)
        want = reference.moe(x, np.asarray(decision.ids), decision.weights, matrices, dy, masked=True)
        assert_close(got, want, FLOAT32)

    @pytest.mark.parametrize("names", [("up", "down"), ("up", "gate", "down"), ("gate",), ("down",)], ids="+".join)
    def test_operators_by_logical_rows(self, names):
        """Errors in all three products of the named matrices, those of dW by the parameter's row; the other products stay exact."""
        x, decision, matrices, dy = problem(gated=names != ("up", "down"), tokens=21, experts=7)
        ids = jnp.where(
            decision.ids == 4, 3, decision.ids
        )  # expert 4 gets no row: the error of its weights' gradient is there all the same
        decision = RoutingDecision(ids, decision.weights)
        got, _ = self.value_and_gradients(x, decision, matrices, dy, operators=reference.bumpy(names), mask=reference.keep_mask)
        given = x, np.asarray(ids), decision.weights, matrices, dy
        want = reference.moe(*given, scale=0.3, masked=True, bumped=names)
        clean = reference.moe(*given, masked=True)
        touched = [(*found[:3], *(found[3][name] for name in names)) for found in (want, clean)]
        for noisy, exact in zip(*touched, strict=True):
            assert np.abs(noisy - exact).max() > 0.1, "no error: the test is empty"
        assert np.abs(want[3][names[0]][4]).max() > 0.1
        assert_close(got, want, FLOAT32)

    def test_token_numbers_move_the_draws_with_the_tokens(self):
        x, decision, matrices, dy = problem(tokens=19)
        extra = dict(mask=reference.keep_mask, operators=reference.bumpy(("up", "down")))
        order = np.random.default_rng(1).permutation(19)
        moved = RoutingDecision(decision.ids[order], decision.weights[order])
        (y, dx, d_weights, d_matrices), _ = self.value_and_gradients(x, decision, matrices, dy, tokens=101 + jnp.arange(19), **extra)
        got, _ = self.value_and_gradients(x[order], moved, matrices, dy[order], tokens=101 + jnp.asarray(order), **extra)
        assert_close(got, (y[order], dx[order], d_weights[order], d_matrices), FLOAT32)

        elsewhere, _ = self.value_and_gradients(x, decision, matrices, dy, tokens=jnp.arange(19), **extra)
        assert np.abs(elsewhere[0] - y).max() > 0.01  # other numbers, other draws

    def test_operators_and_context_get_no_gradient(self):
        x, decision, matrices, _ = problem()
        context = {"scale": jnp.float32(1.0), "key": jnp.arange(2, dtype=jnp.uint32)}
        experts = Experts(matrices, reference.bumpy(("up", "down")), context, mask=reference.keep_mask)
        d = jax.jit(jax.grad(lambda experts: self.call(x, decision, experts)[0].sum(), allow_int=True))(experts)
        assert float(d.context["scale"]) == 0.0 and d.context["key"].dtype == jax.dtypes.float0
        assert float(d.operators["up"].scale) == float(d.operators["down"].scale) == 0.0

    def test_scanned_layers_with_recomputation(self):
        x, decision, matrices, dy = problem(tokens=11)
        stacked = jax.tree.map(lambda a: jnp.stack([a, -a]), matrices)

        def layer(x, matrices):
            y, stats = self.call(x, decision, Experts(matrices))
            return x + y, stats.load

        def scanned(x, stacked):
            y, loads = jax.lax.scan(jax.checkpoint(layer), x, stacked)
            return (y * dy).sum(), loads

        def unrolled(x, stacked):
            for index in (0, 1):
                x, _ = layer(x, jax.tree.map(lambda a, index=index: a[index], stacked))
            return (x * dy).sum()

        got, loads = jax.jit(jax.grad(scanned, argnums=(0, 1), has_aux=True))(x, stacked)
        assert loads.shape == (2, 5)
        assert_close(got, jax.jit(jax.grad(unrolled, argnums=(0, 1)))(x, stacked), FLOAT32)


class TestDense(DispatchContract):
    implementation = "dense"


class TestBlocked(DispatchContract):
    """With tiles of 3 and 6 rows, so that these small problems have both classes, several tiles of the largest, and padding."""

    implementation = staticmethod(functools.partial(dispatch_blocked, unit=3, largest=6))


class TestRagged(DispatchContract):
    implementation = "ragged"


def _jaxpr(implementation) -> str:
    x, decision, matrices, _ = problem()

    def loss(x, weights, matrices):
        return dispatch(x, RoutingDecision(decision.ids, weights), Experts(matrices), implementation, force=True)[0].sum()

    return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, decision.weights, matrices))


def test_the_implementations_are_different_programs():
    dense, blocked, ragged = (_jaxpr(name) for name in ("dense", "blocked", "ragged"))
    assert "while" in blocked and "while" not in dense
    assert "ragged_dot" in ragged and "ragged_dot" not in dense + blocked


@pytest.mark.parametrize("implementation", ["blocked", "ragged"])
def test_no_rows_are_scattered(implementation):
    assert "scatter-add" not in _jaxpr(implementation) and "scatter_add" not in _jaxpr(implementation)


def test_the_platform_chooses():
    assert _jaxpr(None) == _jaxpr("blocked") != _jaxpr("dense")


def test_blocked_with_its_own_tile_sizes():
    """The name alone: 330 assignments to one expert of three need several of the default classes."""
    x, decision, matrices, dy = problem(tokens=165, experts=3, skew=2.0)

    def run(x, weights, matrices):
        return dispatch(x, RoutingDecision(decision.ids, weights), Experts(matrices), "blocked")[0]

    y, pull = jax.vjp(jax.jit(run), x, decision.weights, matrices)
    assert_close((y, *pull(dy)), reference.moe(x, np.asarray(decision.ids), decision.weights, matrices, dy), FLOAT32)


def test_padding_is_counted():
    x, decision, matrices, _ = problem(tokens=20, slots=1)
    decision = RoutingDecision(jnp.repeat(jnp.array([0, 2]), jnp.array([13, 7]), total_repeat_length=20)[:, None], decision.weights)
    _, stats = dispatch_blocked(x, decision, Experts(matrices), unit=8, largest=8)
    assert int(stats.padded) == (16 - 13) + (8 - 7)


def test_refusals():
    x, decision, matrices, _ = problem()
    experts = Experts(matrices)
    with pytest.raises(ValueError, match=r"'bloked' \(did you mean 'blocked'\?\); known: dense, blocked, ragged"):
        dispatch(x, decision, experts, "bloked")
    with pytest.raises(Unsupported, match="130 times slower.*force=True"):
        dispatch(x, decision, experts, "ragged")
    with pytest.raises(ValueError, match=r"shape \[T, D\], got \(1, 13, 8\)"):
        dispatch(x[None], decision, experts)
    with pytest.raises(ValueError, match=r"need ids and weights of shape \[13, K\]"):
        dispatch(x, RoutingDecision(decision.ids, decision.weights[:, :1]), experts)
    with pytest.raises(ValueError, match="x has width 4"):
        dispatch(x[:, :4], decision, experts)
    with pytest.raises(ValueError, match=r"token numbers of shape \(13,\), got \(2,\)"):
        dispatch(x, decision, experts, tokens=jnp.arange(2))


def test_the_package_itself_can_be_called():
    """`mj.dispatch(...)` is the documented name, although it is the package that holds the implementations."""
    import moe_jax as mj

    decision = RoutingDecision(jnp.array([[1], [0]]), jnp.ones((2, 1)))
    experts = mj.experts.Experts({"up": jnp.ones((2, 3, 4)), "down": jnp.ones((2, 4, 3))})
    called, named = mj.dispatch(jnp.ones((2, 3)), decision, experts), dispatch(jnp.ones((2, 3)), decision, experts)
    np.testing.assert_array_equal(called[0], named[0])
