"""Which operator's noise does the damage? The same relative error on the matmuls of the router, the experts, attention, the head, or all.

y -> y (1 + s n), n ~ N(0,1) per element: the error of seed study 004, which could not say which operator suffered from it. Each site is hit alone,
at three scales s, in the forward pass or in the forward and both backward passes, and compared with the clean run of the same seed. Presets:

smoke   no download, made-up text, minutes of compilation: shows that everything works, and nothing about noise
quick   the seed's shape, small, on real text: 31 cells, 3 seeds, minutes on two CPU cores
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from experiments import noise_factorial
from moe_jax.config_tools import config_dict
from moe_jax.studies import USAGE_CV_ROUTED, Comparison, Design, Factor, Metric, difference
from moe_jax.studies.design import Cell
from moe_jax.studies.run import Experiment
from moe_jax.train.loop import RunConfig

QUESTION = "Which operator's relative error during training raises perplexity: the router's, the experts', attention's, the head's, or only all at once?"
RULE = (
    "Each question at each scale (a site against clean; backward noise added to forward noise; the router against another site) is a family of "
    "comparisons paired by seed. An effect is claimed when its Holm-adjusted p in its family is below alpha; otherwise it is unresolved, and the smallest "
    "effect that this design could have seen is given. Scale 0.1 decides a question; a claim at a smaller scale counts only where the same "
    "comparison is resolved at 0.1, since ten families at 5 % each would make a false claim in two such studies out of five if no noise did anything."
)
# level of the factor `site` -> the name of the site or group of sites in a NoiseSpec
SITES: Mapping[str, str] = {"router": "router_gemm", "experts": "experts", "attention": "attention", "head": "lm_head", "all": "matmuls"}
SCALES = (0.1, 0.05, 0.01)
PASSES: Mapping[str, str] = {"forward": "forward", "forward+backward": "forward+grad_input+grad_weight"}
CLEAN: Cell = {"site": "none", "passes": "forward", "scale": 0.0}  # no noise: in which pass there is none says nothing
# The clean run trains without noise, in a program of its own that holds none. Naming the evaluation at scale 0 gives it a perplexity with noise on too.
CLEAN_SPEC = "router_gemm=relative:0:passes=forward:phases=eval"

METRICS = (
    noise_factorial.PERPLEXITY,
    Metric(
        "val_perplexity_noisy",
        "Val PPL, noise on",
        definition="The same windows with the forward noise of training on in evaluation too; of the clean run, the same number again.",
    ),
    USAGE_CV_ROUTED,
    Metric(
        "train_loss_end",
        "Train loss",
        "nats",
        decimals=3,
        definition="Mean training cross-entropy of the last tenth of the updates, noise on.",
    ),
)
NOTES = (
    "Noise is on in training and, for 'noise on', in evaluation. Site 'all' is every matmul of the model; embedding, norms and softmax are exact.",
    "Sites are compared at equal relative error of each product, not at equal error of the output: a forward pass has one product in the head and, per "
    "layer, one in the router, two in the experts and four in attention.",
    "Relative error of the router's logits grows with their common offset, which the softmax ignores: another parametrisation of the same router would "
    "suffer another error.",
)


def experiment(preset: str = "quick") -> Experiment:
    """The declared study of one of PRESETS."""
    base = _base(preset)
    seeds, notes = ((42, 43, 44), NOTES) if preset == "quick" else ((42, 43), (*noise_factorial.NOTES["smoke"], *NOTES))
    return Experiment(f"noise_sites:{preset}", _design(preset, base, seeds, notes), functools.partial(configure, base), COST[preset])


def _base(preset: str) -> RunConfig:
    """The run without noise: that of noise_factorial, shorter, and all that is evaluated is measured on the same windows."""
    base, updates = noise_factorial.RUNS[preset](), UPDATES[preset]
    return dataclasses.replace(
        base,
        updates=updates,
        optimizer=dataclasses.replace(base.optimizer, total=updates),
        data=base.data.replace(eval_windows=base.loss_windows or base.eval_batch),
        loss_windows=None,
        checkpoint_every=0,
    )


UPDATES: Mapping[str, int] = {"smoke": 20, "quick": 80}
COST: Mapping[str, str] = {
    "smoke": "about 4 minutes on two CPU cores, nearly all of it compilation",
    "quick": "about 11 minutes on two CPU cores",
}
PRESETS = tuple(UPDATES)


def configure(base: RunConfig, cell: Mapping[str, Any], seed: int) -> RunConfig:
    """The run of one cell and seed: the seed decides initial weights, data order and draws alike, so that cells are paired by it."""
    return dataclasses.replace(base, noise=noise_of(cell), init_seed=seed, data_seed=seed, noise_seed=seed)


def noise_of(cell: Mapping[str, Any]) -> str:
    """A cell's noise in the grammar of NoiseSpec."""
    if cell["site"] == "none":
        return CLEAN_SPEC
    return f"{SITES[cell['site']]}=relative:{cell['scale']}:passes={PASSES[cell['passes']]}:phases=train+eval"


def _design(preset: str, base: RunConfig, seeds: tuple[int, ...], notes: tuple[str, ...]) -> Design:
    fixed = config_dict(base)
    for name in ("noise", "init_seed", "data_seed", "noise_seed"):
        fixed.pop(name)
    cells = [_cell(site, scale, passes) for site in SITES for passes in PASSES for scale in reversed(SCALES)]
    return Design(
        name=f"noise_sites:{preset}",
        question=QUESTION,
        factors=(
            Factor("site", (CLEAN["site"], *SITES)),
            Factor("passes", tuple(PASSES)),
            Factor("scale", (CLEAN["scale"], *reversed(SCALES))),
        ),
        seeds=seeds,
        metrics=METRICS,
        comparisons=tuple(c for scale in SCALES for c in (*_which_site(scale), *_backward(scale), *_router_against(scale))) + _usage(),
        rule=RULE,
        settings={"split": base.data.split, "kind": "relative", **fixed},
        only=tuple(tuple(cell.items()) for cell in (CLEAN, *cells)),
        notes=notes,
    )


def _cell(site: str, scale: float, passes: str = "forward") -> Cell:
    return {"site": site, "passes": passes, "scale": scale}


def _which_site(scale: float) -> list[Comparison]:
    return [
        difference(
            f"{site} {scale} - clean",
            "val_perplexity",
            of=_cell(site, scale),
            minus=CLEAN,
            question=f"Does forward noise of scale {scale} at {SITES[site]} raise perplexity?",
            family=f"site at {scale}",
        )
        for site in SITES
    ]


def _backward(scale: float) -> list[Comparison]:
    return [
        difference(
            f"{site} {scale}, backward added",
            "val_perplexity",
            of=_cell(site, scale, "forward+backward"),
            minus=_cell(site, scale),
            question=f"Does noise in the gradients, added to forward noise of the same scale {scale} at {SITES[site]}, raise perplexity?",
            family=f"backward at {scale}",
        )
        for site in SITES
    ]


def _router_against(scale: float) -> list[Comparison]:
    return [
        difference(
            f"router - {site}, {scale}",
            "val_perplexity",
            of=_cell("router", scale),
            minus=_cell(site, scale),
            question=f"Does forward noise of scale {scale} hurt more at the router than at {SITES[site]}?",
            family=f"router against at {scale}",
        )
        for site in ("experts", "attention", "head")
    ]


def _usage() -> tuple[Comparison, ...]:
    return tuple(
        difference(
            f"usage CV, {site} {SCALES[0]} - clean",
            "usage_cv_routed",
            of=_cell(site, SCALES[0]),
            minus=CLEAN,
            question=f"Does training with forward noise of scale {SCALES[0]} at {SITES[site]} change how evenly experts are used?",
            family="usage_cv_routed",
        )
        for site in SITES
    )
