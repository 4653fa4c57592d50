"""AQN, adaptive quantisation noise: N(0, sigma^2) added to the RMSNorm scales of the sampling copy of the parameters, once per weight sync.

The trained parameters stay clean: the noise acts in the phase rollout alone. Sigma falls in stages. Sources: QeRL (arXiv 2510.11696 and its
code, which differ by an exponent); the epoch-aware schedule of its port to verl. D width of a scale, L layers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from moe_jax import keys
from moe_jax.errors import ConfigError, Unsupported, check_known, nearest
from moe_jax.noise.kinds import perturb
from moe_jax.noise.sites import NORMS, REACHES
from moe_jax.noise.spec import NoiseSpec, SiteNoise
from moe_jax.paths import flatten, unflatten

VARIANTS = ("qerl_code", "qerl_paper", "epochs")
READERS = REACHES["norm_moe"]


@dataclasses.dataclass(frozen=True)
class AQN:
    """The schedule of sigma over a run, and the norms that it reaches.

    K = stages equal intervals; sigma is 0 in the first, then for i = 0…K-2
    * qerl_code: start*(end/start)**(i/(K-2)), which reaches `end`;
    * qerl_paper: start*(end/start)**(i/(K-1)), which does not;
    * epochs: each of `epochs` equal epochs has stages_per_epoch + 1 intervals: one at 0, then stages_per_epoch values from b_i to b_(i+1),
      both included, b_i = start*(end/start)**(i/epochs). `stages` is not used.
    reach: who reads the noisy scale of norm_moe, whose output both the router and the experts take; "both" is them. Raises ConfigError for what cannot be.
    """

    start: float = 1e-2
    end: float = 1e-4
    stages: int = 10
    variant: str = "qerl_code"
    epochs: int = 1
    stages_per_epoch: int = 5
    targets: tuple[str, ...] = ("norms",)  # all that the model has, or some by name
    reach: tuple[str, ...] = READERS

    def __post_init__(self):
        for field, known in (("variant", VARIANTS), ("targets", ("norms", *NORMS)), ("reach", READERS)):
            given = getattr(self, field)
            names = (given,) if isinstance(given, str) else tuple(given)
            names = READERS if (field, names) == ("reach", ("both",)) else names
            for name in names or ("",):
                check_known(f"AQN {field}", name, known)
            object.__setattr__(self, field, names[0] if field == "variant" else names)
        for field in ("start", "end"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"AQN {field} must be positive and finite, got {getattr(self, field)}")
        least = {"qerl_code": {"stages": 3}, "qerl_paper": {"stages": 2}, "epochs": {"epochs": 1, "stages_per_epoch": 2}}
        for field, count in least[self.variant].items():
            if not isinstance(given := getattr(self, field), int) or given < count:
                raise ConfigError(f"AQN variant {self.variant} needs {field} to be a whole number from {count} up, got {given}")

    def stage_table(self, total_steps: int) -> list[tuple[int, float]]:
        """(first step, sigma) of each interval of a run of `total_steps` weight syncs, counted from 0."""
        rounds, values = (self.epochs, self.stages_per_epoch) if self.variant == "epochs" else (1, self.stages - 1)
        last = values if self.variant == "qerl_paper" else values - 1
        if total_steps < (count := rounds * (values + 1)):
            raise ConfigError(f"AQN cuts a run into {count} intervals and this one has {total_steps} steps; lower stages or epochs")
        exponents = [(epoch + i / last) / rounds if i >= 0 else None for epoch in range(rounds) for i in range(-1, values)]
        sigmas = [0.0 if x is None else self.start * (self.end / self.start) ** x for x in exponents]
        return [(-(-index * total_steps // count), sigma) for index, sigma in enumerate(sigmas)]  # in integers: no boundary is rounded

    def spec(self, sigma: Float[Array, ""] | float) -> NoiseSpec:
        """The noise of the sampling forward, sigma traced or not: one draw per sync when `Draw.step` is the step of the last sync."""
        noise = SiteNoise("additive", sigma, ("forward",), phases=("rollout",))
        reached = {"norm_moe": dataclasses.replace(noise, reach=self.reach)} if self._targeted("norm_moe") else {}
        return NoiseSpec(dict.fromkeys(self.targets, noise) | reached)

    def _targeted(self, site: str) -> bool:
        return site in self.targets or "norms" in self.targets

    def sampling_copy(
        self, params: Mapping[str, Any], scale_sites: Mapping[str, str], layers: Mapping[str, Sequence[int]], sigma, key: UInt32[Array, "2"]
    ) -> dict[str, Any]:
        """`params` for an external sampler, with the scales of the targets as the forward pass of `spec(sigma)` perturbs them.

        scale_sites: path of a norm's scale -> its site, e.g. {"layers/norm_moe/scale": "norm_moe"}. layers: stack, the first part of a path
        -> its absolute layers; scales are [L, D] in a stack and [D] outside. key: `Draw(seed, step, "rollout").key()`. Raises ConfigError
        for a target without a path, a path without a parameter and a shape that does not fit; Unsupported for a reach that is not both.
        """
        if self._targeted("norm_moe") and set(self.reach) != set(READERS):
            raise Unsupported(f"AQN that reaches {self.reach} alone needs two scales at norm_moe, and a copy holds one; use AQN.spec")
        if absent := [target for target in self.targets if target not in ("norms", *scale_sites.values())]:
            raise ConfigError(f"AQN targets {', '.join(absent)}, which no path of scale_sites has; give them paths or other targets")
        flat = flatten(params)
        for path, site in scale_sites.items():
            if path not in flat:
                raise ConfigError(f"no parameter {path!r}{nearest(path, flat)}")
            if self._targeted(site):
                numbers = layers.get(path.split("/")[0])
                if jnp.shape(flat[path])[:-1] != (() if numbers is None else (len(numbers),)):
                    raise ConfigError(f"{path!r} has the shape {jnp.shape(flat[path])}, and its stack the layers {numbers}")
                flat[path] = _perturbed(jnp.asarray(flat[path]), numbers, site, sigma, key)
        return unflatten(flat)


def _perturbed(scale: Float[Array, "... D"], layers: Sequence[int] | None, site: str, sigma, key) -> Float[Array, "... D"]:
    """Each layer's scale perturbed as row 0 of the layer's stream, -1 outside the layers."""

    def row(scale, layer):
        return perturb(scale[None], "additive", sigma, keys.stream(key, layer, site, "forward"), jnp.zeros(1, jnp.int32))[0]

    return row(scale, -1) if layers is None else jax.vmap(row)(scale, jnp.asarray(layers, jnp.int32))
