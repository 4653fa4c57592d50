"""The exchanges of rows on meshes of forced CPU devices against dense on one: values, gradients, counts, overflow, and what the devices say to each other.

XLA:CPU has no ragged all-to-all: that exchange runs here with one made of all-gathers, and is lowered as it is for a TPU.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.dispatch import ragged_all_to_all
from moe_jax.dispatch.all_gather import exchange_all_gather
from moe_jax.dispatch.all_to_all import exchange_all_to_all
from moe_jax.dispatch.base import Group
from moe_jax.dispatch.blocked import dispatch_blocked
from moe_jax.dispatch.dense import dispatch_dense
from moe_jax.dispatch.offsets import capacity
from moe_jax.errors import Unsupported
from moe_jax.experts import Experts
from moe_jax.noise.dot import Operator
from moe_jax.routing import RoutingDecision
from tests.dispatch.test_contract import BFLOAT16, FLOAT32, assert_close, problem

TOKENS, EXPERTS, SLOTS = 64, 8, 2
AXES = ("data", "expert")
LOCAL = {"dense": dispatch_dense, "blocked": functools.partial(dispatch_blocked, unit=8, largest=16, share=0.5)}
exchange_ragged = functools.partial(ragged_all_to_all.exchange_ragged_all_to_all, force=True)


def routings():
    """name: ids [T, K]. Each has its own mean load; `empty` leaves half of the experts, and on a mesh half of the devices, without work;
    `half` overflows in one half of the data and not in the other, and all must still take the same branch."""
    token, slot = np.indices((TOKENS, SLOTS))
    skewed = problem(tokens=TOKENS, experts=EXPERTS, skew=3.0, seed=1)[1].ids
    return {
        "balanced": (token * SLOTS + slot) % EXPERTS,
        "skewed": np.asarray(skewed),
        "one": np.full_like(token, 5),
        "half": np.where(token < TOKENS // 2, (token * SLOTS + slot) % EXPERTS, 5),
        "padded": np.where(token % 4 == 3, EXPERTS, np.asarray(skewed)),  # every fourth token is nobody's
        "empty": (3 * token + slot) % (EXPERTS // 2) + EXPERTS // 2,
    }


def operators(kind):
    """Errors on all three products of both matmuls; None: exact ones."""
    passes = ("forward", "grad_input", "grad_weight")
    if kind is None:
        return {}
    return {name: Operator(jnp.float32(0.3), jnp.array([7, 11], jnp.uint32), name, kind, passes) for name in ("up", "down")}


def given(name="skewed", kind=None, dtype=jnp.float32):
    """(x, decision, matrices, dy, token numbers, operators) of the whole batch."""
    x, decision, matrices, dy = problem(tokens=TOKENS, experts=EXPERTS, dtype=dtype)
    decision = RoutingDecision(jnp.asarray(routings()[name], jnp.int32), decision.weights)
    return x, decision, matrices, dy.astype(jnp.float32), 3 * jnp.arange(TOKENS) + 5, operators(kind)


def with_gradients(apply):
    """apply(x, decision, experts, tokens) -> (y, stats), made a function of `given()`: ((y, dx, d_weights, d_matrices), stats)."""

    def run(x, decision, matrices, dy, tokens, operators):
        def forward(x, weights, matrices):
            return apply(x, RoutingDecision(decision.ids, weights), Experts(matrices, operators), tokens)

        y, pull, stats = jax.vjp(forward, x, decision.weights, matrices, has_aux=True)
        return (y, *pull(dy)), stats

    return run


def make_mesh(data, expert):
    return jax.make_mesh((data, expert), AXES, devices=jax.devices()[: data * expert], axis_types=(AxisType.Auto,) * 2)


def on_mesh(data, expert, factor, exchange=exchange_all_to_all, local="dense", axes=("expert",)):
    """The layer with `exchange` on a mesh; stats have an entry for each device. axes: over which the experts are divided."""
    mesh = make_mesh(data, expert)
    group = Group(axes, int(np.prod([mesh.shape[axis] for axis in axes])), AXES)
    gather = functools.partial(exchange_all_gather, group=group, local=LOCAL[local])

    def body(x, decision, experts, tokens):
        experts = dataclasses.replace(experts, first=lax.axis_index(axes) * experts.count)
        y, stats = exchange(x, decision, experts, tokens, group, LOCAL[local], gather, factor)
        assert y.dtype == jnp.float32
        return y, jax.tree.map(lambda n: n[None], stats)

    def apply(x, decision, experts, tokens):
        specs = dataclasses.replace(experts, weights=P(axes), operators=P(), context=P(), first=P())
        return jax.shard_map(body, mesh=mesh, in_specs=(P(AXES), P(AXES), specs, P(AXES)), out_specs=P(AXES))(x, decision, experts, tokens)

    return apply


@functools.cache
def program(*shape, kind=None, dtype=jnp.float32, **options):
    """Compiled once for all routings."""
    return jax.jit(with_gradients(on_mesh(*shape, **options))).lower(*given(kind=kind, dtype=dtype)).compile()


dense = jax.jit(with_gradients(dispatch_dense))


@functools.cache
def wanted(name, kind):
    return dense(*given(name, kind))[0]


def pairs(name, data, expert):
    """Int[data, expert, expert]: how many assignments each device has for each device of its group."""
    homes = routings()[name].reshape(data, expert, -1) // (EXPERTS // expert)
    return (homes[..., None] == np.arange(expert)).sum(2)


def check(name, kind, data, expert, factor, **options):
    """The layer equals dense on one device, and every count is exact. Returns whether it overflowed."""
    got, stats = program(data, expert, factor, kind=kind, **options)(*given(name, kind))
    assert_close(got, wanted(name, kind), FLOAT32)

    ragged, sent = options.get("exchange") is exchange_ragged, pairs(name, data, expert)
    here = TOKENS * SLOTS // (data * expert)
    if ragged:
        rows = capacity(here, expert * here, factor)
        computed, overflow = rows, np.maximum(sent.sum(1) - rows, 0)
    else:
        rows = capacity(here / expert, here, factor)
        computed, overflow = expert * rows, np.maximum(sent - rows, 0).sum(2)
    np.testing.assert_array_equal(stats.overflow, overflow.ravel())
    load = np.asarray(stats.load).reshape(data, EXPERTS).sum(0)
    np.testing.assert_array_equal(load, np.bincount(routings()[name].ravel(), minlength=EXPERTS)[:EXPERTS])
    assert not np.any(stats.dropped)
    own = np.diagonal(sent, axis1=1, axis2=2)
    np.testing.assert_array_equal(stats.received, (sent.sum(1) - own).ravel())  # by whichever path
    if overflow.any():  # every device computed by the fallback, the ones without overflow too: each sent its tokens to all others
        np.testing.assert_array_equal(stats.sent, here // SLOTS * (expert - 1))
    else:
        np.testing.assert_array_equal(stats.sent, (sent.sum(2) - own).ravel())
        if options.get("local", "dense") == "dense":
            np.testing.assert_array_equal(stats.padded, computed - sent.sum(1).ravel())
        else:
            assert np.all(np.asarray(stats.padded) >= computed - sent.sum(1).ravel())
    return bool(overflow.any())


MESHES = [(1, 2), (2, 2), (2, 4), (1, 8)]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


KINDS = (None, "relative", "additive")


def quick(*first):
    """`first`, and every other mesh and kind of error for when there is time."""
    return [first, *(slow(mesh, kind) for mesh in MESHES for kind in KINDS if (mesh, kind) != first)]


@pytest.mark.parametrize("mesh, kind", quick((2, 4), "additive"))
def test_equals_dense(mesh, kind):
    """In all routings that fit, and in those that do not: among four and eight devices all to one is more than twice the mean."""
    overflowed = [name for name in routings() if check(name, kind, *mesh, factor=2.0)]
    assert overflowed == ([] if mesh[1] == 2 else ["one", "half"])


@pytest.mark.parametrize("kind", ["relative", slow("additive"), slow(None)])
def test_overflow_is_computed_all_the_same(kind):
    """Half the mean load: every routing overflows, is counted, and nothing is dropped."""
    assert all(check(name, kind, 2, 2, factor=0.5) for name in routings())


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("data", "expert"), ("expert", "data")])
def test_experts_over_two_axes(axes):
    """Device i is counted over the group's axes in their order."""
    got, stats = program(2, 4, 2.0, kind="additive", axes=axes)(*given("skewed", "additive"))
    assert_close(got, wanted("skewed", "additive"), FLOAT32)
    assert not np.any(stats.overflow)
    load = np.asarray(stats.load).reshape(2, 4)
    np.testing.assert_array_equal((load if axes == AXES else load.T).ravel(), np.bincount(routings()["skewed"].ravel(), minlength=EXPERTS))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_with_blocked_equals_dense(mesh, factor):
    for name in routings():
        check(name, "additive", *mesh, factor=factor, local="blocked")


@pytest.mark.slow
def test_bfloat16_equals_dense():
    data = given(dtype=jnp.bfloat16)
    got, _ = program(2, 2, 2.0, dtype=jnp.bfloat16)(*data)
    assert_close(got, dense(*data)[0], BFLOAT16)


def test_what_travels():
    """There: rows in the type of x, labels, weights; back: results in float32. The gradients of results, rows and weights in the types of those."""
    data = given(dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(with_gradients(on_mesh(2, 4, 1.0)))(*data)
    rows = capacity(TOKENS * SLOTS / 8 / 4, TOKENS * SLOTS // 8, 1.0) * 4
    found = re.findall(r":(\w+\[[\d,]*\])\S* = all_to_all\[", str(jaxpr))
    there = [f"i32[{rows},2]", f"bf16[{rows},8]", f"f32[{rows}]"]
    assert sorted(found) == sorted([*there, f"f32[{rows},8]", f"f32[{rows},8]", f"bf16[{rows},8]", f"f32[{rows}]"])
    assert [a.dtype for a in jax.tree.leaves(jaxpr.out_avals[:2])] == [jnp.float32, jnp.bfloat16]


def collectives(compiled) -> dict[str, int]:
    """How often each collective stands in a compiled program."""
    found = re.findall(r" (all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(?:-start)?\(", compiled.as_text())
    return {name: found.count(name) for name in set(found)}


def test_collectives():
    """What the module's docstring promises. The fallback stands in the program too, and the dW of dense is summed over data: neither is an all-to-all."""
    x, decision, matrices, _, tokens, _ = given()
    forward = jax.jit(on_mesh(2, 2, 2.0)).lower(x, decision, Experts(matrices), tokens).compile()
    assert collectives(forward)["all-to-all"] == 4
    assert collectives(forward)["all-reduce"] == 1
    assert collectives(program(2, 2, 0.5, kind="relative"))["all-to-all"] == 4 + 3


@pytest.mark.parametrize("exchange", [exchange_all_to_all, exchange_ragged], ids=["all_to_all", "ragged_all_to_all"])
def test_no_rows_are_scattered(exchange):
    """Only whole numbers are, and in the backward pass nothing is added in place."""
    text = str(jax.make_jaxpr(with_gradients(on_mesh(2, 2, 2.0, exchange=exchange)))(*given()))
    assert "scatter-add" not in text and "scatter_add" not in text
    scattered = re.findall(r"(\w+)\[[\d,]*\]\S* = scatter\[", text)
    assert set(scattered) == {"i32"}


def test_repeated_tokens_are_refused():
    group, mesh = Group(("expert",), 2, AXES), make_mesh(1, 2)
    x, decision, matrices, _, tokens, _ = given()

    def body(x, decision, experts, tokens):
        return exchange_all_to_all(x, decision, experts, tokens, group, dispatch_dense, dispatch_dense, 1.0)

    specs = dataclasses.replace(Experts(matrices), weights=P("expert"), first=P())
    with pytest.raises(ValueError, match=r"needs tokens divided over the mesh axes \['expert'\]; use all_gather"):
        jax.shard_map(body, mesh=mesh, in_specs=(P(), P(), specs, P()), out_specs=P("expert"))(x, decision, Experts(matrices), tokens)


def by_all_gather(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """lax.ragged_all_to_all, as its documentation says, made of what XLA:CPU has."""
    del recv_sizes
    operand, begins, sizes, lands = (lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets))
    me, row = lax.axis_index(axis_name), jnp.arange(operand.shape[1])
    for source in range(operand.shape[0]):
        rows = operand[source].at[begins[source, me] + row].get(mode="clip")
        place = jnp.where(row < sizes[source, me], lands[source, me] + row, output.shape[0])
        output = output.at[place].set(rows, mode="drop")
    return output


@pytest.mark.parametrize("mesh, kind", quick((2, 2), "relative"))
def test_ragged_equals_dense(mesh, kind, monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", by_all_gather)
    overflowed = [name for name in routings() if check(name, kind, *mesh, factor=1.25, exchange=exchange_ragged)]
    assert "balanced" not in overflowed and "one" in overflowed


def test_ragged_lowers_for_a_tpu():
    """Forward and backward: 4 + 3 ragged all-to-alls, and no other."""
    lowered = (
        jax.jit(with_gradients(on_mesh(1, 8, 1.0, exchange=exchange_ragged))).trace(*given()).lower(lowering_platforms=("tpu",)).as_text()
    )
    assert lowered.count("@ragged_all_to_all") == 4 + 3
    assert "stablehlo.all_to_all" not in lowered


def test_ragged_is_refused_on_a_cpu():
    with pytest.raises(Unsupported, match="no ragged all-to-all for CPUs; use all_to_all"):
        on_mesh(1, 2, 1.0, exchange=ragged_all_to_all.exchange_ragged_all_to_all)(*given()[:2], Experts(given()[2]), given()[4])
