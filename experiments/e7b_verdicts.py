"""What the matrix of e7b says about each claim of study 004, and the seed's table for each arm: pages made from the ledger alone, without jax."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moe_jax.studies import Ledger, document
from moe_jax.studies.analysis import Analysis, analyse, interval_text, number, p_words
from moe_jax.studies.document import Bullets, Heading, Table, Text
from moe_jax.studies.stats import Contrast

MARGIN = 0.02  # accuracy: what is less apart than this counts as equally good
CHANGED = "experts changed by noise while sampling"
GROWTH = "growth of changed experts from the first layer to the last"
DENSE_LEVEL = "damage left when the router is spared, less that of the dense twin"


def half_name(arm: str) -> str:
    """The contrast of what an arm takes away with half of the damage."""
    return f"taken away by {arm}, less half of the damage"


def against_name(model: str, arm: str, other: str, label: str) -> str:
    """The contrast of two arms of a model."""
    return f"{model}: {arm} - {other}, {label}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of study 004 and how its contrast is read.

    resolved: says which side of 0. at_least: `value` or more. as_good: not worse by more than MARGIN. harm: below 0, refuted when not by more than MARGIN.
    """

    letter: str
    text: str
    contrast: str
    reading: str = "resolved"
    value: float = 0.0


CLAIMS = (
    Claim("a", "The router is the failure point: sparing it takes away more than half of the damage", half_name("router left out")),
    Claim("b", "5 % noise changes half of the chosen experts", CHANGED, "at_least", 0.5),
    Claim("c", "Errors compound over layers: more routes change in later ones", GROWTH),
    Claim(
        "d",
        "A router that learns under noise degrades: noise on the router in training leaves a worse policy behind, with the noise off",
        against_name("moe", "router only", "clean", "Accuracy, noise off"),
        "harm",
    ),
    Claim("e", "Freezing the router recovers most of what was lost", half_name("freeze")),
    Claim("f", "With the router left out of the noise, what is lost is no more than a dense model loses", DENSE_LEVEL, "as_good"),
    Claim("g", "Replaying clean routes recovers most of what was lost", half_name("replay reference")),
    Claim("h", "1 % on the router and 5 % elsewhere recovers most of what was lost", half_name("router 1 %")),
    Claim("i", "AQN on the experts only helps", against_name("moe", "AQN experts", "as described", "Accuracy, noise on")),
)


def verdict(claim: Claim, found: Contrast | None) -> str:
    """CONFIRMED, REFUTED or UNRESOLVED; "not run" while fewer than two seeds have the contrast's cells."""
    if found is None:
        return "not run"
    low, high = found.interval
    if claim.reading == "at_least":
        holds, fails = low >= claim.value, high < claim.value
    elif claim.reading == "as_good":
        holds, fails = low > -MARGIN, high < -MARGIN
    elif claim.reading == "harm":
        holds, fails = found.resolved and found.mean < 0, low > -MARGIN
    else:
        holds, fails = found.resolved and found.mean > 0, found.resolved and found.mean < 0
    return "CONFIRMED" if holds else "REFUTED" if fails else "UNRESOLVED"


def evidence(found: Contrast | None) -> str:
    """The effect, its interval, n and p."""
    if found is None:
        return "-"
    p = p_words(found.p if found.holm_p is None else found.holm_p)
    end = "" if found.resolved else f"; smallest effect to be seen {number(found.smallest, 3)}"
    return f"{number(found.mean, 3, sign=True)} {interval_text(found.interval, 3)} (n = {found.n}, Holm {p}{end})"


def write(workdir: Path) -> Sequence[Path]:
    """verdicts.md and verdicts.html beside the ledger."""
    ledger = Ledger.read(workdir)
    analysis = analyse(ledger.design, ledger.runs())
    title = f"{ledger.design.name}: the claims of study 004" + (" (PARTIAL)" if analysis.missing else "")
    blocks = [
        Text("At this size, on this task, with these seeds; the report beside this page has every contrast.", "note"),
        Bullets(tuple(ledger.design.notes[:2])),
        claims_table(analysis),
        Heading("By step, mean over seeds: the table of study 004 for each arm"),
        *(steps_table(analysis, cell) for cell in ledger.design.cells()),
    ]
    return document.write(workdir, "verdicts", title, blocks)


def claims_table(analysis: Analysis) -> Table:
    """Claim, verdict and evidence."""
    rows = []
    for claim in CLAIMS:
        found = analysis.contrasts.get(claim.contrast)
        rows.append((f"004-{claim.letter}", claim.text, verdict(claim, found), claim.contrast, evidence(found)))
    notes = (f"Differences of accuracy are shares: 0.02 is two points. As good: not worse by more than {MARGIN}.",)
    return Table("Verdicts", ("claim", "study 004 says", "verdict", "contrast", "effect, interval"), tuple(rows), words=5, notes=notes)


COLUMNS = (
    ("accuracy, noise on", "eval/sampled_noisy", 3),
    ("accuracy, noise off", "eval/sampled", 3),
    ("reward", "reward/mean", 3),
    ("policy entropy", "policy/entropy_before", 3),
    ("router entropy", "router/entropy", 3),
    ("gradient norm", "optimizer/gradient_norm", 2),
    ("length", "answers/length", 2),
    ("sampler KL", "sampler/kl", 5),
    ("changed experts", "route/changed_experts", 4),
)


def steps_table(analysis: Analysis, cell: dict) -> Table:
    """Accuracy at each evaluation and the training numbers nearest after it, or at the end before it."""
    runs = analysis.runs_of(cell)
    per_step = int(analysis.design.settings.get("mini_batches", 1))
    updates = sorted({int(step) for run in runs for step, _ in run.series.get("eval/sampled", ())})

    def at(name: str, update: int, decimals: int) -> str:
        values = []
        for run in runs:
            points = run.series.get(name, ())
            if name.startswith("eval/"):
                chosen = [value for step, value in points if int(step) == update]
            else:
                after = [value for step, value in points if int(step) > update]
                chosen = after[:1] or [value for _, value in points][-1:]
            values += chosen
        return number(sum(values) / len(values), decimals) if values else "-"

    rows = tuple((str(update // per_step), *(at(name, update, decimals) for _, name, decimals in COLUMNS)) for update in updates)
    name = ", ".join(str(level) for level in cell.values())
    return Table(f"{name} ({len(runs)} seeds)", ("step", *(title for title, _, _ in COLUMNS)), rows)
