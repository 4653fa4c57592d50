"""A noise spec in words and in numbers measured on one batch, as aligned text. B sequences of S tokens, L routing layers."""

import dataclasses
import math
import textwrap
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from launch.common import listed
from launch.noise_measure import Measurement, Tally, measure
from moe_jax.errors import ConfigError
from moe_jax.keys import PASSES, PHASES, Draw
from moe_jax.model import Model, ModelConfig
from moe_jax.noise import Noise, NoiseSpec, SiteNoise
from moe_jax.noise import sites as names
from moe_jax.noise.formats import FORMATS
from moe_jax.replay import Replay
from moe_jax.train.data import DataConfig

_SHORT = {"forward": "y", "grad_input": "dX", "grad_weight": "dW"}
_DRAWS = {"quantise": 0, "bias": 0, "bit_flip": 32}  # numbers per element, 1 for every other kind
_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Config:
    """What --set can reach."""

    model: ModelConfig
    data: DataConfig
    init_seed: int = 0
    data_seed: int = 0
    noise_seed: int = 0
    step: int = 0  # of the draws

    def __post_init__(self):
        for field in ("init_seed", "data_seed", "noise_seed", "step"):
            if not 0 <= getattr(self, field) < 1 << 32:
                raise ConfigError(f"{field} must be from 0 to 2**32 - 1, got {getattr(self, field)}")
        if self.data.seq_len > self.model.max_seq_len:
            raise ConfigError(f"seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}")


def read_spec(text: str) -> NoiseSpec:
    """A spec from the grammar, or by the name of a preset."""
    spec = NoiseSpec.parse(text) if ":" in text or "=" in text else NoiseSpec.preset(text.strip())
    if not spec.sites:
        raise ConfigError(f"--noise={text!r} names no site; write e.g. router_gemm=relative:0.05")
    return spec


# --- words --------------------------------------------------------------------------------------------------------------------

_PASS_WORDS = {"forward": "the result", "grad_input": "dX", "grad_weight": "dW"}
_WORDS = {
    "router_input": "the router's copy of its input (the experts read the clean one)",
    "router_logits": "the router's logits",
    "router_gemm": "the router's matmul",
    "lm_head": "the head's matmul",
    "embedding": "the embedded tokens",
    "norm_attention": "the scale of the norm before attention",
    "norm_moe": "the scale of the norm before the feed-forward",
    "norm_q": "the scale of the queries' norm",
    "norm_k": "the scale of the keys' norm",
    "norm_final": "the scale of the last norm",
} | {
    f"attention_{letter}": f"attention's {word} projection"
    for letter, word in zip("qkvo", ("query", "key", "value", "output"), strict=True)
}
_KIND_WORDS = {
    "relative": "becomes y*(1 + s*n), n ~ N(0,1)",
    "additive": "becomes y + s*n, n ~ N(0,1)",
    "rms_relative": "becomes y + s*rms(its row)*n, n ~ N(0,1)",
    "centred_relative": "becomes y + s*|y - mean of its row|*n, n ~ N(0,1)",
    "accumulation": "becomes y + s*sqrt(sum of the squared products in it)*n, n ~ N(0,1)",
    "jitter": "becomes y*u, u uniform from 1-s to 1+s",
    "learned": "becomes y + s*n*softplus(x W), n ~ N(0,1), with a W that the model learns",
    "bit_flip": "has each of its stored bits flipped with probability s",
    "bias": "becomes y + s*sign(y)*(mean of |y| in its row), without any draw",
}


def sentence(name: str, noise: SiteNoise, hit: Sequence[str], config: ModelConfig) -> str:
    """One entry of a spec in words. hit: the sites of this model that it acts on."""
    what = _WORDS.get(hit[0], f"the matmul {hit[0]}") if len(hit) == 1 else f"the matmuls {listed(hit)}"
    is_value, per_element = hit[0] in names.VALUES, _DRAWS.get(noise.kind, 1)
    passes = ("forward",) if is_value else tuple(name for name in PASSES if name in noise.passes)
    where = " in the forward pass" if is_value else f" of {listed(_PASS_WORDS[name] for name in passes)}"
    own = ", each with its own draws" * (len(passes) > 1 and per_element > 0) + ", the same for all tokens" * (hit[0] in names.NORMS)
    parts = [_how(noise, is_value, where) + own, listed(_places(noise, hit, config))]
    parts.append(
        "all phases"
        if set(noise.phases) == set(PHASES)
        else f"phase{'s' * (len(noise.phases) > 1)} {listed(name for name in PHASES if name in noise.phases)}"
    )
    if noise.reach:
        parts.append(f"read so by {listed(noise.reach)} alone")
    if per_element:
        parts.append("a fresh draw each step" if noise.draws == "fresh" else "the same draw in every step")
    if noise.format:
        parts.append(f"{noise.format} is {FORMATS[noise.format].description}")
    return f"{name}: {what}. {'; '.join(parts)}."


def _how(noise: SiteNoise, is_value: bool, where: str) -> str:
    scale = "/".join(f"{value:g}" for value in np.atleast_1d(np.asarray(noise.scale)))
    if noise.kind == "quantise":
        rounded = f"rounded to {noise.format}" if scale == "1" else f"moved {scale} of the way to their values in {noise.format}"
        return (
            f"The elements are {rounded}{where}"
            if is_value
            else f"Both operands are {rounded} in the products for{where.removeprefix(' of')}"
        )
    return f"Each element y{where} {_KIND_WORDS[noise.kind]}, s = {scale}{' by layer' * ('/' in scale)}"


def _places(noise: SiteNoise, hit: Sequence[str], config: ModelConfig) -> list[str]:
    inside = [site for site in hit if site not in names.OUTSIDE_LAYERS]
    by_layers: dict[str, list[str]] = {}
    for site in inside:
        by_layers.setdefault(_layer_words(_layers_of(site, noise, config), config), []).append(site)
    places = [f"{words}{f' ({listed(sites)})' * (len(by_layers) > 1)}" for words, sites in by_layers.items()]
    return places + [
        f"{site} once, outside the layers" if inside else "once, outside the layers" for site in hit if site in names.OUTSIDE_LAYERS
    ]


def _layers_of(site: str, noise: SiteNoise, config: ModelConfig) -> list[int]:
    """The absolute layers in which the noise acts, of those that have the site."""
    has = range(config.num_layers)
    if site in ("router_gemm", "router_input", "router_logits", *names.GROUPS["experts"]):
        has = config.moe_layers
    if site in names.GROUPS["mlp"]:
        has = [layer for layer in has if layer not in config.moe_layers]
    return [layer for layer in has if noise.layers is None or layer in noise.layers]


def _layer_words(layers: list[int], config: ModelConfig) -> str:
    if len(layers) == config.num_layers:
        return "every layer" if config.num_layers < 3 else f"all {config.num_layers} layers"
    return f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers)) or 'none'} (of 0 to {config.num_layers - 1})"


def words(spec: NoiseSpec, config: ModelConfig) -> list[str]:
    """The spec's table, a sentence for each entry, and what it leaves exact."""
    acting = {site: noise for site, noise in spec.by_site().items() if site in config.noise_sites}
    lines = [*NoiseSpec(acting).table().splitlines(), ""]
    for name, noise in spec.sites.items():
        hit = [site for site in names.members(name) if acting.get(site) is noise]
        text = sentence(name, noise, hit, config) if hit else f"{name}: nothing, for other entries stand for each of its sites."
        lines.append(textwrap.fill(text, _WIDTH, subsequent_indent="  "))
    exact = [site for site in config.noise_sites if site not in acting]
    for group in ("experts", "attention", "mlp"):
        members = [site for site in names.GROUPS[group] if site in config.noise_sites]
        if members and set(members) <= set(exact):
            exact = [group if site == members[0] else site for site in exact if site not in members[1:]]
    text = f"Not hit: {', '.join(exact) or 'no site of this model'}. No site stands for attention's scores and softmax, the norms' statistics, "
    lines.append(
        textwrap.fill(
            f"{text}the residual sums, the weighted sum of the experts and the loss: these are always exact.",
            _WIDTH,
            subsequent_indent="  ",
        )
    )
    return lines


# --- numbers ------------------------------------------------------------------------------------------------------------------


def aligned(rows: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """Columns side by side, the first `text_columns` flush left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < text_columns else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _ratio(error: float, size: float) -> float:
    return math.sqrt(error / size) if size > 0 else math.nan


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}" if value < 1e-3 or value >= 1e4 else f"{value:.4f}"


def _per_token(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _acting(found: dict[int, np.ndarray], scale) -> dict[int, np.ndarray]:
    """The layers in which the scale is not 0, or all when it is 0 in each."""
    scale = np.asarray(scale)
    kept = {layer: sums for layer, sums in found.items() if scale.ndim == 0 or scale[layer] > 0}
    return kept or found


def errors_table(tally: Tally, noise: Noise, tokens: int) -> list[str]:
    """Site by pass: numbers drawn, in all and per token, and the relative error, pooled and of the worst layer."""
    rows, total, everywhere, unmeasured = [("site", "pass", "numbers", "per token", "error", "worst layer")], 0, 0, []
    for site, structure in noise.structure:
        for pass_ in PASSES:
            found = tally.layers(site, pass_)
            if not found:
                continue
            acting = _acting(found, noise.scales[site])
            per_element = _DRAWS.get(structure.kind, 1)
            drawn = per_element * int(sum(sums[2] for sums in acting.values()))
            total, everywhere = total + drawn, everywhere + per_element * int(sum(sums[2] for sums in found.values()))
            pooled = _ratio(*np.sum([*acting.values()], axis=0)[:2])
            by_layer = {layer: _ratio(*sums[:2]) for layer, sums in acting.items()}
            worst = max(by_layer, key=by_layer.__getitem__)
            place = "-" if worst < 0 or math.isnan(pooled) else f"{_number(by_layer[worst])} (layer {worst})"
            rows.append((site, f"{pass_} ({_SHORT[pass_]})", f"{drawn:,}", _per_token(drawn / tokens), _number(pooled), place))
            if math.isnan(pooled):
                unmeasured.append(site)
    rows.append(("in all", "", f"{total:,}", _per_token(total / tokens), "", ""))
    lines = aligned(rows, 2)
    if everywhere > total:
        lines.append(f"(the layers that are not hit draw too, at scale 0: {everywhere:,} numbers in all)")
    if unmeasured:
        lines.append(
            f"(no relative error at {listed(sorted(set(unmeasured)))}: exact values that are all 0 or not finite, or a learned noise, which is added later)"
        )
    return lines


def router_table(found: Measurement, noise: Noise, config: ModelConfig) -> list[str]:
    """By routing layer: the clean logits' statistics, the error of the logits over their spread, and how many tokens changed experts."""
    assert found.logits is not None and found.changed is not None
    mean, std = found.logits.mean(-1), found.logits.std(-1)
    chosen, top = config.experts_per_token, -np.sort(-found.logits, -1)
    margin = top[..., chosen - 1] - top[..., chosen] if chosen < config.num_experts else np.zeros(mean.shape)
    at = [site for site in ("router_gemm", "router_logits") if any(size for _, size, _ in found.tally.layers(site, "forward").values())]
    head = ("layer", "mean", "std", "offset", "margin", *(f"error/std {site}" for site in at), "sets changed")
    rows: list[tuple[str, ...]] = []
    for index, layer in [*enumerate(config.moe_layers), (slice(None), -1)]:
        spread = std[index].mean()
        cells = [f"{mean[index].mean():.4f}", f"{spread:.4f}", f"{np.abs(mean[index]).mean() / spread:.3f}", f"{margin[index].mean():.4f}"]
        for site in at:
            sums = found.tally.layers(site, "forward")
            error, _, count = sums[layer] if layer >= 0 else np.sum([*_acting(sums, noise.scales[site]).values()], axis=0)
            cells.append(f"{math.sqrt(error / count) / spread:.4f}")
        rows.append(("all" if layer < 0 else str(layer), *cells, f"{found.changed[index].mean():.2%}"))
    return aligned([head, *rows], 1)


def effect(found: Measurement, config: ModelConfig) -> list[str]:
    """What the noise did to the loss and to the choice of experts."""
    difference = found.noisy_loss - found.loss
    lines = [f"loss            clean {found.loss:.5f}, noisy {found.noisy_loss:.5f} nats per token ({difference:+.5f})"]
    if found.changed is None:
        return lines
    layers = [layer for layer, changed in zip(config.moe_layers, found.changed, strict=True) if changed.any()]
    lines.append(
        f"expert sets     {found.changed.mean():.2%} of the {found.changed.size:,} (token, layer) pairs changed; "
        f"{found.changed.any(0).mean():.2%} of the tokens in at least one layer"
    )
    return [*lines, f"first change    {f'in layer {layers[0]}' if layers else 'none: every token went to the same experts in every layer'}"]


def explain(
    spec: NoiseSpec, config: Config, batch, text: str, phase: str | None = None, name: str = "", replay: Replay | None = None
) -> str:
    """The whole explanation. batch: tokens and targets Int[B, S]; text: where they come from; phase: default train if the spec acts there; replay: routes
    that the clean and the noisy pass take."""
    noise, model = config.model.resolve(spec), Model(config.model)
    used = [name for name in PHASES if noise.in_phase(name)]
    phase = phase or next(iter([name for name in used if name == "train"] or used), "train")
    acting = noise.in_phase(phase)
    rows, length = batch["tokens"].shape
    shape = config.model
    routing = f", {shape.num_experts} experts of which {shape.experts_per_token} per token" if shape.moe_layers else ", dense"
    lines = [
        f"model   {name}: {model.parameter_count():,} parameters, fresh from seed {config.init_seed}; {shape.num_layers} layers{routing}",
        f"batch   {rows} x {length} = {rows * length:,} tokens of {text}",
        f"phase   {phase}, step {config.step}, noise seed {config.noise_seed}; dropout off"
        + ("; routes replayed, so that noise moves none" if replay else ""),
        "",
        "What is hit",
        *words(spec, shape),
    ]
    if acting is None:
        where = f"it acts in {listed(used)}" if used else "it is empty"
        return "\n".join([*lines, "", f"In the phase {phase} nothing acts ({where}): its program is that of a model without noise."])
    draw = Draw(jnp.uint32(config.noise_seed), jnp.uint32(config.step), phase)
    found = measure(shape, model.init(config.init_seed), batch, noise, draw, replay)
    lines += ["", f"How often, and how large: one step in the phase {phase}", *errors_table(found.tally, acting, rows * length)]
    if phase != "train" and any(set(site.passes) - {"forward"} for name, site in acting.structure if name not in names.VALUES):
        lines.append("(no gradient is computed in this phase, so dX and dW draw nothing)")
    others = [name for name in used if name != phase and set(dict(noise.in_phase(name).structure)) != set(dict(acting.structure))]  # type: ignore
    if others:
        lines.append(f"(other sites act in {listed(others)}: --phase={others[0]} shows them)")
    if found.logits is not None:
        lines += ["", "The routers' logits, clean network, and what became of the choice", *router_table(found, acting, shape)]
    return "\n".join([*lines, "", "What it does", *effect(found, shape)])
