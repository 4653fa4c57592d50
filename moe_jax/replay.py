"""The router under control: routes recorded before as an input of a forward pass, and what of a router stands still.

L MoE layers, B sequences, S positions, E experts, K experts per token.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from moe_jax.errors import ConfigError, TraceError, check_known
from moe_jax.routing import RoutingTrace, trace_dtype, unrecorded

WHAT = ("ids", "ids+weights")
POLICIES = ("live", "replayed", "off")
# freeze_params: the router's weights and biases never change. stop_gate_gradient: no gradient passes the gate into the trunk. stop_aux_gradient: balance and z
# loss train nothing. freeze_bias: the selection bias is not updated.
FREEZES = ("freeze_params", "stop_gate_gradient", "stop_aux_gradient", "freeze_bias")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("trace",), meta_fields=("what", "balance_loss", "z_loss", "load", "selection_bias")
)
@dataclasses.dataclass(frozen=True)
class Replay:
    """Routes to take instead of the router's own; a row that holds none (or ids that cannot be one: too large, or twice the same) is routed live.

    what: "ids" takes the experts and gathers their weights from the live logits, so that the router learns; "ids+weights" takes the recorded weights too: where
    it does, the language loss gives the router no gradient, and what still trains it are its own losses. The other fields say what the rest of the router
    follows: "live" its own choice, "replayed" the experts that worked, "off" nothing (a loss of 0, no counts, no update). The z loss sees logits alone,
    so it has no "replayed".
    Raises ConfigError for an unknown choice, and for "ids+weights" without recorded weights.
    """

    trace: RoutingTrace  # ids [L, B, S, K]
    what: str = "ids"
    balance_loss: str = "live"
    z_loss: str = "live"
    load: str = "replayed"
    selection_bias: str = "off"

    def __post_init__(self):
        for field, known in (
            ("what", WHAT),
            ("balance_loss", POLICIES),
            ("z_loss", ("live", "off")),
            ("load", POLICIES),
            ("selection_bias", POLICIES),
        ):
            check_known(f"replay {field}", getattr(self, field), known)
        if self.what == "ids+weights" and isinstance(self.trace, RoutingTrace) and self.trace.weights is None:
            raise ConfigError("replay of ids+weights needs a trace with weights, and this one has none; record with weights or replay ids")

    def micro_batches(self, count: int) -> "Replay":
        """The same with arrays [count, L, B/count, S, K]: one step's rows cut into micro-batches, in order."""

        def cut(x):
            return x.reshape(x.shape[0], count, -1, *x.shape[2:]).swapaxes(0, 1)

        trace = self.trace
        weights = None if trace.weights is None else cut(trace.weights)
        layers = np.broadcast_to(np.asarray(trace.layer_index), (count, len(trace.layer_index)))
        return dataclasses.replace(self, trace=RoutingTrace(cut(trace.ids), weights, layers))

    # --- one layer: the trace's arrays are [B, S, K] ---

    def recorded(self, num_experts: int) -> Bool[Array, "T 1"]:
        """Which rows hold a route that this router could have taken."""
        ids = jnp.asarray(self.trace.ids).reshape(-1, self.trace.ids.shape[-1])
        twice = jnp.triu(ids[:, :, None] == ids[:, None, :], 1).any((1, 2))
        return ((ids < num_experts).all(-1) & ~twice)[:, None]

    def ids(self, live: Integer[Array, "T K"], recorded: Bool[Array, "T 1"]) -> Integer[Array, "T K"]:
        """The experts to take."""
        return jnp.where(recorded, self.trace.ids.reshape(live.shape).astype(live.dtype), live)

    def weights(self, live: Float[Array, "T K"], recorded: Bool[Array, "T 1"]) -> Float[Array, "T K"]:
        """The weights to take."""
        weights = self.trace.weights if self.what == "ids+weights" else None
        return live if weights is None else jnp.where(recorded, weights.reshape(live.shape), live)

    def counts(
        self, live: Integer[Array, "T K"], used: Integer[Array, "T K"], recorded: Bool[Array, "T 1"]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """replay/live_rows: of all rows, those routed live. replay/set_overlap: of recorded experts, those that the router would have chosen."""
        rows = recorded.sum(dtype=jnp.float32)
        total = jnp.asarray(len(live), jnp.float32)
        common = ((used[:, :, None] == live[:, None, :]).any(-1) & recorded).sum(dtype=jnp.float32)
        return {"replay/live_rows": (total - rows, total), "replay/set_overlap": (common, rows * live.shape[-1])}


def check_freeze(freeze: Sequence[str]) -> tuple[str, ...]:
    """The names of what is frozen; raises ConfigError for an unknown one."""
    for name in freeze:
        check_known("freeze", name, FREEZES)
    return tuple(freeze)


def empty_trace(layers: Sequence[int], num_experts: int, top_k: int, batch: int, length: int, weights: bool = False) -> RoutingTrace:
    """A trace in which no row is recorded: its replay is the live model, through the program of a replay."""
    shape, dtype = (len(layers), batch, length, top_k), trace_dtype(num_experts)
    ids = np.full(shape, unrecorded(dtype), dtype)
    return RoutingTrace(ids, np.zeros(shape, np.float32) if weights else None, np.asarray(layers, np.int32))


def check_shape(trace: RoutingTrace, layers: Sequence[int], num_experts: int, top_k: int, batch: int, length: int) -> None:
    """Raises TraceError, with the numbers, when the trace is not one of this many layers, sequences, positions and experts."""
    wanted = {"layers": len(layers), "sequences": batch, "positions": length, "experts per token": top_k}
    if len(trace.ids.shape) != 4:
        raise TraceError(f"a trace's ids are [layers, sequences, positions, experts per token], got the shape {trace.ids.shape}")
    wrong = [
        f"{have} {name} where the model and its text have {want}"
        for have, (name, want) in zip(trace.ids.shape, wanted.items(), strict=True)
        if have != want
    ]
    if trace.ids.dtype != trace_dtype(num_experts):
        wrong.append(f"ids in {trace.ids.dtype} where {num_experts} experts need {trace_dtype(num_experts)}")
    if trace.weights is not None and trace.weights.shape != trace.ids.shape:
        wrong.append(f"weights of shape {trace.weights.shape} beside ids of shape {trace.ids.shape}")
    if wrong:
        raise TraceError(f"this trace cannot be replayed here: it has {'; '.join(wrong)}")


def check_trace(trace: RoutingTrace, layers: Sequence[int], num_experts: int, top_k: int, batch: int, length: int) -> None:
    """As `check_shape`, and the values too, on the host: layer numbers, ids out of range, an expert twice in a row."""
    check_shape(trace, layers, num_experts, top_k, batch, length)
    found = tuple(int(layer) for layer in np.asarray(trace.layer_index))
    if found != tuple(layers):
        raise TraceError(f"this trace holds the layers {_few(found)}, the model routes in {_few(tuple(layers))}")
    ids = np.asarray(trace.ids)
    present = ids != unrecorded(ids.dtype)
    _refuse(present & (ids >= num_experts), ids, f"the model has {num_experts} experts")
    _refuse((present != present[..., :1]), ids, "a row is recorded whole or not at all")
    for slot in range(1, top_k):  # pair by pair, a sixth of the time of sorting each row
        _refuse((ids[..., slot:] == ids[..., : top_k - slot]) & present[..., slot:], ids, "no expert can be chosen twice")


def _refuse(bad: np.ndarray, ids: np.ndarray, why: str) -> None:
    if bad.any():
        layer, row, position, _ = (int(i) for i in np.argwhere(bad)[0])
        count = int(bad.any(-1).sum())
        raise TraceError(
            f"{count} rows of this trace are no routes: {why}, and layer {layer}, sequence {row}, position {position} holds "
            f"{ids[layer, row, position].tolist()}"
        )


def _few(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f", … ({len(numbers)} in all)" if len(numbers) > 8 else "")
