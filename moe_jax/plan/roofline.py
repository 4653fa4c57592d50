"""How long a training step would take: its operations and bytes, component by component, over what a chip can do. An estimate with stated assumptions.

Each component takes the longest of its matrix products, its elementwise arithmetic and its memory traffic; components follow one another. Traffic between
devices is added whole for the upper figure and hidden behind the work as far as it goes for the lower one. B, S, T, K, D, F, V as in `memory`.
"""

import dataclasses

from moe_jax.mesh import MeshSpec
from moe_jax.noise import NoiseSpec
from moe_jax.optim.muon import takes_gram
from moe_jax.optim.plan import LeafPlan, OptimizerConfig
from moe_jax.plan.chips import Chip
from moe_jax.plan.memory import WIDTH, Part, planned
from moe_jax.train.run_config import RunConfig

MATMUL, STREAM, LINK = 0.6, 0.75, 0.7  # assumed shares of a chip's peak: matrix unit, HBM, links
DRAW = 45  # float32 operations for one element's draw, its inverse error function and its use
ASSUMPTIONS = (
    f"Matrix products reach {MATMUL:.0%} of the published rate, HBM traffic {STREAM:.0%} of its bandwidth, collectives {LINK:.0%} of the links' together.",
    "The first figure hides all traffic between devices behind the work, as far as there is work; the second hides none.",
    "Assignments are spread evenly over the devices; the most loaded one decides, so divide by its load over the mean where that is known.",
    f"Noise costs {DRAW} float32 operations for each element of a perturbed product, done beside the matrix unit where there is matrix work left.",
)


@dataclasses.dataclass(frozen=True)
class Component:
    """Of one device and one update."""

    name: str
    flops: float = 0.0  # of matrix products in the compute type
    exact: float = 0.0  # of those in float32 at full precision
    vector: float = 0.0  # elementwise operations of noise
    traffic: float = 0.0  # bytes to and from HBM
    sent: float = 0.0  # bytes that come from other devices

    def parts(self, chip: Chip) -> dict[str, float]:
        """Seconds by what takes them; the longest is the component's time."""
        matrix = (self.flops + self.exact * chip.exact) / (chip.flops * MATMUL)
        return {"matrix unit": matrix, "HBM": self.traffic / (chip.bandwidth * STREAM), "noise": self.vector / chip.vector}

    def seconds(self, chip: Chip) -> float:
        return max(self.parts(chip).values())

    def limit(self, chip: Chip) -> str:
        """What decides its time."""
        parts = self.parts(chip)
        return max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The step of one device; `model_flops` are those that a step needs, without recomputation and Newton-Schulz."""

    components: tuple[Component, ...]
    model_flops: float

    def work(self, chip: Chip) -> float:
        return sum(part.seconds(chip) for part in self.components)

    def exchange(self, chip: Chip) -> float:
        return sum(part.sent for part in self.components) / (chip.links * LINK)

    def seconds(self, chip: Chip) -> tuple[float, float]:
        """(all traffic between devices hidden as far as there is work, none hidden)."""
        work, exchange = self.work(chip), self.exchange(chip)
        return max(work, exchange), work + exchange

    def mfu(self, chip: Chip) -> tuple[float, float]:
        """Share of the published rate that `model_flops` are, for both times."""
        fast, slow = self.seconds(chip)
        return self.model_flops / fast / chip.flops, self.model_flops / slow / chip.flops


def roofline(config: RunConfig, mesh: MeshSpec) -> Roofline:
    """The components of one update on `mesh`."""
    counts = _Counts(config, mesh)
    parts = (counts.attention(), counts.router(), counts.experts(), counts.mlp(), counts.head(), counts.optimizer())
    repeated = {"experts": 4 / 3 if counts.again else 1.0, "embedding and head": 1.0}
    usual = 4 / 3 if config.model.remat == "full" else 1.0
    useful = sum((part.flops + part.exact) / repeated.get(part.name, usual) for part in parts[:-1])
    useful -= 0.5 * counts.layers * counts.scores / usual  # what attention's backward pass computes again in any case
    return Roofline(tuple(part for part in parts if part.traffic), useful)


class _Counts:
    """What each component of a device's step does. Accumulated micro-batches count together."""

    def __init__(self, config: RunConfig, mesh: MeshSpec):
        self.config, self.mesh, self.c = config, mesh, config.model
        self.part, self.many = Part.of(config, mesh), config.data.accumulation
        self.store, self.wide = WIDTH[config.model.dtypes.params], WIDTH[config.model.dtypes.compute]
        self.passes = 4 if config.model.remat == "full" else 3  # forward, perhaps again, and two products backward
        self.again = self.c.remat == "full" or self.c.dispatch_chunks > 1  # whether the experts' forward pass is computed twice
        self.layers, self.moe = self.c.num_layers, len(self.c.moe_layers)
        self.split = mesh.tensor
        self.together = self.part.together * self.many
        seen = min(config.data.seq_len / 2, self.c.sliding_window or config.data.seq_len)
        # operations of attention's two products over the positions that are seen, forward in a layer
        self.scores = 4 * self.together * seen * self.c.num_heads * self.c.head_width / self.split
        acting = NoiseSpec.parse(config.noise).by_site() if config.noise else {}
        self.noisy = {site: noise for site, noise in acting.items() if "train" in noise.phases}

    def _drawn(self, site: str, forward: float, inward: float, weights: float) -> float:
        """Operations of a site's noise: of the elements of each product that it perturbs; a pass that is computed again draws again."""
        noise = self.noisy.get(site)
        if noise is None:
            return 0.0
        again = 2 if (self.again if site.startswith("expert") else self.c.remat == "full") and site != "lm_head" else 1
        sizes = {"forward": forward * again, "grad_input": inward, "grad_weight": weights * self.many}
        return DRAW * sum(sizes[name] for name in noise.passes if name in sizes)

    def _gathered(self, weights: float) -> float:
        """Bytes that a device gets for `weights` elements of a layer that are divided over fsdp: twice gathered, and their gradients divided again."""
        over = self.mesh.fsdp
        return weights * (over - 1) / over * (2 * self.wide + self.store) * self.many

    def _averaged(self, weights: float) -> float:
        """Bytes of summing gradients over the axes that repeat the parameters."""
        over = self.mesh.data
        return 2 * weights * (over - 1) / over * self.store if over > 1 else 0.0

    def _joined(self, tokens: float) -> float:
        """Bytes by which a tensor group adds up attention's results and brings its tokens together after the experts, in each pass."""
        return (self.passes - 1) * 3 * tokens * (self.split - 1) / self.split * self.c.d_model * self.wide

    def attention(self) -> Component:
        c, tokens = self.c, self.together
        query, key = c.num_heads * c.head_width / self.split, c.kv_heads * c.head_width / self.split
        weights = c.d_model * (2 * query + 2 * key)
        scores = self.scores * (self.passes + 0.5)  # two products forward, five backward: those of the queries and keys are computed again
        noise = sum(
            self._drawn(f"attention_{name}", tokens * out, tokens * c.d_model, c.d_model * out)
            for name, out in (("q", query), ("k", key), ("v", key))
        )
        noise += self._drawn("attention_o", tokens * c.d_model / self.split, tokens * query, query * c.d_model)
        traffic = self.passes * tokens * (6 * c.d_model + 4 * query + 4 * key) * self.wide + 3 * weights * self.wide * self.many
        sent = self._gathered(weights) + self._averaged(weights / self.mesh.fsdp) + self._joined(tokens)
        return self._each("attention", self.layers, 2 * tokens * weights * self.passes + scores, noise, traffic, sent)

    def router(self) -> Component:
        c, tokens = self.c, self.part.tokens * self.many
        product = 2 * tokens * c.d_model * c.num_experts * self.passes
        noise = self._drawn("router_gemm", tokens * c.num_experts, tokens * c.d_model, c.d_model * c.num_experts)
        noise += self._drawn("router_logits", tokens * c.num_experts, 0, 0)
        traffic = self.passes * tokens * (c.d_model * self.wide + 8 * c.num_experts * 4)
        part = self._each("router", self.moe, 0.0, noise, traffic, 0.0)
        return dataclasses.replace(part, exact=self.moe * product)

    def experts(self) -> Component:
        c, rows = self.c, self.part.tokens * self.c.experts_per_token * self.many
        matrices = 2 + c.gated
        each = c.num_experts / (self.part.experts_over if self.part.exchange else 1) * c.d_model * c.d_expert
        weights = matrices * each
        names = ("up", "gate")[: 1 + c.gated]
        noise = sum(self._drawn(f"expert_{name}", rows * c.d_expert, rows * c.d_model, each) for name in names)
        noise += self._drawn("expert_down", rows * c.d_model, rows * c.d_expert, each)
        passes = 4 if self.again else 3
        traffic = passes * rows * (4 * c.d_model + 4 * c.d_expert) * self.wide + 3 * weights * self.wide * self.many
        over = self.mesh.fsdp if self.part.exchange else self.mesh.fsdp * self.part.experts_over
        gathered = weights * (over - 1) / over * (2 * self.wide + self.store) * self.many
        sent = gathered + self._averaged(weights / over) + self._rows_sent() * self.many
        return self._each("experts", self.moe, 2 * rows * c.d_model * c.d_expert * matrices * passes, noise, traffic, sent)

    def _rows_sent(self) -> float:
        """Bytes of rows that come to a device and go back, forward, perhaps again, and backward; results travel in float32."""
        c, size = self.c, self.part.experts_over
        passes = 3 if self.again else 2
        rows = self.part.rows if self.part.exchange == "all_to_all" else self.part.tokens * size
        return passes * rows * (size - 1) / size * c.d_model * (self.wide + 4) if self.part.exchange else 0.0

    def mlp(self) -> Component:
        c, tokens = self.c, self.together
        width = c.dense_width / self.split
        each, names = c.d_model * width, ("up", "gate")[: 1 + c.gated]
        weights = (2 + c.gated) * each
        noise = sum(self._drawn(f"mlp_{name}", tokens * width, tokens * c.d_model, each) for name in names)
        noise += self._drawn("mlp_down", tokens * c.d_model, tokens * width, each)
        traffic = self.passes * tokens * (4 * c.d_model + 4 * width) * self.wide + 3 * weights * self.wide * self.many
        sent = self._gathered(weights) + self._averaged(weights / self.mesh.fsdp)
        return self._each("dense feed-forward", self.layers - self.moe, 2 * tokens * weights * self.passes, noise, traffic, sent)

    def head(self) -> Component:
        c, tokens = self.c, self.part.tokens * self.many
        whole = c.vocab_size * c.d_model
        noise = self._drawn("lm_head", tokens * c.vocab_size, tokens * c.d_model, whole)
        chunks = max(1.0, tokens / c.loss_chunk_size)
        traffic = tokens * c.vocab_size * (4 * 2 + 2 * self.wide) + whole * chunks * (2 * self.wide + 2 * 4)
        over = self.mesh.fsdp * self.mesh.data * self.mesh.expert * self.mesh.tensor
        sent = whole * (over - 1) / over * (self.wide + 2 * 4) * self.many * 2  # the embedding's gradient too
        return Component("embedding and head", 2 * tokens * whole * 3, 0.0, noise, traffic, sent)

    def optimizer(self) -> Component:
        """Each leaf once through HBM: its gradient is read, it and its one (Muon) or two (AdamW) states are read and written. Newton-Schulz in `ns_dtype`."""
        config = self.config.optimizer
        flops, exact, traffic = 0.0, 0.0, 0.0
        shards = self.mesh.size / self.mesh.data
        for leaf in planned(self.c, config):
            traffic += leaf.size / shards * self.store * (5 if leaf.label == "muon" else 7 if leaf.label == "adamw" else 0)
            if leaf.label == "muon":
                done = _newton_schulz(leaf, config) / self.mesh.size
                flops, exact = (flops, exact + done) if config.ns_dtype == "float32" else (flops + done, exact)
        return Component("optimizer", flops, exact, 0.0, traffic, 0.0)

    def _each(self, name: str, layers: int, flops: float, noise: float, traffic: float, sent: float) -> Component:
        return Component(name, layers * flops, 0.0, layers * noise, layers * traffic, layers * sent)


def _newton_schulz(leaf: LeafPlan, config: OptimizerConfig) -> float:
    """Operations on all matrices of a leaf, in the form that moe_jax.optim.muon takes."""
    rows, columns = (leaf.shape[axis] for axis in leaf.dimension_numbers)  # type: ignore[union-attr,index]
    (m, n), steps, count = sorted((rows, columns)), config.ns_steps, leaf.size / (rows * columns)
    if takes_gram(config.ns_form, config.ns_dtype, m, n):
        return (4 * m * m * n + 2 * m**3 * (4 * steps - 3)) * count
    return steps * (4 * m * m * n + 2 * m**3) * count
