"""Noise as a value: which sites are perturbed, how, in which passes, layers and phases.

Structure (sites, kinds, passes, phases, reach) is static and part of a program's identity; scales are arrays, so one program serves every
scale.

| kind | what takes the place of y, n ~ N(0,1) per element |
|---|---|
| relative | y*(1 + s*n) |
| additive | y + s*n |
| rms_relative | y + s*rms(y over its last axis)*n |
| centred_relative | y + s*abs(y - mean(y over its last axis))*n |
| accumulation | y + s*sqrt((a^2)(b^2))*n for the matmul y = a b |
| jitter | y*u, u ~ U(1-s, 1+s) |
| learned | y + s*n*softplus(x W), W a parameter (router_logits; needs ModelConfig.learned_noise) |
| quantise | the operands of a matmul, or y itself, rounded to a format; s = 1 is all the way |
| bit_flip | each stored bit of y flips with probability s |
| bias | y + s*sign(y)*mean(abs(y) over its last axis), no draw |
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import ConfigError, nearest
from moe_jax.keys import MOST_LAYERS, PASSES, PHASES
from moe_jax.noise import sites as names
from moe_jax.noise.formats import FORMATS

DRAWS = ("fresh", "fixed")
OPTIONS = ("passes", "layers", "phases", "reach", "draws", "format")
PRESETS = {
    "seed_gate": "router_logits=additive:{0}:phases=train",
    "e7b_as_run": "attention=relative:{0}:passes=forward:phases=rollout+eval,router_gemm=relative:{0}:passes=forward:phases=rollout+eval,"
    "lm_head=relative:{0}:passes=forward",
    "e7b_as_described": "matmuls=relative:{0}",
    "dense7b_as_run": "attention=relative:{0},mlp=relative:{0},lm_head=relative:{0}",
}
DEFAULT_SCALE = {"e7b_as_run": "0.05", "e7b_as_described": "0.05", "dense7b_as_run": "0.05"}


@dataclasses.dataclass(frozen=True)
class SiteNoise:
    """Noise at one site or group. What is not said: all passes, all layers, all phases, everything that reads the site, a fresh draw each step.

    scale: >= 0, a number, an array scalar, or one per layer. layers: absolute layer indices. reach (router_logits, norm_moe): which readers get
    the noisy value; "both", or None, is all of them. draws: "fresh", one per step, or "fixed", the same in each: a device's fixed pattern.
    format (quantise): one of FORMATS.
    """

    kind: str
    scale: Any = 1.0
    passes: tuple[str, ...] = PASSES
    layers: tuple[int, ...] | None = None
    phases: tuple[str, ...] = PHASES
    reach: tuple[str, ...] | None = None
    draws: str = "fresh"
    format: str | None = None

    def __post_init__(self):
        for field in ("passes", "phases", "reach", "layers"):
            given = getattr(self, field)
            object.__setattr__(self, field, (given,) if isinstance(given, str) else None if given is None else tuple(given))
        if self.reach == ("both",):
            object.__setattr__(self, "reach", None)
        names.check_names(self.kind, self.passes)
        for field, given, known in (("phases", self.phases, PHASES), ("draws", (self.draws,), DRAWS)):
            for name in given:
                if name not in known:
                    raise ConfigError(f"unknown name {name!r} in {field}{nearest(name, known)}; known: {', '.join(known)}")
        if self.kind == "quantise" and self.format not in FORMATS:
            raise ConfigError(
                f"unknown format {self.format!r} to quantise to{nearest(str(self.format), FORMATS)}; known: {', '.join(FORMATS)}"
            )
        if self.kind != "quantise" and self.format is not None:
            raise ConfigError(f"noise kind {self.kind!r} has no format, got {self.format!r}; only quantise has one")
        most = 1.0 if self.kind in ("quantise", "bit_flip") else math.inf
        # an array of jax may be traced: it has no value here
        if all(isinstance(part, (int, float, np.number, np.ndarray)) for part in jax.tree.leaves(self.scale)):
            given = np.asarray(self.scale, np.float64)
            if not (np.isfinite(given) & (given >= 0) & (given <= most)).all():
                limits = "finite and not negative" if most == math.inf else f"from 0 to {most:g}"
                raise ConfigError(f"the scale of {self.kind} must be {limits}, got {self.scale}")


@jax.tree_util.register_pytree_node_class
class NoiseSpec:
    """Sites or groups mapped to their noise; immutable. A pytree whose leaves are the scales.

    Example: NoiseSpec({"experts": SiteNoise("relative", 0.05, phases=("train",)), "router_gemm": SiteNoise("relative", 0.01)})
    """

    def __init__(self, sites: Mapping[str, SiteNoise] | None = None):
        self.sites: dict[str, SiteNoise] = dict(sorted((sites or {}).items()))
        for site, noise in self.sites.items():
            names.members(site)
            names.check(site, noise.kind, noise.passes, noise.reach)

    def __repr__(self):
        return f"NoiseSpec({self.sites})"

    def __eq__(self, other):
        return isinstance(other, NoiseSpec) and self.sites == other.sites

    @classmethod
    def parse(cls, text: str) -> "NoiseSpec":
        """A spec from `site=kind:scale[:field=a+b...],...`, e.g. "experts=relative:0.05:passes=forward:layers=0-2+5,router_gemm=quantise:fp8_e4m3".

        Without a site the noise is on every matmul: "relative:0.05" is "matmuls=relative:0.05", which may be written "all=relative:0.05". A scale per layer
        is written 0.1/0.2/0.3. A preset's name is read as that preset.
        """
        if text in DEFAULT_SCALE or text.rpartition("_")[0] in PRESETS:
            return cls.preset(text)
        sites = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            site, equals, rest = entry.partition("=")
            if not equals or ":" in site:
                site, rest = "matmuls", entry
            elif site == "all":
                site = "matmuls"
            if site in sites:
                raise ConfigError(f"noise at {site!r} is given twice, the second time as {entry!r}; give one")
            sites[site] = _site_noise(rest, entry)
        return cls(sites)

    @classmethod
    def preset(cls, name: str) -> "NoiseSpec":
        """A named spec, with its scale after an underscore: seed_gate_0.1, e7b_as_run (0.05 unless said), e7b_as_run_0.01, ...

        seed_gate: Gaussian noise on the gate's logits in training, as in the small seed study. e7b_as_run: what the noise of the 30B RL run really hit:
        attention, router and head while sampling and validating, the head's forward pass elsewhere, no experts. e7b_as_described: every matmul, as its
        authors believed. dense7b_as_run: every matmul of their dense 7B run, which was indeed so.
        """
        prefix, _, number = name.rpartition("_")
        if name in DEFAULT_SCALE:
            prefix, number = name, DEFAULT_SCALE[name]
        if prefix not in PRESETS:
            known = ("seed_gate_S with a number S", *DEFAULT_SCALE)
            raise ConfigError(f"unknown noise preset {name!r}{nearest(name, DEFAULT_SCALE)}; known: {', '.join(known)}")
        if set(number) & set(",:="):
            raise ConfigError(f"a noise preset stands alone, got {name!r}; write its sites out to combine or change it: {PRESETS[prefix]}")
        return cls.parse(PRESETS[prefix].format(number))

    def by_site(self) -> dict[str, SiteNoise]:
        """The noise of each single site: groups taken apart, and overridden by what names a site itself (or a smaller group)."""
        found = {}
        for name in sorted(self.sites, key=lambda name: -len(names.members(name))):
            grouped = name in names.GROUPS
            for site in names.members(name):
                noise = self.sites[name]
                if not (grouped and site in names.OUTSIDE_LAYERS and _per_layer(noise)):
                    found[site] = noise
        return dict(sorted(found.items()))

    def resolve(self, num_layers: int, sites: Collection[str] = names.SITES) -> "Noise":
        """The spec over a model's layers: per site one scale per layer, 0 where the layer is not in it; one number for a site outside the layers.

        sites: those that the model has. Raises ConfigError for a site it does not have (a group means those it has), for layers beyond it, and for a
        scale per layer of another length.
        """
        scales, structure = {}, []
        for name in self.sites:
            if not any(site in sites for site in names.members(name)):
                raise ConfigError(
                    f"this model has no noise site {name!r}; it has {', '.join(site for site in names.SITES if site in sites)}"
                )
        for site, noise in self.by_site().items():
            if site in sites:
                scales[site] = _layer_scales(site, noise, num_layers)
                structure.append((site, dataclasses.replace(noise, scale=0.0, layers=None)))
        return Noise(scales, tuple(structure))

    def table(self) -> str:
        """Sites by phases as aligned text: what is perturbed where, "-" where nothing is."""
        rows: list[tuple[str, ...]] = [("site", *PHASES)]
        for site, noise in self.by_site().items():
            rows.append((site, *(_cell(site, noise) if phase in noise.phases else "-" for phase in PHASES)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)

    def tree_flatten(self):
        structure = tuple((site, tuple(getattr(noise, field) for field in _STATIC)) for site, noise in self.sites.items())
        return tuple(noise.scale for noise in self.sites.values()), structure

    @classmethod
    def tree_unflatten(cls, structure, scales):
        spec = object.__new__(cls)
        spec.sites = {
            site: SiteNoise(scale=scale, **dict(zip(_STATIC, static, strict=True)))
            for (site, static), scale in zip(structure, scales, strict=True)
        }
        return spec


_STATIC = tuple(field.name for field in dataclasses.fields(SiteNoise) if field.name != "scale")


def _per_layer(noise: SiteNoise) -> bool:
    return noise.layers is not None or isinstance(noise.scale, list | tuple) or np.ndim(noise.scale) > 0


def _layer_scales(site: str, noise: SiteNoise, num_layers: int) -> jax.Array:
    """Float32[L], or [] for a site outside the layers."""
    scale = jnp.asarray(noise.scale, jnp.float32)
    if site in names.OUTSIDE_LAYERS:
        if _per_layer(noise):
            raise ConfigError(
                f"noise at {site!r} names layers {noise.layers} or a scale of shape {scale.shape}, but stands outside the layers"
            )
        return scale
    outside = [layer for layer in noise.layers or () if not 0 <= layer < num_layers]
    if outside:
        raise ConfigError(f"noise at {site!r} names layers {outside}, the model has layers 0 to {num_layers - 1}")
    if scale.shape not in ((), (num_layers,)):
        raise ConfigError(f"noise at {site!r} has a scale of shape {scale.shape}; give one number or one per layer ({num_layers},)")
    return (
        scale
        * (1.0 if noise.layers is None else np.isin(np.arange(num_layers), noise.layers).astype(np.float32))
        * np.ones(num_layers, np.float32)
    )


def _cell(site: str, noise: SiteNoise) -> str:
    short = {"forward": "y", "grad_input": "dX", "grad_weight": "dW"}
    acting = ("forward",) if site in names.VALUES else noise.passes
    scale = "/".join(f"{value:g}" for value in np.atleast_1d(np.asarray(noise.scale)))
    amount = noise.format if noise.kind == "quantise" and scale == "1" else f"{noise.format or ''} {scale}".strip()
    layers = "" if noise.layers is None else f" layers {','.join(map(str, noise.layers))}"
    reach = "" if noise.reach is None else f" to {'+'.join(noise.reach)}"
    return f"{noise.kind} {amount} on {'+'.join(short[name] for name in acting)}{layers}{reach}{' fixed' * (noise.draws == 'fixed')}"


def _site_noise(text: str, entry: str) -> SiteNoise:
    kind, *options = text.split(":")
    if not kind or not options:
        raise ConfigError(f"cannot read noise {entry!r}; write site=kind:scale, e.g. router_logits=additive:0.1")
    pairs = [_option(option, entry) for option in options[1:]]
    fields: dict[str, Any] = dict(pairs)
    if len(fields) < len(pairs):
        raise ConfigError(f"noise {entry!r} gives an option twice; give each once")
    if kind == "quantise" and options[0][:1].isalpha():
        return SiteNoise(kind, 1.0, **{"format": options[0], **fields})
    try:
        scales = [float(part) for part in options[0].split("/")]
    except ValueError:
        raise ConfigError(f"noise scale {options[0]!r} in {entry!r} is not a number") from None
    return SiteNoise(kind, scales[0] if len(scales) == 1 else tuple(scales), **fields)


def _option(option: str, entry: str) -> tuple[str, Any]:
    name, _, value = option.partition("=")
    if name not in OPTIONS:
        raise ConfigError(f"unknown option {name!r} in noise {entry!r}{nearest(name, OPTIONS)}; known: {', '.join(OPTIONS)}")
    if name in ("draws", "format"):
        return name, value
    if name != "layers":
        return name, tuple(value.split("+"))
    try:
        return name, tuple(_layer_numbers(value))
    except ValueError:
        raise ConfigError(f"cannot read layers {value!r} in noise {entry!r}; write e.g. 0-3+7") from None


def _layer_numbers(text: str) -> Iterable[int]:
    for part in text.split("+"):
        first, _, last = part.partition("-")
        layers = range(int(first), int(last or first) + 1)
        if not layers or layers[-1] >= MOST_LAYERS:
            raise ValueError(f"no layers in {part!r}")
        yield from layers


@functools.partial(jax.tree_util.register_dataclass, data_fields=("scales",), meta_fields=("structure",))
@dataclasses.dataclass(frozen=True)
class Noise:
    """A spec resolved for one model: what a compiled program takes. Leaves: one float32 scale per layer and site."""

    scales: dict[str, jax.Array]  # site -> Float[L]
    structure: tuple[tuple[str, SiteNoise], ...]  # static; here scale is 0 and layers None

    def in_phase(self, phase: str) -> "Noise | None":
        """The sites that act in a phase; None when there are none, so that the program is the one without noise."""
        kept = tuple((site, noise) for site, noise in self.structure if phase in noise.phases)
        return Noise({site: self.scales[site] for site, _ in kept}, kept) if kept else None

    def scaled(self, factor: float) -> "Noise":
        """The same structure, and so the same program, with every scale times `factor`."""
        return Noise({site: scale * factor for site, scale in self.scales.items()}, self.structure)
