"""The same tokens meet the same experts on any mesh, with noise on every matmul: ids exactly, loss to 1e-6, gradients to 1e-5 of each leaf's largest.

Every case is compared with one program on one device: dense dispatch, layers scanned, nothing recomputed. `python -m pytest tests/test_layouts.py -m
"slow or not slow"` runs all of them.

Float32 sums in another order differ by some 1e-7 of their largest term, and a gradient is a few of them one after the other.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import paths
from moe_jax.dispatch.offsets import capacity
from moe_jax.keys import Draw
from moe_jax.mesh import MeshSpec
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec
from tests.model.conftest import random_params

CONFIG = ModelConfig.preset("tiny", num_experts=8, num_heads=8, vocab_size=256, dropout=0.1, tie_embeddings=False)
NOISE = NoiseSpec.parse("matmuls=relative:0.05")
B, S = 8, 8
MESHES = (
    ("data=1", "data=2", "fsdp=2", "expert=2", "tensor=2")
    + ("data=4", "fsdp=4", "expert=4", "tensor=4", "data=2,expert=2", "fsdp=2,tensor=2")
    + ("data=8", "fsdp=8", "expert=8", "tensor=8")
    + ("data=2,expert=4", "data=2,fsdp=2,expert=2", "fsdp=2,expert=2,tensor=2", "data=2,expert=2,tensor=2")
)
DISPATCH = ("dense", "blocked", "all_gather", "all_to_all")
# What is added to each expert's logits, which the tokens share: see `steered`.
ROUTINGS = {
    "balanced": np.zeros(8),
    "skewed": -0.5 * np.arange(8),
    "one": np.array([9.0, 6, 0, 0, 0, 0, 0, 0]),  # each token's first expert is 0 and its second is 1
    "empty": np.array([0.0, 0, 0, -9, -9, -9, -9, -9]),
    "padded": np.zeros(8),  # and the last tokens of each sequence do not count
}
QUICK = {  # of (mesh, dispatch, scanned, remat), those that run by default: every axis, both exchanges, remat on and off
    ("data=2,expert=4", "all_to_all", True, "none"),
    ("fsdp=2,expert=2,tensor=2", "all_gather", True, "full"),
}
_ran: list[str] = []


def steered(offsets: np.ndarray) -> dict:
    """Parameters whose routers add about `offsets` to every token's logits: eight large components of the hidden state are the same in all tokens."""
    params = paths.flatten(random_params(Model(CONFIG)))
    params["embedding"] = (10 * params["embedding"]).at[:, :8].set(1.0)
    params["layers/norm_moe/scale"] = params["layers/norm_moe/scale"].at[:, :8].set(1.0)
    params["layers/feed_forward/router"] = params["layers/feed_forward/router"].at[:, :8].set(jnp.asarray(offsets) / 16)
    return paths.unflatten(params)


@functools.cache
def batch(routing: str):
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (B, S + 1)).astype(np.int32)
    weights = np.ones((B, S), np.float32)
    if routing == "padded":
        weights[:, 5:] = 0
        tokens[:, 6:] = 0
    return jax.device_get(steered(ROUTINGS[routing])), tokens[:, :-1], tokens[:, 1:], weights


def program(model: Model):
    """Jitted (params, tokens, targets, weights) -> ((objective, (ids, load, overflow)), gradients)."""

    @jax.jit
    def run(params, tokens, targets, weights):
        def objective(params):
            draw = Draw(seed=7, step=3, phase="train", row_offset=16)
            total, metrics, out = model.loss(params, tokens, targets, weights, NOISE, draw, train=True, capture=("trace",))
            value = total / metrics["loss"][1] + 0.01 * out.aux["balance_loss"][0] + 0.001 * out.aux["z_loss"][0]
            assert out.trace is not None
            return value, (out.trace.ids, out.load, out.aux.get("router/overflow", (0.0, 1.0))[0])

        return jax.value_and_grad(objective, has_aux=True)(params)

    return run


@functools.cache
def reference(routing: str):
    return jax.device_get(_one_device(*batch(routing)))


_one_device = program(Model(CONFIG.replace(dispatch="dense")))


def cases():
    for case in itertools.product(MESHES, DISPATCH, (True, False), ("none", "full")):
        mesh, dispatch, scanned, remat = case
        name = f"{mesh}-{dispatch}-{'scan' if scanned else 'unrolled'}-{remat}"
        yield pytest.param(*case, id=name, marks=[] if case in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("mesh, dispatch, scanned, remat", list(cases()))
def test_same_experts_same_loss_same_gradients(mesh, dispatch, scanned, remat):
    spec = MeshSpec.parse(mesh)
    model = Model(CONFIG.replace(dispatch=dispatch, scan_layers=scanned, remat=remat), spec.build(jax.devices()[: spec.size]))
    run = program(model)
    for routing in ROUTINGS:
        params, *rest = batch(routing)
        (loss, (ids, load, overflow)), grads = jax.device_get(run(jax.device_put(params, model.shardings), *rest))
        (wanted_loss, (wanted_ids, wanted_load, _)), wanted_grads = reference(routing)
        np.testing.assert_array_equal(ids, wanted_ids, err_msg=routing)
        np.testing.assert_array_equal(load, wanted_load, err_msg=routing)
        np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6, err_msg=routing)
        for path, wanted in paths.flatten(wanted_grads).items():
            np.testing.assert_allclose(
                paths.flatten(grads)[path], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=f"{routing} {path}"
            )
        if dispatch != "all_to_all":
            assert overflow == 0
        elif routing == "one":
            assert (overflow > 0) == _one_overflows(spec)
        _ran.append(routing)
    if len(_ran) > 50:  # many programs; after the few that run by default, other tests still use what is compiled
        jax.clear_caches()


def _one_overflows(spec: MeshSpec) -> bool:
    """Whether experts 0 and 1, which get everything, get more from a device than a buffer of twice the mean holds."""
    group, tokens = spec.expert * spec.tensor, B * S // spec.size
    assignments = tokens * CONFIG.experts_per_token
    return group > 1 and (tokens if group == CONFIG.num_experts else assignments) > capacity(assignments / group, assignments, 2.0)


def test_the_routings_are_what_they_say():
    loads = {routing: reference(routing)[0][1][1] for routing in ROUTINGS}
    tokens = B * S
    for load in loads["one"]:
        assert load[0] == load[1] == tokens
    assert (loads["empty"][:, 3:] == 0).all() and (loads["balanced"] > 0).all()
    assert (loads["skewed"][:, 0] > 3 * loads["skewed"][:, 4:].max(-1)).all()


def test_noise_acts_in_the_reference():
    """Without it the suite would compare clean programs."""
    params, tokens, targets, weights = batch("balanced")
    model, noise = Model(CONFIG.replace(dispatch="dense", dropout=0.0)), CONFIG.resolve(NOISE)
    loss = jax.jit(lambda noise: model.loss(params, tokens, targets, weights, noise, Draw(7, 3, "train"))[0])
    clean, noisy = float(loss(noise.scaled(0.0))), float(loss(noise))
    assert abs(clean - noisy) > 1e-4 * clean


def test_how_many_cases_agreed(capsys):
    programs = len(MESHES) * len(DISPATCH) * 4
    assert len(_ran) % len(ROUTINGS) == 0 and len(_ran) <= programs * len(ROUTINGS)  # whole programs, each once
    with capsys.disabled():
        print(
            f"\nlayouts: {len(_ran)} of {programs * len(ROUTINGS):,} cases agreed with one device ({len(ROUTINGS)} routings in each program)"
        )
