"""Which mesh: every way to divide the devices that the model allows, judged by the memory model and the roofline, and why the best is that."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moe_jax.errors import ConfigError
from moe_jax.mesh import DEFAULT_RULES, MeshSpec
from moe_jax.plan.chips import Chip
from moe_jax.plan.memory import Memory, Part, declared, estimate
from moe_jax.plan.roofline import Roofline, roofline
from moe_jax.train.run_config import RunConfig

MARGIN = 0.9  # of what a chip has, for what the memory model does not see: its error, and pieces that lie between arrays


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the step. refused: why it cannot be, or "" ."""

    mesh: MeshSpec
    config: RunConfig  # with the exchange and the recomputation that it is judged with
    refused: str = ""
    memory: Memory | None = None
    roofline: Roofline | None = None

    def fits(self, chip: Chip) -> bool:
        return self.memory is not None and self.memory.peak <= MARGIN * chip.limit


def meshes(devices: int) -> Iterator[MeshSpec]:
    """Every (data, fsdp, expert, tensor) of sizes that multiply to `devices`, with tensor up to 8."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for tensor in (size for size in sizes if size <= 8):
        for expert in (size for size in sizes if devices // tensor % size == 0):
            for fsdp in (size for size in sizes if devices // tensor // expert % size == 0):
                yield MeshSpec(devices // tensor // expert // fsdp, fsdp, expert, tensor)


def judged(config: RunConfig, mesh: MeshSpec, devices: Sequence[Any] | None = None) -> Candidate:
    """One mesh, as `config` has it; what does not divide is a refusal. devices: abstract or real, whose network it has to fit; None: not looked at."""
    model, sizes = config.model, dataclasses.asdict(mesh)
    try:
        for path, spec in declared(model).items():
            _named(path, DEFAULT_RULES.partition, spec.axes, spec.shape, sizes)
        for name, count in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads)):
            _divides(count, mesh.tensor, name, "tensor")
        for name, count in (("batch_size", config.data.batch_size), ("eval_batch", config.eval_batch)):
            _divides(count, mesh.data * mesh.fsdp, name, "data x fsdp")
        if devices is not None:
            mesh.build(devices)
    except ConfigError as error:
        return Candidate(mesh, config, str(error))
    return Candidate(mesh, config, "", estimate(config, mesh), roofline(config, mesh))


def _divides(count: int, over: int, what: str, axes: str) -> None:
    """Raises ConfigError where `count` does not divide."""
    if count % over:
        raise ConfigError(f"{what}={count} does not divide over {axes}={over}")


def _named(path: str, function: Callable, *arguments: Any) -> None:
    try:
        function(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def search(config: RunConfig, chip: Chip, size: int, devices: Sequence[Any] | None = None, keep_remat: bool = False) -> list[Candidate]:
    """All candidates, the best first: of those that fit the fastest (by the slower of the two times), then by what they need; refusals last.

    For each mesh the exchange of rows is the faster one that fits, and the recomputation the least that fits, unless keep_remat.
    """
    best = [on_mesh(config, mesh, chip, devices, keep_remat) for mesh in meshes(size)]
    return sorted(best, key=lambda candidate: _rank(candidate, chip))


def on_mesh(config: RunConfig, mesh: MeshSpec, chip: Chip, devices: Sequence[Any] | None, keep_remat: bool) -> Candidate:
    """The best way to run on one mesh; see `search`."""
    options = [judged(option, mesh, devices) for option in _options(config, mesh, keep_remat)]
    return min(options, key=lambda candidate: _rank(candidate, chip))


def _options(config: RunConfig, mesh: MeshSpec, keep_remat: bool) -> Iterator[RunConfig]:
    model = config.model
    exchanges = (
        (model.dispatch,) if model.dispatch or mesh.expert * mesh.tensor == 1 or not model.moe_layers else ("all_to_all", "all_gather")
    )
    tokens = Part.of(config, mesh).tokens
    chunks = (model.dispatch_chunks,) if model.dispatch_chunks > 1 or tokens % 4 or not model.moe_layers else (1, 4)
    for remat in (model.remat,) if keep_remat else ("none", "dots", "full"):
        for exchange, parts in itertools.product(exchanges, chunks):
            yield dataclasses.replace(config, model=model.replace(remat=remat, dispatch=exchange, dispatch_chunks=parts))


def _rank(candidate: Candidate, chip: Chip) -> tuple:
    if candidate.refused or candidate.memory is None or candidate.roofline is None:
        return (2, 0.0)
    if not candidate.fits(chip):
        return (1, candidate.memory.peak)
    used = sum(size > 1 for size in (candidate.mesh.data, candidate.mesh.fsdp, candidate.mesh.expert, candidate.mesh.tensor))
    return (0, round(candidate.roofline.seconds(chip)[1], 4), used, candidate.config.model.dispatch_chunks)


def why(candidates: list[Candidate], chip: Chip) -> str:
    """In words: what the best has over the next, and what the others lack."""
    fitting = [candidate for candidate in candidates if candidate.fits(chip)]
    refused = sum(bool(candidate.refused) for candidate in candidates)
    large = len(candidates) - len(fitting) - refused
    counts = f"Of {len(candidates)} meshes {refused} do not divide the model or the network, {large} need more than {MARGIN:.0%} of a chip, {len(fitting)} fit."
    if not fitting:
        return f"{counts} None fits."
    first = fitting[0]
    text = f"{counts} {first.mesh} has the shortest step that hides no traffic: {words(first, chip)}."
    return text + (f" Next is {fitting[1].mesh}: {words(fitting[1], chip)}." if len(fitting) > 1 else "")


def words(candidate: Candidate, chip: Chip) -> str:
    """What a step takes on a candidate, and how it is run."""
    assert candidate.roofline is not None and candidate.memory is not None
    work, exchange = candidate.roofline.work(chip), candidate.roofline.exchange(chip)
    return (
        f"{work:.2f} s of work and {exchange:.2f} s of traffic with remat={candidate.config.model.remat} and "
        f"{candidate.config.model.dispatch or 'its tokens in place'}{_chunks(candidate)}, {candidate.memory.peak / 2**30:.1f} GiB"
    )


def _chunks(candidate: Candidate) -> str:
    parts = candidate.config.model.dispatch_chunks
    return f" in {parts} chunks" if parts > 1 else ""
