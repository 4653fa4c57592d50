"""Commands as a shell sees them: exit codes, one-line errors, the manual, and signals that stop cleanly."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMMAND = '''
"""Trains a model for a while.

    python -m sample --workdir=runs/a --steps=20

A second paragraph with 100 % of the details.
"""

import dataclasses
import errno
import signal
import time
import warnings

from absl import flags

from launch.common import StopRequests, apply_overrides, define_set, run
from moe_jax import errors

# a shell's background job ignores SIGINT and hands that on: here the signals are a terminal's wherever the tests run
signal.signal(signal.SIGINT, signal.default_int_handler)
STEPS = flags.DEFINE_integer("steps", 10, "How many steps to take.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; " + "long text " * 12, required=True)
RATE = flags.DEFINE_float("rate", 1e-3, "Learning rate.")
KIND = flags.DEFINE_enum("kind", "a", ["a", "b"], "Which kind.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would run.")
LAYERS = flags.DEFINE_list("layers", [], "Which layers.")
DO = flags.DEFINE_string("do", "", "What the test wants.")
SET = define_set()


@dataclasses.dataclass(frozen=True)
class Config:
    top_k: int = 2
    rate: float = 0.5


def wait():
    print("ready", flush=True)
    time.sleep(30)


def loop():
    with StopRequests() as stop:
        print("ready", flush=True)
        for step in range(3000):
            time.sleep(0.01)
            if stop():
                raise errors.Stopped(f"{stop()} at a step")


def deaf():
    with StopRequests():
        wait()


def after():
    with StopRequests():
        pass
    wait()


def write(size=1):
    from moe_jax.files import write_atomic

    write_atomic("there", b"0" * size)


def write_much():
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, 1 << 10))
    write(1 << 20)


def read():
    open("not there")


def stale():
    raise OSError(errno.ESTALE, "Stale file handle")


def main(argv):
    if DO.value == "crash":
        raise RuntimeError("a bug")
    if DO.value == "warn":
        warnings.warn("look at this", errors.MoeJaxWarning)
    if DO.value in globals():
        return globals()[DO.value]()
    if DO.value == "fill":
        import jax

        jax.jit(lambda: jax.numpy.zeros((1 << 20, 1 << 26)))().block_until_ready()  # 256 TB
    if DO.value == "MemoryError":
        raise MemoryError("what went wrong")
    if hasattr(errors, DO.value):
        raise getattr(errors, DO.value)("what went wrong")
    print(apply_overrides(Config(), SET.value), argv[1:])


if __name__ == "__main__":
    run(main, positional=WRAPS, resumable=not WRAPS)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands")
    (path / "sample.py").write_text(COMMAND.replace("WRAPS", "False").lstrip())
    (path / "wrapper.py").write_text(COMMAND.replace("WRAPS", "True").lstrip())
    return path


@pytest.fixture
def start(folder):
    def start(*arguments: str, module: str = "sample") -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "COLUMNS": "80"}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return start


@pytest.fixture
def shell(start):
    """Runs the command and returns (exit code, stdout, stderr)."""

    def shell(*arguments: str, module: str = "sample") -> tuple[int, str, str]:
        with start(*arguments, module=module) as process:
            out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return shell


def test_a_command_runs_with_its_flags_and_overrides(shell):
    code, out, err = shell("--workdir=x", "--set", "top_k=4", "--set=rate=0.25")
    assert (code, out, err) == (0, "Config(top_k=4, rate=0.25) []\n", "")


@pytest.mark.parametrize(
    ("error", "code"), [("ConfigError", 2), ("DataError", 3), ("CheckpointError", 4), ("Stopped", 75), ("NonFinite", 1)]
)
def test_a_typed_error_is_one_line_and_its_code(shell, error, code):
    kind = "stopped" if error == "Stopped" else "error"
    assert shell("--workdir=x", f"--do={error}") == (code, "", f"{kind}: what went wrong\n")


@pytest.mark.parametrize(("command", "line"), [((), rb"error: no command: .*\n"), (("--", "true"), rb"launch.local: started 2 .*\n")])
def test_a_line_is_written_in_one_piece(command, line):
    """Else another process that writes to the same terminal can come between a line and its end; a datagram is one write."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        subprocess.run([sys.executable, "-m", "launch.local", "--processes=2", *command], cwd=ROOT, stderr=theirs, check=False)
        ours.settimeout(5)
        assert re.fullmatch(line, ours.recv(1 << 16))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("--workdir=x", "--do=print"), ("--help",)])
def test_a_reader_that_leaves_is_no_error(start, monkeypatch, arguments, unbuffered):
    """As in `command | head -1`, however Python keeps what is printed."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with start(*arguments) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_a_bug_keeps_its_traceback(shell):
    code, _, err = shell("--workdir=x", "--do=crash")
    assert code == 1 and "Traceback" in err and err.rstrip().endswith("RuntimeError: a bug")


@pytest.mark.parametrize(("do", "words"), [("fill", "Out of memory allocating 281474976710656 bytes"), ("MemoryError", "what went wrong")])
def test_memory_that_runs_out_is_one_line(shell, do, words):
    code, out, err = shell("--workdir=x", f"--do={do}")
    assert (
        (code, out) == (2, "") and err.count("\n") == 1 and f"error: not enough memory ({words}" in err.replace("RESOURCE_EXHAUSTED: ", "")
    ), err


def test_what_the_disk_refuses_is_one_line(shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shell("--workdir=x", "--do=write_much") == (2, "", "error: there: File too large\n")
    (tmp_path / "there").mkdir()
    assert shell("--workdir=x", "--do=write") == (2, "", "error: there: Is a directory\n")
    # a bug, since whoever asked for the file should have looked; and what may pass, after which a job starts again
    for other in ("read", "stale"):
        code, _, err = shell("--workdir=x", f"--do={other}")
        assert code == 1 and "Traceback" in err


def test_a_warning_is_one_line(shell):
    assert shell("--workdir=x", "--do=warn")[2] == "warning: look at this\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stpes=3"], "unknown flag --stpes (did you mean '--steps'?)"),
        (["--zzzzzzzz"], "unknown flag --zzzzzzzz."),
        (["--top_k.x=3"], "unknown flag --top_k.x; a field of the config is set by --set top_k.x=value"),
        (["--steps=abc"], "flag --steps=abc: needs a whole number, was given 'abc'"),
        (["--steps=0"], "flag --steps=0: 0 is not a positive integer"),
        (["--rate=fast"], "flag --rate=fast: needs a number, was given 'fast'"),
        (["--rate=nan"], "flag --rate=nan: needs a finite number"),
        (["--kind=c"], "flag --kind=c: value should be one of <a|b>"),
        (["steps=3"], "unexpected argument 'steps=3' (did you mean '--steps=3'?)"),
        (["--", "more"], "unexpected argument 'more': this command takes flags only"),
        (["--set", "topk=3"], "unknown config field 'topk' (did you mean 'top_k'?); known: top_k, rate"),
        (["--set", "rate=nan"], "--set rate=nan: needs a finite number, was given 'nan'"),
        (["--flagfile=/nothing/here"], "Unable to open flagfile"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(shell, arguments, words):
    code, out, err = shell("--workdir=x", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"error: {words}") and err.count("\n") == 1


def test_a_required_flag_is_named(shell):
    assert shell() == (2, "", "error: flag --workdir is required. --help lists the flags\n")


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort"])
def test_help_reads_like_a_manual_and_ignores_the_other_flags(shell, flag):
    code, out, err = shell("--nonsense", flag)
    assert (code, err) == (0, "")
    expected = """
        python -m sample [--flag=value ...]

        Trains a model for a while.

            python -m sample --workdir=runs/a --steps=20

        A second paragraph with 100 % of the details.

        Flags:
          --steps=INTEGER
              How many steps to take. (default: 10)
        """
    assert out.startswith(textwrap.dedent(expected).lstrip())
    for line in (
        "  --kind=a|b\n      Which kind. (default: a)\n",
        "  --[no]dry_run\n      Print what would run. (default: false)\n",
        "  --layers=A,B,...\n      Which layers. (default: empty)\n",
        "  --rate=NUMBER\n      Learning rate. (default: 0.001)\n",
        " (required)\n",
        "Flags of every such command:\n  --set=TEXT\n",
    ):
        assert line in out
    assert max(map(len, out.splitlines())) <= 80
    assert "verbosity" not in out and "pdb" not in out  # the libraries' own flags


def test_a_wrapping_command_gets_what_follows_the_dashes(shell):
    code, out, _ = shell("--workdir=x", "--", "python", "--help", module="wrapper")
    assert (code, out) == (0, "Config(top_k=2, rate=0.5) ['python', '--help']\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("do", ["wait", "loop", "after"])
def test_a_signal_stops_with_75(start, name, do):
    with start("--workdir=x", f"--do={do}") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=20)
    assert process.returncode == 75 and "Traceback" not in err
    if do == "loop":  # it was the loop that stopped, between two steps
        assert err == f"\n{name}: stopping after this step; once more stops at once\nstopped: {name} at a step\n"
    else:
        assert err.startswith("stopped: ") and err.count("\n") == 1


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_command_without_checkpoints_says_that_it_begins_anew(start, name, code):
    """A scheduler that queues 75 again must not take it for one that goes on."""
    with start("--workdir=x", "--do=wait", module="wrapper") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (code, f"stopped: {name}; the same command begins anew\n")


def test_the_commands_that_go_on_are_those_that_say_75():
    """`resumable` and the manual agree, command by command."""
    commands = {path.stem: path.read_text() for path in (ROOT / "launch").glob("*.py") if "\n    run(main" in path.read_text()}
    says = {name for name, text in commands.items() if "75" in text.split('"""')[1]}
    assert says == {name for name, text in commands.items() if "resumable=True)" in text} == {"local", "rl", "study", "train"}
    assert len(commands) == 12


def test_a_second_signal_stops_at_once(start):
    with start("--workdir=x", "--do=deaf") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        while "once more" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 75 and err == "stopped: SIGTERM; the same command goes on from the last checkpoint\n"
