"""The small parts of a block: what a layer knows besides its input (Scope), normalisation, linear maps, rotary positions, the dense MLP.

B batch, S sequence, T = B*S tokens, D model width, H heads, N head width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from moe_jax import keys
from moe_jax.axes import ParamSpec
from moe_jax.dots import made_once
from moe_jax.experts import ACTIVATIONS
from moe_jax.mesh import Layout
from moe_jax.model.bind import declare
from moe_jax.model.config import ModelConfig
from moe_jax.noise import Operator, SiteNoise, draws, perturb
from moe_jax.products import matmul


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "fixed", "layer", "tokens", "scales"),
    meta_fields=("sites", "dropout", "freeze", "layout", "balance"),
)
@dataclasses.dataclass(frozen=True)
class Scope:
    """Where in the model and in which draw a layer stands: everything random in it is a function of this and of the token's number."""

    key: UInt32[Array, "2"]  # of the seed, phase and step
    layer: Int[Array, ""] | int  # absolute layer, -1 outside the layers
    tokens: Int[Array, "B S"]  # global token numbers
    scales: dict[str, Float[Array, ""]]  # this layer's noise scale by site
    sites: tuple[tuple[str, SiteNoise], ...] = ()  # the sites that act in this phase
    dropout: float = 0.0  # 0 outside training
    fixed: Any = None  # UInt32[2] as `key` without the step, for sites whose draws are fixed
    freeze: tuple[str, ...] = ()  # of replay.FREEZES, those that act in a forward pass
    layout: Layout | None = None  # how this batch lies on a mesh; None: on one device
    balance: str = "microbatch"  # of losses.BALANCE_SCOPES

    def at(self, layer, scales) -> "Scope":
        return dataclasses.replace(self, layer=layer, scales=scales)

    def laid(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """x, on a mesh divided over its sequences alone."""
        return x if self.layout is None else self.layout.constrain(x, "batch", *(None,) * (x.ndim - 1))

    @property
    def top_k(self) -> Callable:
        """jax.lax.top_k; on a mesh each device's of its own rows, where the compiler would gather them all."""
        return jax.lax.top_k if self.layout is None else self.layout.by_rows(jax.lax.top_k)

    def stream(self, site: str) -> UInt32[Array, "2"]:
        return keys.stream(self.key, self.layer, site, "forward")

    def drop(self, y: Float[Array, "B S D"], site: str) -> Float[Array, "B S D"]:
        """Dropout on the last axis."""
        if not self.dropout:
            return y
        mask = draws.dropout_mask(self.stream(f"dropout_{site}"), self.tokens.reshape(-1), y.shape[-1], self.dropout)
        return y * mask.reshape(y.shape).astype(y.dtype)

    def noise(self, site: str) -> SiteNoise | None:
        """What acts at a site here, or None."""
        return dict(self.sites).get(site)

    def operator(self, site: str) -> Operator | None:
        """How a matmul is computed here; None: exactly."""
        noise = self.noise(site)
        if noise is None:
            return None
        return Operator(self.scales[site], keys.fold(self._key(noise), self.layer), site, noise.kind, noise.passes, noise.format)

    def perturb(self, y: Float[Array, "... D"], site: str, rows: Int[Array, "R"] | None = None) -> Float[Array, "... D"]:
        """y with this site's noise, or y itself when the site does not act here. rows: default the tokens."""
        noise = self.noise(site)
        if noise is None:
            return y
        key = keys.stream(self._key(noise), self.layer, site, "forward")
        rows = self.tokens.reshape(-1) if rows is None else rows
        return perturb(y.reshape(-1, y.shape[-1]), noise.kind, self.scales[site], key, rows, noise.format).reshape(y.shape)

    def _key(self, noise: SiteNoise):
        return self.fixed if noise.draws == "fixed" else self.key


def linear(x: Float[Array, "... D"], w: Float[Array, "D F"], scope: Scope, site: str) -> Float[Array, "... F"]:
    """x @ w in x's type with float32 sums, as the scope's operator for the site computes it."""
    operator = scope.operator(site)
    y = matmul(x, w, operator, scope.tokens, divided=scope.layout is not None).astype(x.dtype)
    return y if operator is None else made_once(y, scope.layer > -2)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x / rms(x) * scale, with the statistics in float32 (Zhang and Sennrich 2019)."""
    exact = x.astype(jnp.float32)
    return (exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, config: ModelConfig, width: int, axis: str = "embed"):
        self.eps = config.norm_eps
        self.scale = declare(ParamSpec((width,), (axis,), "norm", "ones", dtype=config.dtypes.params))

    def __call__(self, x, scope: Scope | None = None, site: str = ""):
        """The norm, with the scope's noise for the site on its scale: one draw per layer, the same for all tokens."""
        scale = self.scale[...] if scope is None else scope.perturb(self.scale[...], site, jnp.zeros(1, jnp.int32))
        return rms_norm(x, scale, self.eps)


def weight(config: ModelConfig, shape, axes, role: str = "hidden") -> nnx.Param:
    """A matrix drawn from N(0, init_std)."""
    return declare(ParamSpec(tuple(shape), tuple(axes), role, "normal", config.init_std, config.dtypes.params))


def bias(config: ModelConfig, width: int, axis: str) -> nnx.Param:
    return declare(ParamSpec((width,), (axis,), "bias", "zeros", dtype=config.dtypes.params))


def rotate(x: Float[Array, "B S H N"], positions: Int[Array, "B S"], theta: float, style: str) -> Float[Array, "B S H N"]:
    """Rotary position embedding in float32 (Su et al. 2021). "half" pairs n with n + N/2, "interleaved" pairs 2n with 2n + 1.

    Written as x*cos + flip(x)*sin over an axis of pairs: all elementwise, where joining halves would be a pass of its own.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    pair, shape = (-2, (2, half)) if style == "half" else (-1, (half, 2))
    signs = jnp.expand_dims(jnp.array([-1.0, 1.0]), -1 if style == "half" else 0)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *shape)
    turned = pairs * jnp.expand_dims(jnp.cos(angles), pair) + jnp.flip(pairs, pair) * (jnp.expand_dims(jnp.sin(angles), pair) * signs)
    return turned.reshape(x.shape).astype(x.dtype)


class MLP(nnx.Module):
    """The dense feed-forward: down(act(up x)), or down(act(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        width = config.dense_width
        self.activation = config.activation
        self.up = weight(config, (config.d_model, width), ("embed", "mlp"))
        self.down = weight(config, (width, config.d_model), ("mlp", "embed"))
        if config.gated:
            self.gate = weight(config, (config.d_model, width), ("embed", "mlp"))
        self.gated = config.gated

    def __call__(self, x: Float[Array, "B S D"], scope: Scope, routed=None, replay=None) -> tuple[Float[Array, "B S D"], dict]:
        """The output, and nothing about a router."""
        del routed, replay
        act = ACTIVATIONS[self.activation]
        up = linear(x, self.up[...], scope, "mlp_up")
        hidden = act(linear(x, self.gate[...], scope, "mlp_gate")) * up if self.gated else act(up)
        return linear(scope.drop(hidden, "expert_hidden"), self.down[...], scope, "mlp_down"), {}
