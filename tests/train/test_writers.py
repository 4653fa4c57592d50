"""metrics.jsonl keeps every bit and survives kills, resumes and full disks; progress tells the truth about the time left."""

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import MoeJaxError
from moe_jax.train import writers
from moe_jax.train.writers import MetricsWriter, Progress, Transfer, duration_text, pace_text, read_metrics, seconds_left

# --- metrics.jsonl ------------------------------------------------------------------------------------------------------------


def test_numbers_come_back_bit_for_bit(tmp_path):
    generator = random.Random(0)
    values = [generator.uniform(-1, 1) * 10.0 ** generator.randrange(-300, 300) for _ in range(200)] + [-0.0, 5e-324, 1e308, math.pi]
    with MetricsWriter(tmp_path) as writer:
        for step, value in enumerate(values):
            writer.write(step, {"loss": value, "f32": np.float32(value % 1)})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(values)))
    assert [row["loss"].hex() for row in rows] == [value.hex() for value in values]
    assert all(np.float32(row["f32"]) == np.float32(value % 1) for row, value in zip(rows, values, strict=True))


def test_every_kind_of_value_and_strict_json(tmp_path):
    given = {
        "int": 3,
        "jax": jnp.float32(0.1),
        "bf16": jnp.bfloat16(0.5),
        "count": np.int64(2**53 + 1),
        "flag": True,
        "text": "train",
        "nan": math.nan,
        "inf": jnp.inf,
        "low": -math.inf,
    }
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, given)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["int"] == 3 and row["count"] == 2**53 + 1 and row["flag"] is True and row["text"] == "train" and row["bf16"] == 0.5
    assert row["jax"] == float(np.float32(0.1)) and math.isnan(row["nan"]) and row["inf"] == math.inf and row["low"] == -math.inf


def test_a_resume_drops_the_rows_it_will_write_again(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 2, 3, 4):
            writer.write(step, {"loss": step / 3})
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_to(2)
        writer.write(3, {"loss": 9})
        writer.truncate_to(7)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1 / 3), (2, 2 / 3), (2, 2 / 3), (3, 9)]
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_to(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"{", b'{"step": 3}', b"\x00\x00"])
def test_a_torn_last_line_is_skipped_by_readers_and_dropped_by_the_next_writer(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
    path.write_bytes(whole + torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": 0.125})
    assert path.read_bytes() == whole + b'{"step": 3, "loss": 0.125}\n'


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": "x"}', ""])
def test_a_bad_line_in_the_middle_is_an_error_that_names_it(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(MoeJaxError, match="metrics.jsonl line 2 is not a row of metrics"):
        read_metrics(tmp_path / "metrics.jsonl")
    with MetricsWriter(tmp_path) as writer, pytest.raises(MoeJaxError, match="line 2"):
        writer.truncate_to(3)


def test_a_full_disk_is_one_line_and_leaves_whole_rows(tmp_path):
    code = textwrap.dedent("""
        import resource, signal, sys
        from moe_jax.errors import MoeJaxError
        from moe_jax.train.writers import MetricsWriter
        writer = MetricsWriter(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (110, 110))
        try:
            for step in range(50):
                writer.write(step, {"loss": 0.5})
        except MoeJaxError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert content.endswith(b"\n") and len(content) <= 110 and [row["step"] for row in rows] == list(range(len(rows))) and rows
    assert done.stdout.count("\n") == 1 and f"cannot write step {len(rows)} to" in done.stdout


def test_a_kill_at_any_moment_leaves_whole_rows_in_order(tmp_path):
    code = textwrap.dedent("""
        import itertools, sys
        from moe_jax.train.writers import MetricsWriter
        writer = MetricsWriter(sys.argv[1])
        print("ready", flush=True)
        for step in itertools.count():
            writer.write(step, {"loss": step / 7, "text": "x" * 300})
    """)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(random.uniform(0.02, 0.1))
        process.send_signal(signal.SIGKILL)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) > 10 and all(row["step"] == step and row["loss"] == step / 7 for step, row in enumerate(rows))


# --- TensorBoard --------------------------------------------------------------------------------------------------------------


class FakeSummaries:
    made: list = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars = folder, purge_step, []
        FakeSummaries.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        pass


def test_tensorboard_gets_the_numbers_and_forgets_the_steps_of_a_resume(tmp_path, monkeypatch):
    FakeSummaries.made = []
    monkeypatch.setattr(writers, "_summary_writer_class", lambda: FakeSummaries)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5, "phase": "train"})
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_to(7)
        writer.write(8, {"loss": 0.25})
    first, second = FakeSummaries.made
    assert first.folder == str(tmp_path / "tensorboard") and first.scalars == [("loss", 0.5, 1)]
    assert second.purge_step == 8 and second.scalars == [("loss", 0.25, 8)]


def test_tensorboard_files_are_written_where_tensorboardx_is_installed(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


# --- progress -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7650, "2 h 07 min"),
        (90000, "1 d 01 h"),
    ],
)
def test_duration_text(seconds, text):
    assert duration_text(seconds) == text


def test_time_left_and_pace_are_those_of_this_launch():
    assert seconds_left(step=60, total=100, mark_step=50, mark_seconds=20) == 80  # resumed at 50: 2 s a step, 40 steps to go
    assert seconds_left(50, 100, 50, 0) is None and seconds_left(50, 100, 50, 3) is None and seconds_left(51, 100, 50, 0) is None
    assert seconds_left(100, 100, 100, 0) == 0 and seconds_left(120, 100, 50, 1) == 0
    assert pace_text(60, 50, 20) == "2 s/step" and pace_text(90, 50, 20, tokens=40_000) == "2 steps/s, 2,000 tokens/s"
    assert pace_text(50, 50, 0) == ""


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_plain_lines_appear_now_and_then_and_skip_the_compilation():
    clock, stream = Clock(), io.StringIO()
    with Progress(total=100, every=10, stream=stream, clock=clock, label="cell 3") as progress:
        clock.now += 60  # compiling
        for step in range(51, 101):
            clock.now += 1
            progress.update(step, {"loss": 1 / step}, tokens=500)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "cell 3 51/100 (51 %): loss 0.01961, 1 min 01 s elapsed"
    assert lines[1] == "cell 3 61/100 (61 %): loss 0.01639, 1 steps/s, 500 tokens/s, 1 min 11 s elapsed, 39 s left"
    assert lines[-1] == "cell 3 100/100 (100 %): loss 0.01000, 1 steps/s, 500 tokens/s, 1 min 50 s elapsed, 0 s left"
    assert len(lines) == 6


def test_steps_of_an_earlier_launch_are_no_pace():
    """A study's second run goes on from its step 40 while the first has done 2 of this launch."""
    clock, stream = Clock(), io.StringIO()
    with Progress(total=100, every=0, stream=stream, clock=clock) as progress:
        for step, earlier in ((1, 0), (2, 0), (43, 40), (44, 0)):
            clock.now += 1
            progress.update(step, tokens=10, earlier=earlier)
    assert stream.getvalue().splitlines()[-1] == "train 44/100 (44 %): 1 steps/s, 10 tokens/s, 4 s elapsed, 56 s left"


def test_closing_early_prints_the_last_state_once():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(total=9, every=1e9, stream=stream, clock=clock)
    progress.update(1)
    clock.now += 4
    progress.update(3)
    progress.close()
    progress.close()
    assert stream.getvalue().splitlines() == ["train 1/9 (11 %): 0 s elapsed", "train 3/9 (33 %): 2 s/step, 4 s elapsed, 12 s left"]
    Progress(total=0, stream=stream, clock=clock).close()


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(total=4, stream=stream, label="train") as progress:
        progress.update(2, {"loss": 1.5})
        progress.update(4, {"loss": 0.75})
    assert "4/4" in stream.getvalue() and "loss 0.7500" in stream.getvalue()


def test_a_transfer_tells_every_few_seconds():
    stream, now = io.StringIO(), iter(range(0, 100, 2))
    told = Transfer("read", 5.0, stream, lambda: float(next(now)))
    for done in range(1, 7):
        told(done * 10**9, 8 * 10**9)
    assert stream.getvalue().splitlines() == ["read 3.00 of 8.00 GB (38%)", "read 6.00 of 8.00 GB (75%)"]
