"""Routes of the sampler, of the pass before the updates and of the reference in the trainer's passes: which rows, how far off, and what they do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import paths, routing_stats
from moe_jax.keys import Draw
from moe_jax.replay import Replay
from moe_jax.rl import loop
from moe_jax.rl.grpo import Policy
from moe_jax.rl.program import policy_loss
from moe_jax.rl.replay import mismatch, recorded, replayed
from moe_jax.routing import RoutingTrace, unrecorded
from moe_jax.train.state import Knobs
from tests.rl.small import CONFIG, TASK, bits, program_of, replace, rows_of

NONE = unrecorded(jnp.uint8)  # 255
NOISY = replace(CONFIG, noise="matmuls=relative:0.05:phases=rollout", steps=1, eval_every=9, checkpoint_every=0)


def trace_of(ids, weights=None) -> RoutingTrace:
    ids = np.array(ids, np.uint8)
    return RoutingTrace(ids, weights, np.arange(len(ids), dtype=np.int32))


def test_recorded_leaves_out_the_last_token_and_what_lies_behind():
    """Two sequences of 3 and 4 of 4 places: the routes of places 0 and 1, and of 0 to 2, remain; a hole that was there stays one."""
    ids = np.arange(2 * 2 * 4 * 2).reshape(2, 2, 4, 2)
    ids[1, 1, 0] = NONE
    weights = np.ones(ids.shape, np.float32)
    found = recorded(trace_of(ids, weights), np.array([3, 4]))
    expected = ids.copy()
    expected[:, 0, 2:] = expected[:, 1, 3:] = NONE
    assert np.array_equal(found.ids, expected) and found.ids.dtype == np.uint8
    assert np.array_equal(found.weights, weights)


def test_replayed_takes_weights_only_where_they_are_used():
    trace = trace_of(np.zeros((1, 1, 2, 2)), np.ones((1, 1, 2, 2), np.float32))
    assert replayed(trace, "ids").trace.weights is None and replayed(trace, "ids").what == "ids"
    assert replayed(trace, "ids+weights").trace.weights is trace.weights


def test_mismatch():
    """Two layers, four tokens of which the last did not choose one, two experts each.

    Layer 0: same set in another order; one of two; same; (both). Layer 1: same; none; same; (none). Changed experts 0 + 1/2 + 0 and 0 + 1 + 0 of 6
    rows, changed rows 2 of 6, changed tokens 1 of 3 (the second, in both layers). Growth: layer 0 overlaps in 2.5 rows, layer 1 in 2, of 3: 1/2.
    """
    sampler = trace_of([[[[0, 1], [2, 3], [1, 2], [0, 1]]], [[[0, 1], [0, 1], [2, 0], [0, 1]]]])
    trainer = trace_of([[[[1, 0], [2, 1], [1, 2], [2, 3]]], [[[0, 1], [2, 3], [0, 2], [2, 3]]]])
    found = mismatch(sampler, trainer, np.array([[True, True, True, False]]))
    expected = {"route/changed_experts": (1.5, 6), "route/changed_rows": (2, 6), "route/changed_tokens": (1, 3), "route/growth": (0.5, 3)}
    assert {name: (float(total), float(count)) for name, (total, count) in found.items()} == expected
    none = mismatch(sampler, trainer, np.zeros((1, 4), bool))
    assert all(float(total) == float(count) == 0 for total, count in none.values())


def test_mismatch_holds_pairs_of_experts_of_one_layer_at_a_time(monkeypatch):
    """3 layers, 5 tokens, 2 experts each: 5 x 2 x 2 pairs, not three times as many."""
    sizes, match = [], routing_stats._match
    monkeypatch.setattr(routing_stats, "_match", lambda a, b: sizes.append(match(a, b).size) or match(a, b))
    trace = trace_of(np.arange(3 * 5 * 2).reshape(3, 1, 5, 2))
    mismatch(trace, trace, np.ones((1, 5), bool))
    assert set(sizes) == {5 * 2 * 2}


# ------------------------------------------------------------------------------------------------------------------ in a run


@functools.cache
def numbers(**changes) -> tuple[float, float]:
    """(KL of the sampler to the trainer, share of changed experts) of one step."""
    config = replace(NOISY, **changes)
    series = rows_of(loop.run(config, program_of(config), TASK))
    return series["sampler/kl"][0][1], series["route/changed_experts"][0][1]


def test_sampler_and_trainer_agree_unless_the_sampler_is_noisy():
    """No noise: KL below 1e-6 and every route equal; noise in the rollout: neither; its routes replayed: they are equal again."""
    clean, noisy, replay = numbers(noise=""), numbers(), numbers(replay="rollout")
    print("\n              KL        changed experts")
    for name, (kl, changed) in {"no noise": clean, "rollout noise": noisy, "and replayed": replay}.items():
        print(f"{name:<13} {kl:.1e}   {changed:.4f}")
    assert 0 <= clean[0] < 1e-6 and clean[1] == 0
    assert noisy[0] > 1e-3 and noisy[1] > 0.005
    assert replay[1] == 0 and replay[0] > 1e-3  # the noise acted on more than routes


@functools.cache
def loop_of(**changes):
    """A step's answers and what is known of them."""
    config = replace(NOISY, **changes)
    found = loop._Loop(config, program_of(config), TASK)
    found.batch, row = found.collect(0)
    return found, row


def lengths_of(batch) -> np.ndarray:
    return np.array([np.flatnonzero(row)[-1] + 2 for row in batch["mask"]])  # the last place that chose a token is the last but one


@pytest.mark.parametrize("source, what", [("rollout", "ids"), ("rollout", "ids+weights"), ("self", "ids")])
def test_what_is_replayed(source, what):
    """The routes in the batch are those of their source over all but the last token; the updates take them, and the others are counted as live."""
    here, row = loop_of(replay=source, replay_what=what)
    batch, config = here.batch, here.config
    routes, lengths = batch["routes"], lengths_of(batch)
    known = np.broadcast_to(np.arange(config.length) < lengths[:, None] - 1, routes.ids.shape[:3])
    assert np.array_equal(routes.valid, known) and (routes.weights is None) == (what == "ids")
    if source == "rollout":
        problems = here.problems(0)
        seed = loop._seed(config.sample_seed, "train", 0)
        answers, _ = here.answers(problems, "rollout", config.noise_of(0), 0, seed, 1.0, 1.0)
        expected = answers.trace
        live = (~known).sum()
        assert row["score/live_rows"] == pytest.approx(live / known.size)
        assert row["route/changed_experts"] == 0 and row["score/set_overlap"] < 1
    else:
        scored, _ = here.score(here.state.params, Answered(batch["tokens"]), None, None, 0)
        expected = scored.trace
        assert "score/live_rows" not in row  # the pass before the updates routed for itself
        assert row["route/changed_experts"] > 0
    assert np.array_equal(np.asarray(expected.ids)[known], routes.ids[known])
    if what == "ids+weights":
        assert np.array_equal(np.asarray(expected.weights)[known], routes.weights[known])
    updated = here.update(0, 1, ["" for _ in range(99)])  # answers 4 to 7
    assert updated["replay/live_rows"] == pytest.approx((~known[:, 4:8]).mean())
    assert updated["policy/log_ratio_abs"] < 1e-6  # the updates take the routes of the pass before: nothing has moved yet


class Answered:
    def __init__(self, tokens):
        self.tokens = tokens


def test_the_reference_is_the_start_without_noise(tmp_path):
    """Its routes are those that its parameters take in a clean pass, also when the pass before the updates is noisy and the policy has moved on."""
    start = replace(CONFIG, steps=1, eval_every=9, init_seed=5)
    loop.run(start, program_of(start), TASK, tmp_path)
    config = replace(NOISY, start=str(tmp_path), replay="reference", noise="router_logits=additive:0.5:phases=rollout+old_logprob", steps=2)
    here = loop._Loop(config, program_of(config), TASK)
    for step in range(2):
        here.batch, row = here.collect(step)
        assert row["score/set_overlap"] < 0.99 and row["route/changed_experts"] > 0  # noise would choose others in both passes
        clean, _ = here.score(here.reference, Answered(here.batch["tokens"]), None, None, step)
        known = here.batch["routes"].valid
        assert known.any() and np.array_equal(clean.trace.ids[known], here.batch["routes"].ids[known])
        changes = [here.update(step, part, [""] * 99)["policy/log_ratio_abs"] for part in range(config.mini_batches)]
        assert changes[0] > 1e-4  # noise in the pass before alone
    assert bits(here.state.params) != bits(here.reference)
    moved, _ = here.score(here.state.params, Answered(here.batch["tokens"]), None, None, 1)
    assert not np.array_equal(moved.trace.ids[known], here.batch["routes"].ids[known])


@pytest.mark.parametrize("what", ["ids", "ids+weights"])
def test_the_gradient_of_the_router(what):
    """Replayed experts leave the router the gradient of their weights; with replayed weights the policy's loss gives it none, exactly."""
    here, _ = loop_of(replay="rollout", replay_what="ids+weights")
    batch = {name: value for name, value in here.batch.items() if name != "routes"} | {"divisor": np.float32(10)}
    model = here.program.model

    @jax.jit
    def gradient(params, replay: Replay):
        def loss(params):
            return policy_loss(Policy(), "", model, params, batch, Knobs(None, 0, 0.0, 0.0), Draw(phase="train"), replay=replay)[0]

        return jax.grad(loss)(params)

    found = paths.flatten(gradient(here.program.init(jnp.uint32(0)).params, replayed(here.batch["routes"], what)))
    routers = {path: np.asarray(leaf) for path, leaf in found.items() if "router" in path}
    assert len(routers) == 1 and np.asarray(found["embedding"]).any()
    (router,) = routers.values()
    assert router.any() == (what == "ids")
