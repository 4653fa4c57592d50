"""What follows from routers' logits alone: the exact chance that a router's own noise changes a token's experts, and what relative noise does to the
chosen few, on logits that a model made and on the twelve that a published analysis printed. L routing layers, T tokens, E experts, k chosen."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax import routing, routing_stats
from moe_jax.noise import Noise
from moe_jax.sensitivity import factor_of

SAMPLE = 512  # tokens of a batch that are looked at
SCALES, SHIFTS = (0.01, 0.05, 0.10), (0.0, -2.0, 8.0, None)  # of `relative_noise`; None: each token's mean is taken away
# The analysis's own example of "5 % relative noise", 12 of 128 logits before and after, of which it says that half of the 8 chosen differ.
EXAMPLE = (2.05, 2.03, 2.01, 2.00, 1.99, 1.97, 1.95, 1.93, 1.85, 1.83, 1.80, 1.78)
EXAMPLE_NOISY = (2.15, 1.94, 2.11, 2.10, 1.89, 2.07, 1.85, 2.03, 2.01, 1.92, 1.89, 1.86)
EXAMPLE_EXPERTS, EXAMPLE_CHOSEN = 128, 8


class Logits:
    """Takes each batch's clean logits from `sensitivity` and keeps means over a sample of their tokens."""

    def __init__(self, noise: Noise, layers: Sequence[int], k: int, selection_bias: bool = False):
        self.noise, self.layers, self.k, self.selection_bias = noise, layers, k, selection_bias
        self._exact, self._redone = [], []

    def __call__(self, logits: Float[Array, "L T E"], weight: np.ndarray) -> None:
        real = np.flatnonzero(weight)  # evenly spread over these, and as many in a last batch that is not full
        some = logits[:, real[np.linspace(0, real.size - 1, min(SAMPLE, weight.size)).round().astype(int)]]
        self._redone.append(np.asarray(relative_noise(some, self.k, len(self._redone)), np.float64))
        sigma = None if self.selection_bias else own_sigma(self.noise, self.layers, some)
        if sigma is not None:
            self._exact.append(np.asarray(predict(some, sigma, self.k), np.float64))

    @property
    def predicted(self) -> np.ndarray | None:
        """[L] chance that the routers' own noise changes a token's experts; None when there is no such noise or no formula for it."""
        return np.mean(self._exact, 0) if self._exact else None

    @property
    def redone(self) -> np.ndarray:
        """[shifts, scales, L, 3] of `relative_noise`."""
        return np.mean(self._redone, 0)


def own_sigma(noise: Noise, layers: Sequence[int], logits: Float[Array, "L T E"]) -> Float[Array, "L T E"] | None:
    """The standard deviation of each clean logit under the routers' own noise, where it is Gaussian and a function of the logits; else None."""
    spread = {
        "additive": jnp.ones_like,
        "relative": jnp.abs,
        "rms_relative": lambda y: jnp.sqrt(jnp.square(y).mean(-1, keepdims=True)),
        "centred_relative": lambda y: jnp.abs(y - y.mean(-1, keepdims=True)),
    }
    variance, own = jnp.zeros_like(logits), [(site, how) for site, how in noise.structure if factor_of(site, how) == "router"]
    for site, how in own:
        if site not in ("router_gemm", "router_logits") or how.kind not in spread:
            return None
        if "forward" in how.passes and "selection" in (how.reach or ("selection",)):
            variance += jnp.square(noise.scales[site][jnp.array(layers)][:, None, None] * spread[how.kind](logits))
    return jnp.sqrt(variance) if own else None


@functools.partial(jax.jit, static_argnames="k")
def predict(logits: Float[Array, "L T E"], sigma: Float[Array, "L T E"], k: int) -> Float[Array, "L"]:
    """The mean over tokens of `routing_stats.predicted_flips`, layer by layer."""
    return jax.lax.map(lambda layer: routing_stats.predicted_flips(layer[0], layer[1], k).mean(), (logits, sigma))


@functools.partial(jax.jit, static_argnames=("k", "exact"))
def relative_noise(logits: Float[Array, "L T E"], k: int, seed: Any, exact: int | None = None) -> Float[Array, "shifts scales L 3"]:
    """What noise y(1 + s n) on the logits does to the chosen k, for s in SCALES and the logits moved by each of SHIFTS, which changes no route.

    Means over tokens: shared experts / k and tokens with another set, of one draw per token, the same for all scales and shifts; and the chance of
    another set, exact, of the first `exact` tokens (None: all).
    """
    normal = jax.random.normal(jax.random.key(seed), logits.shape)
    clean = routing.select(logits, k)

    def one(case):
        y, scale = case
        found = jax.vmap(routing_stats.compare)(clean, routing.select(y * (1.0 + scale * normal), k))
        drawn = [found[name][0] / found[name][1] for name in ("router/set_overlap", "router/tokens_changed")]
        return jnp.stack([*drawn, predict(y[:, :exact], scale * jnp.abs(y[:, :exact]), k)], -1)

    moved = [logits - logits.mean(-1, keepdims=True) if shift is None else logits + shift for shift in SHIFTS]
    return jnp.stack([jax.lax.map(lambda scale, y=y: one((y, scale)), jnp.array(SCALES)) for y in moved])


@functools.cache
def example(tokens: int = 4096) -> tuple[int, np.ndarray]:
    """The printed example: how many of its 8 chosen experts its own noisy logits keep, and `relative_noise` [shifts, scales, 3] on it.

    Of 128 logits 12 were printed; the others are taken to go on downward at the mean step between those.
    """
    chosen, noisy = (set(np.argsort(np.negative(values), kind="stable")[:EXAMPLE_CHOSEN]) for values in (EXAMPLE, EXAMPLE_NOISY))
    step = (EXAMPLE[0] - EXAMPLE[-1]) / (len(EXAMPLE) - 1)
    rest = EXAMPLE[-1] - step * np.arange(1, EXAMPLE_EXPERTS - len(EXAMPLE) + 1)
    logits = jnp.broadcast_to(jnp.array([*EXAMPLE, *rest], jnp.float32), (1, tokens, EXAMPLE_EXPERTS))
    return len(chosen & noisy), np.asarray(relative_noise(logits, EXAMPLE_CHOSEN, 0, exact=1), np.float64)[:, :, 0]
