"""The keys and values of tokens that a model has read, so that it reads each once.

L layers, B sequences, C tokens that there is room for, S new tokens, G key-value heads, R query heads to each, N head width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.tree_util.register_dataclass, data_fields=("keys", "values"), meta_fields=("fresh",))
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values by layer, sequence and position. What lies behind a token's own position is never read, so it may hold anything."""

    keys: Float[Array, "L B C G N"]  # turned by their positions
    values: Float[Array, "L B C G N"]
    fresh: bool = False  # nothing has been written: the first tokens stand at the positions 0 to S-1 and attend to each other alone

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def written(
        self, layer: Int[Array, ""] | int, positions: Int[Array, "B S"], k: Float[Array, "B S G N"], v: Float[Array, "B S G N"]
    ) -> "Cache":
        """With the keys and values of new tokens."""

        def put(all_layers, new):
            new = new.astype(all_layers.dtype)
            if self.fresh:
                return jax.lax.dynamic_update_slice(all_layers, new[None], (layer, 0, 0, 0, 0))
            return all_layers.at[layer, jnp.arange(len(new))[:, None], positions].set(new, unique_indices=True)

        return dataclasses.replace(self, keys=put(self.keys, k), values=put(self.values, v))

    def attend(
        self, layer: Int[Array, ""] | int, q: Float[Array, "B S H N"], positions: Int[Array, "B S"], window: int | None
    ) -> Float[Array, "B S H N"]:
        """softmax(q k / sqrt(N)) v over the tokens at each position and before it, softmax in float32."""
        k, v = self.keys[layer], self.values[layer]
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
        scores = jnp.einsum("bsgrn,bcgn->bgrsc", grouped, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        distance = positions[:, :, None] - jnp.arange(self.length)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
        return jnp.einsum("bgrsc,bcgn->bsgrn", weights, v, preferred_element_type=jnp.float32).reshape(q.shape).astype(q.dtype)
