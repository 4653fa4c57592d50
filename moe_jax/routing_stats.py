"""What a router did, as numbers that need no model: health of one pass as (sum, count) pairs, and imbalance of a load.

T tokens, E experts, K experts chosen per token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def health(logits: Float[Array, "T E"], k: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Per-token quantities of a router's logits, each as (sum over tokens, tokens), without gradient.

    router/entropy: of the softmax over E, in nats. router/logit_mean, router/logit_std: over the experts of a token (relative noise
    depends on the mean, which softmax ignores). router/margin: K-th minus (K+1)-th largest logit, 0 when K = E.
    """
    logits = jax.lax.stop_gradient(logits)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    margin = jnp.zeros(logits.shape[0])
    if k < logits.shape[-1]:
        top = jax.lax.top_k(logits, k + 1)[0]
        margin = top[:, k - 1] - top[:, k]
    per_token = {
        "router/entropy": -(jnp.exp(log_p) * log_p).sum(-1),
        "router/logit_mean": logits.mean(-1),
        "router/logit_std": logits.std(-1),
        "router/margin": margin,
    }
    count = jnp.asarray(logits.shape[0], jnp.float32)
    return {name: (value.sum(), count) for name, value in per_token.items()}


def load_cv(load: Float[Array, "... E"]) -> Float[Array, "..."]:
    """Coefficient of variation of an expert load: population standard deviation over mean; 0 when nothing was routed."""
    mean = load.mean(-1)
    return load.std(-1) / jnp.where(mean > 0, mean, 1.0)


def dead_experts(load: Float[Array, "... E"]) -> Float[Array, "..."]:
    """How many experts received no token."""
    return (load == 0).sum(-1).astype(jnp.float32)
