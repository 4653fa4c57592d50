"""Noise as a value: which sites are perturbed, how, in which passes, layers and phases.

Structure (sites, kinds, passes, phases, reach) is static and part of a program's identity; scales are arrays, so one program serves every
scale.

| kind | perturbed value of y, n ~ N(0,1) per element |
|---|---|
| additive | y + s*n |
| relative | y*(1 + s*n) |
| rms_relative | y + s*rms(y over its last axis)*n |
| centred_relative | y + s*abs(y - mean(y over its last axis))*n |
| jitter | y*u, u ~ U(1-s, 1+s) |
| bias | y + s*sign(y)*mean(abs(y)), no draw |
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import ConfigError, Unsupported, nearest
from moe_jax.keys import PASSES, PHASES
from moe_jax.noise.kinds import KINDS

SITES = ("router_input", "router_logits")  # sites that a program can perturb
DECLARED_SITES = (  # sites that the grammar names
    *("router_gemm", "experts", "expert_gate", "expert_up", "expert_down"),
    *("attention", "attention_q", "attention_k", "attention_v", "attention_o", "lm_head", "embedding"),
    *("norm_attention", "norm_moe", "norm_q", "norm_k", "norm_final"),
)
DECLARED_KINDS = ("accumulation", "learned", "quantise", "bit_flip")
REACHES = ("selection", "weights", "balance")


@dataclasses.dataclass(frozen=True)
class SiteNoise:
    """Noise at one site. What is not said: all passes, all layers, all phases, and (at router_logits) all three reaches.

    scale: >= 0, a number or an array scalar. layers: absolute layer indices. reach (router_logits only): which of selection, combine
    weights and balance loss read the noisy logits.
    """

    kind: str
    scale: Any
    passes: tuple[str, ...] = PASSES
    layers: tuple[int, ...] | None = None
    phases: tuple[str, ...] = PHASES
    reach: tuple[str, ...] = REACHES

    def __post_init__(self):
        object.__setattr__(self, "layers", None if self.layers is None else tuple(self.layers))
        if self.kind not in KINDS:
            if self.kind in DECLARED_KINDS:
                raise Unsupported(f"noise kind {self.kind!r} acts inside a matmul, which no site offers yet; usable: {', '.join(KINDS)}")
            raise ConfigError(f"unknown noise kind {self.kind!r}{nearest(self.kind, KINDS)}; known: {', '.join(KINDS)}")
        for field, known in (("passes", PASSES), ("phases", PHASES), ("reach", REACHES)):
            given = getattr(self, field)
            given = (given,) if isinstance(given, str) else tuple(given)
            object.__setattr__(self, field, given)
            for name in given:
                if name not in known:
                    raise ConfigError(f"unknown name {name!r} in {field}{nearest(name, known)}; known: {', '.join(known)}")
        if isinstance(self.scale, (int, float, np.number, np.ndarray)):  # an array of jax may be traced: it has no value here
            given = np.asarray(self.scale, np.float64)
            if not (np.isfinite(given) & (given >= 0)).all():
                raise ConfigError(f"a noise scale must be finite and not negative, got {self.scale}")


@jax.tree_util.register_pytree_node_class
class NoiseSpec:
    """Sites mapped to their noise; immutable. A pytree whose leaves are the scales.

    Example: NoiseSpec({"router_logits": SiteNoise("additive", 0.1, phases=("train",))})
    """

    def __init__(self, sites: Mapping[str, SiteNoise] | None = None):
        self.sites: dict[str, SiteNoise] = dict(sorted((sites or {}).items()))
        for site in self.sites:
            if site in DECLARED_SITES:
                raise Unsupported(
                    f"noise site {site!r} is a matmul or a norm, which programs do not perturb yet; usable: {', '.join(SITES)}"
                )
            if site not in SITES:
                raise ConfigError(f"unknown noise site {site!r}{nearest(site, SITES + DECLARED_SITES)}; known: {', '.join(SITES)}")
            noise = self.sites[site]
            if "forward" not in noise.passes:
                raise ConfigError(f"noise at {site!r} has passes {noise.passes}, but an elementwise site acts in the pass forward alone")
            if site != "router_logits" and noise.reach != REACHES:
                raise ConfigError(f"noise at {site!r} names a reach {noise.reach}; only router_logits has one")

    def __repr__(self):
        return f"NoiseSpec({self.sites})"

    def __eq__(self, other):
        return isinstance(other, NoiseSpec) and self.sites == other.sites

    @classmethod
    def parse(cls, text: str) -> "NoiseSpec":
        """A spec from `site=kind:scale[:field=a+b…],…`, e.g. "router_logits=additive:0.1:phases=train:reach=selection+weights:layers=0-2+5"."""
        sites = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            site, _, rest = entry.partition("=")
            kind, *options = rest.split(":")
            if not rest or not options:
                raise ConfigError(f"cannot read noise {entry!r}; write site=kind:scale, e.g. router_logits=additive:0.1")
            if site in sites:
                raise ConfigError(f"noise at {site!r} is given twice, the second time as {entry!r}; give one")
            try:
                scale = float(options[0])
            except ValueError:
                raise ConfigError(f"noise scale {options[0]!r} in {entry!r} is not a number") from None
            sites[site] = SiteNoise(kind, scale, **dict(_option(option, entry) for option in options[1:]))
        return cls(sites)

    @classmethod
    def preset(cls, name: str) -> "NoiseSpec":
        """A named spec. seed_gate_S: Gaussian noise of standard deviation S on the gate's logits in training, as in the small seed study."""
        prefix, _, number = name.rpartition("_")
        if prefix != "seed_gate":
            raise ConfigError(f"unknown noise preset {name!r}; known: seed_gate_S with a number S, e.g. seed_gate_0.1")
        return cls.parse(f"router_logits=additive:{number}:phases=train")

    def resolve(self, num_layers: int) -> "Noise":
        """The spec over a model's layers: one scale per layer and site, 0 where the layer is not in it."""
        scales = {}
        for site, noise in self.sites.items():
            outside = [layer for layer in noise.layers or () if not 0 <= layer < num_layers]
            if outside:
                raise ConfigError(f"noise at {site!r} names layers {outside}, the model has layers 0 to {num_layers - 1}")
            scale = jnp.asarray(noise.scale, jnp.float32)
            if scale.shape not in ((), (num_layers,)):
                raise ConfigError(f"noise at {site!r} has a scale of shape {scale.shape}; give one number or one per layer ({num_layers},)")
            mask = (
                np.ones(num_layers, np.float32) if noise.layers is None else np.isin(np.arange(num_layers), noise.layers).astype(np.float32)
            )
            scales[site] = scale * mask
        structure = tuple((site, dataclasses.replace(noise, scale=None, layers=None)) for site, noise in self.sites.items())
        return Noise(scales, structure)

    def tree_flatten(self):
        structure = tuple((site, noise.kind, noise.passes, noise.layers, noise.phases, noise.reach) for site, noise in self.sites.items())
        return tuple(noise.scale for noise in self.sites.values()), structure

    @classmethod
    def tree_unflatten(cls, structure, scales):
        spec = object.__new__(cls)
        spec.sites = {
            site: SiteNoise(kind, scale, passes, layers, phases, reach)
            for (site, kind, passes, layers, phases, reach), scale in zip(structure, scales, strict=True)
        }
        return spec


def _option(option: str, entry: str) -> tuple[str, tuple]:
    name, _, value = option.partition("=")
    known = ("passes", "layers", "phases", "reach")
    if name not in known:
        raise ConfigError(f"unknown option {name!r} in noise {entry!r}{nearest(name, known)}; known: {', '.join(known)}")
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
        if not layers:
            raise ValueError(f"no layers in {part!r}")
        yield from layers


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Noise:
    """A spec resolved for one model: what a compiled program takes. Leaves: one float32 scale per layer and site."""

    scales: dict[str, jax.Array]  # site -> Float[L]
    structure: tuple[tuple[str, SiteNoise], ...]  # static; scale and layers are None here

    def in_phase(self, phase: str) -> "Noise | None":
        """The sites that act in a phase; None when there are none, so that the program is the one without noise."""
        kept = tuple((site, noise) for site, noise in self.structure if phase in noise.phases)
        return Noise({site: self.scales[site] for site, _ in kept}, kept) if kept else None

    def scaled(self, factor: float) -> "Noise":
        """The same structure, and so the same program, with every scale times `factor`."""
        return Noise({site: scale * factor for site, scale in self.scales.items()}, self.structure)

    def tree_flatten(self):
        return (self.scales,), self.structure

    @classmethod
    def tree_unflatten(cls, structure, children):
        return cls(children[0], structure)
