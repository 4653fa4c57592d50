"""Which process this is, from flags and environments; how processes meet; what they tell each other. Real processes: tests/launch/test_local.py."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_jax import distributed, errors
from moe_jax.distributed import Found, find, first_host
from moe_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]
SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
    "SLURM_JOB_NODELIST": "x",
}
LOCAL = {"MOE_JAX_COORDINATOR": "127.0.0.1:25000", "MOE_JAX_NUM_PROCESSES": "2", "MOE_JAX_PROCESS_ID": "1"}
JOBSET = {"JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:8476", "JAX_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "5"}
TPU = {"TPU_WORKER_HOSTNAMES": "a.svc,b.svc,c.svc,d.svc", "TPU_WORKER_ID": "3"}
SLICES = TPU | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "lead:8080"}
NO_FLAGS = (None, None, None)


@pytest.mark.parametrize(
    "environ, given, found",
    [
        ({}, NO_FLAGS, Found(0, 1, "alone")),
        ({}, (None, 1, None), Found(0, 1, "alone")),
        ({}, (None, 1, 0), Found(0, 1, "alone")),
        ({}, ("h:1", 3, 2), Found(2, 3, "flags", "h:1")),
        (LOCAL, NO_FLAGS, Found(1, 2, "launch.local", "127.0.0.1:25000")),
        (SLURM, NO_FLAGS, Found(2, 4, "SLURM job 123", "gpu07:61563")),
        (SLURM | {"SLURM_STEP_ID": "2"}, NO_FLAGS, Found(2, 4, "SLURM job 123", "gpu07:61565")),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "ib0:77"}, NO_FLAGS, Found(2, 4, "SLURM job 123", "ib0:77")),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, NO_FLAGS, Found(2, 4, "SLURM job 123", "x:61563")),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, NO_FLAGS, Found(0, 1, "alone")),
        ({"SLURM_JOB_ID": "7"}, NO_FLAGS, Found(0, 1, "alone")),  # an interactive shell sets some of the variables only
        (SLURM, ("h:1", None, None), Found(2, 4, "flags", "h:1")),
        (SLURM, (None, 4, None), Found(2, 4, "flags", "gpu07:61563")),
        (SLURM | LOCAL, NO_FLAGS, Found(1, 2, "launch.local", "127.0.0.1:25000")),
        (JOBSET, NO_FLAGS, Found(5, 8, "JAX_NUM_PROCESSES", "run-workers-0-0.run:8476")),
        (JOBSET | {"JAX_PROCESS_ID": "6"}, NO_FLAGS, Found(6, 8, "JAX_NUM_PROCESSES", "run-workers-0-0.run:8476")),
        ({"JOB_COMPLETION_INDEX": "0"}, NO_FLAGS, Found(0, 1, "alone")),
        (TPU, NO_FLAGS, Found(3, 4, "TPU_WORKER_HOSTNAMES", "a.svc:8482")),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, NO_FLAGS, Found(0, 1, "TPU_WORKER_HOSTNAMES", "localhost:8482")),
        (SLICES, NO_FLAGS, Found(7, 8, "TPU_WORKER_HOSTNAMES", "lead:8482")),
    ],
)
def test_who_this_is(environ, given, found):
    assert find(environ, *given) == found


@pytest.mark.parametrize(
    "environ, given, words",
    [
        ({}, ("h:1", None, None), ["--num_processes and --process_id missing"]),
        ({}, (None, 2, 1), ["--coordinator missing"]),
        ({}, ("h:1", 2, None), ["--process_id missing"]),
        ({}, (None, None, 1), ["--coordinator and --num_processes missing"]),
        ({}, ("h:1", 2, 2), ["process 2 of 2"]),
        ({}, ("h:1", 2, -1), ["process -1 of 2"]),
        ({}, ("h:1", 0, 0), ["process 0 of 0"]),
        ({}, (None, 1, 1), []),
        ({}, ("h", 2, 1), ["'h'", "host:port"]),
        ({}, ("h:port", 2, 1), ["'h:port'", "host:port"]),
        ({}, (":1", 2, 1), ["':1'", "host:port"]),
        ({}, ("h:65536", 2, 1), ["'h:65536'", "host:port"]),
        (SLURM, (None, 3, None), ["--num_processes=3", "SLURM job 123", "4"]),
        (SLURM, ("h:1", 1, 0), ["--num_processes=1", "4"]),
        (LOCAL, ("h:1", 3, 0), ["--num_processes=3", "launch.local", "2"]),
        (LOCAL, (None, 1, None), ["--num_processes=1", "launch.local", "2"]),
        ({"MOE_JAX_NUM_PROCESSES": "2", "MOE_JAX_COORDINATOR": "h:1"}, NO_FLAGS, ["MOE_JAX_PROCESS_ID"]),
        (LOCAL | {"MOE_JAX_COORDINATOR": ""}, NO_FLAGS, ["''", "launch.local"]),
        (LOCAL | {"MOE_JAX_PROCESS_ID": "one"}, NO_FLAGS, ["MOE_JAX_PROCESS_ID", "'one'"]),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, NO_FLAGS, ["SLURM job 7", "4 tasks", "srun"]),
        (SLURM | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, NO_FLAGS, ["4 tasks", "srun"]),
        (SLURM | {"SLURM_PROCID": "4"}, NO_FLAGS, ["process 4 of 4", "SLURM"]),
        ({"JOB_COMPLETION_INDEX": "3"}, NO_FLAGS, ["pod 3", "JAX_COORDINATOR_ADDRESS"]),
        ({"JAX_NUM_PROCESSES": "2"}, NO_FLAGS, ["''", "JAX_NUM_PROCESSES"]),
        (JOBSET | {"JOB_COMPLETION_INDEX": "8"}, NO_FLAGS, ["process 8 of 8"]),
        (TPU | {"MEGASCALE_NUM_SLICES": "2"}, NO_FLAGS, ["''", "TPU_WORKER_HOSTNAMES"]),
    ],
)
def test_refused(environ, given, words):
    if given == (None, 1, 1):  # one process that is given a number and no address is alone, whatever the number
        assert find(environ, *given).count == 1
        return
    with pytest.raises(ConfigError) as error:
        find(environ, *given)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_tpu_vm_is_left_to_jax(monkeypatch, tmp_path):
    """A chip, libtpu and nothing announced: jax asks the metadata server. Any of them missing, and this process is alone."""
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(distributed, "Path", lambda path: tmp_path / path.strip("/"))
    assert find({}, *NO_FLAGS).source == "alone"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/accel0").touch()
    assert find({}, *NO_FLAGS) == Found(0, 0, "TPU VM")
    assert find({}, None, 1, None).source == "alone"
    assert find({"JAX_PLATFORMS": "cpu"}, *NO_FLAGS).source == "alone"
    assert find({"TPU_SKIP_MDS_QUERY": "1"}, *NO_FLAGS).source == "alone"
    assert find(LOCAL, *NO_FLAGS).source == "launch.local"
    assert find({}, "h:1", 2, 1) == Found(1, 2, "flags", "h:1")


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[01-03,07]", "node01"),
        ("node[7,01-03]", "node7"),
        ("gpu-a[3-4]-ib,x", "gpu-a3-ib"),
        ("rack[2-3]n[01-04,07],x", "rack2n01"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_alone():
    found = distributed.initialize()
    assert (found.index, found.count, found.source, found.local_devices, found.devices) == (0, 1, "alone", 8, 8)
    assert str(found) == "process 0 of 1 (alone), 8 of 8 devices"
    assert distributed.first()
    pair = (1, 2)
    assert distributed.share(pair) is pair
    with pytest.raises(OSError, match="as it is"):
        distributed.on_first(lambda: (_ for _ in ()).throw(OSError("as it is")))


def test_jax_sees_another_job(monkeypatch):
    """A TPU pod's runtime knows its hosts: a host of it that was told to be alone is refused."""
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match="alone means 1 processes, but jax sees 4"):
        distributed.initialize(num_processes=1)


# --- meeting ------------------------------------------------------------------------------------------------------------------


def meet(members: list[tuple[int, int]], timeout: float = 10, strangers: bool = False) -> dict[int, str]:
    """What each (index, count) met with, by its place in the list, process 0 first: "" or the error. It leaves its port to a listener, as to jax's service."""
    from launch.local import free_port

    address = f"127.0.0.1:{free_port()}"
    met: dict[int, str] = {}

    def one(place: int, index: int, count: int) -> None:
        world = Found(index, count, "flags", address)
        try:
            (distributed._join if index else distributed._gather)(world, timeout)
            met[place] = ""
        except ConfigError as error:
            met[place] = str(error)
        if index == 0 and not met[place]:
            service = socket.create_server(("127.0.0.1", int(address.split(":")[1])))
            done.wait(20)
            service.close()

    def stranger(text: bytes) -> None:
        with distributed._dial(Found(9, 9, "flags", address), 10) as peer:
            peer.sendall(text)

    done = threading.Event()
    threads = [threading.Thread(target=one, args=(place, *member)) for place, member in enumerate(members)]
    threads[0].start()
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"moe_jax 1\n", b"") if strangers else ():
        stranger(text)
    for thread in threads[1:]:
        thread.start()
    for thread, member in zip(threads, members, strict=True):
        if member[0]:
            thread.join(30)
    done.set()
    threads[0].join(30)
    assert len(met) == len(members)
    return met


def test_all_meet():
    assert set(meet([(0, 4), (3, 4), (1, 4), (2, 4)]).values()) == {""}


def test_strangers_are_passed_over():
    assert set(meet([(0, 2), (1, 2)], strangers=True).values()) == {""}


def test_too_few_come():
    began = time.monotonic()
    met = meet([(0, 12), (1, 12)], timeout=1)
    assert time.monotonic() - began < 8
    assert met[0] == met[1]
    assert "2 of 12 processes came" in met[0] and "without process 2, 3, 4, 5, 6, 7, 8, 9, …" in met[0]


def test_other_count():
    met = meet([(0, 2), (1, 3)])
    assert met[0] == met[1] and "process 1 of 3 came to process 0 of 2" in met[0]


def test_the_same_index_twice():
    met = meet([(0, 3), (1, 3), (1, 3)])
    assert len(set(met.values())) == 1 and "process 1 of 3 came to process 0 of 3 a second time" in met[0]


def test_nobody_there():
    world = Found(1, 2, "flags", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"process 1 of 2: nothing answers at 127\.0\.0\.1:1 within 0\.5 s"):
        distributed._join(world, 0.5)


def test_somebody_else_there():
    """Another server's answer is not taken for a verdict, and its port not for ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            with server.accept()[0] as peer:
                peer.sendall(b"SSH-2.0-x\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match=f"process 1: what answered at {address} ended, or is not this job's process 0"):
            distributed._join(Found(1, 2, "flags", address), 2)
        thread.join()
        with pytest.raises(ConfigError, match=f"cannot listen at {address}"):
            distributed._gather(Found(0, 2, "flags", address), 1)


# --- what they tell each other ------------------------------------------------------------------------------------------------


class Store:
    """The coordination service's keys, for threads of one process."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            assert key not in self.keys
            self.keys[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout: int) -> str:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.keys, timeout=5)
            return self.keys[key]

    def key_value_delete(self, prefix: str) -> None:
        with self.changed:
            self.keys = {key: value for key, value in self.keys.items() if not key.startswith(prefix)}


def together(monkeypatch, script, count: int = 3) -> tuple[list, Store]:
    """What script() returns or raises in each of `count` threads that stand for processes."""
    store, here, out = Store(), threading.local(), [None] * count

    class Counter:
        def __next__(self) -> int:
            here.uses = getattr(here, "uses", -1) + 1
            return here.uses

    monkeypatch.setattr(distributed, "_job", lambda: (store, here.index, count))
    monkeypatch.setattr(distributed, "_uses", Counter())

    def one(index: int) -> None:
        here.index = index
        try:
            out[index] = script(index)
        except Exception as error:
            out[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return out, store


def test_share(monkeypatch):
    def script(index: int):
        first = distributed.share({"index": index, "pair": (1, 2)})
        again = distributed.share(None)
        distributed.on_all(lambda: None)
        return first, again, distributed.share([index]), distributed.first()

    out, store = together(monkeypatch, script)
    assert out == [({"index": 0, "pair": [1, 2]}, None, [0], index == 0) for index in range(3)]
    assert len(store.keys) == 2, "what everybody has read is deleted: all but on_all's verdict and what was shared after it"


@pytest.mark.parametrize(
    "error, kind, text",
    [
        (errors.DataError("no text"), errors.DataError, "no text"),
        (errors.Unsupported("not here"), errors.Unsupported, "not here"),
        (errors.Stopped("SIGTERM"), errors.Stopped, "SIGTERM"),
        (OSError("disk full"), errors.MoeJaxError, "process 0 failed: OSError: disk full"),
    ],
)
def test_errors_of_process_0_reach_all(monkeypatch, error, kind, text):
    def work():
        raise error

    out, _ = together(monkeypatch, lambda index: distributed.on_first(work))
    assert out[0] is error
    assert [(type(other), str(other)) for other in out[1:]] == [(kind, text)] * 2


def test_what_is_not_json_fails_everywhere(monkeypatch):
    out, _ = together(monkeypatch, lambda index: distributed.share({1, 2}))
    assert isinstance(out[0], TypeError) and all(type(other) is errors.MoeJaxError for other in out[1:])


def test_own_error_class_is_known_by_its_base(monkeypatch):
    class Own(errors.CheckpointError):
        pass

    def work():
        raise Own("torn")

    out, _ = together(monkeypatch, lambda index: distributed.on_first(work))
    assert [type(other) for other in out] == [Own, errors.CheckpointError, errors.CheckpointError]


def test_on_all_gives_each_its_own(monkeypatch):
    out, store = together(monkeypatch, lambda index: [distributed.on_all(lambda: {index}) for _ in range(2)])
    assert out == [[{index}] * 2 for index in range(3)], "what is not JSON may be returned"
    assert len(store.keys) == 1


@pytest.mark.parametrize(
    "error, kind, text",
    [
        (errors.DataError("no text"), errors.DataError, "no text"),
        (OSError("full"), errors.MoeJaxError, "full"),
        (OSError(), errors.MoeJaxError, "OSError"),
    ],
)
@pytest.mark.parametrize("failing", [{0}, {1}, {1, 2}])
def test_on_all_raises_the_first_failure_everywhere(monkeypatch, failing, error, kind, text):
    def work(index: int) -> None:
        if index in failing:
            raise error

    out, _ = together(monkeypatch, lambda index: distributed.on_all(lambda: work(index)))
    where = "" if 0 in failing else "process 1: "
    assert [(type(raised), str(raised)) for raised in out] == [(kind, where + text)] * 3


def test_on_all_of_one_process_is_a_call():
    assert distributed.on_all(lambda: {1: "not JSON"}) == {1: "not JSON"}
    with pytest.raises(ZeroDivisionError):
        distributed.on_all(lambda: 1 // 0)


# --- real processes, without a launcher ---------------------------------------------------------------------------------------


def start(folder: Path, count: int, *more: str) -> list[subprocess.Popen]:
    port = random.randrange(15000, 19000)
    command = [sys.executable, "-m", "tests.distributed_job", f"--folder={folder}", f"--coordinator=127.0.0.1:{port}"]
    return [
        subprocess.Popen(
            [*command, f"--num_processes={count}", f"--process_id={index}", *more], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for index in range(count)
    ]


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_process_ends_the_others(tmp_path, victim):
    processes = start(tmp_path, 3, "--steps=5000", "--sleep=0.05")
    try:
        wait_for(tmp_path / "saved.json")
        os.kill(processes[victim].pid, signal.SIGKILL)
        began = time.monotonic()
        codes = [process.wait(60) for process in processes]
        print(f"process {victim} killed: all ended after {time.monotonic() - began:.1f} s with {codes}")
        assert all(codes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("fail, codes", [("CheckpointError", [4, 4, 4]), ("1:DataError", [None, 3, None])])
def test_errors_of_real_processes(tmp_path, fail, codes):
    """One that all meet ends all with its code; one of a single process ends it at once, and then the others."""
    processes = start(tmp_path, 3, f"--fail={fail}", "--steps=5000")
    said = [process.communicate(timeout=70)[1] for process in processes]
    for process, text, code in zip(processes, said, codes, strict=True):
        assert process.returncode and code in (None, process.returncode), text
    assert "error (process 1): as asked in step 2\n" in said[1]
