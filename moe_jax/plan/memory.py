"""A model of a step's memory on one device, from the parameters' declarations, the mesh and the batch alone: no compiler, no arrays.

It says which meshes are worth compiling, and what GPUs that are not here would need. results/plans_30b has its error against the compiler's own figures.
T tokens of one device, S sequence length, R rows that its experts compute, D model width, F expert width, L layers, K experts per token, V words.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from moe_jax import paths
from moe_jax.axes import ParamSpec
from moe_jax.dispatch import LOCAL
from moe_jax.dispatch.base import Group
from moe_jax.dispatch.offsets import capacity
from moe_jax.dispatch.sharded import pick_exchange
from moe_jax.mesh import DEFAULT_RULES, MeshSpec
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import NoiseSpec
from moe_jax.noise.sites import GROUPS
from moe_jax.optim.plan import LeafPlan, OptimizerConfig, plan
from moe_jax.train.run_config import RunConfig

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes
_STATES = {"muon": 1, "adamw": 2, "frozen": 0}  # arrays of the parameter's shape that the optimizer keeps


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float  # kept from the forward pass for the backward pass
    head: float  # the head's gradient, whole, which is made in the forward pass
    loss: float  # besides, while the loss is computed: the head, a chunk's logits and exponentials
    layer: float  # while the layers are computed backward: all weights in the compute type, one layer's whole, its rows and their gradients
    update: float  # while the optimizer works on its largest parameter

    @property
    def temporaries(self) -> float:
        """What is there besides parameters and optimizer when most is: in the loss, in the layers' backward pass, or in the update."""
        kept = self.activations + self.head
        return max(kept + self.loss, self.gradients + kept + self.layer, self.gradients + self.update)

    @property
    def peak(self) -> float:
        return self.parameters + self.optimizer + self.temporaries


@dataclasses.dataclass(frozen=True)
class Part:
    """The share of one device: the sizes from which memory and time are reckoned."""

    tokens: int  # T, that it routes
    together: int  # that a tensor group has, each device of it some of the heads
    rows: int  # R
    experts_over: int  # devices among which the experts are divided
    exchange: str  # all_to_all, all_gather, or "" where tokens stay

    @classmethod
    def of(cls, config: RunConfig, mesh: MeshSpec) -> "Part":
        model, data = config.model, config.data
        over = mesh.data * mesh.fsdp * mesh.expert
        rows_over = over if data.batch_size % over == 0 else over // mesh.expert
        tokens = data.batch_size * data.seq_len // (rows_over * (mesh.tensor if model.moe_layers else 1))
        size = mesh.expert * mesh.tensor
        name = exchange_of(model, size)
        assignments = tokens * model.experts_per_token
        rows = {"": assignments, "all_gather": assignments * size}.get(name, 0)
        rows = rows or size * capacity(assignments / size, assignments, model.exchange_factor)
        together = data.batch_size * data.seq_len // rows_over
        return cls(tokens, together, rows if model.moe_layers else tokens, size, name if model.moe_layers else "")


def exchange_of(model: ModelConfig, size: int) -> str:
    """The exchange that a model's layers use among `size` devices; "" where tokens stay."""
    if size == 1 or model.dispatch in LOCAL:
        return ""
    name = model.dispatch or pick_exchange(Group((), size, ()), model.experts_per_token, model.exchange_factor)
    return "all_gather" if name == "all_gather" else "all_to_all"


def estimate(config: RunConfig, mesh: MeshSpec) -> Memory:
    """The memory of a training step."""
    leaves = declared(config.model)
    sizes = dataclasses.asdict(mesh)
    divided = {path: spec.size / _shards(spec, sizes) for path, spec in leaves.items()}
    store = WIDTH[config.model.dtypes.params]
    labels = {leaf.path: leaf.label for leaf in planned(config.model, config.optimizer)}
    parameters = store * sum(divided.values())
    kept = store * sum(_STATES[labels[path]] * size for path, size in divided.items())
    gradients = store * sum(size for path, size in divided.items() if labels[path] != "frozen")
    part, wide = Part.of(config, mesh), WIDTH[config.model.dtypes.compute]
    copies = wide * sum(divided.values()) if wide != store else 0.0  # XLA casts the weights of all layers before the first of them
    return Memory(
        parameters,
        kept,
        gradients * (2 if config.data.accumulation > 1 else 1),
        _activations(config.model, part, mesh.tensor),
        4 * config.model.vocab_size * config.model.d_model,
        _loss(config.model, part),
        copies + _layer(config, leaves, mesh, part),
        _update(divided, labels),
    )


@functools.lru_cache(maxsize=64)
def declared(model: ModelConfig) -> Mapping[str, ParamSpec]:
    """The parameters of a model by path."""
    return paths.flatten(Model(model).specs)


@functools.lru_cache(maxsize=64)
def planned(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[LeafPlan, ...]:
    """What the optimizer does with each."""
    return plan(paths.unflatten(dict(declared(model))), optimizer).leaves


def _shards(spec: ParamSpec, sizes: Mapping[str, int], without: tuple[str, ...] = ()) -> int:
    return math.prod(sizes[axis] for name in spec.axes for axis in DEFAULT_RULES.axes_of(name) if axis not in without and axis in sizes)


def _activations(c: ModelConfig, part: Part, tensor: int) -> float:
    """What the backward pass finds kept, over all layers: under "full" each layer's input and routes alone."""
    wide, routes = WIDTH[c.dtypes.compute], part.tokens * c.experts_per_token * 8
    heads = (2 * c.num_heads + 2 * c.kv_heads) * c.head_width
    each = part.together * c.d_model * wide
    if c.remat != "full":
        each += part.together * (heads / tensor + c.d_model) * wide
    whole = c.remat == "none" and c.dispatch_chunks == 1  # chunks are computed again
    moe = routes + part.rows * (2 * c.d_model + (2 + c.gated) * c.d_expert) * wide if whole else routes
    dense = 0 if c.remat == "full" else part.tokens * 3 * c.dense_width * wide
    layers = len(c.moe_layers)
    return layers * (each + moe) + (c.num_layers - layers) * (each + dense)


def _loss(c: ModelConfig, part: Part) -> float:
    wide, words = WIDTH[c.dtypes.compute], c.vocab_size
    return words * c.d_model * wide + min(c.loss_chunk_size, part.tokens) * words * (4 + wide)


def _layer(config: RunConfig, leaves: Mapping[str, ParamSpec], mesh: MeshSpec, part: Part) -> float:
    """One layer's weights, gathered over fsdp, and their gradients before they are divided again; rows of its experts, and queries, keys, scores."""
    c, sizes = config.model, dataclasses.asdict(mesh)
    wide = WIDTH[c.dtypes.compute]
    stays = () if part.exchange else ("expert", "tensor")
    own = {path: spec for path, spec in leaves.items() if "layers" in spec.axes}
    per_layer = {
        path: spec.size / spec.shape[spec.axes.index("layers")] / _shards(spec, sizes, ("fsdp", *stays)) for path, spec in own.items()
    }
    weights = sum(per_layer.values()) * (wide + 4)
    # what lies side by side in the compiler's buffers while a layer of OLMoE is computed backward: of the model's width 6 arrays in float32 and 7 narrow ones
    each = c.d_model * (6 * 4 + 7 * wide) + c.d_expert * 7 * 4
    if config.noise and _row_sites(config.noise):
        each += c.d_model * 10 * 4  # what Qwen3-30B-A3B's step with noise on every matmul needs more, where each chip computes 32,768 rows
    rows = part.rows / c.dispatch_chunks * each if c.moe_layers else 0
    heads = part.together * c.head_width * (3 * c.num_heads + 2 * c.kv_heads) * wide / mesh.tensor
    scores = part.together * c.num_heads / mesh.tensor * min(512, config.data.seq_len) * 8
    return weights + max(rows, heads + scores) + 6 * part.together * c.d_model * wide


def _row_sites(noise: str) -> bool:
    """Whether noise reaches the experts' rows."""
    return any(site in GROUPS["experts"] and "train" in acts.phases for site, acts in NoiseSpec.parse(noise).by_site().items())


def _update(divided: Mapping[str, float], labels: Mapping[str, str]) -> float:
    """Gradients are there already; Newton-Schulz holds about three more float32 copies of the parameter that it works on."""
    largest = max((size for path, size in divided.items() if labels[path] == "muon"), default=0.0)
    return 3 * 4 * largest
