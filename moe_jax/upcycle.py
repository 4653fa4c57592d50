"""A dense model made into a mixture of experts: every feed-forward becomes E copies of itself behind a router (Komatsuzaki et al. 2023).

With weights that sum to 1, equal experts give the dense model's output whatever the router says. What makes them differ is asked for by name. E experts,
D model width, F feed-forward width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax import paths
from moe_jax.errors import ConfigError
from moe_jax.keys import parameter_key
from moe_jax.model import Model, ModelConfig

_WIDTH = {"up": -1, "gate": -1, "down": -2}  # the axis of F


def upcycled(
    config: ModelConfig, num_experts: int, experts_per_token: int, router_std: float = 0.02, dense_layers: tuple[int, ...] = ()
) -> ModelConfig:
    """The configuration of the mixture: all layers but `dense_layers` route. Raises ConfigError for a model that has experts already."""
    if config.moe_layers:
        raise ConfigError(
            f"this model has {config.num_experts} experts in {len(config.moe_layers)} layers already; only a dense model is upcycled"
        )
    if num_experts < 2 or not router_std >= 0:
        raise ConfigError(f"upcycling makes at least 2 experts with a router_std of at least 0, got {num_experts} and {router_std}")
    return config.replace(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        d_expert=config.dense_width,
        d_ff=config.dense_width,
        dense_layers=dense_layers,
        renormalise=True,
        init_std=router_std,
    )


def upcycle(
    dense: Model, params: dict[str, Any], model: Model, seed: int = 0, expert_noise: float = 0.0, reinitialise: float = 0.0
) -> dict[str, Any]:
    """The parameters of `model`, which `upcycled` described, from those of the dense one.

    The routers are drawn from N(0, init_std), a selection bias is 0. expert_noise: adds N(0, 1) times this times the standard deviation of the matrix to
    each expert's, by draws of its own. reinitialise: the share of the F hidden units that each expert draws anew, in all its matrices, from a normal
    distribution with the mean and standard deviation of the matrix (drop-upcycling, Nakamura et al. 2025). With both 0 the logits are the dense model's.
    Raises ConfigError for a share outside [0, 1] and a negative noise.
    """
    if not 0 <= reinitialise <= 1 or not expert_noise >= 0:
        raise ConfigError(f"reinitialise must be from 0 to 1 and expert_noise at least 0, got {reinitialise} and {expert_noise}")
    old, found = _by_layer(dense, params), {}
    for path, spec in paths.flatten(model.specs).items():
        stack, _, within = path.partition("/")
        layers = model.stacks().get(stack)
        if layers is None:
            found[path] = old[path]
        elif spec.role in ("router", "selection_bias"):  # what a dense model has nothing of
            found[path] = spec.initial(parameter_key(seed, path))
        else:
            leaf = jnp.stack([old[f"{layer}/{within}"] for layer in layers])
            if spec.role == "expert":
                leaf = _experts(
                    leaf, model.config.num_experts, within, parameter_key(seed, f"{stack}/feed_forward"), expert_noise, reinitialise
                )
            found[path] = leaf.astype(spec.dtype)
    return model.place(paths.unflatten(found))


def _by_layer(model: Model, params: dict[str, Any]) -> dict[str, jax.Array]:
    """Parameters in layers by absolute layer and path in it, the others by their path."""
    stacks, found = model.stacks(), {}
    for path, leaf in paths.flatten(params).items():
        stack, _, within = path.partition("/")
        if stack in stacks:
            found |= {f"{layer}/{within}": leaf[index] for index, layer in enumerate(stacks[stack])}
        else:
            found[path] = leaf
    return found


def _experts(leaf: Float[Array, "L A B"], count: int, within: str, key: jax.Array, noise: float, share: float) -> Float[Array, "L E A B"]:
    """The experts' matrices from the dense ones: copies, with what was asked for. key: the same for all matrices of a stack."""
    name = within.rsplit("/", 1)[1]
    copies = jnp.repeat(leaf[:, None], count, axis=1)
    own = jax.random.fold_in(key, sorted(_WIDTH).index(name) + 1)
    mean, std = (moment(leaf.astype(jnp.float32), axis=(-2, -1), keepdims=True)[:, None] for moment in (jnp.mean, jnp.std))
    if noise:
        copies = copies + noise * std * jax.random.normal(own, copies.shape)
    if share:
        width = copies.shape[_WIDTH[name]]
        anew = _chosen(key, (leaf.shape[0], count), width, round(share * width))
        anew = anew[..., None, :] if _WIDTH[name] == -1 else anew[..., :, None]
        copies = jnp.where(anew, mean + std * jax.random.normal(jax.random.fold_in(own, 7), copies.shape), copies)
    return copies


def _chosen(key: jax.Array, shape: tuple[int, int], width: int, count: int) -> Bool[Array, "L E F"]:
    """Of each expert's hidden units, `count` at random: the same in all of its matrices."""
    order = jax.random.uniform(key, (*shape, width)).argsort(-1).argsort(-1)
    return order < count
