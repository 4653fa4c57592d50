"""Several processes on one file system: checkpoints, run folder, metrics and traces are one job's, and an error anywhere is everybody's.

Each job is real: processes that meet over loopback, with gloo between them.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax import TraceReader
from moe_jax.errors import ConfigError
from moe_jax.hf.load import load_hf
from moe_jax.model import Model, ModelConfig
from moe_jax.train.run_folder import RunFolder

HEAD = """
import json, os, resource, signal, sys, warnings
from pathlib import Path
from moe_jax import distributed
from moe_jax.distributed import on_all
index, count, folder, rest = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4]), sys.argv[5:]
distributed.initialize(f"127.0.0.1:{sys.argv[3]}", count, index)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from moe_jax.errors import MoeJaxError
from moe_jax.train import checkpoint
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.run_folder import RunFolder
from moe_jax.train.writers import MetricsWriter, Progress, read_metrics

def values(step, size):
    'What a state holds, as numpy: bits of all kinds.'
    rng = np.random.default_rng(step)
    bits = rng.integers(0, 2**32, (size, size), dtype=np.uint32)
    return {
        "step": np.uint32(step), "w": bits.view(np.float32), "momentum": bits[::-1].view(np.float32).copy(), "odd": np.array([-0.0, 1e-42, np.nan], np.float32),
        "half": rng.normal(size=(size, 4)).astype(jnp.bfloat16), "flags": rng.integers(0, 2, (2, size)).astype(bool),
    }

def shardings(shape):
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = {"step": (), "w": ("a", "b"), "momentum": ("b", "a"), "odd": (), "half": (("a", "b"),), "flags": (None, "b"), "void": ("a",)}
    return {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}

def state(step, shape, size=16):
    'Global arrays, an array without elements, and what every process has for itself.'
    where, host = shardings(shape), values(step, size)
    put = {name: jax.make_array_from_callback(value.shape, where[name], lambda part, value=value: value[part]) for name, value in host.items()}
    put["void"] = jax.jit(lambda: jnp.zeros((0, 4)), out_shardings=where["void"])()
    return {**put, "mine": jnp.full(3, step), "half_mine": jnp.full(2, step, jnp.bfloat16), "numpy": np.arange(4) + step}

def abstract(tree):
    def leaf(value):
        given = isinstance(value, jax.Array) and value.committed
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding) if given else value
    return jax.tree.map(leaf, tree)

def same(tree, step, size=16):
    'The names whose bits on the devices of this process are not those of `step`.'
    wrong = [name for name, value in values(step, size).items() for shard in tree[name].addressable_shards
             if np.asarray(shard.data).tobytes() != np.ascontiguousarray(value[shard.index]).tobytes()]
    wrong += [name for name in ("mine", "half_mine") if (tree[name] != step).any() or tree[name].committed]
    return wrong + ["numpy"] * bool((tree["numpy"] != np.arange(4) + step).any()) + ["void"] * (tree["void"].shape != (0, 4))

def failure(function):
    try:
        return ["no error", str(function())]
    except (MoeJaxError, OSError) as error:
        return [type(error).__name__, str(error)]

def say(**found):
    print(json.dumps(found), flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """`count` processes that run HEAD and `code`, killed when the test is over."""

    def __init__(self, code: str, count: int, folder: Path, *arguments: object, devices: int = 1):
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
        environment = {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
        port, text = free_port(), HEAD + textwrap.dedent(code)

        def start(index: int) -> subprocess.Popen:
            command = [sys.executable, "-c", text, *map(str, (index, count, port, folder, *arguments))]
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

        self.processes = [start(index) for index in range(count)]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def found(self) -> list[list[dict]]:
        """What each process said, once all have ended well; `errors` are their other words."""
        with ThreadPoolExecutor() as pool:  # one that waits for another's end must not keep that one's words unread
            ended = list(pool.map(lambda process: process.communicate(timeout=100), self.processes))
        self.errors = [errors for _, errors in ended]
        codes = [process.returncode for process in self.processes]
        assert not any(codes), f"exit codes {codes}: " + "\n".join(text[-2000:] for text in self.errors)
        return [[json.loads(line) for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in ended]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(what each of two processes said, their folder): one job for many tests, as its start is what takes the time."""
    folder = tmp_path_factory.mktemp("two")
    code = """
    checkpoints, shape = Checkpoints(folder / "ck", {"a": 1}, "data"), (2, 1)
    empty = [checkpoints.steps(), checkpoints.latest()]
    none = failure(lambda: checkpoints.restore({}))
    for step in (3, 5, 8):
        checkpoints.save(step, state(step, shape))
    restored, step = checkpoints.restore(abstract(state(0, shape)))
    say(empty=empty, none=none, steps=checkpoints.steps(), wrong=same(restored, 8), step=step,
        shardings=[restored[name].sharding == where for name, where in shardings(shape).items()], manifest=checkpoints.manifest(8)["leaves"]["w"])

    # Errors of one process are the errors of all, and the next call finds everybody in step.
    write, hashes, read = checkpoint._orbax_save, checkpoint._flush_and_hash, checkpoint._orbax_restore
    def full(*arguments):
        raise OSError(28, "No space left on device")
    def on(victim, instead, usual):
        return instead if index == victim else usual
    said = {}
    for victim in range(count):
        checkpoint._orbax_save = on(victim, full, write)
        said[f"write {victim}"] = failure(lambda: checkpoints.save(13, state(13, shape)))
    checkpoint._orbax_save = write
    for victim in range(count):  # and as it really happens, in the middle of orbax's work
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if index == victim else usual[0], usual[1]))
        said[f"disk {victim}"] = failure(lambda: checkpoints.save(13, state(13, shape, 512)))
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    checkpoint._flush_and_hash = on(0, full, hashes)
    said["hash 0"] = failure(lambda: checkpoints.save(13, state(13, shape)))
    checkpoint._flush_and_hash = hashes
    checkpoint._orbax_restore = on(1, full, read)
    said["read 1"] = failure(lambda: checkpoints.restore(abstract(state(0, shape))))
    checkpoint._orbax_restore = read
    said["config 1"] = failure(lambda: Checkpoints(folder / "ck", {"a": 1 + index}, "data").restore(abstract(state(0, shape))))
    said["earlier"] = failure(lambda: checkpoints.save(7, state(7, shape)))
    said["unknown"] = failure(lambda: checkpoints.restore(abstract(state(0, shape)), step=6))
    said["left"] = distributed.on_first(lambda: sorted(path.name for path in (folder / "ck").iterdir()))
    say(**said)

    # Damage: process 0 sees it and says so, and all restore the step before.
    if index == 0:
        path = max((folder / "ck" / "8" / "state").rglob("ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored, step = checkpoints.restore(abstract(state(0, shape)))
    say(step=step, wrong=same(restored, 5), warned=[str(warning.message) for warning in caught])

    # The run folder, the metrics and the progress.
    said = {"held": failure(lambda: RunFolder(folder / "held"))}
    with RunFolder(folder / "run") as run:
        said["other"] = failure(lambda: run.start({"lr": index, "depth": 2}, ["command"]))
        said["first"] = [run.config(), run.start({"lr": 1}, ["command"]), run.config()]
        said["news"] = run.start({"lr": 1}, ["command"], device="another")
        said["changed"] = failure(lambda: run.check_config({"lr": 2}))
        with on_all(lambda: MetricsWriter(folder / "run")) as metrics, Progress(2) as progress:
            for number in (1, 2, 3):
                metrics.write(number, {"loss": 0.5 * number})
            metrics.flush()
            metrics.truncate_to(2)
            on_all(lambda: None)
            said["rows"] = read_metrics(metrics.path)
            progress.update(1, {"loss": 0.5})
    say(**said)

    # A model as a Hugging Face folder, each process with half of its experts.
    import shutil
    from types import SimpleNamespace
    from moe_jax.hf.save import save_hf
    from moe_jax.mesh import MeshSpec
    from moe_jax.model import Model, ModelConfig
    model = Model(ModelConfig.preset("qwen3_tiny"), MeshSpec(expert=2).build())
    params, usual = model.init(0), shutil.disk_usage
    shutil.disk_usage = lambda _: SimpleNamespace(free=1000)
    full = failure(lambda: save_hf(model, params, folder / "hf"))
    shutil.disk_usage = usual
    save_hf(model, params, folder / "hf")
    say(full=full)
    """
    with RunFolder(folder / "held"), Job(code, 2, folder) as job:
        return job.found(), job.errors, folder


def test_a_model_that_the_disk_has_no_room_for_is_refused_in_all_processes_and_one_that_it_has_is_written(two):
    (said, _, folder) = two
    kinds, lines = zip(*(found[-1]["full"] for found in said), strict=True)
    assert kinds == ("OSError", "MoeJaxError") and all(
        re.search("bytes are to be written, and 1,000 are free: '.*/hf'$", line) for line in lines
    )
    params = load_hf(folder / "hf")[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, Model(ModelConfig.preset("qwen3_tiny")).init(0)))


def test_every_process_gets_the_same_state_back(two):
    (said, _, _) = two
    for saved, *_ in said:
        assert saved["empty"] == [[], None] and saved["none"][0] == "CheckpointError" and "no checkpoint in" in saved["none"][1]
        assert saved["steps"] == [5, 8] and saved["step"] == 8
        assert saved["wrong"] == [] and all(saved["shardings"]) and saved["manifest"] == [[16, 16], "float32"]


def test_an_error_in_any_process_is_an_error_in_all_and_leaves_the_earlier_steps(two):
    (said, _, _) = two
    for _, errors, *_ in said:
        for case, words in {"write 0": r": \[Errno 28\]", "write 1": r": process 1: \[Errno 28\]", "hash 0": r"\[Errno 28\]"}.items():
            kind, message = errors[case]
            assert kind == "CheckpointError" and re.search(rf"cannot save step 13 in .*{words} No space .*intact: 5, 8$", message), (
                case,
                message,
            )
        for victim in (0, 1):
            kind, message = errors[f"disk {victim}"]
            assert kind == "CheckpointError" and re.search(r"cannot save step 13 in .*intact: 5, 8$", message), message
            assert ("free): process 1: " in message) == (victim == 1) and "\n" not in message
        assert errors["read 1"][0] == "CheckpointError" and re.search(
            "process 1: checkpoint step 8 .*orbax cannot read", errors["read 1"][1]
        )
        assert errors["config 1"][0] == "ConfigError" and re.search("process 1: .*another config: a: was 1, now 2", errors["config 1"][1])
        assert "step 8 is already there" in errors["earlier"][1] and "no checkpoint of step 6" in errors["unknown"][1]
        assert errors["left"] == ["5", "8"]
    assert said[0][1] == said[1][1]  # word for word


def test_damage_is_seen_once_and_all_go_back_one_step(two):
    (said, _, folder) = two
    assert [process[2]["step"] for process in said] == [5, 5] and [process[2]["wrong"] for process in said] == [[], []]
    (warned,) = said[0][2]["warned"]
    assert "8.damaged" in warned and "ocdbt.process_1" in warned and said[1][2]["warned"] == []
    assert sorted(path.name for path in (folder / "ck").iterdir()) == ["5", "8.damaged"]


def test_the_run_folder_is_one_jobs_and_process_0_writes(two):
    (said, errors, folder) = two
    for *_, run, _ in said:
        assert run["held"][0] == "ConfigError" and f"is in use by pid {os.getpid()} on" in run["held"][1]
        assert run["other"][0] == "ConfigError" and "process 1: this process was started with other settings" in run["other"][1]
        assert "lr: was 0, now 1" in run["other"][1]
        assert run["first"] == [None, [], {"lr": 1}] and "1 fields differ" in run["changed"][1]
        assert run["rows"] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    assert [process[-2]["news"] for process in said] == [['device: was null, now "another"'], []]
    assert len((folder / "run" / "command.txt").read_text().splitlines()) == 2
    assert "train 1/2 (50 %): loss 0.5" in errors[0] and "train" not in errors[1]


RESTORE = """
shape, step = tuple(map(int, rest[:2])), int(rest[2])
tree, found = Checkpoints(folder, {}, "f").restore(abstract(state(0, shape)))
say(wrong=same(tree, step), found=found, sharded=[tree[name].sharding == where for name, where in shardings(shape).items()])
Checkpoints(folder, {}, "f").save(found + 1, state(found + 1, shape))
"""
SAVE = """
shape, step = tuple(map(int, rest[:2])), int(rest[2])
Checkpoints(folder, {}, "f").save(step, state(step, shape))
"""


@pytest.mark.slow
def test_processes_may_compile_for_much_longer_than_others(tmp_path):
    """Gloo waits 30 s for the last to come, and jax's compilation cache gives process 0 alone what took minutes."""
    code = """
    import time
    from moe_jax.mesh import MeshSpec
    from moe_jax.train.program import compiled_by_all
    spread = NamedSharding(MeshSpec(data=2).build(), PartitionSpec("data"))
    traced = []
    def total(x):
        time.sleep(40 * index)
        traced.append(index)
        return x.sum()
    run = compiled_by_all(jax.jit(total))
    x = jax.make_array_from_callback((2,), spread, lambda part: np.float32([3 + index]))
    assert [float(run(x)) for _ in range(2)] == [7, 7] and traced == [index]
    """
    with Job(code, 2, tmp_path) as job:  # gloo greets on stdout, so they say nothing there
        errors = [process.communicate(timeout=100)[1] for process in job.processes]
        assert [process.returncode for process in job.processes] == [0, 0], errors


@pytest.mark.slow
def test_a_checkpoint_goes_from_any_number_of_processes_to_any_other(tmp_path):
    """Saved by the first, restored (and the next step saved) by the others in turn: (processes, devices of each, mesh)."""
    jobs = [(4, 1, (2, 2)), (1, 1, (1, 1)), (2, 2, (4, 1)), (4, 2, (2, 4)), (2, 1, (1, 2)), (1, 8, (2, 4)), (4, 1, (1, 4))]
    count, devices, shape = jobs[0]
    with Job(SAVE, count, tmp_path, *shape, 1, devices=devices) as job:
        job.found()
    for step, (count, devices, shape) in enumerate(jobs[1:], start=1):
        with Job(RESTORE, count, tmp_path, *shape, step, devices=devices) as job:
            for (said,) in job.found():
                assert said["wrong"] == [] and said["found"] == step and all(said["sharded"]), (count, devices, shape)


@pytest.mark.slow
def test_a_process_writes_and_reads_only_what_its_devices_hold(tmp_path):
    code = """
    import tensorstore
    def moved(what):
        return sum(value["value"] for metric in tensorstore.experimental_collect_matching_metrics(f"/tensorstore/kvstore/file/bytes_{what}")
                   for value in metric["values"])
    where = shardings((count, 1))["w"]
    tree = {"w": jax.jit(lambda: jax.random.normal(jax.random.key(0), (2048, 1024)), out_shardings=where)()}
    checkpoints = Checkpoints(folder, {}, "f")
    checkpoints.save(1, tree)
    written = moved("written")
    before = moved("read")  # joining what was written reads, too
    checkpoints.restore(abstract(tree))
    say(written=written / tree["w"].nbytes, read=(moved("read") - before) / tree["w"].nbytes)
    """
    with Job(code, 4, tmp_path) as job:
        for (said,) in job.found():
            assert 0.25 <= said["written"] < 0.27 and 0.25 <= said["read"] < 0.27, said


@pytest.mark.slow
@pytest.mark.parametrize("victim, moment", [(0, "_flush_and_hash"), (0, "write_atomic"), (1, "_orbax_save"), (2, "_orbax_save")])
def test_a_kill_in_the_middle_of_a_save_leaves_the_step_before_and_another_number_goes_on(tmp_path, victim, moment):
    code = """
    checkpoints, shape = Checkpoints(folder, {}, "f"), (count, 1)
    checkpoints.save(1, state(1, shape, 48))
    usual = getattr(checkpoint, rest[1])
    def dies(*arguments):
        usual(*arguments)
        say(dies=index)
        os.kill(os.getpid(), signal.SIGKILL)
    if index == int(rest[0]):
        setattr(checkpoint, rest[1], dies)
    say(ready=checkpoints.latest())
    checkpoints.save(2, state(2, shape, 48))
    say(saved=2)
    """
    with Job(code, 3, tmp_path, victim, moment) as job:
        out, errors = job.processes[victim].communicate(timeout=120)
        assert job.processes[victim].returncode == -signal.SIGKILL, errors[-2000:]
        assert [json.loads(line) for line in out.splitlines()] == [{"ready": 1}, {"dies": victim}]
        time.sleep(1)
        others = [process for process in job.processes if process is not job.processes[victim]]
        for process in others:
            process.kill()  # what a launcher does; alone they wait for jax to notice
            assert "saved" not in process.communicate()[0]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["1"]
    assert any(path.name.startswith(".saving-2.") for path in tmp_path.iterdir())
    again = """
    checkpoints, shape = Checkpoints(folder, {}, "f"), (1, count)
    tree, found = checkpoints.restore(abstract(state(0, shape, 48)))
    checkpoints.save(2, state(2, shape, 48))
    say(wrong=same(tree, 1, 48), found=found, then=same(checkpoints.restore(abstract(tree))[0], 2, 48))
    """
    with Job(again, 2, tmp_path) as job:
        assert job.found() == [[{"wrong": [], "found": 1, "then": []}]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.slow
def test_a_second_job_is_refused_in_all_its_processes_by_one_line_that_names_the_first(tmp_path):
    hold = """
    with RunFolder(folder) as run:
        run.start({}, ["first"])
        say(held=True)
        signal.pause()
    """
    launch = """
    from launch import common
    common.run(lambda argv: RunFolder(folder).close(), positional=True)
    """
    with Job(hold, 2, tmp_path) as first:
        for process in first.processes:
            assert process.stdout is not None and json.loads(process.stdout.readline()) == {"held": True}
        with Job(launch, 2, tmp_path) as second:
            for process in second.processes:
                _, errors = process.communicate(timeout=120)
                assert process.returncode == ConfigError.exit_code == 2, errors
                assert errors.count("\n") == 1 and f"in use by pid {first.processes[0].pid} on" in errors, errors
    RunFolder(tmp_path).close()


@pytest.mark.slow
def test_two_processes_write_the_parts_of_one_trace_and_a_third_reads_it(tmp_path):
    code = """
    from moe_jax import TraceInfo, TraceWriter
    from moe_jax.routing import RoutingTrace
    info = TraceInfo("model", (0, 2), 8, 2, batch=4, length=6, weights=True)
    with on_all(lambda: TraceWriter(folder / "trace", info, part=(index, count))) as writer:
        for step in range(5):
            rng = np.random.default_rng(step)
            ids = np.argsort(rng.random((2, 4, 6, 8)), -1)[..., :2].astype(info.dtype)
            weights, tokens = rng.random(ids.shape).astype(np.float32), rng.integers(0, 100, (4, 6)).astype(np.uint32)
            rows = slice(2 * index, 2 * index + 2)
            writer.write(step, RoutingTrace(ids[:, rows], weights[:, rows], np.array([0, 2], np.int32)), tokens[rows])
        on_all(writer.flush)
    """
    for _ in range(2):  # the second time it goes on with what is there
        with Job(code, 2, tmp_path) as job:
            job.found()
    reader = TraceReader(tmp_path / "trace")
    assert reader.steps == (0, 1, 2, 3, 4) and reader.verify() == 5
    for step in reader.steps:
        rng = np.random.default_rng(step)
        ids = np.argsort(rng.random((2, 4, 6, 8)), -1)[..., :2]
        weights, tokens = rng.random(ids.shape).astype(np.float32), rng.integers(0, 100, (4, 6)).astype(np.uint32)
        trace = reader.read(step, tokens)
        assert (trace.ids == ids).all() and (trace.weights == weights).all()
