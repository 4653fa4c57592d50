"""Sampling with a cache against whole forward passes: the same logits, the same routes, noise included; and every choice of a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.generate import Sampler, Sampling, _allowed, generate
from moe_jax.keys import Draw
from moe_jax.mesh import MeshSpec
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.replay import Replay
from moe_jax.routing import unrecorded

# dense dispatch compiles in a third of the time; which one computes is the business of tests/dispatch and of the layouts
CONFIG = ModelConfig.preset("qwen3_tiny", num_layers=3, dense_layers=(1,), num_experts=8, d_model=32, d_ff=40, max_seq_len=48, init_std=0.3)
CONFIG = CONFIG.replace(dispatch="dense")
PROMPTS = [[5, 6, 7, 8, 9], [1], [10, 20, 30]]
SAMPLING = Sampling(max_tokens=9, temperature=1.0, seed=3)
NOISE = NoiseSpec.parse("matmuls=relative:0.1,router_logits=additive:0.3,norm_moe=additive:0.05")
VARIANTS = {
    "qwen": CONFIG,
    "window": CONFIG.replace(sliding_window=4, qk_norm="none", num_kv_heads=1),
    "seed": ModelConfig.preset("quick", vocab_size=260, d_model=32, num_layers=2, d_expert=24, max_seq_len=48, init_std=0.3),
    "blocked": CONFIG.replace(dispatch="blocked"),
    "unrolled": CONFIG.replace(scan_layers=False, num_kv_heads=None, attention_bias=True, output_bias=True),
}


@functools.cache
def sampler_of(name: str, trace: bool = True) -> Sampler:
    """One for each model, which compiles once for each number of rows and structure of noise."""
    return Sampler(Model(VARIANTS[name]), trace=trace)


@functools.cache
def params_of(name: str):
    return Model(VARIANTS[name]).init(1)


def sampled(prompts=PROMPTS, sampling=SAMPLING, name="qwen", **how):
    return sampler_of(name)(params_of(name), prompts, sampling, **how)


@functools.cache
def forward_of(name: str):
    """(params, tokens, noise, draw) -> Output of a whole pass, compiled once for each structure of noise."""
    model = Model(VARIANTS[name])
    return jax.jit(lambda params, tokens, noise, draw: model.apply(params, tokens, noise, draw, capture=("trace",)))


def whole(name, found, noise=None, draw=None, temperature=1.0):
    """What one pass over everything that was sampled says: (log-probability of each next token, trace)."""
    out = forward_of(name)(params_of(name), jnp.asarray(found.tokens), noise, draw)
    log_probs = jax.nn.log_softmax(out.logits / temperature)
    return (
        np.asarray(jnp.take_along_axis(log_probs[:, :-1], jnp.asarray(found.tokens)[:, 1:, None], 2)[..., 0]),
        jax.device_get(out.trace),
        out.logits,
    )


@pytest.mark.parametrize(
    "name, noise",
    [("qwen", NOISE), ("window", None), ("seed", None), ("unrolled", None)]
    + [
        pytest.param(name, noise, marks=pytest.mark.slow)
        for name, noise in (("window", NOISE), ("seed", NOISE), ("unrolled", NOISE), ("blocked", NOISE))
    ],
)
def test_a_cache_changes_nothing(name, noise):
    """Log-probabilities and routes of sampled tokens are those of one pass over the finished text, with the same draws."""
    draw = Draw(seed=4, step=2, phase="rollout")
    found = sampled(name=name, noise=noise, draw=draw)
    log_probs, trace, _ = whole(name, found, noise, draw)
    recorded = found.trace.ids != unrecorded(found.trace.ids.dtype)
    for row, (begin, end) in enumerate(zip(found.prompt_lengths, found.lengths, strict=True)):
        assert end == begin + 9
        np.testing.assert_allclose(found.log_probs[row, begin:end], log_probs[row, begin - 1 : end - 1], atol=2e-5)
        assert not found.log_probs[row, :begin].any() and not found.tokens[row, end:].any()
        assert recorded[:, row, : end - 1].all() and not recorded[:, row, end - 1 :].any()  # the last token was never read
        assert np.array_equal(found.trace.ids[:, row, : end - 1], trace.ids[:, row, : end - 1])
        np.testing.assert_allclose(found.trace.weights[:, row, : end - 1], trace.weights[:, row, : end - 1], atol=2e-6)


def test_noise_changes_the_text():
    clean, noisy = (sampled(noise=noise) for noise in (None, NOISE))
    assert (clean.tokens != noisy.tokens).any()


def test_greedy_takes_the_likeliest_token():
    found = sampled(sampling=Sampling(max_tokens=9))
    _, _, logits = whole("qwen", found)
    for row, (begin, end) in enumerate(zip(found.prompt_lengths, found.lengths, strict=True)):
        assert np.array_equal(np.asarray(logits[row, begin - 1 : end - 1].argmax(-1)), found.sampled(row))


def test_a_row_does_not_depend_on_its_neighbours():
    """Neither on their lengths nor on when they end; another row number, another draw."""
    together, alone = sampled(), sampled([PROMPTS[0], [1, 2], [7]])
    assert np.array_equal(together.sampled(0), alone.sampled(0))
    moved = sampled([PROMPTS[2], [1], [1]], draw=Draw(row_offset=2, phase="rollout"))
    assert np.array_equal(together.sampled(2), moved.sampled(0))
    assert not np.array_equal(together.sampled(2), sampled([PROMPTS[2], [1], [1]]).sampled(0))


def test_a_sequence_ends_with_its_stop_token():
    free = sampled()
    stop = int(free.sampled(0)[3])
    found = sampled(sampling=Sampling(max_tokens=9, temperature=1.0, seed=3, stop=(stop, 259)))
    for row in range(3):
        every = free.sampled(row).tolist()
        kept = every[: every.index(stop) + 1] if stop in every else every
        assert found.sampled(row).tolist() == kept
        end = found.lengths[row]
        assert np.array_equal(found.trace.ids[:, row, : end - 1], free.trace.ids[:, row, : end - 1])
        assert (found.trace.ids[:, row, end - 1 :] == unrecorded(found.trace.ids.dtype)).all()
        assert not found.log_probs[row, end:].any() and not found.tokens[row, end:].any()


def test_all_ended_ends_the_work():
    steps = []
    found = sampled(sampling=Sampling(max_tokens=9, stop=tuple(range(260))), progress=lambda step, left: steps.append(left))
    assert (found.lengths == found.prompt_lengths + 1).all() and len(steps) <= 3 and steps[-1] == 0


def test_one_program_serves_every_temperature_seed_and_scale():
    model = Model(CONFIG)
    params, sampler = params_of("qwen"), Sampler(model)
    texts = set()
    for seed, temperature, scale in ((0, 0.0, 0.1), (1, 0.7, 0.1), (2, 0.7, 0.2), (2, 1.5, 0.2)):
        noise = model.config.resolve(NoiseSpec.parse(f"experts=relative:{scale}"))
        sampling = Sampling(max_tokens=6, temperature=temperature, seed=seed, top_p=0.9)
        texts.add(sampler(params, PROMPTS, sampling, noise, Draw(seed=seed, phase="rollout")).tokens.tobytes())
    assert len(texts) == 4
    assert sampler.step._cache_size() == sampler.prefill._cache_size() == 1


@pytest.mark.parametrize("mesh", ["data=2,expert=4", pytest.param("fsdp=4,tensor=2", marks=pytest.mark.slow)])
def test_the_same_text_on_any_mesh(mesh):
    config = CONFIG.replace(num_kv_heads=None, dense_layers=(), num_layers=1, dispatch=None)
    prompts = [[1 + row, 2, 3] for row in range(8)]
    alone, on_mesh = Model(config), Model(config, MeshSpec.parse(mesh).build())
    results = [
        generate(model, model.init(1), prompts, SAMPLING, noise=NOISE, draw=Draw(seed=4, phase="rollout"), trace=True)
        for model in (alone, on_mesh)
    ]
    assert np.array_equal(results[0].tokens, results[1].tokens)
    assert np.array_equal(results[0].trace.ids, results[1].trace.ids)


def test_its_trace_is_replayed():
    """The rollout source of routes: a training pass that takes them differs in no id, and routes the last token live."""
    model, params = Model(CONFIG), params_of("qwen")
    found = sampled(noise=NOISE)
    out = jax.jit(lambda p, t, r: model.apply(p, t, replay=Replay(r), capture=("trace",)))(params, jnp.asarray(found.tokens), found.trace)
    recorded = found.trace.ids != unrecorded(found.trace.ids.dtype)
    assert np.array_equal(np.asarray(out.trace.ids)[recorded], found.trace.ids[recorded])
    live, total = out.aux["replay/live_rows"]
    assert int(live) == int((~recorded[..., 0]).sum()) and int(total) == recorded[..., 0].size


def test_frequencies_are_those_of_the_softmax():
    """2,000 rows of one prompt: the first token's counts against softmax(logits / T), by chi-square."""
    from scipy.stats import chisquare

    config = CONFIG.replace(vocab_size=12, num_layers=1, dense_layers=())
    model = Model(config)
    params = model.init(1)
    found = generate(model, params, [[3, 4]] * 2000, Sampling(max_tokens=1, temperature=1.3))
    logits = model.apply(params, jnp.array([[3, 4]])).logits[0, -1]
    wanted = np.asarray(jax.nn.softmax(logits / 1.3), np.float64)
    counts = np.bincount(found.tokens[:, 2], minlength=12)
    assert chisquare(counts, wanted / wanted.sum() * 2000).pvalue > 1e-3


def test_the_likeliest_are_allowed():
    logits = jnp.log(jnp.array([[0.4, 0.1, 0.3, 0.15, 0.05], [0.05, 0.8, 0.05, 0.05, 0.05]]))
    assert _allowed(logits, 2, 1.0).tolist() == [[True, False, True, False, False], [True, True, True, True, True]]  # ties are all kept
    assert _allowed(logits[:1], None, 0.65).tolist() == [[True, False, True, False, False]]
    assert _allowed(logits, None, 0.75).tolist() == [[True, False, True, True, False], [False, True, False, False, False]]
    assert _allowed(logits[:1], 3, 0.5).tolist() == [[True, False, True, False, False]]  # 0.4 of 0.85 is not enough
    assert _allowed(logits, 1, 1e-6).sum(-1).tolist() == [1, 1]


@pytest.mark.parametrize("how", [{"top_p": 0.2}, pytest.param({"top_k": 2}, marks=pytest.mark.slow)])
def test_top_k_and_top_p_never_leave_the_allowed(how):
    sampling = Sampling(max_tokens=9, temperature=3.0, **how)
    found = generate(Model(CONFIG), params_of("qwen"), PROMPTS, sampling) if "top_k" in how else sampled(sampling=sampling)
    _, _, logits = whole("qwen", found)
    for row, (begin, end) in enumerate(zip(found.prompt_lengths, found.lengths, strict=True)):
        kept = _allowed(logits[row, begin - 1 : end - 1] / 3.0, how.get("top_k"), jnp.float32(how.get("top_p", 1)))
        assert np.asarray(kept)[np.arange(9), found.sampled(row)].all()


@pytest.mark.parametrize(
    "prompts, sampling, room, message",
    [
        ([], Sampling(), None, "at least one token, got 0 prompts"),
        ([[1], []], Sampling(), None, r"every prompt needs at least one token, got 2 prompts of \[1, 0\]"),
        ([[1, 260]], Sampling(), None, "has the token 260, the vocabulary is 0 to 259"),
        ([[-1]], Sampling(), None, "has the token -1"),
        ([[1] * 40], Sampling(max_tokens=9), None, "room for 1 to max_seq_len=48 tokens, got 49"),
        ([[1] * 8], Sampling(max_tokens=9), 12, "room for 12 tokens is less than the 8 of a prompt and 9"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, sampling, room, message):
    with pytest.raises(ConfigError, match=message):
        generate(Model(CONFIG), {}, prompts, sampling, room=room)


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": np.inf}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}]
)
def test_a_sampling_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError):
        Sampling(**wrong)
