"""The update of a policy: its gradient against a plain one, in one part or two, on one device or four, and which noise acts where."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import paths
from moe_jax.keys import Draw
from moe_jax.mesh import MeshSpec
from moe_jax.model import Model
from moe_jax.noise import NoiseSpec
from moe_jax.rl import loop
from moe_jax.rl.grpo import Policy
from moe_jax.rl.program import RLProgram, following, policy_loss, score
from moe_jax.train.state import Knobs
from tests.rl import small
from tests.rl.small import CONFIG, OPTIMIZER, TASK, program_of, replace, rows_of

ROWS, LENGTH = 6, 12
NOISE = NoiseSpec.parse("matmuls=relative:0.1")
DENSE = small.MODEL.replace(num_layers=1)
MODEL = small.MODEL.replace(num_layers=1, dense_layers=())
POLICIES = {
    "token": Policy(dual_clip=1.5, clip_low=0.1, clip_high=0.15),
    "sequence": Policy(level="sequence", reduction="sequence_mean", dual_clip=None, clip_low=0.02, clip_high=0.05),
    "everything": Policy(level="sequence_token", kl_weight=0.1, importance_cap=1.1),
}


@functools.cache
def params_of(config=MODEL):
    return Model(config).init(1)


def drawn(config=MODEL, noise=None, seed=0):
    """A micro-batch whose old, sampler's and reference log-probabilities are a little off, with answers of 1 to 7 tokens and one of none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 18, (ROWS, LENGTH)).astype(np.int32)
    mask = np.zeros((ROWS, LENGTH), np.float32)
    for row, length in enumerate((7, 1, 4, 0, 5, 2)):
        mask[row, 3 : 3 + length] = 1
    base = scored(config)(params_of(config), tokens, noise).log_probs
    near = {name: np.asarray(base) + rng.normal(0, 0.2, (ROWS, LENGTH)).astype(np.float32) for name in ("old", "sampler", "reference")}
    return {"tokens": tokens, "mask": mask, "advantage": rng.normal(size=ROWS).astype(np.float32), "divisor": np.float32(5), **near}


@functools.cache
def scored(config):
    def of(params, tokens, noise):
        return score(Model(config), (), params, tokens, noise, Draw(np.uint32(0), np.uint32(3), "train", np.uint32(2)), None)

    return jax.jit(of)


def plain_loss(policy: Policy, micro, log_probs):
    """Written out answer by answer and token by token, with the whole mini-batch's log-probabilities at hand."""
    total = 0.0
    for row in range(ROWS):
        places = np.flatnonzero(micro["mask"][row])
        new, old, advantage = log_probs[row, places], micro["old"][row, places], micro["advantage"][row]
        if not len(places):
            continue
        of_sequence = jnp.exp((new - old).mean())
        losses = []
        for place in range(len(places)):
            ratio = {
                "token": jnp.exp(new[place] - old[place]),
                "sequence": of_sequence,
                "sequence_token": jax.lax.stop_gradient(of_sequence) * jnp.exp(new[place] - jax.lax.stop_gradient(new[place])),
            }[policy.level]
            gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - policy.clip_low, 1 + policy.clip_high) * advantage)
            if policy.dual_clip is not None and advantage < 0:
                gain = jnp.maximum(gain, policy.dual_clip * advantage)
            if policy.importance_cap:
                gain = gain * min(np.exp(old[place] - micro["sampler"][row, places[place]]), policy.importance_cap)
            c = micro["reference"][row, places[place]] - new[place]
            losses.append(-gain + policy.kl_weight * (jnp.exp(c) - c - 1))
        total += sum(losses) / (1 if policy.reduction == "token_mean" else len(losses))
    return total / micro["divisor"]


@pytest.mark.parametrize(
    "config, noise, names",
    [
        pytest.param(MODEL, NOISE, tuple(POLICIES), id="noisy"),
        pytest.param(MODEL, None, ("everything",), id="clean", marks=pytest.mark.slow),
        pytest.param(DENSE, NOISE, ("token",), id="dense"),
    ],
)
def test_the_gradient_is_that_of_the_plain_loss(config, noise, names):
    """Of every parameter, against automatic differentiation through whole logits; noise on all matmuls, forward and backward."""
    model, params = Model(config), params_of(config)
    resolved = None if noise is None else config.resolve(noise)
    draw = Draw(np.uint32(0), np.uint32(3), "train", np.uint32(2))
    micro = drawn(config, resolved)

    @jax.jit
    def log_probs_and_gradient(params, noise, slope):
        def of(params):
            logits = model.apply(params, micro["tokens"], noise=noise, draw=draw).logits
            log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), following(micro["tokens"])[..., None], -1)[..., 0]
            return (slope * log_probs).sum(), log_probs

        gradient, log_probs = jax.grad(of, has_aux=True)(params)
        return log_probs, gradient

    def fast(params, noise, policy):
        value, metrics, _ = policy_loss(policy, "", model, params, micro, Knobs(noise, 0, 0.0, 0.0), draw)
        return value, metrics

    log_probs, _ = log_probs_and_gradient(params, resolved, np.zeros((ROWS, LENGTH), np.float32))
    for name in names:
        policy = POLICIES[name]
        value, slope = jax.jit(jax.value_and_grad(functools.partial(plain_loss, policy, micro)))(log_probs)
        assert np.asarray(slope).any() and not np.asarray(slope)[micro["mask"] == 0].any()
        _, expected = log_probs_and_gradient(params, resolved, slope)
        found, metrics = jax.jit(jax.grad(functools.partial(fast, policy=policy), has_aux=True))(params, resolved)
        np.testing.assert_allclose(metrics["loss"][0], value, rtol=2e-5, err_msg=name)
        assert metrics["policy/clip_fraction"][0] > 0 or name == "everything", name
        expected, found = paths.flatten(expected), paths.flatten(found)
        for path, leaf in expected.items():
            scale = float(jnp.abs(leaf).max())
            assert scale > 0, path
            np.testing.assert_allclose(np.asarray(found[path]) / scale, np.asarray(leaf) / scale, atol=2e-5, err_msg=f"{name} {path}")


def test_metrics_count_the_tokens_of_answers():
    """By hand from the log-probabilities: 19 tokens count."""
    micro = drawn()
    draw = Draw(np.uint32(0), np.uint32(3), "train", np.uint32(2))
    policy = Policy(clip_low=0.1, clip_high=0.15, dual_clip=None)
    loss = jax.jit(lambda params: policy_loss(policy, "", Model(MODEL), params, micro, Knobs(None, 0, 0.0, 0.0), draw)[1])
    metrics, found, mask = loss(params_of()), scored(MODEL)(params_of(), micro["tokens"], None), micro["mask"] > 0
    change = (np.asarray(found.log_probs) - micro["old"])[mask]
    good = np.broadcast_to(micro["advantage"][:, None], mask.shape)[mask] > 0
    clipped = np.where(good, np.exp(change) > 1.15, np.exp(change) < 0.9)
    expected = {
        "policy/log_ratio_abs": np.abs(change).sum(),
        "policy/kl": -change.sum(),
        "policy/extreme": (np.abs(change) > 1).sum(),
        "policy/clip_fraction": clipped.sum(),
        "policy/entropy": np.asarray(found.entropy)[mask].sum(),
    }
    assert 0 < clipped.sum() < 19
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name][0], value, rtol=1e-4, atol=1e-5, err_msg=name)
        assert metrics[name][1] == 19, name
    assert metrics["loss"][1] == 1


# ------------------------------------------------------------------------------------------------------------------ in parts, on a mesh

LINEAR = dataclasses.replace(OPTIMIZER, eps=1e3, adamw_learning_rate=10.0, clip_norm=None, betas=(0.0, 0.0))  # moves by gradient / 100


def updated(policy: Policy, parts: int, mesh=None, noise: NoiseSpec | None = NOISE):
    """(how far each parameter moved, its metrics) after one update on the same six answers, in so many parts."""
    program = RLProgram(MODEL, LINEAR, CONFIG.objective, policy, 6, mesh=mesh)
    micro = drawn()
    divisor = micro["mask"].sum() if policy.reduction == "token_mean" else micro["mask"].any(-1).sum()
    batch = {name: value.reshape(parts, ROWS // parts, *value.shape[1:]) for name, value in micro.items() if name != "divisor"}
    batch["divisor"] = np.full(parts, divisor / parts, np.float32)
    batch["draw"] = np.full(parts, 1, np.int32), np.arange(0, ROWS, ROWS // parts, dtype=np.int32)
    state = program.init(jnp.uint32(1))
    before = jax.device_get(state.params)
    knobs = Knobs(None if noise is None else MODEL.resolve(noise), jnp.uint32(0), jnp.float32(0), jnp.float32(0))
    state, metrics, flags = program.train(state, program.place(batch, ROWS // parts, 1), knobs)
    assert not np.asarray(flags).any()
    moved = jax.tree.map(lambda a, b: a - b, jax.device_get(state.params), before)
    return paths.flatten(moved), {name: (float(value[0]), float(value[1])) for name, value in metrics.items() if name != "router/load"}


def assert_same_update(one, other):
    (moved, metrics), (also, said) = one, other
    for path, value in moved.items():
        scale = np.abs(value).max()
        assert scale > 2e-4, path
        np.testing.assert_allclose(also[path] / scale, value / scale, atol=2e-3, err_msg=path)  # parameters of up to 2 round to 2e-7
    for name in ("policy/clip_fraction", "policy/entropy", "policy/log_ratio_abs", "optimizer/gradient_norm"):
        assert said[name] == pytest.approx(metrics[name], rel=1e-4), name
    assert said["loss"][0] / said["loss"][1] == pytest.approx(metrics["loss"][0] / metrics["loss"][1], rel=1e-4)


@pytest.fixture(scope="module")
def whole():
    return updated(POLICIES["everything"], 1)


def test_two_parts_are_one_mean_over_tokens(whole):
    """12 tokens in the first half and 7 in the second: the sum of both is divided by 19. With noise, whose rows go on in the second."""
    assert_same_update(whole, updated(POLICIES["everything"], 2))


def test_two_parts_are_one_mean_over_answers():
    """3 answers have tokens in the first half and 2 in the second."""
    assert_same_update(*(updated(POLICIES["sequence"], parts, noise=None) for parts in (1, 2)))


def test_a_mesh_is_one_device(whole):
    assert_same_update(whole, updated(POLICIES["everything"], 1, MeshSpec.parse("data=2,expert=2").build(jax.devices()[:4])))


# ------------------------------------------------------------------------------------------------------------------ which noise acts

QUIET = replace(
    CONFIG, optimizer=dataclasses.replace(OPTIMIZER, adamw_learning_rate=0.0), steps=1, mini_batches=2, accumulation=2, eval_every=9
)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_draws_are_those_of_the_pass_before(shared):
    """With a learning rate of 0 every update sees the parameters of the pass before: with its draws, the same log-probabilities, in every part of
    every mini-batch; with fresh ones, others."""
    config = replace(
        QUIET,
        noise="router_logits=additive:0.3:phases=old_logprob+train,lm_head=relative:0.1:phases=old_logprob+train",
        shared_draws=shared,
    )
    series = rows_of(loop.run(config, program_of(config), TASK))
    changes = [value for _, value in series["policy/log_ratio_abs"]]
    assert len(changes) == 2 and (max(changes) < 2e-6 if shared else min(changes) > 0.01), changes
    assert series["sampler/log_ratio_abs"][0][1] > 0.01


class Lowered:
    """In the place of a jitted function: what it would compile for each kind of arguments; its results are given."""

    def __init__(self, function, results):
        self.function, self.results, self.texts = function, results, {}

    def __call__(self, *args):
        kind = jax.tree.structure(args)
        if kind not in self.texts:
            self.texts[kind] = self.function.lower(*args).as_text()
        return self.results(*args)


def test_noise_in_a_phase_leaves_the_programs_of_the_others_alone(monkeypatch):
    """What sampling, scoring, updating and evaluating lower to, with noise in one phase, against no noise at all: other in that phase alone."""
    config = replace(CONFIG, model=MODEL, steps=1, mini_batches=1)
    program = program_of(config)
    real = {name: getattr(program, name) for name in ("sample", "score", "train")}
    kept = {}

    def texts_of(noise, replaying):
        spies = {}
        for name, function in real.items():

            def results(*args, name=name, function=function):
                if not replaying:
                    kept[name] = jax.device_get(function(*args))
                return kept[name]

            spies[name] = Lowered(function, results)
            monkeypatch.setattr(program, name, spies[name])
        loop.run(replace(config, noise=noise), program, TASK)
        sampled: dict[str, set] = {"rollout": set(), "eval": set()}
        for kind, text in spies["sample"].texts.items():
            sampled["rollout" if "rollout" in str(kind) else "eval"].add(text)
        return sampled | {"old_logprob": set(spies["score"].texts.values()), "train": set(spies["train"].texts.values())}

    clean = texts_of("", False)
    assert all(len(texts) == 1 for texts in clean.values())
    for phase in clean:
        found = texts_of(f"router_logits=additive:0.1:phases={phase}", True)
        assert {name for name in clean if found[name] != clean[name]} == {phase}
