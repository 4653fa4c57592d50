"""Which optimizer rule each parameter gets, decided once from its declared role and axes, printed as a table, run as one optax chain."""

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from moe_jax.axes import ROLES, STACK_AXES, ParamSpec, Rules
from moe_jax.errors import ConfigError, check_known
from moe_jax.mesh import DEFAULT_RULES
from moe_jax.optim import muon, schedules
from moe_jax.paths import flatten, unflatten

LABELS = ("muon", "adamw", "frozen")
VARIANTS = ("seed", "moonlight")
_MUON_ROLES = ("hidden", "expert")
_VECTOR_ROLES = ("norm", "bias")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for the rest, and what is frozen. Learning rates are peaks; the schedule multiplies both."""

    variant: str = "seed"  # "seed": Keller Jordan's scale, decay on every AdamW leaf; "moonlight": 0.2 RMS, no decay on norms and biases
    learning_rate: float = 0.01  # Muon's
    adamw_learning_rate: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    eps: float = 1e-8  # AdamW's
    weight_decay: float = 0.1  # AdamW's, decoupled: multiplied by the learning rate
    muon_weight_decay: float | None = None  # None: 0 in the seed's variant, `weight_decay` in Moonlight's
    momentum: float = 0.95
    ns_steps: int = 5  # Newton-Schulz iterations
    ns_form: str = "auto"  # see moe_jax.optim.muon.orthogonalise
    ns_dtype: str = "float32"
    ns_batch: str | None = None
    matrices: str = "muon"  # of attention, feed-forwards and experts: "muon" or "adamw"
    router: str = "muon"  # "muon", "adamw" or "frozen"
    freeze_roles: tuple[str, ...] = ()
    dead_expert: str = "keep"  # "skip": an expert matrix with an exactly zero gradient is not moved
    clip_norm: float | None = 1.0  # over the trainable leaves; None: no clipping
    schedule: str = "warmup_cosine"
    warmup: int = 20  # updates
    total: int = 400  # updates at which the schedule would reach its floor, which a run need not reach
    floor: float = 0.1  # of the peak

    def __post_init__(self):
        for field, value, known in (
            ("variant", self.variant, VARIANTS),
            ("matrices", self.matrices, LABELS[:2]),
            ("router", self.router, LABELS),
            ("dead_expert", self.dead_expert, ("keep", "skip")),
            ("ns_form", self.ns_form, muon.FORMS),
            ("ns_dtype", self.ns_dtype, muon.DTYPES),
            ("ns_batch", self.ns_batch, (None, *muon.BATCHES)),
            *(("freeze_roles", role, ROLES) for role in self.freeze_roles),
        ):
            check_known(field, value, known)
        for field in ("learning_rate", "adamw_learning_rate", "eps", "weight_decay", "muon_weight_decay", "momentum"):
            if not 0 <= (getattr(self, field) or 0) < math.inf:
                raise ConfigError(f"{field} must be a finite number, 0 or more; got {getattr(self, field)}")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise ConfigError(f"betas {self.betas} and momentum {self.momentum} must be at least 0 and below 1")
        if not 1 <= self.ns_steps <= 100 or (self.clip_norm is not None and not self.clip_norm > 0):
            raise ConfigError(f"ns_steps must be from 1 to 100 and clip_norm above 0 (or none); got {self.ns_steps} and {self.clip_norm}")
        self.multiplier()

    def multiplier(self) -> schedules.Schedule:
        """The schedule: updates done -> multiplier of both peak learning rates."""
        return schedules.schedule(self.schedule, self.warmup, self.total, self.floor)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What the optimizer does with one parameter."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: str
    label: str  # one of LABELS
    dimension_numbers: MuonDimensionNumbers | None  # of Muon leaves: the input and output axis; every other axis counts matrices
    weight_decay: float
    learning_rate: float  # peak

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> str:
        """Of a Muon leaf, "48 x 384x1536": how many separate matrices of which size."""
        if self.dimension_numbers is None:
            return ""
        axes = (self.dimension_numbers.reduction_axis, self.dimension_numbers.output_axis)
        rows, columns = (self.shape[axis] for axis in axes)  # type: ignore[index]
        return f"{self.size // (rows * columns)} x {rows}x{columns}"

    def places(self, rules: Rules, mesh_shape: Mapping[str, int]) -> tuple[PartitionSpec, PartitionSpec]:
        """How a mesh divides a Muon leaf in storage, and as [stack..., in, out] while its matrices are orthogonalised: each whole on one device.

        Experts lie where they are stored. Layers go over as many of the other axes as divide them, those that cut the matrices in storage first: then a
        matrix is brought together on one device instead of on all, and no device works on a matrix that another has.
        """
        matrix = [int(axis) % len(self.shape) for axis in (self.dimension_numbers or ())]  # type: ignore[arg-type]
        stack = [(name, size) for index, (name, size) in enumerate(zip(self.axes, self.shape, strict=True)) if index not in matrix]
        fixed = rules.partition(tuple(name for name, _ in stack), tuple(size for _, size in stack), mesh_shape)
        used = {axis for part in fixed for axis in ((part,) if isinstance(part, str) else part or ())}
        parts = list(fixed)
        for index, (name, size) in enumerate(stack):
            over: tuple[str, ...] = ()
            for axis in ("fsdp", "tensor", "expert", "data") if name == "layers" else ():
                length = mesh_shape.get(axis, 1)
                if length > 1 and axis not in used and size % length == 0:
                    over, size = (*over, axis), size // length
            parts[index] = over or fixed[index]
        return rules.partition(self.axes, self.shape, mesh_shape), PartitionSpec(*parts, None, None)


def plan(specs: Mapping[str, Any], config: OptimizerConfig) -> "Plan":
    """The rule for every parameter of `specs`, a nested dict of ParamSpec.

    Raises ConfigError for a parameter that should go to Muon but is not a matrix (or a stack of matrices) by its axes.
    """
    leaves = tuple(_leaf(path, spec, config) for path, spec in flatten(specs).items())
    if not any(leaf.label != "frozen" for leaf in leaves):
        raise ConfigError(f"all {len(leaves)} parameters are frozen; there is nothing to train. Take a role out of freeze_roles")
    return Plan(leaves, config)


def _leaf(path: str, spec: ParamSpec, config: OptimizerConfig) -> LeafPlan:
    label = _label(spec.role, config)
    decay, rate = 0.0, 0.0
    if label == "adamw":
        exempt = config.variant == "moonlight" and spec.role in _VECTOR_ROLES
        decay, rate = 0.0 if exempt else config.weight_decay, config.adamw_learning_rate
    elif label == "muon":
        inherited = config.weight_decay if config.variant == "moonlight" else 0.0
        decay, rate = inherited if config.muon_weight_decay is None else config.muon_weight_decay, config.learning_rate
    numbers = _dimension_numbers(path, spec) if label == "muon" else None
    return LeafPlan(path, spec.shape, spec.axes, spec.role, label, numbers, decay, rate)


def _label(role: str, config: OptimizerConfig) -> str:
    if role == "selection_bias" or role in config.freeze_roles:  # the selection bias has a rule of its own, outside the optimizer
        return "frozen"
    if role == "router":
        return config.router
    return config.matrices if role in _MUON_ROLES else "adamw"


def _dimension_numbers(path: str, spec: ParamSpec) -> MuonDimensionNumbers:
    """The two axes of the matrix; the others count matrices. A router's experts are a matrix's output: their axis is "router", not "experts"."""
    matrix = [index for index, axis in enumerate(spec.axes) if axis not in STACK_AXES]
    if len(matrix) != 2:
        raise ConfigError(
            f"parameter {path} {spec.shape} has role {spec.role!r}, which Muon updates as matrices, but its axes {spec.axes} "
            f"leave {len(matrix)} besides the stack axes {STACK_AXES}; declare exactly two (input, output), or another role"
        )
    rank = len(spec.axes)
    return MuonDimensionNumbers(reduction_axis=matrix[0] - rank, output_axis=matrix[1] - rank)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rule of every parameter, in path order, and the optax transformation that carries it out."""

    leaves: tuple[LeafPlan, ...]
    config: OptimizerConfig

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises ConfigError, naming the leaves, when `params` (or gradients) have other leaves or shapes than the plan."""
        given = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
        known = {leaf.path: leaf.shape for leaf in self.leaves}
        wrong = [f"{path} is not in the plan" for path in given if path not in known]
        wrong += [f"{path} is missing" for path in known if path not in given]
        wrong += [f"{path} has shape {given[path]}, not {known[path]}" for path in known if given.get(path, known[path]) != known[path]]
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ConfigError(f"{len(wrong)} parameters do not fit the optimizer plan: {'; '.join(wrong[:5])}{more}")

    def labels(self) -> dict[str, Any]:
        """The label of every parameter, as a nested dict."""
        return self._tree(lambda leaf: leaf.label)

    def trainable(self) -> dict[str, Any]:
        """True for every parameter that is not frozen, as a nested dict."""
        return self._tree(lambda leaf: leaf.label != "frozen")

    def learning_rate(self, count: jax.typing.ArrayLike) -> dict[str, jax.Array]:
        """{"muon": rate, "adamw": rate} of the update that follows `count` updates."""
        multiplier = self.config.multiplier()(count)
        return {"muon": self.config.learning_rate * multiplier, "adamw": self.config.adamw_learning_rate * multiplier}

    def global_norm(self, gradients: Mapping[str, Any]) -> jax.Array:
        """L2 norm over all trainable leaves together, float32: what `clip_norm` limits."""
        flat = flatten(gradients)
        squares = [jnp.sum(jnp.square(flat[leaf.path].astype(jnp.float32))) for leaf in self.leaves if leaf.label != "frozen"]
        return jnp.sqrt(sum(squares))

    def update_rms(self, updates: Mapping[str, Any]) -> dict[str, jax.Array]:
        """{path: RMS of each matrix, [stack...]} of the Muon leaves: shows experts that move although they get no tokens."""
        flat = flatten(updates)
        return {leaf.path: muon.matrix_rms(flat[leaf.path], leaf.dimension_numbers) for leaf in self.leaves if leaf.dimension_numbers}

    def transformation(self, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES) -> optax.GradientTransformationExtraArgs:
        """Clip, then Muon, AdamW or nothing by label. `init` raises ConfigError for parameters that the plan does not cover.

        Frozen leaves get no state, no decay, no share in the clip, and updates that leave every bit as it was. mesh, rules: where the parameters lie.
        """
        by_label: dict[Hashable, optax.GradientTransformation] = {"muon": self._muon(mesh, rules), "adamw": self._adamw()}
        by_label["frozen"] = _leave_alone()
        parts = [optax.partition(by_label, self.labels())]
        if self.config.clip_norm is not None:
            parts.insert(0, optax.masked(optax.stateless(self._clip), self.trainable()))
        chain = optax.chain(*parts)

        def init(params):
            self.check(params)
            return chain.init(params)

        return optax.GradientTransformationExtraArgs(init, chain.update)

    def table(self) -> str:
        """The plan as aligned text: a row per parameter, then a row of totals per label."""
        header = ("parameter", "shape", "axes", "role", "optimizer", "matrices", "decay", "peak rate", "parameters")
        rows = [_row(leaf) for leaf in self.leaves]
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [_align(row, widths) for row in [header, *rows]]
        totals = {label: [leaf.size for leaf in self.leaves if leaf.label == label] for label in LABELS}
        lines += [f"{label:<8}{len(sizes):>4} leaves  {sum(sizes):>15,} parameters" for label, sizes in totals.items()]
        total = sum(leaf.size for leaf in self.leaves)
        return "\n".join([*lines, f"{'total':<8}{len(self.leaves):>4} leaves  {total:>15,} parameters"])

    def _tree(self, value) -> dict[str, Any]:
        return unflatten({leaf.path: value(leaf) for leaf in self.leaves})

    def _rate(self, peak: float):
        multiplier = self.config.multiplier()
        return lambda count: peak * multiplier(count)

    def _decay(self, label: str) -> optax.GradientTransformation:
        """Decoupled weight decay for the leaves of one label; the decay may differ between leaves."""
        decays = self._masked_to(label, lambda leaf: leaf.weight_decay)

        def update(updates, state, params=None):
            if params is None:
                raise ValueError("weight decay needs the parameters: call update(gradients, state, params)")
            return jax.tree.map(lambda u, p, decay: u + decay * p if decay else u, updates, params, decays), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    def _masked_to(self, label: str, value) -> dict[str, Any]:
        return self._tree(lambda leaf: value(leaf) if leaf.label == label else optax.MaskedNode())

    def _clip(self, gradients, params=None):
        # one factor for all: a compiler multiplies by it inside the updates, where optax's division costs a pass over the gradients
        factor = jnp.minimum(1.0, (self.config.clip_norm or math.inf) / self.global_norm(gradients))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradients)

    def _muon(self, mesh: Mesh | None, rules: Rules) -> optax.GradientTransformation:
        config = self.config
        direction = muon.scale_by_muon(
            beta=config.momentum,
            steps=config.ns_steps,
            consistent_rms=0.2 if config.variant == "moonlight" else None,
            dead=config.dead_expert,
            dimension_numbers=self._masked_to("muon", lambda leaf: leaf.dimension_numbers),
            form=config.ns_form,
            dtype=config.ns_dtype,
            batch=config.ns_batch,
            mesh=mesh,
            places=None if mesh is None else self._masked_to("muon", lambda leaf: leaf.places(rules, dict(mesh.shape))),
        )
        return optax.chain(direction, self._decay("muon"), optax.scale_by_learning_rate(self._rate(config.learning_rate)))

    def _adamw(self) -> optax.GradientTransformation:
        config = self.config
        adam = optax.scale_by_adam(*config.betas, eps=config.eps)
        return optax.chain(adam, self._decay("adamw"), optax.scale_by_learning_rate(self._rate(config.adamw_learning_rate)))


def _leave_alone() -> optax.GradientTransformation:
    """Updates of -0.0, the one number that added to any other (0.0 and -0.0 too) leaves its bits unchanged."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))


def _row(leaf: LeafPlan) -> tuple[str, ...]:
    shape, axes = "x".join(map(str, leaf.shape)), ",".join(leaf.axes)
    rate = "-" if leaf.label == "frozen" else f"{leaf.learning_rate:g}"
    return leaf.path, shape, axes, leaf.role, leaf.label, leaf.matrices or "-", f"{leaf.weight_decay:g}", rate, f"{leaf.size:,}"


def _align(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row[:-3], widths[:-3], strict=True)]
    cells += [cell.rjust(width) for cell, width in zip(row[-3:], widths[-3:], strict=True)]
    return "  ".join(cells).rstrip()
