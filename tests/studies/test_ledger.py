"""The ledger keeps every run exactly, survives a killed writer, and refuses damage and other studies in one line."""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.errors import ConfigError, DataError
from moe_jax.studies import Ledger, LedgerDamaged, LedgerMissing, Run, StudyMismatch

METRICS = {"val_ppl": 130.0, "usage_cv_routed": 0.1, "usage_cv_seed": 0.2}


@pytest.fixture
def ledger(tmp_path, seed_design):
    return Ledger.open(tmp_path / "new" / "study", seed_design)


def _run(ledger, at=0, **changes):
    cell, seed = ledger.design.runs()[at]
    return Run(**{"cell": cell, "seed": seed, "metrics": METRICS, "seconds": 1.0, **changes})


def _failed(ledger, at=0, **changes):
    return _run(ledger, at, **{"status": "failed", "metrics": {}, "error": "the loss is nan at update 7", **changes})


def test_rows_come_back_exactly(ledger, seed_runs):
    tricky = {"val_ppl": 0.1 + 0.2, "usage_cv_routed": 5e-324, "usage_cv_seed": float(np.float32(0.1)), "extra": 2**60}
    ledger.append(dataclasses.replace(seed_runs[0], metrics=tricky))
    found = Ledger.read(ledger.path.parent).runs()[0]
    assert found.metrics == tricky
    assert found.cell == seed_runs[0].cell and found.provenance == seed_runs[0].provenance
    np.testing.assert_array_equal(found.arrays["load"], seed_runs[0].arrays["load"])
    np.testing.assert_array_equal(found.series["train_loss"], seed_runs[0].series["train_loss"])


def test_numbers_of_array_libraries_are_kept_to_the_bit(ledger):
    ledger.append(_run(ledger, metrics={**METRICS, "val_ppl": np.float32(0.1)}))
    assert ledger.runs()[0].metrics["val_ppl"] == float(np.float32(0.1)) != 0.1


def test_a_failed_run_may_hold_nan_and_the_file_stays_strict_json(ledger):
    ledger.append(_failed(ledger, metrics={"val_ppl": math.nan}, series={"loss": [[0, 1.5], [1, math.inf], [2, -math.inf]]}))
    for line in ledger.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = ledger.runs()[0]
    assert math.isnan(found.metrics["val_ppl"])
    assert found.series["loss"] == [[0, 1.5], [1, math.inf], [2, -math.inf]]


def test_finished_missing_and_failed(ledger):
    assert len(ledger.missing()) == 18
    ledger.append(_failed(ledger, 0))
    ledger.append(_failed(ledger, 1))
    ledger.append(_run(ledger, 0))
    assert list(ledger.finished()) == [_run(ledger, 0).key]
    assert [run.seed for run in ledger.failed()] == [42, 42]
    assert len(ledger.missing()) == 17
    assert ledger.missing()[0] == ledger.design.runs()[1]  # the second failed and never finished


def test_a_failure_after_a_finish_changes_nothing(ledger):
    ledger.append(_run(ledger))
    ledger.append(_failed(ledger))
    assert len(ledger.finished()) == 1 and len(ledger.missing()) == 17


def test_a_run_counts_once(ledger):
    ledger.append(_run(ledger))
    with pytest.raises(ValueError, match="finished already .line 2.; a study counts a run once"):
        ledger.append(_run(ledger, metrics={**METRICS, "val_ppl": 1.0}))
    ledger.path.write_bytes(ledger.path.read_bytes() + ledger.path.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(LedgerDamaged, match="lines 2 and 3 both finish noise_std=0.0"):
        ledger.runs()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "seed 7 is not one of the 18 runs"),
        ({"cell": {"noise_std": 0.2, "balance_weight": 0.0}}, "noise_std=0.2"),
        ({"status": "finishd"}, "did you mean 'finished'"),
        ({"error": "oops"}, "a finished one has no error"),
        ({"status": "failed"}, "a failed run says why"),
        ({"metrics": {"val_pl": 1.0}}, r"lacks 3 of 3 metrics \('val_ppl' \(did you mean 'val_pl'"),
        ({"metrics": {**METRICS, "val_ppl": math.nan}}, "is nan; a run that did not end in finite numbers is recorded as failed"),
        ({"metrics": {**METRICS, "val_ppl": "130"}}, "is '130', not a number"),
        ({"metrics": {**METRICS, "val_ppl": True}}, "not a number"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"series": {"loss": [1.0, 2.0]}}, "pairs"),
        ({"series": {"loss": 1.0}}, "pairs"),
        ({"provenance": {"device": object()}}, "must be JSON values"),
    ],
)
def test_a_wrong_run_is_refused_and_leaves_the_file_alone(ledger, changes, message):
    before = ledger.path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        ledger.append(_run(ledger, **changes))
    assert "\n" not in str(caught.value)
    assert ledger.path.read_bytes() == before


def test_a_torn_last_line_is_ignored_then_healed_wherever_it_was_cut(ledger):
    ledger.append(_run(ledger, 0))
    whole = ledger.path.read_bytes()
    ledger.append(_run(ledger, 1))
    line = ledger.path.read_bytes()[len(whole) :]
    for cut in (*range(1, len(line) - 1, 29), len(line) - 2):
        ledger.path.write_bytes(whole + line[:cut])
        assert len(ledger.runs()) == 1 and ledger.torn_lines() == (3,), cut
        ledger.append(_run(ledger, 2))
        assert ledger.path.read_bytes().startswith(whole + line[:cut])  # appended to, never rewritten
        assert [run.key for run in ledger.runs()] == [_run(ledger, at).key for at in (0, 2)]
        assert ledger.torn_lines() == (3,)


def test_a_line_that_the_disk_takes_a_part_of_is_an_error_then_healed(ledger):
    ledger.append(_run(ledger, 0))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.path.stat().st_size + 7, usual[1]))
        with pytest.raises(OSError, match="7 of [0-9]+ bytes were written: '.*/ledger.jsonl'$"):
            ledger.append(_run(ledger, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert len(ledger.runs()) == 1 and ledger.torn_lines() == (3,)
    ledger.append(_run(ledger, 1))
    assert [run.key for run in ledger.runs()] == [_run(ledger, at).key for at in (0, 1)]


def test_a_line_that_lacks_only_its_newline_counts(ledger):
    ledger.append(_run(ledger, 0))
    ledger.path.write_bytes(ledger.path.read_bytes()[:-1])
    assert len(ledger.runs()) == 1 and ledger.torn_lines() == ()
    ledger.append(_run(ledger, 1))
    assert len(ledger.runs()) == 2 and ledger.torn_lines() == ()


def test_a_writer_killed_while_healing_is_healed_too(ledger):
    ledger.append(_run(ledger, 0))
    with open(ledger.path, "ab") as file:
        file.write(b'{"kind":"run","sta\n{"kind":"torn","li')
    assert ledger.torn_lines() == (3, 4)
    ledger.append(_run(ledger, 1))
    assert len(ledger.runs()) == 2 and ledger.torn_lines() == (3, 4)


def test_damage_in_the_middle_names_the_line(ledger):
    for at in range(3):
        ledger.append(_run(ledger, at))
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"seed":42', b'"seed":4')
    ledger.path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerDamaged, match="line 3: .*seed 4 is not one of the 18 runs"):
        ledger.runs()
    lines[2] = lines[2][:40] + b"\n"
    ledger.path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerDamaged, match="line 3 is not a JSON object"):
        ledger.runs()
    with pytest.raises(LedgerDamaged, match="line 3"):
        ledger.append(_run(ledger, 5))


def test_damage_in_the_header(ledger):
    row = json.loads(ledger.path.read_text())
    for change, message in [
        ({"schema": 2}, "schema 2; this program reads schema 1"),
        ({"kind": "run"}, "line 1 is not a study's design"),
        ({"design": {**row["design"], "alpha": 0.5}}, "edited after the study began"),
        ({"design": {**row["design"], "seeds": [42]}}, "line 1 holds no usable design"),
    ]:
        ledger.path.write_text(json.dumps({**row, **change}) + "\n")
        with pytest.raises(LedgerDamaged, match=message):
            Ledger.read(ledger.path.parent)
    ledger.path.write_bytes(b"")
    with pytest.raises(LedgerDamaged, match="is empty"):
        Ledger.read(ledger.path.parent)


def test_another_study_is_refused_with_what_differs(ledger, seed_design):
    other = dataclasses.replace(seed_design, settings={**seed_design.settings, "micro_batches": 200}, seeds=(42, 43))
    before = ledger.path.read_bytes()
    with pytest.raises(StudyMismatch, match=r"seeds: was \[42, 43, 44\], now \[42, 43\]; settings.micro_batches: was 400, now 200"):
        Ledger.open(ledger.path.parent, other)
    assert ledger.path.read_bytes() == before
    assert Ledger.open(ledger.path.parent, seed_design).design == seed_design


def test_no_ledger(tmp_path):
    with pytest.raises(LedgerMissing, match="no ledger.jsonl in"):
        Ledger.read(tmp_path)


def test_errors_carry_the_exit_codes_of_the_commands():
    assert issubclass(StudyMismatch, ConfigError) and StudyMismatch.exit_code == 2
    assert issubclass(LedgerMissing, DataError) and issubclass(LedgerDamaged, DataError) and LedgerDamaged.exit_code == 3


def test_a_writer_killed_at_any_time_loses_at_most_its_last_line(ledger):
    """A process appends rows until it is killed without warning; what it reported as written is there, and the ledger goes on."""
    program = (
        "import sys\nfrom moe_jax.studies import Ledger, Run\n"
        "ledger = Ledger.read(sys.argv[1])\ncell, seed = ledger.design.runs()[0]\n"
        "while True:\n    ledger.append(Run(cell, seed, 'failed', error='x' * 5000))\n    print(1, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(ledger.path.parent)], stdout=subprocess.PIPE, cwd=os.getcwd()) as process:
        assert process.stdout is not None
        reported = sum(1 for _ in zip(range(7), process.stdout, strict=False))
        process.kill()
        reported += len(process.stdout.read().split())
    assert reported >= 7
    assert reported <= len(ledger.runs()) <= reported + 1
    ledger.append(_run(ledger))
    assert len(ledger.finished()) == 1
