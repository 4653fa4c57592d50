"""What a draw is a function of: (seed, step, phase, layer, site, pass), folded into a two-word key; rows and columns come later.

Nothing here knows a device, a shard or an order of execution, so the same draw is made on any mesh. The hash is the multiply-and-xorshift
finaliser "lowbias32" (Chris Wellons, hash-prospector), applied to each word with the other mixed in between rounds, so that two keys
never share one stream at an offset.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.errors import check_known

PHASES = ("rollout", "old_logprob", "train", "eval")
PASSES = ("forward", "grad_input", "grad_weight")
MOST_LAYERS = 10_000  # a larger number is a slip of the keyboard, and lists of so many layers would fill the memory


def mix(word: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every input bit flips every output bit with probability near 1/2."""
    word = word ^ (word >> 16)
    word = word * jnp.uint32(0x7FEB352D)
    word = word ^ (word >> 15)
    word = word * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def fold(key: jax.Array, value: jax.Array | int) -> jax.Array:
    """A new key UInt32[2] from a key and a 32-bit value (an int, or an array scalar)."""
    value = jnp.uint32(value & 0xFFFFFFFF) if isinstance(value, int) else jnp.asarray(value).astype(jnp.uint32)
    first = mix(key[0] ^ mix(value + jnp.uint32(0x9E3779B9)))
    second = mix(key[1] + first * jnp.uint32(0x85EBCA6B) + value)
    return jnp.stack([first ^ (second >> 7), second])


def name_word(name: str) -> int:
    """A 32-bit FNV-1a hash of a name: sites, passes and phases enter a key by their name, so adding one changes no other draw."""
    word = 0x811C9DC5
    for byte in name.encode():
        word = ((word ^ byte) * 0x01000193) & 0xFFFFFFFF
    return word


@functools.partial(jax.tree_util.register_dataclass, data_fields=("seed", "step", "row_offset"), meta_fields=("phase", "like"))
@dataclasses.dataclass(frozen=True)
class Draw:
    """Which draw of the noise this call uses; arrays, so that no value compiles again.

    phase and like are static.
    """

    seed: jax.Array | int = 0  # noise seed: an int (its lowest 32 bits count) or an array; as an argument of jit, give np.uint32(seed)
    step: jax.Array | int = 0  # optimizer updates done
    phase: str = "eval"  # one of PHASES
    row_offset: jax.Array | int = 0  # global index of the first example of this (micro-)batch
    like: str = ""  # the phase whose draws these are, where two phases are to meet the same noise; "": its own

    def __post_init__(self):
        for phase in (self.phase, self.like or self.phase):
            check_known("phase", phase, PHASES)

    def key(self, fixed: bool = False) -> jax.Array:
        """The key UInt32[2] of this seed, phase and step; `fixed` leaves the step out, for what is the same in each, as a device's pattern."""
        key = jnp.zeros(2, jnp.uint32) + jnp.array([0x243F6A88, 0x85A308D3], jnp.uint32)
        for value in (self.seed, name_word(self.like or self.phase), 0 if fixed else self.step):
            key = fold(key, value)
        return key


def stream(key: jax.Array, layer: jax.Array | int, site: str, pass_: str) -> jax.Array:
    """The key of one operator: absolute layer (-1 outside the layers), site and pass."""
    return fold(fold(key, layer), name_word(f"{site}/{pass_}"))


def parameter_key(seed: jax.Array | int, path: str) -> jax.Array:
    """The jax.random key of a parameter's initial value: a function of the seed and the parameter's path alone."""
    return jax.random.fold_in(jax.random.key(jnp.asarray(seed, jnp.uint32)), name_word(path))
