"""A run folder has one live holder, outlives dead ones, and refuses another config; writes leave the old or the new file."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from moe_jax.errors import ConfigError
from moe_jax.train import run_folder
from moe_jax.train.run_folder import RunFolder, some

HOLDER = """
import sys, time
from moe_jax.train.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold():
    """Starts processes that hold a folder; they are killed when the test ends."""
    started = []

    def start(path, code=HOLDER):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline().strip() == "held"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_launch_says_who_holds_the_folder(tmp_path, hold):
    process = hold(tmp_path / "run")
    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(ConfigError, match=rf"run is in use by pid {process.pid} on \S+ since 20\d\d-") as caught:
            RunFolder(tmp_path / "run")
    assert time.monotonic() - began < 5
    assert caught.value.exit_code == 2 and process.poll() is None


def test_the_lock_of_a_killed_holder_is_taken_over(tmp_path, hold):
    for _ in range(2):
        process = hold(tmp_path / "run")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == process.pid  # its name stayed; its lock did not
    with RunFolder(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_file_that_names_a_living_pid_which_does_not_hold_it_is_taken_over(tmp_path):
    # The pid of a dead holder, given to another process since: here, to this one.
    (tmp_path / "lock").write_text(json.dumps({"pid": os.getpid(), "host": "x", "since": "then", "boot_id": run_folder._boot_id()}))
    with RunFolder(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["host"] != "x"


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path, hold):
    code = """
import os, sys, time
from moe_jax.train.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
if os.fork() == 0:
    os.close(1)
    time.sleep(3)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""
    process = hold(tmp_path, code)
    with pytest.raises(ConfigError, match=f"pid {process.pid} "):
        RunFolder(tmp_path)  # the child let go of its copy, and the parent still holds the lock
    process.kill()
    process.wait()
    RunFolder(tmp_path).close()


def test_one_process_cannot_hold_a_folder_twice_and_can_after_closing(tmp_path):
    with RunFolder(tmp_path), pytest.raises(ConfigError, match=f"in use by pid {os.getpid()} "):
        RunFolder(tmp_path)
    RunFolder(tmp_path).close()
    assert (tmp_path / "lock").read_text() == ""


def test_another_machines_lock_counts_until_it_has_been_silent(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "noon", "boot_id": "another kernel"}))
    with pytest.raises(ConfigError, match=r"in use by pid 7 on elsewhere since noon, and gave a sign of life 0 s ago.*delete"):
        RunFolder(tmp_path)
    silent = time.time() - run_folder.SILENCE_SECONDS - 1
    os.utime(lock, (silent, silent))
    RunFolder(tmp_path).close()


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 0.02)
    with RunFolder(tmp_path):
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.monotonic() + 5
        while (tmp_path / "lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "lock").stat().st_mtime > 0


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00" * 20, "5"])
def test_a_damaged_lock_file_is_no_obstacle(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with RunFolder(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_start_says_what_ran(tmp_path):
    path = tmp_path / "läufe" / "ein lauf"
    with RunFolder(path) as folder:
        assert folder.config() is None
        assert folder.start({"model": {"top_k": 2}}, ["python", "-m", "launch.train", "--name=a b"], device="cpu") == []
        assert folder.start({"model": {"top_k": 2}}, ["again"], device="cpu") == []
    assert json.loads((path / "config.json").read_text()) == {"model": {"top_k": 2}}
    versions = json.loads((path / "versions.json").read_text())
    assert versions["schema"] == run_folder.SCHEMA and versions["device"] == "cpu" and versions["earlier"] == []
    assert versions["python"] == sys.version.split()[0] and versions["jax"] and {"commit", "dirty", "platform"} <= versions.keys()
    lines = (path / "command.txt").read_text().splitlines()
    assert len(lines) == 2 and lines[0].endswith("  python -m launch.train '--name=a b'")


def test_changed_versions_are_reported_and_both_are_kept(tmp_path, monkeypatch):
    now = {"jax": "1.0", "commit": "a"}
    monkeypatch.setattr(run_folder, "versions", lambda device: dict(now))
    with RunFolder(tmp_path) as folder:
        folder.start({}, [])
        now["jax"] = "2.0"
        assert folder.start({}, []) == ['jax: was "1.0", now "2.0"']
        assert folder.start({}, []) == []
    written = json.loads((tmp_path / "versions.json").read_text())
    assert written["jax"] == "2.0" and written["earlier"] == [{"jax": "1.0", "commit": "a"}]


def test_a_resume_under_another_config_lists_every_field_and_changes_nothing(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.start({"a": {"b": 3, "c": 1}, "d": [1, 2]}, [])
        folder.check_config({"d": (1, 2), "a": {"c": 1, "b": 3}})
        with pytest.raises(ConfigError, match=r"2 fields differ\): a.b: was 3, now 4; d: was \[1, 2\], now \[1\]\."):
            folder.start({"a": {"b": 4, "c": 1}, "d": [1]}, [])
        assert folder.config() == {"a": {"b": 3, "c": 1}, "d": [1, 2]}
        with pytest.raises(ConfigError, match="and 30 more"):
            folder.check_config({f"field{number}": number for number in range(47)})


def test_long_lists_in_errors_are_cut_and_counted():
    assert some(["a", "b"], 2) == "a; b" and some(["a", "b", "c", "d"], 2, ", ") == "a, b, and 2 more" and some([], 2) == ""


def test_commit_names_the_checkout_and_whether_it_is_changed(tmp_path, monkeypatch):
    module = tmp_path / "moe_jax" / "train" / "run_folder.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(run_folder, "__file__", str(module))
    assert run_folder.commit() == {"commit": None, "dirty": None}

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert run_folder.commit() == {"commit": None, "dirty": None}
    git("add", ".")
    git("commit", "-m", "one")
    clean = run_folder.commit()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    module.write_text("changed")
    assert run_folder.commit() == {"commit": clean["commit"], "dirty": True}


def test_a_path_that_cannot_be_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/nothing/run"):
        with pytest.raises(ConfigError, match="cannot use .* as a run folder"):
            RunFolder(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_an_unreadable_config_is_one_line_and_frees_the_lock(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for _ in range(2):
        with RunFolder(tmp_path) as folder, pytest.raises(ConfigError, match="cannot read .*config.json"):
            folder.start({}, [])


def test_a_folder_of_newer_code_is_refused_and_its_lock_freed(tmp_path):
    (tmp_path / "versions.json").write_text('{"schema": "moe_jax.run_folder/2"}')
    for _ in range(2):
        with pytest.raises(ConfigError, match="was written as 'moe_jax.run_folder/2'"):
            RunFolder(tmp_path)
