"""safetensors files: the library of that name reads what is written and writes what is read; every damaged file is refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moe_jax.errors import CheckpointError, MoeJaxError, Unsupported
from moe_jax.hf.shards import find_tensors, read_header, write_shards

VALUES = {
    "a.weight": np.arange(35, dtype=np.float32).reshape(5, 7),
    "b": np.arange(6).astype(ml_dtypes.bfloat16),
    "c": np.arange(24).reshape(2, 3, 4).astype(np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3, np.float32),
}


def write(folder, shard_bytes=1 << 20, values=VALUES):
    folder.mkdir(exist_ok=True)
    write_shards(folder, {name: (value.shape, value.dtype) for name, value in values.items()}, values.values(), shard_bytes)
    return folder


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("shard_bytes", [1 << 20, 150, 1])
def test_the_library_reads_what_is_written(tmp_path, shard_bytes):
    folder = write(tmp_path / "m", shard_bytes)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 1 << 20) == (folder / "model.safetensors.index.json").is_file()
    theirs = {name: value for file in files for name, value in load_file(file).items()}
    found = find_tensors(folder)
    assert theirs.keys() == found.keys() == VALUES.keys()
    assert all(equal(theirs[name], value) and equal(found[name].read(), value) for name, value in VALUES.items())


def test_what_the_library_writes_is_read(tmp_path):
    save_file({name: np.asarray(value) for name, value in VALUES.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = find_tensors(tmp_path)
    assert all(equal(found[name].read(), value) for name, value in VALUES.items())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_slice_is_that_of_the_array(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    value = np.random.default_rng(0).normal(size=shape).astype(data.draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])))
    cuts = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    index = tuple(slice(*cut) for cut in cuts)
    folder = write(tmp_path_factory.mktemp("slice"), values={"x": value})
    assert equal(find_tensors(folder)["x"].read(index), value[index])


# --- damaged files ---


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_FILES = {
    "empty": (b"", "truncated or no safetensors file: 0 bytes"),
    "a huge header": (header({"x": entry()}, bytes(8), length=1 << 62), "header of 4,611,686,018,427,387,904 announced"),
    "a header longer than the file": (header({"x": entry()}, b"", length=500), "truncated or no safetensors file"),
    "no JSON": (header(b"{not json}", bytes(8)), "its JSON cannot be read"),
    "a list": (header(b"[1, 2]", bytes(8)), "no object"),
    "deep JSON": (header(b"[" * 200_000, bytes(8)), "its JSON cannot be read"),
    "twice": (
        header(b'{"x":' + json.dumps(entry()).encode() + b',"x":' + json.dumps(entry()).encode() + b"}", bytes(8)),
        "names 'x' twice",
    ),
    "a wrong dtype": (header({"layer.w": entry("I64", (1,))}, bytes(8)), "the tensor layer.w is of type I64; supported: F32, F16, BF16"),
    "fewer bytes than the shape": (
        header({"w": entry(shape=(3,))}, bytes(8)),
        r"w of type F32 and shape \(3,\) needs 12 bytes, its offsets give it 8",
    ),
    "an offset outside the file": (header({"w": entry(offsets=(800, 808))}, bytes(8)), "truncated: w ends at byte"),
    "a truncated shard": (header({"w": entry(shape=(9,), offsets=(0, 36))}, bytes(30)), "truncated: w ends at byte"),
    "offsets backwards": (header({"w": entry(offsets=(8, 0))}, bytes(8)), "needs 8 bytes"),
    "negative": (header({"w": entry(shape=(-2,), offsets=(0, -8))}, bytes(8)), "not one of a dtype, a shape and two offsets"),
    "overlapping": (header({"v": entry(), "w": entry(offsets=(4, 12))}, bytes(12)), "the bytes of the tensor w overlap"),
    "no offsets": (header({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)), "not one of a dtype, a shape and two offsets"),
    "a number": (header({"w": 7}, bytes(8)), "not one of a dtype, a shape and two offsets"),
    "a fraction": (header({"w": entry(shape=(2.0,))}, bytes(8)), "not one of a dtype, a shape and two offsets"),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises((CheckpointError, Unsupported), match=message) as caught:
        find_tensors(tmp_path)
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def index(folder, change):
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))


BAD_FOLDERS = {
    "a name that leaves the folder": (
        lambda v: v | {"weight_map": {**v["weight_map"], "b": "../evil.safetensors"}},
        "'../evil.safetensors', which points outside",
    ),
    "an absolute name": (lambda v: v | {"weight_map": {**v["weight_map"], "b": "/etc/passwd"}}, "'/etc/passwd', which points outside"),
    "a file that is not there": (
        lambda v: v | {"weight_map": {**v["weight_map"], "b": "gone.safetensors"}},
        "lacks the file gone.safetensors",
    ),
    "a tensor that is not there": (
        lambda v: v | {"weight_map": {**v["weight_map"], "z": next(iter(v["weight_map"].values()))}},
        "differ in where 1 tensors are, e.g. z",
    ),
    "a tensor that is not listed": (
        lambda v: v | {"weight_map": {k: f for k, f in v["weight_map"].items() if k != "a.weight"}},
        "differ in where 1 tensors are, e.g. a.weight",
    ),
    "no map": (lambda v: {"metadata": {}}, "no weight_map"),
    "numbers": (lambda v: v | {"weight_map": {"b": 3}}, "no weight_map of tensor names to files"),
}


@pytest.mark.parametrize("change, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_index_is_refused(tmp_path, change, message):
    folder = write(tmp_path / "m", 160)
    index(folder, change)
    with pytest.raises(CheckpointError, match=message):
        find_tensors(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write(tmp_path / "m", 160)
    files = sorted(folder.glob("*.safetensors"))
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(CheckpointError, match="both hold the tensor"):
        find_tensors(folder)


def test_a_file_cut_while_it_is_read_is_refused(tmp_path):
    tensor = find_tensors(write(tmp_path / "m"))["a.weight"]
    tensor.file.write_bytes(tensor.file.read_bytes()[: tensor.offset + 60])
    with pytest.raises(CheckpointError, match="it ended while a tensor of shape"):
        tensor.read()


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pytorch_model.bin .*pickles, which are never loaded"):
        find_tensors(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_or_cut_bytes_are_one_clear_error_or_the_same_tensors(tmp_path_factory, data):
    """The header's bytes at random: an error of ours, or tensors that lie inside the file."""
    folder = write(tmp_path_factory.mktemp("fuzz"))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 700) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read_header(path)
    except MoeJaxError as error:
        assert "\n" not in str(error)
        return
    size = path.stat().st_size
    assert all(tensor.offset + tensor.nbytes <= size and tensor.read().shape == tensor.shape for tensor in found.values())
