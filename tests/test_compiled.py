"""What a compiled program on a mesh sends in each layer, and what a device of it holds: read from the compiler's output, nothing is run."""

import functools

import jax
import jax.numpy as jnp
import pytest

from moe_jax.keys import Draw
from moe_jax.mesh import MeshSpec
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.train.program import Program
from moe_jax.train.state import Knobs
from moe_jax.train.step import Objective
from tests.collectives import counted

CONFIG = ModelConfig.preset("tiny", num_experts=8, num_heads=8, vocab_size=256)
NOISE = NoiseSpec.parse("matmuls=relative:0.05")
# What the docstrings of moe_jax.dispatch promise for one layer with gated experts (three matrices): (forward, backward).
PROMISED = {
    "all_gather": ({"all-gather": 3, "reduce-scatter": 1}, {"all-gather": 1, "reduce-scatter": 2}),
    "all_to_all": ({"all-to-all": 4}, {"all-to-all": 3}),
    "blocked": ({"all-gather": 3}, {"all-gather": 3}),
}


@functools.cache
def compiled_text(mesh: str, dispatch: str, noisy: bool) -> str:
    """The forward and backward pass on eight devices, layers scanned, so that the loops' bodies are those of one layer."""
    model = Model(CONFIG.replace(dispatch=dispatch), MeshSpec.parse(mesh).build())

    def objective(params, tokens, noise):
        total, _, out = model.loss(params, tokens, tokens, noise=noise, draw=Draw(phase="train"))
        return total + out.aux["balance_loss"][0]

    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    noise = model.config.resolve(NOISE) if noisy else None
    return jax.jit(jax.grad(objective)).lower(model.abstract(), tokens, noise).compile().as_text() or ""


def layer(text: str, backward: bool, least: int) -> dict[str, int]:
    """The collectives of one layer without those of the branch that overflow takes."""
    where = r"transpose\(.*while/body" if backward else "^(?!.*transpose).*while/body"
    return dict(counted(text, where, "branch_0", least))


@pytest.mark.parametrize("noisy", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["clean", "noisy"])
@pytest.mark.parametrize("dispatch", ["all_to_all", *(pytest.param(name, marks=pytest.mark.slow) for name in ("all_gather", "blocked"))])
def test_an_expert_layer_sends_what_is_promised(dispatch, noisy):
    """On a mesh that divides experts alone, apart from sums of gradients and statistics, nothing else crosses devices; noise adds nothing."""
    text = compiled_text("expert=8", dispatch, noisy)
    for backward, promised in zip((False, True), PROMISED[dispatch], strict=True):
        found = layer(text, backward, least=64)
        assert {kind: count for kind, count in found.items() if kind != "all-reduce"} == promised
        # one sum for each matrix that all devices have: q, k, v, o and the router, and the experts' three where they are whole on each
        assert found.get("all-reduce", 0) == (0 if not backward else 8 if dispatch == "blocked" else 5)


def test_the_branch_for_overflow_is_the_all_gather():
    found = counted(compiled_text("expert=8", "all_to_all", False), "^(?!.*transpose).*while/body.*branch_0", least=64)
    assert found == PROMISED["all_gather"][0]


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
def test_data_parallel_layers_send_nothing_but_gradients(noisy):
    text = compiled_text("data=8", "blocked", noisy)
    assert layer(text, False, least=64) == {} and layer(text, True, least=64) == {"all-reduce": 8}


@pytest.mark.slow
def test_fsdp_gathers_each_matrix_once_forward_and_once_backward():
    """Ten parameters of a layer: q, k, v, o, two norms, the router and the experts' three."""
    text = compiled_text("fsdp=8", "blocked", False)
    assert layer(text, False, least=64) == {"all-gather": 10}
    found = layer(text, True, least=64)
    assert found["all-gather"] == 10 and set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}


@functools.cache
def train_step(mesh: str):
    """A compiled update, on a mesh or, for "", on one device."""
    config = ModelConfig.preset(
        "tiny",
        num_layers=4,
        num_experts=8,
        num_heads=8,
        d_model=64,
        d_expert=256,
        dispatch="all_to_all" if mesh else "blocked",
        remat="full",
    )
    program = Program(config, OptimizerConfig(), Objective(), MeshSpec.parse(mesh).build() if mesh else None)
    state = jax.eval_shape(program.init, jnp.uint32(0))
    if mesh:
        state = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, program.shardings)
    tokens = jax.ShapeDtypeStruct((1, 16, 64), jnp.int32)
    knobs = Knobs(None, jnp.uint32(0), jnp.float32(0), jnp.float32(0))
    return program, program.train.lower(state, {"tokens": tokens, "targets": tokens}, knobs).compile()


@pytest.mark.slow
def test_no_device_has_the_whole_expert_stack(capsys):
    """On 1 x 8 devices each has an eighth of the experts, of their momentum, and less than half of the work's memory."""
    names = ("parameters and optimizer", "temporaries")
    program = train_step("")[0]
    experts = 2 * 4 * sum(leaf.size for leaf in program.plan.leaves if leaf.role == "expert")  # parameters and momentum, float32
    analyses = [train_step(mesh)[1].memory_analysis() for mesh in ("", "expert=8")]
    whole, part = ((a.argument_size_in_bytes, a.temp_size_in_bytes) for a in analyses)
    with capsys.disabled():
        rows = zip(names, whole, part, strict=True)
        words = "; ".join(f"{name} {one:,} on one device, {each:,} on each of 8 ({each / one:.2f})" for name, one, each in rows)
        print(f"\nbytes per device, {program.model.parameter_count():,} parameters, 16 x 64 tokens: {words}")
    assert part[0] <= experts / 8 + whole[0] - experts
    assert part[1] < 0.4 * whole[1]


def orthogonalising(mesh: str) -> dict[str, int]:
    """The collectives of an optimizer step that move more than statistics."""
    text = train_step(mesh)[1].as_text() or ""
    moved = counted(text, "optimizer|traced./add", "while/body|jvp", least=1000)
    return {kind: count for kind, count in moved.items() if count}


@pytest.mark.slow
def test_muon_moves_no_expert():
    """Experts lie where they are orthogonalised, and all devices have the other matrices whole."""
    assert orthogonalising("expert=8") == {}


@pytest.mark.slow
def test_muon_under_fsdp_brings_each_matrix_to_one_device_and_back():
    """q, k, v, o, the router and the experts' three are exchanged once for whole layers and once back; nothing is gathered on all devices."""
    assert orthogonalising("fsdp=4,expert=2") == {"all-to-all": 16}
