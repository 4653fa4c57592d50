"""Collectives of a compiled text: loops multiply, branches of an overflow count apart, bytes are those of the results."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.mesh import MeshSpec
from moe_jax.plan.hlo import collectives

TPU = """
%cond (p: (s32[], f32[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(48)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %ag = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), dimensions={0}, metadata={op_name="jit(f)/while/body/gather"}
  %a2a = (f32[8,4]{1,0}, /*index=1*/f32[8,4]{1,0}) all-to-all(%x, %y), metadata={op_name="jit(f)/while/body/cond/branch_1_fun"}
  %rare = f32[2,2]{1,0} all-gather(%x), metadata={op_name="jit(f)/while/body/cond/branch_0_fun/fallback/gather"}
}
ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %while = (s32[], f32[8,4]) while(%tuple), condition=%cond, body=%body
  %start = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%p), dimensions={0}, metadata={op_name="jit(f)/once"}
  %done = f32[16,4]{1,0} all-gather-done(%start)
}
"""


@pytest.mark.parametrize(
    "instruction, size",
    [
        ("(f32[10], f32[20]) all-reduce-start(%a, %b)", 120),  # its results alone
        ("f32[] all-reduce-start(%a)", 4),
        ("((f32[1], f32[2]), (f32[8], f32[16])) all-gather-start(%a, %b)", 96),  # two in one: operands, then results
        ("(f32[6], f32[6], u32[], u32[]) collective-permute-start(%a)", 24),
        ("(f32[10], f32[20]) all-reduce(%a, %b)", 120),
    ],
)
def test_what_is_only_started_counts_its_results(instruction, size):
    always, _ = collectives(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %x = {instruction}\n}}\n")
    ((count, found),) = always.values()
    assert (count, found) == (1, size)


def test_a_text_of_a_tpu():
    always, overflowing = collectives(TPU)
    assert always == {"all-gather": (49.0, 48 * 8 * 4 * 2 + 16 * 4 * 4), "all-to-all": (48.0, 48 * 2 * 8 * 4 * 4)}
    assert overflowing == {"all-gather": (48.0, 48 * 2 * 2 * 4)}


@pytest.mark.parametrize("rounds", [1, 7])
def test_a_compiled_loop_counts_its_rounds(rounds):
    mesh = MeshSpec(data=4).build(jax.devices()[:4])

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    def summed(x):
        return lax.fori_loop(0, rounds, lambda _, y: lax.pcast(lax.psum(jnp.sin(y), "data"), "data", to="varying"), x)

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    always, overflowing = collectives(summed.lower(x).compile().as_text())
    assert always == {"all-reduce": (float(rounds), rounds * 2 * 16 * 4)} and overflowing == {}
