"""A key is a function of every coordinate and of nothing else, the same inside jit, and no two coordinates share one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import keys
from moe_jax.keys import PASSES, PHASES, Draw

BASE = dict(seed=3, step=7, phase="train")


def words(key) -> tuple[int, int]:
    return tuple(int(word) for word in key)


def stream_of(layer=2, site="router_logits", pass_="forward", fixed=False, **draw):
    return words(keys.stream(Draw(**(BASE | draw)).key(fixed), layer, site, pass_))


def test_mix_is_a_bijection_that_flips_half_the_bits():
    inputs = jnp.arange(1 << 16, dtype=jnp.uint32)
    assert len(np.unique(keys.mix(inputs))) == 1 << 16
    # one flipped input bit flips each output bit with probability 1/2: 65,536 trials of each of 1,024 pairs, 6 sd and the hash's own bias
    for bit in range(32):
        flipped = np.asarray(keys.mix(inputs) ^ keys.mix(inputs ^ jnp.uint32(1 << bit)))
        rates = ((flipped[:, None] >> np.arange(32)) & 1).mean(0)
        assert abs(rates - 0.5).max() < 6 * 0.5 / 256 + 0.01, (bit, rates)


def test_every_coordinate_changes_the_key():
    others = [
        stream_of(),
        *(stream_of(seed=seed) for seed in (0, 4, -3, 2**31 + 3)),
        *(stream_of(step=step) for step in (1, 8, 3)),
        *(stream_of(phase=phase) for phase in PHASES if phase != "train"),
        *(stream_of(layer=layer) for layer in (-1, 0, 3)),
        *(stream_of(site=site) for site in ("router_input", "dropout_final")),
        *(stream_of(pass_=pass_) for pass_ in PASSES if pass_ != "forward"),
        stream_of(seed=7, step=3),  # the order of the coordinates counts
        stream_of(fixed=True),  # which is the draw of step 0
    ]
    assert len({first for first, _ in others}) == len({second for _, second in others}) == len(others)


def test_equal_coordinates_give_equal_keys_in_any_type():
    expected = stream_of()
    assert stream_of(seed=np.int32(3), step=jnp.uint32(7), layer=jnp.int32(2)) == expected
    assert stream_of(seed=2**32 + 3) == expected  # 32 bits of the seed count
    assert stream_of(seed=jnp.int32(-3)) == stream_of(seed=-3) == stream_of(seed=2**32 - 3)
    assert stream_of(layer=jnp.int32(-1)) == stream_of(layer=-1)


def test_row_offset_is_no_part_of_the_key():
    assert stream_of(row_offset=5) == stream_of()


def test_fixed_ignores_the_step_alone():
    assert stream_of(fixed=True, step=7) == stream_of(fixed=True, step=8)
    assert stream_of(fixed=True, seed=1) != stream_of(fixed=True, seed=2)
    assert stream_of(fixed=True, phase="eval") != stream_of(fixed=True, phase="train")


def test_jit_and_eager_agree_and_values_do_not_retrace():
    traces = []

    @jax.jit
    def traced(draw, layer):
        traces.append(draw.phase)
        return keys.stream(draw.key(), layer, "router_logits", "forward")

    for seed, step in ((3, 7), (1, 2), (-1, 0)):
        assert words(traced(Draw(seed, step, "train"), 2)) == stream_of(seed=seed, step=step)
    assert traces == ["train"]
    traced(Draw(3, 7, "eval"), 2)
    assert traces == ["train", "eval"]


def test_unknown_phase():
    with pytest.raises(ValueError, match=r"unknown phase 'training' \(did you mean 'train'\?\); known: rollout, old_logprob, train, eval"):
        Draw(phase="training")


def test_no_two_streams_share_a_key():
    """198,000 streams: all keys differ, and each word alone collides as often as random words would (n^2 / 2^33 = 4.6 pairs)."""
    names = [(site, pass_) for site in ("router_logits", "router_input", "dropout_final") for pass_ in PASSES[:2]]
    seeds, steps, layers = (axis.reshape(-1) for axis in jnp.meshgrid(jnp.arange(20), jnp.arange(50), jnp.arange(-1, 10), indexing="ij"))

    @jax.jit
    def all_keys():
        def one(seed, step, layer):
            draws = [Draw(seed, step, phase).key() for phase in PHASES[1:]]
            return jnp.stack([keys.stream(key, layer, *name) for key, name in itertools.product(draws, names)])

        return jax.vmap(one)(seeds, steps, layers).reshape(-1, 2)

    found = np.asarray(all_keys())
    assert len(np.unique(found.astype(np.uint64) @ np.array([1 << 32, 1], np.uint64))) == len(found) == 198_000
    for word in found.T:  # 25 or more has probability under 1e-10
        assert len(word) - len(np.unique(word)) < 25


def test_names():
    assert keys.name_word("") == 0x811C9DC5 and keys.name_word("a") == 0xE40C292C  # published FNV-1a values
    assert keys.name_word("foobar") == 0xBF9CF968


def test_parameter_key_is_a_function_of_seed_and_path():
    def data(seed, path):
        return tuple(jax.random.key_data(keys.parameter_key(seed, path)).tolist())

    assert data(0, "layers/up") == data(jnp.uint32(0), "layers/up")
    assert len({data(0, "layers/up"), data(1, "layers/up"), data(0, "layers/down")}) == 3
