"""What a router did, as numbers that need no model: health of one pass, two passes compared, flips predicted from margins, imbalance of a load.

All are without gradient. Scalars come as (sum, count), float32, which add up over layers and batches; for a trace [L, B, S, K] reshape to
[L, B*S, K] and use jax.vmap. weights [T] and valid [T] leave tokens out (weight 0, False); so does an id that means "unrecorded".

T tokens, E experts, K experts chosen per token, L layers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from moe_jax import routing

Pairs = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)

# bins of explained_by_margin: lower edge in, upper edge out
MARGIN_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, float("inf"))
NODES, REACH = 257, 7.0  # of predicted_flips: points of its integral, and how many standard deviations from a logit it looks


def health(logits: Float[Array, "T E"], k: int, weights: Float[Array, "T"] | None = None, top_k: Callable = jax.lax.top_k) -> Pairs:
    """Per-token quantities of a router's logits.

    router/entropy: of the softmax over E, in nats. router/logit_mean, router/logit_std: over the experts of a token. router/logit_offset:
    abs(mean) / std of a token's logits. The mean is their common offset, which softmax and top-k ignore and noise relative to a logit does
    not: such noise is sqrt(1 + offset**2) times as large, in rms against the logits' spread, as without offset. 0 where all logits of the
    token are equal. router/margin: K-th minus (K+1)-th largest logit, 0 when K = E. top_k: as jax.lax.top_k, for rows divided over devices.
    """
    logits = jax.lax.stop_gradient(logits)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    mean, std = logits.mean(-1), logits.std(-1)
    margin = jnp.zeros(logits.shape[0])
    if k < logits.shape[-1]:
        top, _ = _top_k(logits, k + 1, top_k)
        margin = top[:, k - 1] - top[:, k]
    spread = std > 1e-6 * jnp.abs(mean)  # less is rounding
    per_token = {
        "router/entropy": -(jnp.exp(log_p) * log_p).sum(-1),
        "router/logit_mean": mean,
        "router/logit_std": std,
        "router/logit_offset": jnp.where(spread, jnp.abs(mean) / jnp.where(spread, std, 1.0), 0.0),
        "router/margin": margin,
    }
    return {name: _pair(value, weights) for name, value in per_token.items()}


def flips(
    clean: Float[Array, "T E"],
    noisy: Float[Array, "T E"],
    k: int,
    weights: Float[Array, "T"] | None = None,
    top_k: Callable = jax.lax.top_k,
) -> Pairs:
    """What noise on the logits did to the chosen sets, and what the margins let expect.

    router/flips: tokens whose set of K changed. router/boundary_variance: square of delta, the change of (K-th minus (K+1)-th) at the two
    experts that hold these ranks in the clean logits. router/flips_predicted: Phi(-margin / sigma_b), sigma_b = rms of delta over the
    tokens of this call. That neglects every pair but the one at the boundary (so it is low where many experts crowd there: see
    predicted_flips), that sigma_b differs between tokens, and that noise need not be Gaussian or of mean 0. Without noise it is 0.
    """
    changed, z, squared = _boundary(clean, noisy, k, weights, top_k)
    per_token = {"router/flips": changed, "router/flips_predicted": ndtr(-z), "router/boundary_variance": squared}
    return {name: _pair(value, weights) for name, value in per_token.items()}


def explained_by_margin(
    clean: Float[Array, "T E"], noisy: Float[Array, "T E"], k: int, weights: Float[Array, "T"] | None = None
) -> dict[str, Float[Array, "bins"]]:
    """Calibration of `flips`, binned by z = margin / sigma_b between MARGIN_EDGES: "tokens", "flips" (observed) and "predicted" (the sum of
    Phi(-z)). Tables of several batches and layers add up; a token without noise lies in the last bin."""
    changed, z, _ = _boundary(clean, noisy, k, weights)
    where = jnp.searchsorted(jnp.asarray(MARGIN_EDGES[1:-1]), z, side="right")
    rows = jnp.stack([jnp.ones_like(z), changed.astype(z.dtype), ndtr(-z)]) * (1.0 if weights is None else jax.lax.stop_gradient(weights))
    return dict(zip(("tokens", "flips", "predicted"), jnp.zeros((3, len(MARGIN_EDGES) - 1)).at[:, where].add(rows), strict=True))


def explained_share(table: dict[str, Float[Array | np.ndarray, "bins"]]) -> Float[Array, ""]:
    """The share of observed flips that the prediction accounts for, bin by bin (what it predicts too many in one bin excuses none in
    another): 1 when no bin has more flips than predicted, nan when nothing flipped."""
    return jnp.minimum(table["flips"], table["predicted"]).sum() / table["flips"].sum()


def predicted_flips(logits: Float[Array, "T E"], sigma: ArrayLike, k: int) -> Float[Array, "T"]:
    """The probability that a token's chosen set changes when each logit gets independent Gaussian noise of standard deviation sigma.

    sigma: broadcastable to [T, E], for instance s * abs(logits) for relative noise of scale s. The integral over t of
    (1 - P(all K chosen > t)) dP(every other < t), in log space so that small probabilities keep their digits. Against quadrature in double
    precision: within 1e-6, and within 1 % of probabilities down to 1e-10; within 3e-3 where an expert near the boundary has a sigma of less
    than a thirtieth of its rivals'. A token without any noise, or with K = E: 0.
    """
    return _predicted_flips(jax.lax.stop_gradient(logits), jax.lax.stop_gradient(jnp.asarray(sigma)), k)


@functools.partial(jax.jit, static_argnames="k")
def _predicted_flips(logits, sigma, k):
    tokens, experts = logits.shape
    if k == experts:
        return jnp.zeros(tokens)
    ranked, order = jax.lax.top_k(logits, experts)
    ranked = ranked - ranked[:, k - 1 : k]  # near 0 where it matters: an offset would cost digits
    sigma = jnp.take_along_axis(jnp.broadcast_to(sigma, logits.shape), order, axis=-1)
    token = functools.partial(_chance_of_change, k)
    return jax.lax.map(lambda row: token(*row), (ranked, sigma), batch_size=max(1, min(tokens, 2**21 // (NODES * experts))))


def _chance_of_change(k: int, ranked: Float[Array, "E"], sigma: Float[Array, "E"]) -> Float[Array, ""]:
    s = jnp.maximum(sigma, 1e-6 * jnp.abs(ranked).max() + 1e-30)  # an exact logit is a step: one that float32 can place
    low, high = ranked - REACH * s, ranked + REACH * s
    start = jnp.maximum(low[k:].max(), low[:k].min())  # below it no chosen logit falls, or the largest other one never is
    stop = jnp.maximum(start, jnp.minimum(high[k:].max(), high[:k].min()))
    t = start + (stop - start) * jnp.linspace(0.0, 1.0, NODES)
    x = (t[:, None] - ranked) / s
    some_below = -jnp.expm1(log_ndtr(-x[:, :k]).sum(-1))  # of the chosen, under t
    some_above = -jnp.expm1(log_ndtr(x[:, k:]).sum(-1))  # of the others, over t

    def trapezoids(step: int):
        f, g = some_below[::step], some_above[::step]  # increments of g, not its density: all mass is counted, however narrow its peak
        return ((f[1:] + f[:-1]) / 2 * (g[:-1] - g[1:])).sum()

    inside = (4 * trapezoids(1) - trapezoids(2)) / 3  # Richardson: the error of second order cancels
    return jnp.where(sigma.max() > 0, jnp.clip(inside + some_below[-1] * some_above[-1], 0.0, 1.0), 0.0)


def compare(
    ids_a: Integer[Array, "T K"],
    ids_b: Integer[Array, "T K"],
    logits_a: Float[Array, "T E"] | None = None,
    logits_b: Float[Array, "T E"] | None = None,
    weights_a: Float[Array, "T K"] | None = None,
    weights_b: Float[Array, "T K"] | None = None,
    valid: Bool[Array, "T"] | None = None,
) -> Pairs:
    """Two routings of the same tokens, over the tokens that are valid and recorded in both.

    router/set_overlap: shared experts / K. router/tokens_changed: tokens with another set. router/order_changed: tokens with the same set in
    another order. With both weights, router/moved_mass: half the L1 distance of the two weight vectors over the experts. With both
    logits, router/kl: KL(softmax a || softmax b) in nats.
    """
    match = _match(ids_a, ids_b)
    overlap = match.sum((-1, -2))
    changed = overlap < ids_a.shape[-1]
    per_token = {
        "router/set_overlap": overlap / ids_a.shape[-1],
        "router/tokens_changed": changed,
        "router/order_changed": ~changed & (jnp.asarray(ids_a) != jnp.asarray(ids_b)).any(-1),
    }
    if weights_a is not None and weights_b is not None:
        a, b = jax.lax.stop_gradient((weights_a, weights_b))
        there = (match * b[..., None, :]).sum(-1)  # b's weight on each of a's experts
        per_token["router/moved_mass"] = (jnp.abs(a - there).sum(-1) + (jnp.abs(b) * ~match.any(-2)).sum(-1)) / 2
    if logits_a is not None and logits_b is not None:
        log_a, log_b = (jax.nn.log_softmax(jax.lax.stop_gradient(logits), axis=-1) for logits in (logits_a, logits_b))
        per_token["router/kl"] = (jnp.exp(log_a) * (log_a - log_b)).sum(-1)
    counted = _counted(ids_a, ids_b, valid).astype(jnp.float32)
    return {name: _pair(value, counted) for name, value in per_token.items()}


def gained_lost(
    ids_a: Integer[Array, "T K"], ids_b: Integer[Array, "T K"], num_experts: int, valid: Bool[Array, "T"] | None = None
) -> tuple[Float[Array, "E"], Float[Array, "E"]]:
    """(gained, lost): for each expert the tokens that chose it in b only, and in a only; tokens as in `compare`."""
    match, counted = _match(ids_a, ids_b), _counted(ids_a, ids_b, valid)

    def load(ids, alone):
        alone = (alone & counted[:, None]).reshape(-1).astype(jnp.float32)
        return routing.expert_load(jnp.asarray(ids, jnp.int32).reshape(-1, 1), num_experts, alone)

    return load(ids_b, ~match.any(-2)), load(ids_a, ~match.any(-1))


def first_difference(ids_a: Integer[Array, "L T K"], ids_b: Integer[Array, "L T K"]) -> Integer[Array, "T"]:
    """For each token the first position on the layer axis where the sets differ, L where none does; layers unrecorded in a or b are passed over.
    routing.expert_load(found[:, None], L + 1) is its histogram."""
    differs = (_match(ids_a, ids_b).sum((-1, -2)) < ids_a.shape[-1]) & _counted(ids_a, ids_b, None)
    return jnp.where(differs.any(0), differs.argmax(0), len(differs)).astype(jnp.int32)


def amplification(x: Float[Array | np.ndarray, "L"]) -> Float[Array, "L-1"]:
    """Growth of a per-layer quantity from each layer to the next, x[l+1] / x[l]; nan where x[l] is 0, since growth from nothing has no ratio."""
    x = jax.lax.stop_gradient(x)
    return jnp.where(x[:-1] == 0, jnp.nan, x[1:] / jnp.where(x[:-1] == 0, 1.0, x[:-1]))


def load_cv(load: Float[Array | np.ndarray, "... E"]) -> Float[Array, "..."]:
    """Coefficient of variation of an expert load: population standard deviation over mean; 0 when nothing was routed."""
    mean = load.mean(-1)
    return load.std(-1) / jnp.where(mean > 0, mean, 1.0)


def dead_experts(load: Float[Array | np.ndarray, "... E"]) -> Float[Array, "..."]:
    """How many experts received no token."""
    return jnp.asarray(load == 0).sum(-1).astype(jnp.float32)


def _pair(value: Array, weights: Array | None) -> tuple[jax.Array, jax.Array]:
    if weights is None:
        return value.sum(dtype=jnp.float32), jnp.asarray(value.size, jnp.float32)
    weights = jax.lax.stop_gradient(weights)
    return jnp.where(weights != 0, value * weights, 0.0).sum(dtype=jnp.float32), weights.sum(dtype=jnp.float32)


def _top_k(logits, k: int, top_k: Callable = jax.lax.top_k):
    """top_k for callers that slice what it gives: without the barrier XLA on a CPU sorts all E instead, nine times as slow at E = 128, K = 8."""
    return jax.lax.optimization_barrier(tuple(top_k(logits, k)))


def _boundary(clean, noisy, k, weights, top_k: Callable = jax.lax.top_k) -> tuple[Bool[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """(the set changed, margin / sigma_b with inf for no noise, delta**2) of each token."""
    clean, noisy = jax.lax.stop_gradient((clean, noisy))
    if k == clean.shape[-1]:
        zero = jnp.zeros(clean.shape[0])
        return zero > 0, zero + jnp.inf, zero
    top, ids = _top_k(clean, k + 1, top_k)
    changed = ~_match(ids[:, :k], top_k(noisy, k)[1]).any(-1).all(-1)
    moved = jnp.take_along_axis(noisy - clean, ids[:, k - 1 :], axis=-1)
    squared = (moved[:, 0] - moved[:, 1]) ** 2
    total, count = _pair(squared, weights)
    sigma = jnp.sqrt(total / jnp.maximum(count, 1.0))
    return changed, jnp.where(sigma > 0, (top[:, k - 1] - top[:, k]) / jnp.where(sigma > 0, sigma, 1.0), jnp.inf), squared


def _match(ids_a, ids_b) -> Bool[Array, "... K K"]:
    """Which of a's slots and which of b's hold the same expert."""
    return jnp.asarray(ids_a)[..., :, None] == jnp.asarray(ids_b)[..., None, :]


def _counted(ids_a, ids_b, valid) -> Bool[Array, "... T"]:
    recorded = (jnp.asarray(ids != routing.unrecorded(ids.dtype)).all(-1) for ids in (ids_a, ids_b))
    return functools.reduce(jnp.logical_and, recorded if valid is None else (*recorded, valid))
