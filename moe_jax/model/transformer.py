"""The decoder: embedding, blocks under one scan, final norm; everything the routers did comes back as scan outputs.

B batch, S sequence, D model width, V vocabulary, L layers, E experts, K experts per token.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.axes import ParamSpec
from moe_jax.model.attention import Attention
from moe_jax.model.bind import bind
from moe_jax.model.cache import Cache
from moe_jax.model.config import ModelConfig
from moe_jax.model.layers import MLP, RMSNorm, Scope, weight
from moe_jax.model.moe import ROUTING, MoE
from moe_jax.replay import Replay


class Block(nnx.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: ModelConfig, moe: bool):
        self.norm_attention = RMSNorm(config, config.d_model)
        self.attention = Attention(config)
        self.norm_moe = RMSNorm(config, config.d_model)
        self.feed_forward = MoE(config) if moe else MLP(config)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions,
        scope: Scope,
        capture: tuple[str, ...],
        replay: Replay | None = None,
        cache: Cache | None = None,
    ):
        """(x after the block, what its router did or {}, the cache with these tokens)."""
        entered = x
        with jax.named_scope("attention"):
            y, cache = self.attention(self.norm_attention(x, scope, "norm_attention"), positions, scope, cache)
            x = x + scope.drop(y, "attention_output")
        read, routed = self._read_by_experts_and_router(x, scope)
        with jax.named_scope("moe" if isinstance(self.feed_forward, MoE) else "mlp"):
            y, router = self.feed_forward(scope.laid(read), scope, routed, replay)
        if "residual_ids" in capture and isinstance(self.feed_forward, MoE):
            router["residual_ids"] = self.feed_forward.ids_on(entered, scope)
        return scope.laid(x + scope.drop(y, "feed_forward_output")), router, cache

    def _read_by_experts_and_router(self, x, scope: Scope):
        """(norm x, None), or norm x as the experts read it and as the router does, when the norm's noise reaches one of the two alone."""
        noisy, noise = self.norm_moe(x, scope, "norm_moe"), scope.noise("norm_moe")
        if noise is None or noise.reach is None or len(noise.reach) == 2:
            return noisy, None
        clean = self.norm_moe(x)
        return (noisy, clean) if noise.reach == ("experts",) else (clean, noisy)


class Ends(nnx.Module):
    """What stands before and after the blocks."""

    def __init__(self, config: ModelConfig):
        self.config = config
        shape, axes = (config.vocab_size, config.d_model), ("vocab", "embed")
        self.embedding = weight(config, shape, axes, "embedding")
        self.norm_final = RMSNorm(config, config.d_model)
        if not config.tie_embeddings:
            self.head = weight(config, shape, axes, "head")

    def __call__(self, blocks: Callable, tokens: Int[Array, "B S"], scope: Scope):
        with jax.named_scope("embedding"):
            x = self.embedding[...][tokens].astype(self.config.dtypes.compute)
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.d_model**0.5, x.dtype)
        x, *found = blocks(scope.laid(scope.drop(scope.perturb(x, "embedding"), "embedding")))
        return scope.drop(self.norm_final(x, scope, "norm_final"), "final"), *found


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers whose parameters are stacked under one name."""

    name: str
    moe: bool
    layers: tuple[int, ...]  # absolute indices, ascending


def layer_plan(config: ModelConfig) -> tuple[tuple[Stack, ...], ...]:
    """Segments, each one scan over the stacks it lists, in order: a repeating pattern is one scan, otherwise each run of equal layers is one."""
    kinds = [layer in config.moe_layers for layer in range(config.num_layers)]
    count = len(kinds)
    period = next(p for p in range(1, count + 1) if count % p == 0 and kinds == kinds[:p] * (count // p))
    if period < count or count == 1:
        segments = [[tuple(range(start, count, period)) for start in range(period)]]
    else:
        starts = [0, *(i for i in range(1, count) if kinds[i] != kinds[i - 1]), count]
        segments = [[tuple(range(first, last))] for first, last in zip(starts[:-1], starts[1:], strict=True)]
    stacks = [layers for segment in segments for layers in segment]
    names = ["layers"] if len(stacks) == 1 else [f"layers_{index}" for index in range(len(stacks))]
    named = iter(names)
    return tuple(tuple(Stack(next(named), kinds[layers[0]], layers) for layers in segment) for segment in segments)


def declare_decoder(config: ModelConfig) -> tuple[dict[str, Any], Callable]:
    """(specs, forward): the nested dict of ParamSpecs and forward(params, tokens, positions, scope, scales, capture, replay, cache) -> (hidden, router, cache).

    The scope is that of what stands outside the layers; scales: per site of the layers, [L]. replay: routes of all MoE layers, or None. cache: of all
    layers, or None.
    """
    ends_specs, ends = bind(Ends(config))
    block_specs, blocks = {}, {}
    plan = layer_plan(config)
    for moe in {stack.moe for segment in plan for stack in segment}:
        block_specs[moe], blocks[moe] = bind(Block(config, moe))
    specs = dict(ends_specs)
    for segment in plan:
        for stack in segment:
            repeat = functools.partial(ParamSpec.stacked, count=len(stack.layers))
            specs[stack.name] = jax.tree.map(repeat, block_specs[stack.moe], is_leaf=lambda leaf: isinstance(leaf, ParamSpec))

    def forward(
        params,
        tokens,
        positions,
        scope: Scope,
        scales: Mapping[str, Float[Array, "L"]],
        capture: tuple[str, ...],
        replay: Replay | None,
        cache: Cache | None,
    ):
        def through_blocks(x):
            found, after = [], cache
            for segment in plan:
                (x, after), outputs = _through_segment(
                    config, gathering, segment, params, (x, after), positions, scope, scales, capture, replay
                )
                found.extend((stack.layers, output) for stack, output in zip(segment, outputs, strict=True) if output)
            return x, _in_layer_order(found), after

        def gathering(moe: bool, layer_params, *args):
            return blocks[moe](_gathered(scope, layer_params, block_specs[moe]), *args)

        own = _gathered(scope, {name: value for name, value in params.items() if name in ends_specs}, ends_specs)
        return ends(own, through_blocks, tokens, scope)

    return specs, forward


def _gathered(scope: Scope, params, specs):
    return params if scope.layout is None else scope.layout.gathered(params, specs)


def _through_segment(config, block, segment, params, carry, positions, scope, scales, capture, replay):
    """(x, cache) through one segment, and for each of its stacks what the routers did, with a leading axis of that stack's layers."""

    def step(carry, per_layer):
        (x, cache), outputs = carry, []
        for stack, (layer_params, layer, layer_scales, routes) in zip(segment, per_layer, strict=True):
            x, output, cache = block(stack.moe, layer_params, x, positions, scope.at(layer, layer_scales), capture, routes, cache)
            outputs.append(output)
        return (x, cache), outputs

    step = remat(step, config.remat, scope.layout is not None and scope.layout.size("fsdp") > 1)
    per_layer = [
        (
            params[stack.name],
            jnp.array(stack.layers, jnp.int32),
            {site: scale[jnp.array(stack.layers)] for site, scale in scales.items()},
            _routes_of(config, stack, replay),
        )
        for stack in segment
    ]
    if config.scan_layers:
        return jax.lax.scan(step, carry, per_layer)
    outputs = []
    for index in range(len(segment[0].layers)):
        carry, output = step(carry, jax.tree.map(lambda leaf: leaf[index], per_layer))  # noqa: B023 (read at once)
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _routes_of(config: ModelConfig, stack: Stack, replay: Replay | None) -> Replay | None:
    """The routes of one stack's layers, [layers, B, S, K]."""
    if replay is None or not stack.moe:
        return None
    rows = np.array([config.moe_layers.index(layer) for layer in stack.layers])
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], replay)


def remat(step: Callable, policy: str, gathers: bool = False) -> Callable:
    """The step with a policy of what its backward pass computes again; the routing is saved under each.

    gathers: it brings together parameters that are stored in parts. A backward pass that keeps everything would keep those of all layers, so "none" is
    "dots" there.
    """
    names = jax.checkpoint_policies.save_only_these_names(ROUTING)
    if policy == "none" and not gathers:
        return step
    if policy in ("none", "dots"):
        names = jax.checkpoint_policies.save_from_both_policies(names, jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return jax.checkpoint(step, policy=names)


def _in_layer_order(found: list[tuple[tuple[int, ...], dict]]) -> dict:
    """The routers' outputs of all stacks along one leading axis, in the order of the layers in the model."""
    if len(found) <= 1:
        return found[0][1] if found else {}
    order = np.argsort([layer for layers, _ in found for layer in layers])
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *(output for _, output in found))
