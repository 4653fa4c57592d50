"""The report says what the ledger holds and nothing else: every number and every sentence is traced back to its contrast."""

import base64
import dataclasses
import io
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.catalogue import load
from moe_jax.studies import Factor, Ledger, LedgerDamaged, Metric, Run, analyse, contrast, difference, report, tables
from moe_jax.studies.analysis import interval_text, number, p_text
from moe_jax.studies.design import Comparison
from moe_jax.studies.document import Table, to_html, to_markdown, to_text
from moe_jax.studies.figures import cell_styles, common_curve, mean_load
from moe_jax.studies.findings import findings, sentence, shape, verdict

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(shared_ledger):
    paths = report.build(shared_ledger.path.parent)
    return paths, paths.markdown.read_text(), paths.html.read_text(), json.loads(paths.json.read_text())


# ---------------------------------------------------------------- the whole report


def test_the_first_studys_table_is_there(built):
    _, markdown, page, _ = built
    for row in (
        ("0.0", "0.01", "130.23 ± 1.15 (0.94)"),
        ("0.0", "0.0", "130.54 ± 1.25 (1.02)"),
        ("0.1", "0.01", "131.39 ± 1.23 (1.00)"),
        ("0.1", "0.0", "131.71 ± 1.33 (1.09)"),
        ("0.5", "0.01", "144.37 ± 1.72 (1.40)"),
        ("0.5", "0.0", "144.30 ± 0.67 (0.54)"),
    ):
        assert "| " + " | ".join(row) + " |" in markdown
        assert "".join(f'<td class="words">{x}</td>' for x in row[:2]) + f'<td class="number">{row[2]}</td>' in page
    assert "0.0696 ± 0.0156" in markdown  # usage CV of the first cell


def test_findings_and_nothing_more(built, seed_design):
    _, markdown, _, data = built
    section = markdown.split("## Findings")[1].split("## ")[0]
    bullets = [line[2:] for line in section.splitlines() if line.startswith("- ")]
    assert bullets == [f["text"] for f in data["findings"]]
    declared = [c.name for c in seed_design.comparisons]
    assert sorted(f["comparison"] for f in data["findings"]) == sorted(declared)
    assert bullets[0] == (
        "noise_std 0.1 instead of 0.0 at balance_weight 0.01 raises Val PPL by 1.15 [0.97, 1.34], which is worse "
        "(n = 3, t = 26.6, Holm p = 0.0049)."
    )
    assert (
        "Unresolved: whether balance_weight 0.0 instead of 0.01 at noise_std 0.0 changes Val PPL. The difference is +0.31 [-1.72, 2.33] "
        "(n = 3, t = 0.65, Holm p = 1); the smallest effect this design could have seen is 4.62." in bullets
    )
    unresolved = [b for b in bullets if b.startswith("Unresolved")]
    assert len(unresolved) == 4 and not any("balance_weight 0.0 instead" in b and "raises Val PPL" in b for b in bullets)


def test_both_usage_cvs_are_kept_apart(built):
    _, markdown, _, _ = built
    header = next(line for line in markdown.splitlines() if line.startswith("| noise_std |"))
    assert "Expert usage CV, as routed" in header and "Expert usage CV, seed's proxy" in header
    assert "It is not the imbalance of the routing that was used." in markdown


def test_the_page_is_self_contained_and_its_figures_are_pictures(built):
    from PIL import Image

    paths, markdown, page, _ = built
    assert not re.search(r'(src|href)="(?!data:)', page) and "@import" not in page and "<script" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == len(paths.figures) == 6
    for path, text in zip(paths.figures, pictures, strict=True):
        data = base64.b64decode(text)
        assert path.read_bytes() == data and f"(figures/{path.name})" in markdown
        picture = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert min(picture.shape) >= 300 and 0.01 < (picture < 200).mean() < 0.9, path.name  # something is drawn


def test_the_same_ledger_gives_the_same_bytes(built):
    paths, *_ = built
    before = [path.read_bytes() for path in (paths.markdown, paths.html, paths.json, *paths.figures)]
    again = report.build(paths.markdown.parent)
    assert again == paths
    assert [path.read_bytes() for path in (again.markdown, again.html, again.json, *again.figures)] == before


def test_json_holds_the_numbers(built):
    *_, data = built
    first = data["comparisons"][0]
    assert first["contrast"]["mean"] == pytest.approx(1.1533333) and first["resolved"]
    assert data["cells"][0]["metrics"]["val_ppl"]["population_sd"] == pytest.approx(0.942, abs=1e-3)
    assert data["state"] == {"runs": 18, "finished": 18, "failed": 0, "missing": [], "torn_lines": [], "partial": False}


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"split": "leaky"}, "warning", "validation text is also seen in training"),
        ({"data": {"split": "leaky"}}, "warning", "must not be compared with those of a clean split"),
        ({"split": "clean"}, "note", "nothing that is evaluated on is in the text that these runs train on"),
        ({"split": "by author"}, "note", "by author"),
        ({"split": [0.9, 0.1]}, "note", "[0.9, 0.1]"),
        ({}, "warning", "do not say"),
    ],
)
def test_the_split_is_stated(settings, kind, words):
    stated = report.split_text(settings)
    assert stated.kind == kind and words in stated.text


# ---------------------------------------------------------------- partial studies


def test_a_partial_study_says_so_and_counts_its_seeds(tmp_path, seed_design, seed_runs):
    ledger = Ledger.open(tmp_path, seed_design)
    lacking = {"noise_std": 0.5, "balance_weight": 0.0}
    for run in seed_runs:
        if run.seed != 44 and not (run.seed == 43 and run.cell == lacking):
            ledger.append(run)
    ledger.append(Run(lacking, 43, "failed", error="the loss is nan at update 7"))
    ledger.append(Run(lacking, 44, "failed", error="killed"))
    ledger.append(dataclasses.replace(seed_runs[-1], metrics={**seed_runs[-1].metrics}))  # seed 44 of that cell, made good
    paths = report.build(tmp_path)
    markdown, data = paths.markdown.read_text(), json.loads(paths.json.read_text())
    assert markdown.startswith("# noise_factorial (PARTIAL)\n\n> **Warning:** PARTIAL study: 12 of 18 runs finished, 6 missing; 2 failed")
    assert "1 of them made good" in markdown
    assert "failed: noise_std 0.5, balance_weight 0.0, seed 43: the loss is nan at update 7" in markdown
    assert "n = 2 of 3 seeds" in markdown
    assert "| noise 0.5 - 0.0, balance 0.0 | - | - | - | - | - | - | - | 1 | too few seeds |" in markdown
    assert "noise 0.5 - 0.0, balance 0.0" not in [f["comparison"] for f in data["findings"]]
    assert len(paths.figures) == 6


def test_a_study_that_has_only_begun_has_a_report_without_findings(tmp_path, seed_design):
    Ledger.open(tmp_path, seed_design)
    paths = report.build(tmp_path)
    markdown = paths.markdown.read_text()
    assert "0 of 18 runs finished" in markdown and "## Findings" not in markdown and "too few seeds" in markdown
    assert "nan" not in markdown


def test_a_damaged_ledger_gives_no_report(seed_ledger):
    lines = seed_ledger.path.read_bytes().splitlines(keepends=True)
    seed_ledger.path.write_bytes(b"".join([*lines[:5], b"{}\n", *lines[6:]]))
    with pytest.raises(LedgerDamaged, match="line 6"):
        report.build(seed_ledger.path.parent)
    assert not (seed_ledger.path.parent / "report.md").exists()


def test_without_matplotlib_the_report_is_whole_but_for_figures(seed_ledger, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what import does when it is not installed
    paths = report.build(seed_ledger.path.parent)
    markdown = paths.markdown.read_text()
    assert paths.figures == () and "Figures are left out: matplotlib is not installed" in markdown
    assert "130.23 ± 1.15 (0.94)" in markdown and "raises Val PPL by 1.15" in markdown and "![" not in markdown


# ---------------------------------------------------------------- sentences


def _two_levels(design, values_of, values_minus, **comparison):
    of, minus = {"noise_std": 0.1, "balance_weight": 0.0}, {"noise_std": 0.0, "balance_weight": 0.0}
    declared = difference("c", "val_ppl", of, minus, **comparison)
    key = [cell for _, cell in declared.terms]
    values = {key[0]: dict(enumerate(values_of)), key[1]: dict(enumerate(values_minus))}
    return declared, contrast(values, declared)


def test_a_lowering_is_told_as_a_positive_amount(seed_design):
    declared, found = _two_levels(seed_design, (1.0, 2.0, 3.1), (11.0, 12.0, 13.0))
    text = sentence(seed_design, declared, found)
    low, high = (-x for x in reversed(found.interval))
    assert f"lowers Val PPL by 9.97 [{low:.2f}, {high:.2f}], which is better (n = 3" in text
    assert verdict(seed_design, declared, found) == "lower, better"


def test_resolved_alone_but_not_in_its_family(seed_design):
    declared, found = _two_levels(seed_design, (11.0, 12.2, 13.4), (10.0, 11.0, 12.0))
    crowded = dataclasses.replace(found, holm_p=0.2, smallest_in_family=9.0)
    assert found.resolved and not crowded.resolved
    text = sentence(seed_design, declared, crowded)
    assert text.startswith(
        "Unresolved: whether noise_std 0.1 instead of 0.0 at balance_weight 0.0 changes Val PPL. The difference is +1.20"
    )
    assert (
        "alone it would be resolved" in text and "as one of 4 comparisons it is not" in text and text.endswith("could have seen is 9.00.")
    )
    assert verdict(seed_design, declared, crowded) == "unresolved after Holm"


def test_no_difference_at_all_is_not_called_unresolved(seed_design):
    declared, found = _two_levels(seed_design, (1.0, 2.0), (1.0, 2.0))
    assert sentence(seed_design, declared, found) == (
        "No difference at all: whether noise_std 0.1 instead of 0.0 at balance_weight 0.0 changes Val PPL: "
        "the difference is 0 in each of 2 seeds."
    )


def test_interactions_and_other_contrasts_have_their_own_words(seed_design, seed_runs):
    analysis = analyse(seed_design, seed_runs)
    both = next(c for c in seed_design.comparisons if c.family == "interaction")
    text = next(f.text for f in findings(analysis) if f.contrast.name == both.name)
    assert (
        "whether the effect on Val PPL of noise_std 0.5 instead of 0.0 differs between balance_weight 0.0 and balance_weight 0.01" in text
    )
    found = analysis.contrasts[both.name]
    assert found is not None
    strong = dataclasses.replace(found, holm_p=0.001, mean=2.0, interval=(1.0, 3.0))
    text = sentence(seed_design, both, strong)
    assert text.startswith("The effect on Val PPL of noise_std 0.5 instead of 0.0 is higher at balance_weight 0.0 than at balance_weight")
    assert "balance_weight 0.01, by 2.00 [1.00, 3.00] (n = 3" in text
    cells = [cell for _, cell in both.terms]
    trend = Comparison("trend", "", "val_ppl", ((1, cells[0]), (1, cells[2]), (-2, cells[1])))
    assert (shape(both), shape(trend)) == ("interaction", "contrast")
    assert sentence(seed_design, trend, strong).startswith("The contrast 'trend' of Val PPL is +2.00 [1.00, 3.00] (n = 3")


def test_numbers_as_text():
    assert (number(-0.0, 2), number(0.0, 2, sign=True), number(1.005, 1, sign=True)) == ("0.0" + "0", "0.00", "+1.0")
    assert number(0.0004, 2) == "0.0004"  # not 0.00: a small value is not nothing
    assert number(float("nan"), 2) == "-"
    assert (p_text(0.0), p_text(0.00123), p_text(None), p_text(1.0)) == ("<0.0001", "0.0012", "-", "1")
    assert interval_text((-1.0, 2.0), 1) == "[-1.0, 2.0]"


# ---------------------------------------------------------------- figures and tables


def test_load_is_sorted_within_each_seed_before_it_is_averaged(seed_design, seed_runs):
    cell = seed_design.cells()[0]
    load = {42: [[3.0, 1.0], [2.0, 2.0]], 43: [[10.0, 30.0], [40.0, 0.0]], 44: [[1.0, 3.0], [1.0, 3.0]]}
    runs = [dataclasses.replace(run, arrays={"load": load[run.seed]}) for run in seed_runs if run.cell == cell]
    found = mean_load(analyse(seed_design, runs), cell)
    # layer 0: (1.5, .5) in every seed, whichever expert it was; layer 1: (1, 1), (2, 0), (1.5, .5)
    np.testing.assert_allclose(found, [[1.5, 0.5], [1.5, 0.5]])


def test_final_and_best_evaluation_are_both_given(seed_design, seed_runs):
    """Of two seeds the best is in the middle, of the third at the end; runs of other cells were evaluated once, or found a loss that is no number."""
    losses = {42: (3.0, 2.0, 2.5), 43: (3.0, 2.0, 2.5), 44: (3.0, 2.0, 1.0)}
    runs, cell = [], seed_runs[0].cell
    for run in seed_runs:
        curve = [[10 * (i + 1), loss] for i, loss in enumerate(losses[run.seed])] if run.cell == cell else [[10, math.nan], [20, 1.0]]
        runs.append(dataclasses.replace(run, series={"eval/loss": curve if run.cell == cell or run.seed == 42 else curve[-1:]}))
    (row,) = tables.evaluations(analyse(seed_design, runs)).rows
    final, best = [math.exp(x) for x in (2.5, 2.5, 1.0)], [math.exp(x) for x in (2.0, 2.0, 1.0)]
    spread = [f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for x in (final, best)]
    assert row[1:] == (*spread, "20, 20, 30", "3")
    assert not tables.evaluations(analyse(seed_design, seed_runs)).rows


def test_curves_use_the_steps_that_every_seed_has():
    found = common_curve([[[0, 5.0], [10, 4.0], [20, 3.0]], [[10, 4.2], [20, 3.2], [30, 2.0]]])
    assert found is not None
    assert found[0] == [10, 20]
    np.testing.assert_array_equal(found[1], [[4.0, 3.0], [4.2, 3.2]])
    assert common_curve([[[0, 1.0]], [[1, 1.0]]]) is None and common_curve([]) is None


def test_cells_differ_in_colour_or_line(seed_design):
    assert len(set(cell_styles(seed_design))) == 6
    matrix = load("e7b:mini").design
    assert len(set(cell_styles(matrix))) == len(matrix.cells()) == 22


def test_one_factor_at_a_time_designs_are_reported_too(tmp_path, seed_design):
    base = {"noise_std": 0.0, "balance_weight": 0.01, "gate": "muon"}
    cells = [base, {**base, "gate": "frozen"}, {**base, "balance_weight": 0.0}]
    design = dataclasses.replace(
        seed_design,
        factors=(*seed_design.factors, Factor("gate", ("muon", "frozen"))),
        only=cells,
        metrics=(Metric("loss|nats", unit="nat", better=""),),
        comparisons=(difference("frozen", "loss|nats", cells[1], cells[0]),),
        settings={},
    )
    ledger = Ledger.open(tmp_path, design)
    for cell, seed in design.runs():
        ledger.append(Run(cell, seed, metrics={"loss|nats": float(seed + (cell["gate"] == "frozen"))}, seconds=240.0))
    paths = report.build(tmp_path)
    markdown = paths.markdown.read_text()
    assert "| 0.0 | 0.01 | frozen | 44.00 ± 1.00 (0.82) | 4.00 ± 0.00 | 3 |" in markdown  # minutes where most runs take two
    assert "gate frozen instead of muon at noise_std 0.0, balance_weight 0.01 raises loss|nats by 1.00 nat [1.00, 1.00] (n" in markdown
    assert "loss\\|nats" in markdown  # a bar in a name does not break the table


def test_provenance_that_differs_between_runs_is_shown(seed_design, seed_runs):
    runs = [dataclasses.replace(r, provenance={"device": "gpu" if r.seed == 43 else "cpu"}) for r in seed_runs]
    table = tables.provenance(analyse(seed_design, runs))
    assert table.rows == (("device", "2 values: cpu (12 runs), gpu (6 runs)"),)


def test_one_long_run_makes_no_column_of_minutes(seed_design, seed_runs):
    runs = [dataclasses.replace(run, seconds=240.0 if number == 0 else 0.2) for number, run in enumerate(seed_runs)]
    assert analyse(seed_design, runs).time.unit == "s"


def test_console_table(seed_design, seed_runs):
    text = report.console_table(seed_design, seed_runs)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[3:9]] == ["0.0", "0.0", "0.1", "0.1", "0.5", "0.5"]
    assert re.search(r"noise 0.1 - 0.0, balance 0.01 +val_ppl +\+1.15 +\[0.97, 1.34\] +26.6 .* higher, worse$", text, re.M)
    assert max(map(len, lines)) <= 150
    one = dataclasses.replace(seed_design, comparisons=seed_design.comparisons[:2])
    assert "comparison" in report.console_table(one, seed_runs) and " metric " not in report.console_table(one, seed_runs)


def test_markup_in_a_name_is_text():
    table = Table("a < b", ("<i>x</i>", "y|z"), (("&", "1"),))
    page, markdown = to_html("t & u", [table]), to_markdown("t", [table])
    assert "<i>" not in page and "&lt;i&gt;" in page and "t &amp; u" in page
    assert "y\\|z" in markdown
    assert to_text(table).splitlines()[1:] == ["<i>x</i>  y|z", "--------  ---", "&           1"]


# ---------------------------------------------------------------- without jax


def test_the_command_rebuilds_the_report_without_jax(seed_ledger):
    check = "import sys, runpy\nsys.modules['jax'] = sys.modules['flax'] = None\nrunpy.run_module('launch.report', run_name='__main__')"
    command = [sys.executable, "-c", check, f"--workdir={seed_ledger.path.parent}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {seed_ledger.path.parent / 'report.html'}"
    assert "130.23 ± 1.15 (0.94)" in done.stdout
    assert (seed_ledger.path.parent / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(["--workdir=none"], 3, "no ledger.jsonl in none"), ([], 2, "workdir"), (["--workdri=x"], 2, "workdir")],
)
def test_the_command_fails_in_one_line(tmp_path, arguments, code, words):
    command = [sys.executable, "-m", "launch.report", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert words in done.stderr and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
