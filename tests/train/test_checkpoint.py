"""Checkpoints come back bit for bit, only whole, only into what they fit; damage is seen, set aside, and survived."""

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from moe_jax.errors import CheckpointError, ConfigError, MoeJaxWarning
from moe_jax.train import checkpoint
from moe_jax.train.checkpoint import Checkpoints

CONFIG = {"model": {"top_k": 2, "width": 16}, "seed": 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    optimizer: tuple


@jax.jit  # one compilation instead of forty small ones
def make_state(seed: int) -> State:
    """A small state with everything a real one holds: adamw under a partition with masked nodes, bf16, odd values."""
    key = jax.random.key(seed)
    params = {
        "experts": {"up": jax.random.normal(key, (3, 4, 5)), "down": jax.random.normal(key, (3, 5, 4)).astype(jnp.bfloat16)},
        "router": {"w": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42, 3.0], jnp.float32)},
        "frozen": jnp.arange(3.0) + seed,
        "none": None,
        "empty": jnp.zeros((0, 4)),
    }
    labels = {"experts": {"up": "adamw", "down": "adamw"}, "router": {"w": "router"}, "frozen": "off", "none": None, "empty": "off"}
    transforms = {"adamw": optax.adamw(1e-3), "router": optax.sgd(0.1, momentum=0.9), "off": optax.set_to_zero()}
    optimizer = optax.chain(optax.partition(transforms, labels), optax.scale_by_learning_rate(optax.constant_schedule(0.1)))
    state = optimizer.init(params)
    _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    return State(jnp.asarray(seed, jnp.uint8), params, state)


@functools.cache
def abstract_state() -> State:
    return jax.eval_shape(make_state, 0)


def bits(tree) -> list[bytes]:
    return [f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert bits(a) == bits(b)


def open_checkpoints(path, config=CONFIG, fingerprint="wiki:abc", keep=2) -> Checkpoints:
    return Checkpoints(path, config, fingerprint, keep)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with steps 4 and 8, and the states saved in them; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    states = {4: make_state(4), 8: make_state(8)}
    for step, state in states.items():
        open_checkpoints(folder).save(step, state)
    return folder, states


@pytest.fixture
def copied(two_steps, tmp_path):
    folder, states = two_steps
    shutil.copytree(folder, tmp_path / "checkpoints")
    return tmp_path / "checkpoints", states


def test_a_state_comes_back_bit_for_bit_with_its_structure(tmp_path):
    state = make_state(3)
    open_checkpoints(tmp_path).save(7, state)
    for template in (state, abstract_state(), make_state(0)):
        restored, step = open_checkpoints(tmp_path).restore(template)
        assert_same(restored, state)
        assert step == 7
    assert bits(make_state(0)) != bits(state)  # the template's values are not what came back
    assert not restored.params["experts"]["up"].committed


def test_restored_leaves_do_not_retrace_a_jitted_step(tmp_path):
    state = make_state(0)
    step = jax.jit(lambda s: s.params["experts"]["up"].sum())
    expected = step(state)
    open_checkpoints(tmp_path).save(1, state)
    restored, _ = open_checkpoints(tmp_path).restore(abstract_state())
    assert step(restored) == expected and step._cache_size() == 1


def test_numpy_leaves_stay_numpy_and_keep_what_jax_would_narrow(tmp_path):
    tree = {"a": np.arange(3, dtype=np.float64) / 3, "b": np.float32(0.1), "c": jnp.ones(2)}
    open_checkpoints(tmp_path).save(1, tree)
    restored, _ = open_checkpoints(tmp_path).restore(tree)
    assert restored["a"].dtype == np.float64 and restored["a"].tobytes() == tree["a"].tobytes()
    assert restored["b"] == tree["b"] and isinstance(restored["c"], jax.Array)
    open_checkpoints(tmp_path).save(2, jnp.arange(4))  # a bare leaf is a tree too
    assert open_checkpoints(tmp_path).restore(jnp.zeros(4, jnp.int32), step=2)[0].tolist() == [0, 1, 2, 3]


def test_a_state_of_numpy_alone_and_one_written_by_orbaxs_own_checkpointer_come_back(tmp_path):
    tree = {"a": np.arange(3.0), "b": np.float32(0.5), "c": np.arange(4).astype(jnp.bfloat16)}
    open_checkpoints(tmp_path).save(1, tree)
    restored, _ = open_checkpoints(tmp_path).restore(tree)
    assert all(restored[name].tobytes() == value.tobytes() for name, value in tree.items())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(tmp_path / "1" / "state")["a"], tree["a"])  # readable without this code
        checkpointer.save(tmp_path / "orbax", args=ocp.args.PyTreeSave({"a": jnp.ones(3)}))
    got = checkpoint._orbax_restore(tmp_path / "orbax", {"a": jnp.zeros(3)})  # as the first versions of this code wrote
    assert got["a"].tolist() == [1, 1, 1]


def test_only_the_newest_are_kept_and_an_explicit_one_can_be_asked_for(tmp_path):
    checkpoints = open_checkpoints(tmp_path / "deep" / "er", keep=3)
    assert checkpoints.steps() == [] and checkpoints.latest() is None
    for step in (1, 5, 9, 10):
        checkpoints.save(step, {"x": jnp.full(2, step)})
    assert checkpoints.steps() == [5, 9, 10] == open_checkpoints(tmp_path / "deep" / "er").steps() and checkpoints.latest() == 10
    template = {"x": jnp.zeros(2, jnp.int32)}
    assert checkpoints.restore(template)[1] == 10
    assert checkpoints.restore(template, step=5)[0]["x"].tolist() == [5, 5]
    with pytest.raises(CheckpointError, match="no checkpoint of step 6 in .*; it has 5, 9, 10"):
        checkpoints.restore(template, step=6)
    with pytest.raises(CheckpointError, match="cannot save step 9 .*: step 10 is already there"):
        checkpoints.save(9, template)
    checkpoints.save(10, {"x": jnp.full(2, 77)})  # the same step again replaces it
    assert checkpoints.restore(template)[0]["x"].tolist() == [77, 77]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["10", "5", "9"]


def test_an_empty_folder_and_a_bad_keep_are_errors(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        open_checkpoints(tmp_path / "none").restore({})
    with pytest.raises(ConfigError, match="at least 1, was given 0"):
        open_checkpoints(tmp_path, keep=0)


def test_sharded_leaves_come_back_in_the_sharding_asked_for(tmp_path):
    assert jax.device_count() == 8, "tests run on 8 forced CPU devices"

    def sharding(shape, spec):
        return NamedSharding(jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2), PartitionSpec(*spec))

    value = jnp.arange(64.0).reshape(8, 8)
    saved = {"w": jax.device_put(value, sharding((8, 1), ("a", None))), "one": jnp.ones(3)}
    open_checkpoints(tmp_path).save(1, saved)
    for wanted in (sharding((2, 4), ("b", "a")), sharding((4, 2), (None, ("a", "b"))), SingleDeviceSharding(jax.devices()[3])):
        template = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=wanted), "one": jax.ShapeDtypeStruct((3,), jnp.float32)}
        restored, _ = open_checkpoints(tmp_path).restore(template)
        assert restored["w"].sharding == wanted and restored["w"].committed and not restored["one"].committed
        np.testing.assert_array_equal(restored["w"], value)


MESHES = [(1, 1), (2, 2), (1, 4), (4, 1), (8, 1)]


def on_mesh(shape: tuple[int, int]):
    """A state with a step, sharded parameters, the momentum of an optimizer and an array without elements, on a mesh of the first devices."""
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: shape[0] * shape[1]])
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (8, 16), dtype=np.uint32).view(np.float32)  # nan of all kinds, denormals, infinities
    host = {
        "step": (np.uint32(7), ()),
        "params": {
            "w": (bits, ("a", "b")),
            "half": (rng.normal(size=(16, 8, 2)).astype(jnp.bfloat16), (("b", "a"),)),
            "norm": (bits[0], ()),
        },
        "optimizer": ({"mu": (bits[::-1].copy(), ("b", "a")), "count": (np.int32(7), ())},),
        "void": (np.zeros((0, 8), np.float32), (None, "a")),
    }

    def put(leaf):
        return jax.device_put(leaf[0], NamedSharding(mesh, PartitionSpec(*leaf[1])))

    return jax.tree.map(put, host, is_leaf=lambda node: isinstance(node, tuple) and len(node) == 2)


@pytest.mark.parametrize("source", MESHES)
def test_a_checkpoint_of_any_mesh_comes_back_on_any_other(tmp_path, source):
    saved = on_mesh(source)
    open_checkpoints(tmp_path).save(7, saved)
    for target in MESHES:
        wanted = on_mesh(target)
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), wanted)
        restored, step = open_checkpoints(tmp_path).restore(abstract)
        assert step == 7
        assert_same(restored, saved)
        for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding == like.sharding and leaf.committed


def test_the_manifest_says_what_the_checkpoint_is(two_steps):
    folder, _ = two_steps
    manifest = open_checkpoints(folder).manifest(8)
    assert manifest["config"] == CONFIG and manifest["data_fingerprint"] == "wiki:abc" and manifest["step"] == 8
    assert manifest["leaves"]["params/experts/down"] == [[3, 5, 4], "bfloat16"]
    files = {path.relative_to(folder / "8").as_posix() for path in (folder / "8").rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files - {"manifest.json"}


# --- what does not fit --------------------------------------------------------------------------------------------------------


def test_another_config_or_data_is_refused_with_what_differs(copied):
    folder, states = copied
    with pytest.raises(ConfigError, match=r"step 8 in .*another config: model.top_k: was 2, now 4; seed: was 0, now 1$"):
        open_checkpoints(folder, {"model": {"top_k": 4, "width": 16}, "seed": 1}).restore(states[8])
    with pytest.raises(CheckpointError, match="other data: fingerprint was wiki:abc, now wiki:xyz") as caught:
        open_checkpoints(folder, fingerprint="wiki:xyz").restore(states[8])
    assert caught.value.exit_code == 4
    assert sorted(os.listdir(folder)) == ["4", "8"]  # a misfit is not damage


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: {**p, "w": jnp.zeros(3, jnp.bfloat16)}, "w has dtype float32 saved and bfloat16 in the state"),
        (lambda p: {**p, "w": jnp.zeros(3, jnp.int32)}, "w has dtype float32 saved and int32 in the state"),
        (lambda p: {**p, "w": jnp.zeros((3, 1))}, r"w has shape \(3,\) saved and \(3, 1\) in the state"),
        (lambda p: {"w": p["w"]}, "b/c is saved and not in the state"),
        (lambda p: {**p, "new": jnp.zeros(1)}, "new is in the state and not saved"),
    ],
)
def test_another_state_is_refused_leaf_by_leaf(tmp_path, change, words):
    params = {"w": jnp.ones(3), "b": {"c": jnp.ones(2)}}
    open_checkpoints(tmp_path).save(1, params)
    with pytest.raises(CheckpointError, match=f"step 1 in .* does not fit this state: {words}"):
        open_checkpoints(tmp_path).restore(change(params))
    assert os.listdir(tmp_path) == ["1"]


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="state leaf a/b is float, not an array"):
        checkpoints.save(1, {"a": {"b": 1.0}})
    with pytest.raises(CheckpointError, match="state leaf key is PRNGKeyArray, not an array"):
        checkpoints.save(1, {"key": jax.random.key(0)})
    with pytest.raises(CheckpointError, match="two leaves of the state are called a/b"):
        checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})
    assert os.listdir(tmp_path) == []


def test_a_manifest_with_more_to_say_is_read(copied):
    """As the first versions of this code wrote: with a field `extra`."""
    folder, states = copied
    path = folder / "8" / "manifest.json"
    body = json.loads(path.read_text())["body"] | {"extra": {"position": 8}}
    path.write_text(json.dumps({"sha256": checkpoint._body_hash(body), "body": body}))
    restored, step = open_checkpoints(folder).restore(states[8])
    assert_same(restored, states[8])
    assert step == 8 and open_checkpoints(folder).manifest(8)["leaves"] == body["leaves"]


def test_a_checkpoint_of_newer_code_is_refused(copied):
    folder, states = copied
    path = folder / "8" / "manifest.json"
    body = json.loads(path.read_text())["body"] | {"schema": "moe_jax.checkpoint/2"}
    path.write_text(json.dumps({"sha256": checkpoint._body_hash(body), "body": body}))
    with pytest.raises(CheckpointError, match="was written as 'moe_jax.checkpoint/2'"):
        open_checkpoints(folder).restore(states[8])
    assert sorted(os.listdir(folder)) == ["4", "8"]


# --- damage -------------------------------------------------------------------------------------------------------------------


def flip(path: Path, generator: random.Random):
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, generator: random.Random):
    os.truncate(path, generator.randrange(path.stat().st_size))


def zero(path: Path, generator: random.Random):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, generator: random.Random):
    path.unlink()


def swap(path: Path, generator: random.Random):
    other = next(path.parents[depth] for depth in range(9) if path.parents[depth].name == "8").with_name("4")
    donors = [donor for donor in other.rglob("*") if donor.is_file() and donor.name == path.name]
    donors = donors or [donor for donor in other.rglob("*") if donor.is_file() and donor.parent.name == path.parent.name]
    shutil.copyfile(donors[0], path)


@pytest.mark.parametrize("damage", [flip, truncate, zero, delete, swap])
def test_damage_to_any_file_is_seen_or_harmless_and_the_step_before_is_used(two_steps, tmp_path, damage):
    original, states = two_steps
    generator = random.Random(damage.__name__)
    names = [path.relative_to(original) for path in sorted((original / "8").rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(names) > 8
    seen = 0
    for name in names:
        folder = tmp_path / "copy"
        shutil.copytree(original, folder)
        before = (folder / name).read_bytes()
        damage(folder / name, generator)
        if (folder / name).exists() and (folder / name).read_bytes() == before:
            shutil.rmtree(folder)
            continue  # a file that is the same in both steps
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored, step = open_checkpoints(folder).restore(states[8])
        assert_same(restored, states[step])
        if step == 4:
            seen += 1
            assert [warning.category for warning in caught] == [MoeJaxWarning]
            assert "step 8" in str(caught[0].message) and name.name in str(caught[0].message)
            assert sorted(os.listdir(folder)) == ["4", "8.damaged"]
        else:
            assert name.name == "manifest.json" and damage is flip  # white space, or a letter of an escape
        shutil.rmtree(folder)
    assert seen >= (3 if damage is swap else len(names) - 1)


def test_a_step_asked_for_is_not_replaced_by_another(copied):
    folder, states = copied
    delete(folder / "8" / "state" / "_METADATA", random.Random(0))
    with (
        pytest.warns(MoeJaxWarning),
        pytest.raises(CheckpointError, match="step 8 .* is damaged: state/_METADATA cannot be read .*8.damaged"),
    ):
        open_checkpoints(folder).restore(states[8], step=8)
    assert open_checkpoints(folder).restore(states[4])[1] == 4


def test_no_good_step_is_an_error_that_names_them_all_and_deletes_none(copied):
    folder, states = copied
    (folder / "8.damaged").mkdir()  # from another time
    for step in (4, 8):
        (folder / str(step) / "manifest.json").unlink()
    with pytest.warns(MoeJaxWarning), pytest.raises(CheckpointError, match="step 8 .* 8.damaged.2; .*step 4 .*manifest.json is missing"):
        open_checkpoints(folder).restore(states[8])
    assert sorted(os.listdir(folder)) == ["4.damaged", "8.damaged", "8.damaged.2"]
    open_checkpoints(folder).save(4, states[4])  # and the run goes on
    assert open_checkpoints(folder).latest() == 4


# --- crashes and full disks ---------------------------------------------------------------------------------------------------


def test_a_save_that_was_cut_off_is_swept_and_a_replaced_step_comes_back(copied):
    folder, states = copied
    (folder / ".saving-12").mkdir()
    (folder / ".saving-12" / "junk").write_text("x")
    (folder / ".deleting-2").mkdir()
    (folder / "8").rename(folder / ".replaced-8")
    checkpoints = open_checkpoints(folder)
    assert checkpoints.steps() == [4] and len(os.listdir(folder)) == 4  # reading sweeps nothing: a writer may be at work
    checkpoints.save(12, states[8])
    assert sorted(os.listdir(folder)) == ["12", "8"]
    assert_same(checkpoints.restore(states[8], step=8)[0], states[8])


def test_a_failing_save_is_one_line_and_leaves_the_others(copied, monkeypatch):
    folder, states = copied

    def full(*_):
        raise OSError(28, "No space left on device\nand a page of details")

    monkeypatch.setattr(checkpoint, "_flush_and_hash", full)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints(folder).save(12, states[8])
    message = str(caught.value)
    assert "cannot save step 12" in message and "bytes needed" in message and "intact: 4, 8" in message and "\n" not in message
    assert sorted(os.listdir(folder)) == ["4", "8"]


def test_too_little_room_is_found_before_anything_is_written(copied, monkeypatch):
    folder, states = copied
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: mock.Mock(free=10))
    monkeypatch.setattr(checkpoint, "_orbax_save", None)
    with pytest.raises(CheckpointError, match=r"bytes needed, 10 free\): .*No space left on device; earlier checkpoints are intact: 4, 8"):
        open_checkpoints(folder).save(12, states[8])
    assert sorted(os.listdir(folder)) == ["4", "8"]


def test_no_two_saves_write_into_one_folder(tmp_path, monkeypatch):
    """A process that outlives its job may still be writing when the next job saves the same step."""
    folders, usual = [], checkpoint._flush_and_hash
    monkeypatch.setattr(checkpoint, "_flush_and_hash", lambda folder: folders.append(folder) or usual(folder))
    for _ in range(2):
        open_checkpoints(tmp_path).save(3, {"a": jnp.ones(1)})
    assert len(set(folders)) == 2 and all(folder.name.startswith(".saving-3.") for folder in folders)


SAVER = """
import sys
import jax.numpy as jnp
from moe_jax.train.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], {}, "f")
step = checkpoints.latest() or 0
print("ready", flush=True)
while True:
    step += 1
    checkpoints.save(step, {"a": jnp.full((300, 300), step), "b": {"c": jnp.arange(1000.0) + step}})
    print(step, flush=True)
"""


def run_python(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    generator = random.Random(0)
    template = {"a": jnp.zeros((300, 300), jnp.int32), "b": {"c": jnp.zeros(1000)}}
    last = 0
    for _ in range(2):
        with run_python(SAVER, tmp_path) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            saved = int(process.stdout.readline())
            time.sleep(generator.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            saved = max([saved, *map(int, process.stdout.read().split())])
        checkpoints = Checkpoints(tmp_path, {}, "f")
        assert checkpoints.latest() in (saved, saved + 1) and saved > last  # what was reported done is there
        for step in checkpoints.steps():
            restored, _ = checkpoints.restore(template, step=step)
            assert bool((restored["a"] == step).all())
            assert_same(restored["b"]["c"], jnp.arange(1000.0) + step)
        last = saved


def test_a_full_disk_is_one_line_and_leaves_the_earlier_step(tmp_path):
    code = textwrap.dedent("""
        import resource, signal, sys
        import jax, jax.numpy as jnp
        from moe_jax.errors import CheckpointError
        from moe_jax.train.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], {}, "f")
        checkpoints.save(1, {"a": jnp.ones(10)})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            checkpoints.save(2, {"a": jax.random.normal(jax.random.key(0), (1 << 20,))})
        except CheckpointError as error:
            print(error)
        checkpoints.save(3, {"a": jnp.ones(10)})
    """)
    with run_python(code, tmp_path) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.count("\n") == 1 and "cannot save step 2" in out and "4,194,304 bytes needed" in out and "intact: 1" in out
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]
