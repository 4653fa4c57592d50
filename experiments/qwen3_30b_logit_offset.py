"""What is relative noise on a router's logits relative to, and how many experts does it change?

y (1 + s n) is an error in proportion to the logit itself. Routing ignores what all logits of a token have in common, the error does not: with an offset of
c standard deviations it is sqrt(1 + c^2) times as large against the spread that decides. Seed study 004 printed an example of twelve logits around 1.9 and
concluded that 5 % noise changes half of the experts; nobody had measured the logits of a model. Here the offset is measured router by router, and noise of
equal scale is compared when it is relative to the logit (relative), to its distance from the token's mean (centred_relative) and to the rms of the token's
logits (rms_relative); and all of these again on logits that were moved by five standard deviations, which changes no route. Nothing is trained.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import qwen3_30b
from experiments.qwen3_30b_routers import write_page
from moe_jax import routing, routing_stats
from moe_jax.errors import ConfigError
from moe_jax.noise import NoiseSpec
from moe_jax.noise.kinds import perturb
from moe_jax.sensitivity import sensitivity
from moe_jax.studies import Comparison, Design, Factor, Metric, difference
from moe_jax.studies.design import Cell
from moe_jax.studies.run import Experiment, Workshop
from moe_jax.train.run_config import RunConfig

KINDS = ("relative", "centred_relative", "rms_relative")
SCALES = (0.01, 0.05, 0.1)
CLEAN: Cell = {"kind": "relative", "scale": 0.0}  # measured like the others: what is not 0 in it is a fault of the measurement
CLAIM: Cell = {"kind": "relative", "scale": 0.05}
CLAIMED = 50.0  # % of the chosen experts, by seed study 004
MOVED = 5.0  # standard deviations of a token's logits, added to all of them
DRAWS = 2  # of the noise for each seed: the intervals of moe_jax.sensitivity need two
QUESTION = "What is relative noise on a router's logits relative to, and does 5 % of it change half of a token's experts?"
RULE = (
    "'5 % relative noise changes half of the experts' is refuted when the upper end of the interval of 'relative 0.05 - clean' in "
    f"experts changed lies below {CLAIMED:g} %, confirmed when its lower end lies above, and else unresolved; the page routers.html "
    "applies this. The offset matters at a scale when 'relative - centred_relative' in experts changed is resolved there after Holm "
    "over the three scales; it matters for the model when the same contrast in KL is. That a shift of all logits would matter is "
    "decided in the same way, on the moved logits."
)
CHANGED = Metric(
    "changed",
    "Experts changed",
    "%",
    definition="Share of a token's chosen experts that its router's own noise replaces, on the inputs of the clean pass; mean over routers.",
)
MOVED_CHANGED = Metric(
    "changed_moved",
    "Experts changed, moved",
    "%",
    definition=f"The same with {MOVED:g} standard deviations added to all logits of the token.",
)
KL = Metric(
    "kl", "KL to clean", "nats", decimals=5, definition="Mean over tokens of KL(clean || noisy) of the model's distribution over words."
)
METRICS = (
    CHANGED,
    MOVED_CHANGED,
    Metric(
        "tokens_changed", "Sets changed", "%", definition="Share of the (token, router) pairs with another set of experts, on clean inputs."
    ),
    Metric(
        "changed_all",
        "Experts changed, all routers",
        "%",
        definition="Experts changed when every router is noisy and reads what the routers before it have done.",
    ),
    KL,
    Metric(
        "loss_change", "Loss change", "nats", decimals=5, definition="Token-mean cross-entropy with all routers noisy, minus the clean one."
    ),
    Metric(
        "offset",
        "Offset",
        better="",
        definition="abs(mean) / standard deviation of a token's clean logits over the experts; mean over tokens and routers.",
    ),
    Metric(
        "spread",
        "Spread",
        better="",
        decimals=3,
        definition="Standard deviation of a token's clean logits over the experts; mean over tokens and routers.",
    ),
)
NOTES = (
    "A seed is a block: other windows of held-out text and other draws, so that an interval contains the spread of both.",
    f"Noise is on the result of the router's matmul in the forward pass, at all routers. Changed experts and what noise does to the words are means of "
    f"{DRAWS} draws; on the moved logits there is one draw.",
    "An offset of the sign of the logits at the boundary between chosen and not chosen makes relative noise larger there, one of the "
    "other sign smaller: the contrast with 'centred_relative' can have either sign.",
    "At equal scale the kinds are not of equal size: the rms error of 'relative' and 'rms_relative' is s times the rms of the logits, "
    "offset included, that of 'centred_relative' s times their standard deviation. That is the point of the comparison.",
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much a preset measures."""

    seeds: tuple[int, ...]
    windows: int  # for each seed
    batch: int  # windows at a time
    cost: str


SIZES: Mapping[str, Size] = {
    "smoke": Size((0, 1), 8, 8, "about 30 seconds on two CPU cores, nearly all of it compilation"),
    "mini": Size(tuple(range(5)), 16, 8, "about a minute on two CPU cores, the checkpoint not counted"),
    "full": Size(
        tuple(range(8)),
        16,
        8,
        "2,100 forward passes of 8 x 512 tokens, 6e16 FLOPs of matmuls: a minute at 40 % of the peak of 8 H100, a quarter of an hour "
        "as an estimate that counts noise, diagnostics and the reading of 61 GB; not measured",
    ),
}


def experiment(preset: str) -> Experiment:
    """The declared study of a preset of qwen3_30b."""
    size = SIZES[preset]
    config = qwen3_30b.base(preset)
    data = config.data.replace(eval_windows=size.windows * len(size.seeds))
    config = dataclasses.replace(config, data=data, eval_batch=size.batch)
    return Experiment(
        f"qwen3_30b.logit_offset:{preset}",
        _design(preset, config),
        functools.partial(configure, config),
        size.cost,
        functools.partial(qwen3_30b.prepare, preset),
        functools.partial(measure, size),
        functools.partial(write_page, "relative 0.05 - clean", CLAIMED),
    )


def configure(config: RunConfig, cell: Mapping[str, Any], seed: int) -> RunConfig:
    """The run of one kind, scale and block."""
    noise = f"router_gemm={cell['kind']}:{cell['scale']}:passes=forward:phases=eval"
    return dataclasses.replace(config, noise=noise, noise_seed=seed)


def measure(size: Size, shop: Workshop, config: RunConfig, cell: Mapping[str, Any], seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics of a cell on its block, and by router [L]: experts changed, and the clean logits' mean, standard deviation and offset."""
    model, params = qwen3_30b.loaded(shop, config)
    batches, moved = list(_block(size, shop, config, seed)), []

    def look(logits: jax.Array, weight: np.ndarray) -> None:
        del weight  # a block is whole batches
        key = np.array([seed, len(moved)], np.uint32)
        moved.append(np.asarray(changed_if_moved(logits, str(cell["kind"]), cell["scale"], key, config.model.experts_per_token)))

    draws = range(DRAWS * seed, DRAWS * (seed + 1))
    found = sensitivity(model, params, batches, NoiseSpec.parse(config.noise), draws, look=look)
    own, clean, everywhere = found.routers["own"], found.routers["clean"], found.routers["all"]
    by_router = {
        "changed": 100 * (1 - own["router/set_overlap"]).mean(0),
        "changed_moved": 100 * np.mean(moved, 0),
        **{name: clean[f"router/logit_{name}"][0] for name in ("mean", "std", "offset")},
    }
    metrics = {
        "changed": by_router["changed"].mean(),
        "changed_moved": by_router["changed_moved"].mean(),
        "tokens_changed": 100 * own["router/tokens_changed"].mean(),
        "changed_all": 100 * (1 - everywhere["router/set_overlap"]).mean(),
        "kl": found.at("kl").mean(),
        "loss_change": found.at("loss").mean(),
        "offset": by_router["offset"].mean(),
        "spread": by_router["std"].mean(),
    }
    return {name: float(value) for name, value in metrics.items()}, {name: x.tolist() for name, x in by_router.items()}


def _block(size: Size, shop: Workshop, config: RunConfig, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a seed's windows. Raises ConfigError when the text does not reach that far."""
    data, each = shop.data(config), size.windows // size.batch
    there, wanted = len(data.validation_starts), size.windows * len(size.seeds)
    if there < wanted:
        raise ConfigError(
            f"the validation text has {there} windows of {config.data.seq_len} tokens, the study reads {wanted}; take a longer text"
        )
    first = size.seeds.index(seed) * each
    return itertools.islice(data.validation_batches(size.batch), first, first + each)


@functools.partial(jax.jit, static_argnames=("kind", "k"))
def changed_if_moved(logits: jax.Array, kind: str, scale: Any, key: jax.Array, k: int) -> jax.Array:
    """[L]: share of the k chosen experts that noise on logits [L, T, E] changes, after MOVED standard deviations were added to every token's."""

    def one(layer, y):
        y = y + MOVED * y.std(-1, keepdims=True)
        noisy = perturb(y, kind, jnp.float32(scale), jnp.stack([key[0], key[1] + 1_000 * layer]), jnp.arange(len(y)))
        overlap, count = routing_stats.compare(routing.select(y, k), routing.select(noisy, k))["router/set_overlap"]
        return 1.0 - overlap / count

    return jax.lax.map(lambda item: one(*item), (jnp.arange(len(logits), dtype=jnp.uint32), logits))


def _design(preset: str, config: RunConfig) -> Design:
    cells = [{"kind": kind, "scale": scale} for kind in KINDS for scale in SCALES]
    return Design(
        name=f"qwen3_30b.logit_offset:{preset}",
        question=QUESTION,
        factors=(Factor("kind", KINDS), Factor("scale", (0.0, *SCALES))),
        seeds=SIZES[preset].seeds,
        metrics=METRICS,
        comparisons=(*_claim(), *_kinds("centred_relative"), *_kinds("rms_relative")),
        rule=RULE,
        settings={
            **qwen3_30b.settings(preset, config, "model", "data", "start"),
            "claimed_percent": CLAIMED,
            "moved_by": MOVED,
            "draws": DRAWS,
        },
        only=tuple(tuple(cell.items()) for cell in (CLEAN, *cells)),
        notes=(*qwen3_30b.SCOPE[preset], *NOTES),
    )


def _claim() -> list[Comparison]:
    return [
        difference(
            "relative 0.05 - clean", "changed", CLAIM, CLEAN, "How many of its chosen experts does 5 % relative noise change?", "the claim"
        ),
        difference("relative 0.05 - clean, KL", "kl", CLAIM, CLEAN, "What does it do to the distribution over words?", "the claim, KL"),
    ]


def _kinds(other: str) -> list[Comparison]:
    """relative against another kind at equal scale: of the experts as they are, of the moved ones, and of the words."""
    return [
        difference(
            f"relative - {other}, {scale}, {metric.label}",
            metric.name,
            {"kind": "relative", "scale": scale},
            {"kind": other, "scale": scale},
            f"Does noise relative to the logit do more than {other} noise of the same scale {scale}?",
            f"relative against {other}, {metric.name}",
        )
        for metric in (CHANGED, MOVED_CHANGED, KL)
        for scale in SCALES
    ]
