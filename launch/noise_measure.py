"""What noise does to one batch: the error of every noisy product and value, beside the loss and the routes of a clean and a noisy pass.

A MeasuredModel computes what a Model does. Its scopes and operators compute each exact product as well and send sums of squares to a Tally on the
host, so that nothing of the library is patched. B batch, S sequence, L routing layers, E experts, K experts per token.
"""

import dataclasses
import functools
import threading
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.keys import Draw
from moe_jax.model import Model, ModelConfig
from moe_jax.model.layers import Scope
from moe_jax.noise import Noise, Operator
from moe_jax.noise import sites as names
from moe_jax.replay import Replay


class Tally:
    """Sums by (site, pass, layer) that a running program sends: [squared error, squared exact value, elements], in no order."""

    def __init__(self):
        self.sums: dict[tuple[str, str, int], np.ndarray] = defaultdict(lambda: np.zeros(3))
        self._lock = threading.Lock()

    def report(self, site: str, pass_: str, layer, noisy, exact, rows=None) -> None:
        """Called while tracing. noisy, exact: [..., C]; rows: Bool, which rows stand for a token; None: all."""
        exact, noisy = (jax.lax.stop_gradient(y).reshape(-1, y.shape[-1]).astype(jnp.float32) for y in (exact, noisy))
        rows = jnp.ones(exact.shape[0], bool) if rows is None else rows
        error, size = (jnp.where(rows[:, None], jnp.square(y), 0.0).sum() for y in (noisy - exact, exact))
        jax.debug.callback(functools.partial(self._add, site, pass_, exact.shape[1]), layer, error, size, rows.sum())

    def _add(self, site: str, pass_: str, columns: int, layer, error, size, rows) -> None:
        with self._lock:
            self.sums[site, pass_, int(layer)] += np.array([float(error), float(size), int(rows) * columns])

    def layers(self, site: str, pass_: str) -> dict[int, np.ndarray]:
        return {layer: sums for (*key, layer), sums in sorted(self.sums.items()) if key == [site, pass_]}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("scale", "key", "layer"), meta_fields=("site", "kind", "passes", "format", "tally")
)
@dataclasses.dataclass(frozen=True)
class MeasuredOperator(Operator):
    """An Operator that also computes each product it perturbs exactly, and reports the two."""

    layer: Any = -1
    tally: Any = None

    def product(self, pass_: str, rows, a, b, multiply, *place):
        noisy = super().product(pass_, rows, a, b, multiply, *place)
        if pass_ in self.passes:
            real = (a != 0).any(-1).reshape(-1)  # rows of another expert (dense) and those that fill up a chunk are zero
            if self.site in names.GROUPS["experts"] and b.ndim == 2:
                # A tile of the blocked dispatch is filled up with the rows of the next expert, or with row 0; an expert's own rows come in
                # ascending order, so what follows a step down is not its own. (Rows that fill up without one would have to come from a next
                # expert whose first token is behind this one's last: they are few, and are real rows times another matrix.)
                step_down = jnp.concatenate([jnp.zeros(1, bool), rows[1:] <= rows[:-1]])
                real &= ~jax.lax.cummax(step_down.astype(jnp.int32)).astype(bool)
            self.tally.report(self.site, pass_, self.layer, noisy, multiply(a, b), real)
        return noisy

    @property
    def _own_sums(self) -> int:
        return super().sum_count

    @property
    def _rounds_weight_gradient(self) -> bool:
        return self.kind == "quantise" and "grad_weight" in self.passes

    @property
    def sum_count(self) -> int:
        return self._own_sums + self._rounds_weight_gradient

    def partial_sums(self, a, b, multiply) -> tuple[jax.Array, ...]:
        own = super().partial_sums(a, b, multiply)
        return (*own, multiply(a, b)) if self._rounds_weight_gradient else own

    def weight_gradient(self, sums: tuple[jax.Array, ...], first):
        noisy = super().weight_gradient(sums[: self._own_sums], first)
        if "grad_weight" in self.passes:
            self.tally.report(self.site, "grad_weight", self.layer, noisy, sums[-1] if self._rounds_weight_gradient else sums[0])
        return noisy


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "fixed", "layer", "tokens", "scales"),
    meta_fields=("sites", "dropout", "freeze", "layout", "balance", "tally"),
)
@dataclasses.dataclass(frozen=True)
class MeasuredScope(Scope):
    """A Scope whose operators and perturbations report what they do."""

    tally: Any = None

    def operator(self, site: str) -> Operator | None:
        operator = super().operator(site)
        if operator is None:
            return None
        return MeasuredOperator(**_fields(operator), layer=jnp.asarray(self.layer, jnp.int32), tally=self.tally)

    def perturb(self, y, site: str, rows=None):
        noisy = super().perturb(y, site, rows)
        if self.noise(site) is not None:
            self.tally.report(site, "forward", jnp.asarray(self.layer, jnp.int32), noisy, y)
        return noisy


class MeasuredModel(Model):
    """A Model that tells a Tally about every noisy product and value; its results are those of Model."""

    def __init__(self, config: ModelConfig, tally: Tally):
        # so that it does not hang on jax whether a block that is computed again in the backward pass reports again
        super().__init__(config.replace(remat="none"))
        self._tally = tally

    def _scope(self, *args):
        scope, scales = super()._scope(*args)
        return MeasuredScope(**_fields(scope), tally=self._tally), scales


def _fields(value) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """What one batch showed. L routing layers, B sequences of S tokens, K experts per token, E experts."""

    tally: Tally
    loss: float  # clean, mean over tokens in nats
    noisy_loss: float
    logits: np.ndarray | None  # [L, B, S, E] of the clean network; None for a dense model
    changed: np.ndarray | None  # Bool[L, B, S]; all False where routes are replayed


def measure(config: ModelConfig, params, batch, noise: Noise, draw: Draw, replay: Replay | None = None) -> Measurement:
    """Runs the batch (tokens and targets Int[B, S]) clean and noisy; the backward pass too, in the phase train, if a site names gradients.

    replay: routes that both passes take.
    """
    tally, capture = Tally(), ("trace", "router_logits") if config.moe_layers else ()
    acting = noise.in_phase(draw.phase)
    backward = draw.phase == "train" and acting is not None and any(set(site.passes) - {"forward"} for _, site in acting.structure)

    def mean_loss(params, model: Model, noise):
        total, _, out = model.loss(params, batch["tokens"], batch["targets"], noise=noise, draw=draw, capture=capture, replay=replay)
        return total / batch["targets"].size, (out.trace.ids if out.trace else None, out.router_logits)

    def noisy_pass(params):
        forward = functools.partial(mean_loss, model=MeasuredModel(config, tally), noise=noise)
        if not backward:
            return forward(params)
        return jax.value_and_grad(forward, has_aux=True)(params)[0]  # the reports keep alive what they need of the gradients

    loss, (ids, logits) = jax.jit(lambda params: mean_loss(params, Model(config), None))(params)
    noisy_loss, (noisy_ids, _) = jax.jit(noisy_pass)(params)
    jax.effects_barrier()
    changed = None if ids is None else (np.sort(ids, -1) != np.sort(noisy_ids, -1)).any(-1)
    return Measurement(tally, float(loss), float(noisy_loss), None if logits is None else np.asarray(logits, np.float64), changed)
