"""One plan: a mesh for a run on named hardware, its real steps compiled there with and without noise, and what they say."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_jax.errors import ConfigError
from moe_jax.mesh import MeshSpec
from moe_jax.plan.memory import Memory
from moe_jax.plan.roofline import Roofline, roofline
from moe_jax.plan.search import Candidate, judged, on_mesh, search, why, words
from moe_jax.plan.steps import Compiled, compile_step, shapes_of
from moe_jax.plan.topology import Topology, compiling_alone
from moe_jax.train.run_config import RunConfig

TRIES = 3  # meshes that are compiled, when the compiler needs more memory than the model thought, with noise or without


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found. Times are of the roofline, memory and collectives of the compiler."""

    topology: Topology
    config: RunConfig  # clean, with the exchange and recomputation that were compiled
    noise: str
    mesh: MeshSpec
    explanation: str
    memory: Memory
    clean: dict[str, Compiled]  # step -> what the compiler said
    noisy: dict[str, Compiled]
    times: tuple[Roofline, Roofline | None]
    candidates: tuple[Candidate, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every step was compiled within a chip's memory (of a stand-in: is, by the memory model)."""
        if self.topology.stand_in and self.topology.chip:
            return self.memory.peak <= self.topology.chip.limit
        chip, every = self.topology.chip, [*self.clean.values(), *self.noisy.values()]
        return not any(step.refused or (chip and step.peak > chip.limit) for step in every)


def make_plan(
    config: RunConfig,
    topology: Topology,
    mesh: MeshSpec | None = None,
    steps: Sequence[str] = (),
    keep_remat: bool = False,
    say: Callable[[str], None] = lambda text: None,
    cache: Path | None = None,
) -> Plan:
    """Compiles `steps` of the run (none named: all that it has) without its noise and, if it has any, with it, on `mesh` or on the best that a search finds.

    say: gets a line before each compilation. cache: see `compile_step`. Raises ConfigError for a mesh that does not divide the run or does not fit the
    topology, and where no mesh does.
    """
    noise, steps = config.noise, steps or shapes_of(config).steps
    chosen_from, explanation, every = candidates(config, topology, mesh, keep_remat)

    def compiled(config: RunConfig, mesh: MeshSpec, steps: Sequence[str], what: str) -> dict[str, Compiled]:
        built, found = mesh.build(topology.devices), {}
        for step in steps:
            say(f"compiling {step}, {what}, for {topology.name} on {mesh}")
            found[step] = compile_step(step, config, built, topology.platform, cache)
        return found

    with compiling_alone(say):
        for chosen in chosen_from[:TRIES]:
            with_noise, clean = chosen.config, dataclasses.replace(chosen.config, noise="")
            found = compiled(clean, chosen.mesh, steps[:1], "clean")
            noisy = compiled(with_noise, chosen.mesh, steps[:1], "noisy") if noise and not found[steps[0]].refused else {}
            refused = next((step.refused for step in (*found.values(), *noisy.values()) if step.refused), "")
            if not refused:
                break
            explanation += f" The compiler refused {chosen.mesh}{' with noise' * bool(noisy)}: {refused}"
        if not refused:
            found |= compiled(clean, chosen.mesh, steps[1:], "clean")
            noisy |= compiled(with_noise, chosen.mesh, steps[1:], "noisy") if noise else {}
    assert chosen.memory is not None and chosen.roofline is not None
    times = (roofline(clean, chosen.mesh), chosen.roofline if noise else None)
    return Plan(topology, clean, noise, chosen.mesh, explanation, chosen.memory, found, noisy, times, tuple(every))


def candidates(
    config: RunConfig, topology: Topology, mesh: MeshSpec | None, keep_remat: bool
) -> tuple[list[Candidate], str, list[Candidate]]:
    """The meshes to compile, in order; in words why; all that were judged."""
    chip = topology.chip
    if mesh is not None:
        if mesh.size != topology.size:
            raise ConfigError(f"mesh {mesh} has {mesh.size} devices, topology {topology.name} has {topology.size}")
        devices = topology.devices
        only = judged(config, mesh, devices) if chip is None else on_mesh(config, mesh, chip, devices, keep_remat)
        if only.refused:
            raise ConfigError(f"mesh {mesh} on {topology.name}: {only.refused}")
        return [only], f"{mesh} was given{f': {words(only, chip)}' if chip else ''}.", []
    if chip is None:
        kind = topology.devices[0].device_kind
        raise ConfigError(
            f"there are no figures of the attached device ({kind}) to choose a mesh by; name one, as in --mesh=data={topology.size}"
        )
    every = search(config, chip, topology.size, topology.devices, keep_remat)
    possible = [candidate for candidate in every if not candidate.refused]
    if not possible:
        raise ConfigError(
            f"no mesh over the {topology.size} devices of {topology.name} divides this run; for one, {every[0].mesh}: {every[0].refused}"
        )
    return [*possible[:1], *(candidate for candidate in possible[1:] if candidate.fits(chip))], why(every, chip), every
