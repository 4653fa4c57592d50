"""A dense model's copies behind routers: the same logits to rounding, and what breaks the symmetry does what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import paths
from moe_jax.errors import ConfigError
from moe_jax.model import Model, ModelConfig
from moe_jax.upcycle import upcycle, upcycled

DENSE = ModelConfig.preset(
    "tiny", num_experts=0, experts_per_token=1, num_layers=4, d_ff=48, d_expert=48, tie_embeddings=False, num_kv_heads=2, init_std=0.3
)
TOKENS = jnp.arange(60).reshape(3, 20)
PARTS = ("gate", "up", "down")


def made(experts=4, per_token=2, dense_layers=(), **how):
    dense, model = Model(DENSE), Model(upcycled(DENSE, experts, per_token, dense_layers=dense_layers))
    params = dense.init(1)
    return dense, params, model, upcycle(dense, params, model, **how)


@pytest.mark.parametrize(
    "experts, per_token, dense_layers",
    [(4, 2, ()), (3, 3, (0, 2)), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 1, ()), (2, 1, (3,))))],
)
def test_copies_give_the_dense_logits(experts, per_token, dense_layers):
    dense, params, model, new = made(experts, per_token, dense_layers)
    assert model.config.moe_layers == tuple(layer for layer in range(4) if layer not in dense_layers)
    wanted, found = (jax.jit(m.apply)(p, TOKENS).logits for m, p in ((dense, params), (model, new)))
    assert float(jnp.abs(found - wanted).max()) < 2e-5 * float(jnp.abs(wanted).max())
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(lambda spec: spec.shape, model.abstract())


def test_routers_have_the_stated_scale():
    _, _, model, new = made(experts=64, per_token=2)
    router = np.asarray(new["layers"]["feed_forward"]["router"])
    assert abs(router.std() / 0.02 - 1) < 0.05 and abs(router.mean()) < 0.001
    wide = Model(upcycled(DENSE, 64, 2, router_std=0.5))
    assert abs(np.asarray(upcycle(Model(DENSE), Model(DENSE).init(1), wide)["layers"]["feed_forward"]["router"]).std() / 0.5 - 1) < 0.05


def test_a_selection_bias_starts_at_zero():
    dense = Model(DENSE.replace(router_score="sigmoid", selection_bias=True))
    model = Model(upcycled(dense.config, 4, 2, dense_layers=(1,)))
    new, specs = upcycle(dense, dense.init(1), model), model.layers_of("selection_bias")
    assert [layers for layers in specs.values()] == [(0,), (2, 3)]
    for path in specs:
        bias = paths.flatten(new)[path]
        assert bias.dtype == jnp.float32 and not bias.any()


def test_noise_is_in_standard_deviations_and_differs_by_expert():
    _, params, _, new = made(experts=8, expert_noise=0.1)
    for part in PARTS:
        old, experts = (np.asarray(tree["layers"]["feed_forward"][part]) for tree in (params, new))
        added = (experts - old[:, None]) / old.std((1, 2))[:, None, None, None]
        assert abs(added.std() / 0.1 - 1) < 0.03 and abs(added.mean()) < 0.005
        flat = added.reshape(32, -1)
        assert np.abs(np.corrcoef(flat) - np.eye(32)).max() < 0.15


def test_a_share_of_the_hidden_units_is_drawn_anew():
    """The same units in all three matrices of an expert, others in another expert, with the matrix's mean and deviation (drop-upcycling)."""
    _, params, _, new = made(experts=4, reinitialise=0.25)
    changed = {}
    for part in PARTS:
        old, experts = (np.asarray(tree["layers"]["feed_forward"][part]) for tree in (params, new))
        differs = experts != old[:, None]
        axis = 3 if part == "down" else 2
        assert (differs.any(axis) == differs.all(axis)).all()
        changed[part] = differs.all(axis)
        drawn = experts[differs]
        assert abs(drawn.std() / old.std() - 1) < 0.05
    assert (changed["gate"] == changed["up"]).all() and (changed["gate"] == changed["down"]).all()
    assert (changed["gate"].sum(-1) == 12).all()
    assert len({row.tobytes() for row in changed["gate"].reshape(16, -1)}) == 16


def test_seeds_differ_and_repeat():
    first, again, other = (made(expert_noise=0.1, reinitialise=0.2, seed=seed)[3] for seed in (0, 0, 1))
    same = [jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, tree)) for tree in (again, other)]
    assert same == [True, False]


def test_what_cannot_be_is_refused():
    mixture = ModelConfig.preset("tiny")
    with pytest.raises(ConfigError, match="4 experts in 2 layers already; only a dense model is upcycled"):
        upcycled(mixture, 4, 2)
    with pytest.raises(ConfigError, match="at least 2 experts .* got 1"):
        upcycled(DENSE, 1, 1)
    with pytest.raises(ConfigError, match="experts_per_token=5"):
        upcycled(DENSE, 4, 5)
    with pytest.raises(ConfigError, match="reinitialise must be from 0 to 1"):
        made(reinitialise=1.5)
