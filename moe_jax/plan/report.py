"""A plan as a document: whether it fits, what it needs and sends, how long it takes and what the noise adds. The same blocks make text and a page."""

from moe_jax.plan.chips import GIB
from moe_jax.plan.hlo import Totals
from moe_jax.plan.plan import Plan
from moe_jax.plan.roofline import ASSUMPTIONS
from moe_jax.plan.search import MARGIN
from moe_jax.plan.steps import Compiled, shapes_of
from moe_jax.studies.document import Block, Bullets, Heading, Table, Text


def verdict(plan: Plan) -> str:
    """One sentence: fits, or not and by how much."""
    steps, chip = {**plan.clean, **{f"{name}, noise on": step for name, step in plan.noisy.items()}}, plan.topology.chip
    if plan.topology.stand_in and chip:
        word = "FITS" if plan.fits else "DOES NOT FIT"
        need = f"{_gib(plan.memory.peak)} of {_gib(chip.limit)} GiB a chip on {plan.topology.name}"
        return f"{word} by the memory model: {need}, mesh {plan.mesh} (CPU devices stand in for it)."
    for name, step in steps.items():
        if step.refused:
            return f"DOES NOT FIT: the compiler refuses {name} on {plan.topology.name}, mesh {plan.mesh}: {step.refused}"
    worst = max(steps, key=lambda name: steps[name].peak)
    limit = f" of {_gib(chip.limit)}" if chip else ""
    word = "FITS" if plan.fits else "DOES NOT FIT"
    return f"{word}: at most {_gib(steps[worst].peak)}{limit} GiB a chip ({worst}) on {plan.topology.name}, mesh {plan.mesh}."


def blocks(plan: Plan, runs: int = 1, would_fit: tuple[str, ...] = (), command: str = "") -> list[Block]:
    """The whole document. runs: of `config.updates` each. would_fit: other slices, in words."""
    found: list[Block] = [Text(verdict(plan), "" if plan.fits else "warning")]
    if would_fit:
        found.append(Bullets(tuple(f"Would fit, by the memory model: {words}" for words in would_fit)))
    found += [Text(plan.explanation), *_setting(plan, command), Heading("Memory of one device"), memory_table(plan)]
    found += [_noise_adds(plan)] if plan.noisy else []
    found += [Heading("What devices send each other"), collectives_table(plan), Heading("Time"), *_times(plan, runs)]
    return [*found, Heading("Meshes"), meshes_table(plan)] if plan.candidates else found


def _setting(plan: Plan, command: str) -> list[Block]:
    c, data, chip = plan.config.model, plan.config.data, plan.topology.chip
    tokens = data.accumulation * data.batch_size * data.seq_len
    items = [
        f"{data.accumulation} x {data.batch_size} sequences of {data.seq_len} tokens in an update ({tokens:,} tokens); "
        f"{shapes_of(plan.config).batches(plan.config)}",
        f"parameters {c.dtypes.params}, compute {c.dtypes.compute}, remat {c.remat}, dispatch {c.dispatch or 'by platform'} in {c.dispatch_chunks} chunk(s), "
        f"Newton-Schulz {plan.config.optimizer.ns_dtype}",
        f"noise: {plan.noise or 'none'}",
    ]
    if chip:
        items.append(
            f"{chip.name}: {chip.memory / GIB:.0f} GiB, {chip.flops / 1e12:.0f} TFLOP/s, HBM {chip.bandwidth / 1e9:.0f} GB/s, links {chip.links / 1e9:.0f} GB/s"
        )
    return [Bullets(tuple(items)), *([Text(f"The step is that of: {command}")] if command else [])]


def memory_table(plan: Plan) -> Table:
    """What the compiler counts for each step, and the memory model's figure for training."""
    rows = []
    for what, steps in (("off", plan.clean), ("on", plan.noisy)):
        for name, step in steps.items():
            if step.refused:
                rows.append((name, what, "-", "-", "refused", f"{step.seconds:.0f}"))
            else:
                rows.append((name, what, _gib(step.arguments), _gib(step.temporaries), _gib(step.peak), f"{step.seconds:.0f}"))
    m = plan.memory
    model = (
        f"Memory model of train: parameters {_gib(m.parameters)}, optimizer {_gib(m.optimizer)}, gradients {_gib(m.gradients)}, activations "
        f"{_gib(m.activations)}, head {_gib(m.head)}, then the largest of loss {_gib(m.loss)}, layers {_gib(m.layer)} and update {_gib(m.update)}: "
        f"peak {_gib(m.peak)} GiB."
    )
    beside = {name: _gib(step.beside) for name, step in plan.clean.items() if step.beside}
    header = ("step", "noise", "arguments", "temporaries", "peak", "compiled in s")
    notes = [model]
    if beside:
        notes.append(f"With what else of the run's state lies there: {', '.join(f'{name} {size}' for name, size in beside.items())}.")
    if plan.topology.stand_in:
        notes.append("The figures are those of the CPU that stands in; the memory model's are meant for the chip.")
    return Table("GiB of one device, by the compiler", header, tuple(rows), words=2, notes=tuple(notes))


def _noise_adds(plan: Plan) -> Text:
    """What noise adds to memory and collectives, step by step."""
    words = []
    for name, noisy in plan.noisy.items():
        clean = plan.clean[name]
        if noisy.refused or clean.refused:
            continue
        more = sum(count for count, _ in noisy.always.values()) - sum(count for count, _ in clean.always.values())
        words.append(f"{name} {(noisy.peak / clean.peak - 1):+.1%} memory, {more:+.0f} collectives")
    return Text(f"Noise adds: {'; '.join(words)}.")


def collectives_table(plan: Plan) -> Table:
    """Kind, how often and how many bytes arrive, in each step."""
    rows = []
    for name, step in plan.clean.items():
        noisy = plan.noisy.get(name)
        for kind in sorted(set(step.always) | set(noisy.always if noisy else ())):
            rows.append((name, kind, *_count(step.always, kind), *(_count(noisy.always, kind) if noisy else ("", ""))))
        if step.overflowing:
            times, size = map(sum, zip(*step.overflowing.values(), strict=True))
            rows.append((name, "(where a buffer overflows)", f"{times:,.0f}", _figures(size / 1e9), "", ""))
    header = ("step", "kind", "times", "GB", "times, noise on", "GB, noise on")
    note = "Of one device; bytes are of the results. Loops count as often as they go round."
    return Table("Collectives", header, tuple(rows), words=2, notes=(note,))


def _count(totals: Totals, kind: str) -> tuple[str, str]:
    times, size = totals.get(kind, (0.0, 0.0))
    return f"{times:,.0f}", _figures(size / 1e9)


def _times(plan: Plan, runs: int) -> list[Block]:
    chip = plan.topology.chip
    if chip is None:
        return [Text("There are no figures of this device to predict times by.")]
    clean, noisy = plan.times
    with_noise = {part.name: part for part in noisy.components} if noisy else {}
    rows = [
        (
            part.name,
            _figures((part.flops + part.exact) / 1e12),
            _figures(part.traffic / 1e9),
            _figures(part.sent / 1e9),
            _figures(part.seconds(chip)),
            part.limit(chip),
            _figures(with_noise[part.name].seconds(chip)) if noisy else "",
        )
        for part in clean.components
    ]
    header = ("component", "TFLOP", "HBM GB", "received GB", "s", "decided by", "s, noise on")
    table = Table("Roofline of one update on one device", header, tuple(rows), words=1, notes=ASSUMPTIONS)
    return [table, Text(_cost(plan, "noise off", clean, runs)), *([Text(_cost(plan, "noise on", noisy, runs))] if noisy else [])]


def _cost(plan: Plan, what: str, times, runs: int) -> str:
    chip = plan.topology.chip
    (fast, slow), (high, low) = times.seconds(chip), times.mfu(chip)
    hours = [seconds * plan.config.updates * runs * plan.topology.size / 3600 for seconds in (fast, slow)]
    update = f"An update, {what}: {_figures(fast)} to {_figures(slow)} s, MFU {low:.0%} to {high:.0%}"
    study = f"{runs} run{'s' * (runs > 1)} of {plan.config.updates:,} updates: {hours[0]:,.0f} to {hours[1]:,.0f} chip-hours"
    return f"{update}; {study} ({hours[0] / plan.topology.size:,.1f} to {hours[1] / plan.topology.size:,.1f} h on {plan.topology.name})."


def meshes_table(plan: Plan, most: int = 8) -> Table:
    """The best meshes of the search, and of what is wrong with the others one example each."""
    chip, rows = plan.topology.chip, []
    assert chip is not None
    for candidate in plan.candidates[:most]:
        if candidate.roofline is None or candidate.memory is None:
            continue
        fast, slow = candidate.roofline.seconds(chip)
        model = candidate.config.model
        how = f"{model.remat}, {model.dispatch or 'tokens stay'}{f' in {model.dispatch_chunks}' if model.dispatch_chunks > 1 else ''}"
        rows.append(
            (str(candidate.mesh), how, _gib(candidate.memory.peak), "yes" if candidate.fits(chip) else "no", _figures(fast), _figures(slow))
        )
    header = ("mesh", "remat, exchange", "GiB (model)", f"within {MARGIN:.0%}", "s, hidden", "s, not hidden")
    refusals = {candidate.refused for candidate in plan.candidates if candidate.refused}
    notes = (f"{len(plan.candidates)} meshes; refused, for example: {min(refusals, key=len)}",) if refusals else ()
    return Table("The best meshes by memory model and roofline", header, tuple(rows), words=2, notes=notes)


def _gib(size: float) -> str:
    return _figures(size / GIB)


def _figures(value: float) -> str:
    """Two decimals, or two digits of what is smaller."""
    return f"{value:.2f}" if value >= 0.1 or not value else f"{value:.1g}"


def summary(steps: dict[str, Compiled]) -> dict[str, dict]:
    """For a JSON file."""
    return {
        name: {
            "arguments": step.arguments,
            "temporaries": step.temporaries,
            "peak": step.peak,
            "seconds": round(step.seconds, 1),
            "refused": step.refused,
            "collectives": {kind: list(value) for kind, value in step.always.items()},
            "overflowing": {kind: list(value) for kind, value in step.overflowing.items()},
        }
        for name, step in steps.items()
    }
