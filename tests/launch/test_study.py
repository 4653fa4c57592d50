"""The command: killed anywhere it ends in the same numbers; a second launch is refused; bad input is one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_jax.studies import Ledger
from tests.launch.here import call

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # one device, as a user has


def command(*arguments):
    return [sys.executable, "-m", *arguments]


def finish(*arguments, timeout=240):
    return subprocess.run(command(*arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False)


def numbers(workdir):
    return {run.key: (run.metrics, run.series, run.arrays) for run in Ledger.read(workdir).runs()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return workdir, finish("launch.study", "--experiment=noise_factorial:smoke", f"--workdir={workdir}")


def test_it_prints_what_it_found(unbroken):
    workdir, done = unbroken
    assert done.returncode == 0, done.stderr
    assert "18 runs finished, 0 failed" in done.stdout
    assert "1 for training, 1 for evaluation, 1 for initialisation" in done.stdout
    assert "report.html" in done.stdout and (workdir / "report.html").stat().st_size > 50_000
    assert len(numbers(workdir)) == 18
    again = call("study", "--experiment=noise_factorial:smoke", f"--workdir={workdir}")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    report = finish("launch.report", f"--workdir={workdir}")
    assert report.returncode == 0 and "Contrasts, paired by seed" in report.stdout


def test_a_run_that_was_refused_is_named_when_nothing_else_is_left(unbroken, tmp_path):
    """The ledger of a whole study but for one run, which met a value that was not finite: the same command would meet it again."""
    lines = (unbroken[0] / "ledger.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    lines[-1] = json.dumps(
        row | {"status": "failed", "error": "NonFinite: update 1 was refused", "metrics": {}, "series": {}, "arrays": {}}
    )
    (tmp_path / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    done = call("study", "--experiment=noise_factorial:smoke", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert "nothing to do, 1 runs met a value that is not finite; --retry_failed runs them again" in done.stdout, done.stdout + done.stderr


def kill_and_finish(workdir, after: float, lanes: int) -> tuple[int, str]:
    """Starts the study, kills it without warning `after` seconds past its first checkpoint, finishes it; its rows then, and what finishing printed."""
    arguments = ("launch.study", "--experiment=noise_factorial:smoke", f"--lanes={lanes}", f"--workdir={workdir}")
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not list(workdir.glob("cells/*/checkpoints/[0-9]*")) and time.monotonic() < deadline:
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.02)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = len(numbers(workdir))
    done = finish(*arguments)
    assert done.returncode == 0
    return rows, done.stdout


# two lanes make two CPU devices of themselves, as in `make study`
@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_run_again_it_ends_in_the_same_bits(unbroken, tmp_path, lanes):
    rows, printed = kill_and_finish(tmp_path, 0.3, lanes)
    assert rows < 18 and f"to do on {lanes} x cpu" in printed and "1 for training, 1 for evaluation" in printed
    assert numbers(tmp_path) == numbers(unbroken[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", range(20))
def test_killed_at_random_moments(unbroken, tmp_path, case):
    """The same, many times; the moment is drawn per case."""
    kill_and_finish(tmp_path, random.Random(case).uniform(0.0, 4.0), lanes=1 + case % 2)
    assert numbers(tmp_path) == numbers(unbroken[0])


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--experiment=noise_factorial:quick"], 2, "--workdir is needed"),
        (["--experiment=noise_factorial:quik", "--dry_run"], 2, "did you mean 'quick'"),
        (["--experimnt=noise_factorial:quick"], 2, "experiment"),
        (["--experiment=qwen3_30b.sensitvity:mini", "--dry_run"], 2, "did you mean 'sensitivity'"),
        (["--experiment=noise_factorial:smoke", "--workdir=x", "--mesh=data=2", "--lanes=2"], 2, "leave one out"),
        (["--experiment=noise_factorial:smoke", "--workdir=x", "--mesh=data=3"], 2, "mesh data=3 needs 3 devices, there are 8"),
        (["--experiment=noise_factorial:smoke", "--workdir=/dev/null/x"], 2, "cannot use"),
        (
            ["--experiment=noise_factorial:smoke", "--set", "balance_weight=0.1", "--dry_run"],
            2,
            "balance_weight=: the runs of noise_factorial",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, code, message):
    done = call("study", *arguments)
    assert done.returncode == code
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_another_studys_folder_is_refused(unbroken):
    workdir, _ = unbroken
    done = call("study", "--experiment=noise_factorial:quick", f"--workdir={workdir}")
    assert done.returncode == 2 and "noise_factorial:smoke" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_is_set_is_shown_and_is_another_study(unbroken):
    flags = ("--experiment=noise_factorial:smoke", "--set", "updates=7")
    shown = call("study", *flags, "--dry_run")
    assert (
        shown.returncode == 0
        and "7 micro-batches of 8 x 16 tokens, 7 updates" in shown.stdout
        and "Changed by --set: updates=7" in shown.stdout
    )
    refused = call("study", *flags, f"--workdir={unbroken[0]}")
    assert refused.returncode == 2 and "settings.updates: was 20, now 7" in refused.stderr


def test_a_missing_or_corrupt_corpus_is_one_line(tmp_path):
    """Code 3, what is wrong, and the command that mends it."""
    arguments = ("--preset=quick", "--data=wiki", "--steps=1", f"--workdir={tmp_path / 'run'}")
    done = call("train", *arguments, MOE_JAX_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 3 and "launch.data --fetch=wiki" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_train_command_runs_and_resumes(tmp_path):
    arguments = ("launch.train", "--preset=tiny", "--data=synthetic", "--steps=4", f"--workdir={tmp_path}", "--set", "model.num_layers=1")
    done = finish(*arguments)
    assert done.returncode == 0 and "val_perplexity" in done.stdout, done.stderr
    again = finish(*arguments)
    assert again.stdout == done.stdout
    other = finish(*arguments, "--set", "balance_weight=0.5")
    assert other.returncode == 2 and "balance_weight: was 0.01, now 0.5" in other.stderr
