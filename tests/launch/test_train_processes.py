"""launch.train as a job of several processes: the losses and routes of one, on any layout; checkpoints for any number; kills; what is refused.

All but one test are slow: each launch traces and compiles the whole program. As everywhere in the tests, XLA does not optimise code, and all processes
keep what they compiled in one folder. Every number that a comparison found is printed (-s shows it).
"""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from launch.local import free_port
from moe_jax import TraceReader

ROOT = Path(__file__).parents[2]
FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count"
ENVIRONMENT = {**os.environ, "XLA_FLAGS": f"{FLAGS}=1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
TRAIN = [sys.executable, "-m", "launch.train", "--preset=tiny", "--data=synthetic"]
NOISY = [*TRAIN, "--noise=matmuls=relative:0.05", "--seed=0"]
TIE = 1e-5  # in the weight of an expert: with choices that are closer than this, float32 sums of another order decide
SAME_LOSS = 1e-6  # relative


def local(processes: int, *flags: str) -> list[str]:
    return [sys.executable, "-m", "launch.local", f"--processes={processes}", *flags, "--"]


def run(command: list[str], code: int = 0, timeout: float = 600) -> str:
    """Runs it to its end and gives stderr."""
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl; none before there is one."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """{(update, which loss): value} of training and evaluation."""
    names = ("train/loss", "eval/loss", "eval/loss_noisy")
    return {(row["step"], name): row[name] for row in rows(folder) for name in names if name in row}


def worst(found: dict, wanted: dict) -> float:
    """The largest relative difference; the keys must be the same."""
    assert found.keys() == wanted.keys()
    return max(abs(value / wanted[key] - 1) for key, value in found.items())


# --- the same curve -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What differs between two recorded runs: before the first choice that differs, and there."""

    updates: int  # with equal ids, from the first on
    of: int
    loss: float  # the largest relative difference of a loss up to there
    tie: float  # the largest difference of weights of the first choices that differ; 0 where none does


def compare(folder: Path, wanted: Path) -> Comparison:
    found, reference, values = TraceReader(folder / "routes"), TraceReader(wanted / "routes"), losses(wanted)
    steps = reference.steps
    assert found.steps == steps and found.verify() == len(steps)
    equal, tie = len(steps), 0.0
    for number, step in enumerate(steps):
        one, other = found.read(step), reference.read(step)
        differ = (one.ids != other.ids).any(-1)  # [L, B, S]
        if differ.any():
            layer = int(np.argwhere(differ.any((1, 2)))[0, 0])  # later layers, and within it later positions, follow from it
            tie, equal = float(np.abs(one.weights[layer] - other.weights[layer])[differ[layer]].max()), number
            break
    whole = equal == len(steps)
    until = {key for key in values if whole or key[0] <= equal}
    mine = losses(folder)
    assert mine.keys() == values.keys()
    return Comparison(equal, len(steps), worst({key: mine[key] for key in until}, {key: values[key] for key in until}), tie)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process on one device, with its routes and their weights."""
    return recorded(tmp_path_factory.mktemp("alone") / "run", NOISY)


def recorded(folder: Path, command: list[str], *flags: str) -> Path:
    run([*command, "--steps=30", f"--workdir={folder}", f"--record={folder}/routes", "--set", "record_what=ids+weights", *flags])
    return folder


LAYOUTS = {
    "2 processes": (2, 1, ""),
    "4 processes": (4, 1, ""),
    "2 x 4 devices, data=2,expert=4": (2, 4, "data=2,expert=4"),
    "2 x 2 devices, fsdp=2,expert=2": (2, 2, "fsdp=2,expert=2"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_of_one_process(name, alone, tmp_path):
    """Every route the same and every loss to 1e-6, over 30 updates, unless a tie comes first: a choice between experts that float32 cannot tell apart.

    From there on it is another run. The sums of a gradient over devices have another order, which is 1e-7 in a logit after a few updates, so among the
    61,440 choices of a run there may be such a tie.
    """
    processes, devices, mesh = LAYOUTS[name]
    launcher = local(processes, f"--devices_per_process={devices}")
    found = compare(recorded(tmp_path / "run", [*launcher, *NOISY], f"--mesh={mesh}"), alone)
    print(f"\n{name}: {found}; last losses {[rows(folder)[-1]['eval/loss'] for folder in (tmp_path / 'run', alone)]}")
    assert found.loss < SAME_LOSS
    assert found.tie < TIE, "no tie explains why another expert was chosen"
    assert found.updates >= 5
    assert len(list((tmp_path / "run" / "routes").glob("part-*.json"))) == processes


# --- checkpoints and routes for any number of processes -----------------------------------------------------------------------

SHORT = [*NOISY, "--steps=20"]


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """A run of four processes that nobody disturbed, with its routes."""
    folder = tmp_path_factory.mktemp("four")
    run([*local(4), *SHORT, f"--workdir={folder}/run"])
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The same, stopped after its eighth update or a little later."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with subprocess.Popen(
        [*local(4), *SHORT, f"--workdir={folder}"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        wait_until(lambda: len(rows(folder)) >= 8 or job.poll() is not None, 400)
        job.send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=100)
    assert job.returncode == 75, err
    assert re.search(r"stopped at update \d+ of 20, saved; the same command goes on", err)
    assert 8 <= len(rows(folder)) < 20
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("launcher, mesh", [([], ""), (local(2, "--devices_per_process=2"), "fsdp=2,expert=2")])
def test_four_processes_are_stopped_and_fewer_go_on(launcher, mesh, four, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    before = losses(stopped)
    run([*launcher, *SHORT, f"--mesh={mesh}", f"--workdir={tmp_path}/run"])
    found, wanted = losses(tmp_path / "run"), losses(four)
    print(
        f"\nstopped after {len(before)} of 20 updates, then mesh '{mesh}': losses differ by {worst(found, wanted):.1e} from the unbroken run's"
    )
    assert {key: found[key] for key in before} == before == {key: wanted[key] for key in before}
    assert worst(found, wanted) < SAME_LOSS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_runs_begin_with_the_parameters_of_four_processes(four, tmp_path):
    begin = [*NOISY, "--steps=5", f"--start={four}"]
    run([*begin, f"--workdir={tmp_path}/one"])
    run([*local(2), *begin, f"--workdir={tmp_path}/two"])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    print(
        f"\n--start: first loss {one[1, 'train/loss']:.6f} after {losses(four)[20, 'train/loss']:.6f}, {worst(two, one):.1e} between 1 and 2 processes"
    )
    assert worst(two, one) < SAME_LOSS
    assert one[1, "train/loss"] < losses(four)[1, "train/loss"] - 0.1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_replay_what_four_recorded(tmp_path):
    """Routes that four wrote in parts are read whole; a replay leaves no choice, so the losses agree however near the ties."""
    run([*local(4), *NOISY, "--steps=10", f"--workdir={tmp_path}/four", f"--record={tmp_path}/routes"])
    again = [*TRAIN, "--seed=0", "--steps=10", f"--replay={tmp_path}/routes", "--noise=matmuls=relative:0.1"]
    run([*again, f"--workdir={tmp_path}/one"])
    run([*local(2), *again, f"--workdir={tmp_path}/two", f"--record={tmp_path}/taken"])
    difference = worst(losses(tmp_path / "two"), losses(tmp_path / "one"))
    print(f"\n--replay: {difference:.1e} between 1 and 2 processes")
    assert difference < SAME_LOSS
    asked, taken = TraceReader(tmp_path / "routes"), TraceReader(tmp_path / "taken")
    assert all((asked.read(step).ids == taken.read(step).ids).all() for step in range(10))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_record_what_one_does(tmp_path):
    """The routes of a noisy pass over two parts, and their weights."""
    record = [sys.executable, "-m", "launch.record", "--model=tiny", "--data=synthetic", "--steps=3", "--noise=matmuls=relative:0.05"]
    readers = []
    for name, launcher, mesh in (("one", [], ""), ("two", local(2, "--devices_per_process=2"), "data=2,expert=2")):
        run([*launcher, *record, f"--mesh={mesh}", f"--out={tmp_path / name}"])
        readers.append(TraceReader(tmp_path / name))
    one, two = readers
    assert two.steps == one.steps == (0, 1, 2) and len(list((tmp_path / "two").glob("part-*.json"))) == 2
    for step in one.steps:
        assert (one.read(step).ids == two.read(step).ids).all()
        np.testing.assert_allclose(two.read(step).weights, one.read(step).weights, atol=1e-6)


# --- kills --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_is_killed(victim, tmp_path):
    """Without launch.local, which would end them itself."""
    command = [*NOISY, "--steps=5000", "--set", "checkpoint_every=100", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    command = [*command, f"--workdir={tmp_path}/run", "--connect_timeout=60"]
    processes = [
        subprocess.Popen([*command, f"--process_id={index}"], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE) for index in range(2)
    ]
    try:
        wait_until(lambda: len(rows(tmp_path / "run")) >= 3 or any(process.poll() is not None for process in processes), 400)
        processes[victim].kill()
        began = time.monotonic()
        code = processes[1 - victim].wait(60)
        print(f"\nprocess {victim} killed: the other ended after {time.monotonic() - began:.1f} s with {code}")
        assert code
    finally:
        for process in processes:
            process.kill()
            process.communicate()


KILLED = [*TRAIN, "--noise=router_gemm=relative:0.05", "--seed=0", "--steps=60", "--set", "checkpoint_every=5"]


class Launched:
    """A job under launch.local whose processes are killed."""

    def __init__(self, folder: Path, processes: int, cache: Path | None = None):
        self.folder, self.starts, self.said = folder, list[list[int]](), list[str]()
        command = [*local(processes, "--max_restarts=3"), *KILLED, f"--workdir={folder}"]
        environment = {**ENVIRONMENT, **({"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {})}
        self.job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.job.stderr or ():
            self.said.append(line)
            if found := re.search(r"launch\.local: started .*\(pid ([\d, ]+)\)", line):
                self.starts.append([int(pid) for pid in found[1].split(", ")])

    def kill(self, number: int, victim: int, moment: str, rng: random.Random) -> str:
        """Kills -9 a process of start `number`, at a random time of what `moment` names; says when it was."""
        wait_until(lambda: len(self.starts) > number or self.job.poll() is not None, 120)
        began, before, launches = time.monotonic(), len(rows(self.folder)), self._launches()
        if moment == "starting":
            time.sleep(rng.uniform(0.3, 4))
        elif moment == "compiling":  # which begins when the folder's command.txt has been written
            wait_until(lambda: self._launches() > launches or self.job.poll() is not None, 120)
            time.sleep(rng.uniform(0.5, 6))
        else:
            goal = before + rng.randint(2, 12)
            wait_until(lambda: (len(rows(self.folder)) >= goal and self._is_at(moment)) or self.job.poll() is not None, 400, 0.0005)
        assert self.job.poll() is None, "".join(self.said)
        saving = bool(list((self.folder / "checkpoints").glob(".saving-*")))
        os.kill(self.starts[number][victim], signal.SIGKILL)
        return f"process {victim} at {time.monotonic() - began:.1f} s, update {len(rows(self.folder))}{', in a save' * saving}"

    def _launches(self) -> int:
        path = self.folder / "command.txt"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _is_at(self, moment: str) -> bool:
        return moment != "saving" or bool(list((self.folder / "checkpoints").glob(".saving-*")))

    def end(self, timeout: float) -> int:
        try:
            return self.job.wait(timeout)
        finally:
            self.close()

    def close(self) -> None:
        self.job.kill()
        self.job.wait()
        self.reader.join()
        if self.job.stderr:
            self.job.stderr.close()


PLANS = [
    [(0, "compiling"), (1, "saving"), (0, "training")],
    [(1, "compiling"), (0, "saving"), (1, "training")],
    [(0, "starting"), (1, "compiling"), (1, "saving")],
    [(0, "saving")],
]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_kills_and_the_same_numbers(tmp_path):
    """Ten kills at random moments, of the coordinator too, in four jobs: all come back by themselves to the numbers of the unbroken run, to the bit."""
    run([*local(2), *KILLED, f"--workdir={tmp_path}/whole"])
    wanted, rng = rows(tmp_path / "whole"), random.Random()
    for plan, kills in enumerate(PLANS):
        # the first job compiles all anew; the others' process 0 finds it in the cache
        job = Launched(tmp_path / f"run{plan}", 2, cache=tmp_path / "cache" if plan == 0 else None)
        try:
            said = [job.kill(number, victim, moment, rng) for number, (victim, moment) in enumerate(kills)]
            code = job.end(400)
        finally:
            job.close()
        found = rows(tmp_path / f"run{plan}")
        print(
            f"\njob {plan}, killed: {'; '.join(said)}; exit code {code}, {len(job.starts) - 1} restarts, last loss {found[-1]['eval/loss']!r}"
        )
        assert code == 0, "".join(job.said)
        assert len(job.starts) == len(kills) + 1
        assert found == wanted, f"losses differ by {worst(losses(tmp_path / f'run{plan}'), losses(tmp_path / 'whole')):.1e}"


# --- what is refused ----------------------------------------------------------------------------------------------------------


def refused(*commands: list[str]) -> list[str]:
    """The error lines of processes that all end with exit code 2 within 30 seconds, and say nothing but one line each."""
    began = time.monotonic()
    processes = [subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=100)[1] for process in processes]
    seconds = time.monotonic() - began
    print(f"\n{seconds:.1f} s", *said, sep="\n")
    assert [process.returncode for process in processes] == [2] * len(commands), said
    assert seconds < 30
    assert all("Traceback" not in text for text in said)
    return [line for text in said for line in text.splitlines() if re.match(r"(\[\d\] )?error", line)]


def test_a_mesh_that_does_not_divide_is_refused(tmp_path):
    lines = refused([*local(2, "--devices_per_process=2"), *TRAIN, "--mesh=data=3", f"--workdir={tmp_path}/run"])
    assert "error (process 0): mesh data=3 needs 3 devices, there are 4; change an axis so that the sizes multiply to that" in lines
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, flags, words",
    [
        (3, ["--mesh=expert=3", "--set", "data.batch_size=18"], "does not divide"),
        (3, [], "a batch of 16 sequences does not divide over the mesh axes data=3; change batch_size, or eval_batch"),
        (2, ["--num_processes=3"], "--num_processes=3, but launch.local announces 2 processes"),
        (2, ["--mesh=data=2,experts=2"], "unknown mesh axis 'experts' (did you mean 'expert'?)"),
    ],
)
def test_what_does_not_fit_is_refused(processes, flags, words, tmp_path):
    lines = refused([*local(processes), *TRAIN, *flags, f"--workdir={tmp_path}/run"])
    assert lines and all(words in line for line in lines)


@pytest.mark.slow
def test_jobs_that_do_not_meet_are_refused(tmp_path):
    def by_hand(index: int, count: int, address: str) -> list[str]:
        return [*TRAIN, f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}", f"--workdir={tmp_path}/run"]

    nobody, here, there = (f"127.0.0.1:{free_port()}" for _ in range(3))
    assert f"nothing answers at {nobody}" in refused(by_hand(1, 2, nobody))[0]
    lines = refused(by_hand(0, 2, here), by_hand(1, 3, here))
    assert len(lines) == 2 and all("process 1 of 3 came to process 0 of 2" in line for line in lines)
    lines = refused(by_hand(0, 3, there), by_hand(1, 3, there))
    assert len(lines) == 2 and all("2 of 3 processes came" in line for line in lines)


def wait_until(condition, seconds: float, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(pause)
