"""Sampling in one program against the sampler that goes step by step: the same tokens, the same bits, the same routes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.generate import Sampler, Sampling
from moe_jax.keys import Draw
from moe_jax.mesh import MeshSpec
from moe_jax.model import Model
from moe_jax.noise import NoiseSpec
from moe_jax.rl.sample import sample
from moe_jax.routing import unrecorded
from tests.rl.small import MODEL, replace

CONFIG = MODEL.replace(num_layers=3)  # a dense layer, then two that route
NOISE = NoiseSpec.parse("matmuls=relative:0.1,router_logits=additive:0.3")
PROMPTS = ((5, 6, 7, 8), (1,), (10, 3, 2), (4, 4))
COUNT = 7
DRAW = Draw(seed=4, step=2, phase="rollout")


def stops(*tokens: int) -> tuple[int, ...]:
    """As many as there are ids, so that one program serves every test; -1 is none."""
    return (*tokens, *(-1,) * (CONFIG.vocab_size - len(tokens)))


FREE, STOPS = stops(), stops(1, 6, 7)


@functools.cache
def model_of(config=CONFIG) -> Model:
    return Model(config)


@functools.cache
def params_of(config=CONFIG):
    return model_of(config).init(1)


@functools.cache
def sampler_of(config=CONFIG) -> Sampler:
    return Sampler(model_of(config), trace=True)


@functools.cache
def whole_of(config=CONFIG, count=COUNT, mesh=""):
    """The function under test, compiled."""
    model = Model(config, MeshSpec.parse(mesh).build()) if mesh else model_of(config)
    return jax.jit(functools.partial(sample, model, count)), model


def arguments(prompts, noise, sampling, draw, config=CONFIG):
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    how = (np.float32(sampling.temperature), np.float32(sampling.top_p or 1), np.array(sampling.stop, np.int32), np.uint32(sampling.seed))
    draw = replace(draw, **{name: np.uint32(getattr(draw, name)) for name in ("seed", "step", "row_offset")})
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return tokens, lengths, None if noise is None else config.resolve(noise), draw, how


def both(sampling, noise=None, prompts=PROMPTS, config=CONFIG, draw=DRAW):
    """(step by step, in one program)."""
    function, _ = whole_of(config, sampling.max_tokens)
    slow = sampler_of(config)(params_of(config), prompts, sampling, noise, draw)
    return slow, jax.device_get(function(params_of(config), *arguments(prompts, noise, sampling, draw, config)))


def assert_same(slow, fast):
    """Bits, not tolerances: the steps are the same."""
    assert np.array_equal(slow.tokens, fast.tokens)
    assert np.array_equal(slow.prompt_lengths, fast.prompt_lengths) and np.array_equal(slow.lengths, fast.lengths)
    assert np.array_equal(slow.log_probs, fast.log_probs)
    assert (slow.trace is None) == (fast.trace is None)
    if slow.trace is not None:
        assert np.array_equal(slow.trace.ids, fast.trace.ids) and slow.trace.ids.dtype == fast.trace.ids.dtype
        assert np.array_equal(slow.trace.weights, fast.trace.weights)
        assert np.array_equal(slow.trace.layer_index, fast.trace.layer_index)


@pytest.mark.parametrize("noise", [None, NOISE], ids=["clean", "noisy"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_is_the_sampler(noise, temperature):
    """Prompts of four lengths, stop tokens that end some rows early, a nucleus; greedy and sampled; noise on everything that is sampled with."""
    free = Sampling(COUNT, temperature, seed=3, stop=FREE)
    slow, fast = both(free, noise)
    assert_same(slow, fast)
    assert (fast.lengths - fast.prompt_lengths == COUNT).all() and not fast.stopped.any()
    chosen = stops(*(int(fast.tokens[row, fast.prompt_lengths[row] + row]) for row in range(3)))
    stopping = Sampling(COUNT, temperature, seed=3, top_p=0.95, stop=chosen)
    slow, fast = both(stopping, noise)
    assert_same(slow, fast)
    lengths = fast.lengths - fast.prompt_lengths
    assert lengths.min() < COUNT  # some end before the limit
    for row, (begin, end) in enumerate(zip(fast.prompt_lengths, fast.lengths, strict=True)):
        inside = np.isin(fast.tokens[row, begin:end], stopping.stop)
        assert not inside[:-1].any() and inside[-1] == fast.stopped[row]
        assert fast.tokens[row, :begin].tolist() == list(PROMPTS[row]) and not fast.tokens[row, end:].any()
        assert (fast.log_probs[row, begin:end] < 0).all() and not fast.log_probs[row, :begin].any() and not fast.log_probs[row, end:].any()
        known = fast.trace.ids[:, row] != unrecorded(fast.trace.ids.dtype)
        assert known[:, : end - 1].all() and not known[:, end - 1 :].any()  # the last token was never read
        assert not fast.trace.weights[:, row, end - 1 :].any()


def test_noise_changes_what_is_sampled():
    clean, noisy = (both(Sampling(COUNT, 1.0, seed=3, stop=FREE), noise)[1] for noise in (None, NOISE))
    assert (clean.tokens != noisy.tokens).any()


def test_its_routes_and_log_probabilities_are_those_of_one_pass():
    """Not only of the other sampler: a forward pass over the finished text with the same draws says the same."""
    _, fast = both(Sampling(COUNT, 1.0, seed=3, stop=STOPS), NOISE)
    model = model_of()
    out = jax.jit(lambda p, t: model.apply(p, t, NOISE, DRAW, capture=("trace",)))(params_of(), jnp.asarray(fast.tokens))
    log_probs = np.asarray(jax.nn.log_softmax(out.logits))
    known = fast.trace.ids != unrecorded(fast.trace.ids.dtype)
    assert known.any() and np.array_equal(np.asarray(out.trace.ids)[known], fast.trace.ids[known])
    np.testing.assert_allclose(np.asarray(out.trace.weights)[known], fast.trace.weights[known], atol=2e-6)
    for row, (begin, end) in enumerate(zip(fast.prompt_lengths, fast.lengths, strict=True)):
        wanted = log_probs[row, np.arange(begin - 1, end - 1), fast.tokens[row, begin:end]]
        np.testing.assert_allclose(fast.log_probs[row, begin:end], wanted, atol=2e-5)


def test_one_token():
    """No step follows the prompts: no route of an answer is known."""
    slow, fast = both(Sampling(1, 1.0, seed=3, stop=STOPS))
    assert_same(slow, fast)
    assert (fast.lengths == fast.prompt_lengths + 1).all()
    assert fast.stopped.tolist() == np.isin(fast.tokens[np.arange(4), fast.prompt_lengths], STOPS).tolist()


def test_all_stop_at_once():
    """Every token stops. The loop's body never runs: it would not leave the second places empty."""
    slow, fast = both(Sampling(COUNT, 1.0, seed=3, stop=stops(*range(18))))
    assert_same(slow, fast)
    assert (fast.lengths == fast.prompt_lengths + 1).all() and fast.stopped.all()


def test_a_dense_model_has_no_trace():
    config = CONFIG.replace(num_layers=1)
    assert not config.moe_layers
    slow, fast = both(Sampling(COUNT, 1.0, seed=3, stop=STOPS), NoiseSpec.parse("matmuls=relative:0.1"), config=config)
    assert fast.trace is None
    assert_same(slow, fast)


def test_another_seed_and_another_row_are_other_tokens():
    """The prompts are equal, so rows differ by their number alone."""
    same = ((5, 6, 7, 8),) * 4
    free = Sampling(COUNT, 1.0, seed=3, stop=STOPS)
    _, one = both(free, prompts=same)
    _, other = both(replace(free, seed=4), prompts=same)
    assert (one.tokens != other.tokens).any()
    assert len({row.tobytes() for row in one.tokens}) > 1


@pytest.mark.slow
def test_the_same_on_a_mesh():
    """Eight rows over data and experts, noise on: every token, length and route is that of one device."""
    config = CONFIG.replace(dispatch=None, num_layers=1, dense_layers=())
    prompts = tuple((1 + row, 2, 3)[: 1 + row % 3] for row in range(8))
    sampling, draw = Sampling(COUNT, 1.0, seed=3, stop=STOPS), Draw(seed=4, step=1, phase="rollout")
    found = []
    for mesh in ("", "data=2,expert=4"):
        function, model = whole_of(config, COUNT, mesh)
        found.append(jax.device_get(function(model.init(1), *arguments(prompts, NOISE, sampling, draw, config))))
    alone, spread = found
    assert np.array_equal(alone.tokens, spread.tokens) and np.array_equal(alone.lengths, spread.lengths)
    assert len(set(alone.lengths - alone.prompt_lengths)) > 1
    assert np.array_equal(alone.trace.ids, spread.trace.ids)
    np.testing.assert_allclose(alone.trace.weights, spread.trace.weights, atol=2e-6)
    np.testing.assert_allclose(alone.log_probs, spread.log_probs, atol=2e-5)
