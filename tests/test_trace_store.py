"""Routing traces on disk: what comes back, what is refused, and what a kill or a flipped byte leaves."""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import trace_store
from moe_jax.errors import TraceError
from moe_jax.model import ModelConfig
from moe_jax.routing import RoutingTrace
from moe_jax.trace_store import TraceInfo, TraceReader, TraceWriter, read_trace, write_trace

INFO = TraceInfo("abc", (1, 2, 4), num_experts=8, top_k=2, batch=4, length=6, data_fingerprint="text", weights=True, logits=True)
IDS_ONLY = dataclasses.replace(INFO, weights=False, logits=False)
DAMAGE = "is damaged|was written as|is no routing trace|is not a routing trace"


def step_of(info: TraceInfo, seed: int, rows: slice = slice(None)) -> tuple[RoutingTrace, np.ndarray, np.ndarray]:
    """A trace with one unrecorded row, its tokens and logits: a function of the seed alone."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((len(info.layers), info.batch, info.length, info.num_experts), dtype=np.float32)
    ids = np.argsort(-logits, -1)[..., : info.top_k].astype(info.dtype)
    ids[:, -1, -1] = np.iinfo(info.dtype).max
    weights = rng.random(ids.shape, dtype=np.float32)
    tokens = rng.integers(0, 2**32, (info.batch, info.length), dtype=np.uint32)
    trace = RoutingTrace(ids[:, rows], weights[:, rows], np.asarray(info.layers, np.int32))
    return trace, tokens[rows], logits[:, rows]


def write(folder: Path, info: TraceInfo = INFO, steps=range(3), part=(0, 1), finish: bool = True) -> TraceWriter:
    size = info.batch // part[1]
    writer = TraceWriter(folder, info, part)
    for step in steps:
        trace, tokens, logits = step_of(info, step, slice(part[0] * size, (part[0] + 1) * size))
        writer.write(step, trace, tokens, logits if info.logits else None)
    writer.flush()
    if finish:
        writer.close()
    else:
        writer._drop()  # as a kill leaves it
    return writer


def same(reader: TraceReader, step: int, info: TraceInfo = INFO) -> bool:
    trace, tokens, logits = step_of(info, step)
    found = reader.read(step, tokens)
    assert found.ids.dtype == trace.ids.dtype and np.array_equal(found.layer_index, info.layers)
    weights = found.weights is None if not info.weights else found.weights.tobytes() == trace.weights.tobytes()
    return np.array_equal(found.ids, trace.ids) and weights and (not info.logits or reader.logits(step).tobytes() == logits.tobytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_round_trip(tmp_path):
    write(tmp_path / "t")
    reader = TraceReader(tmp_path / "t")
    assert reader.info == INFO and reader.steps == (0, 1, 2) and reader.verify() == 3
    assert all(same(reader, step) for step in reader.steps)
    valid = np.asarray(reader.read(1).valid)
    assert not valid[:, -1, -1].any() and valid.sum() == 3 * (4 * 6 - 1)


def test_files(tmp_path):
    """One object per step, part and array, and nothing that a pickle could hide in."""
    write(tmp_path / "t", steps=(0, 7))
    arrays = {f"{name}/{file}" for name in ("ids", "weights", "logits") for file in ("zarr.json", "c.0.0.0.0.0", "c.7.0.0.0.0")}
    tokens = {"tokens/zarr.json", "tokens/c.0.0.0", "tokens/c.7.0.0"}
    assert set(contents(tmp_path / "t")) == arrays | tokens | {"trace.json", "part-0.jsonl", "part-0.json"}
    assert json.loads((tmp_path / "t" / "trace.json").read_bytes())["schema"] == trace_store.SCHEMA
    codecs = json.loads((tmp_path / "t" / "weights" / "zarr.json").read_bytes())["codecs"]
    assert codecs[0]["name"] == "sharding_indexed" and codecs[0]["configuration"]["codecs"][-1] == {"name": "crc32c"}


@pytest.mark.parametrize("experts, dtype", [(255, np.uint8), (256, np.uint16)])
def test_narrowest_type(tmp_path, experts, dtype):
    info = dataclasses.replace(IDS_ONLY, num_experts=experts, layers=(0,))
    write(tmp_path / "t", info, steps=[0])
    reader = TraceReader(tmp_path / "t")
    assert reader.read(0).ids.dtype == dtype and same(reader, 0, info)


def test_bytes_per_token():
    """Qwen3-30B-A3B: 48 MoE layers, 8 of 128 experts."""
    qwen = TraceInfo("q", tuple(range(48)), num_experts=128, top_k=8, batch=1, length=1)
    print(f"Qwen3-30B: {qwen.bytes_per_token} bytes per token")
    assert qwen.bytes_per_token == 384
    assert dataclasses.replace(qwen, num_experts=256).bytes_per_token == 768


def test_a_step_without_any_route(tmp_path):
    """Data equal to zarr's fill value is stored like any other."""
    trace = RoutingTrace(np.full((3, 4, 6, 2), 255, np.uint8), np.zeros((3, 4, 6, 2), np.float32), np.array([1, 2, 4]))
    write_trace(tmp_path / "t", trace, model_hash="abc", num_experts=8, tokens=np.zeros((4, 6), np.int32))
    assert not read_trace(tmp_path / "t").valid.any()
    assert TraceReader(tmp_path / "t").verify() == 1


def test_arrays_of_jax(tmp_path):
    trace, tokens, logits = step_of(INFO, 5)
    with TraceWriter(tmp_path / "t", INFO) as writer:
        device = RoutingTrace(jnp.asarray(trace.ids), jnp.asarray(trace.weights), jnp.asarray(trace.layer_index))
        writer.write(5, device, jnp.asarray(tokens), jnp.asarray(logits))
    assert same(TraceReader(tmp_path / "t"), 5)


def test_a_buffer_may_be_used_again(tmp_path):
    trace, tokens, _ = step_of(IDS_ONLY, 0)
    with TraceWriter(tmp_path / "t", IDS_ONLY) as writer:
        for step in range(3):
            writer.write(step, trace, tokens)
            tokens += 1
    reader, first = TraceReader(tmp_path / "t"), step_of(IDS_ONLY, 0)[1]
    for step in range(3):
        assert (reader.read(step, first + np.uint32(step)).ids == trace.ids).all()


def test_one_batch(tmp_path):
    trace, tokens, _ = step_of(INFO, 0)
    write_trace(
        tmp_path / "näme with spaces", trace, model_hash="h", num_experts=8, tokens=tokens, source="reference", extra={"noise": 0.05}
    )
    found = read_trace(tmp_path / "näme with spaces")
    assert np.array_equal(found.ids, trace.ids) and np.array_equal(found.weights, trace.weights)
    info = TraceReader(tmp_path / "näme with spaces").info
    assert (info.source, info.extra, info.layers) == ("reference", {"noise": 0.05}, (1, 2, 4))
    with TraceWriter(tmp_path / "näme with spaces", info) as writer:
        writer.write(1, trace, tokens)
    with pytest.raises(TraceError, match="holds 2 steps"):
        read_trace(tmp_path / "näme with spaces")


def test_two_parts(tmp_path):
    write(tmp_path / "t", part=(1, 2), steps=range(3))
    with pytest.raises(TraceError, match="still being written .* 0 complete steps, no part-0.json;"):
        TraceReader(tmp_path / "t")
    write(tmp_path / "t", part=(0, 2), steps=range(2), finish=False)
    assert TraceReader(tmp_path / "t", partial=True).steps == (0, 1)
    write(tmp_path / "t", part=(0, 2))
    reader = TraceReader(tmp_path / "t")
    assert all(same(reader, step) for step in range(3)) and reader.verify() == 3
    for part in ((0, 1), (0, 4)):
        with pytest.raises(TraceError, match=f"parts: was 2, now {part[1]}"):
            TraceWriter(tmp_path / "t", INFO, part)
    with pytest.raises(TraceError, match="part 0 of 3 of a trace of 4 rows"):
        TraceWriter(tmp_path / "u", INFO, (0, 3))


def test_append_to_a_finished_trace(tmp_path):
    write(tmp_path / "t", steps=range(2))
    writer = TraceWriter(tmp_path / "t", INFO)
    with pytest.raises(TraceError, match="is still being written .* 2 complete steps.*finish the recording"):
        TraceReader(tmp_path / "t")
    writer.write(2, *step_of(INFO, 2))
    writer.close()
    writer.close()
    with pytest.raises(TraceError, match="is closed"):
        writer.write(3, *step_of(INFO, 3))
    assert TraceReader(tmp_path / "t").steps == (0, 1, 2)
    write(tmp_path / "whole", steps=range(3))
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_a_step_again(tmp_path):
    """The same bits change no file; others replace the step, also for a reader that was open before."""
    write(tmp_path / "t")
    before = contents(tmp_path / "t")
    write(tmp_path / "t", steps=[1])
    assert contents(tmp_path / "t") == before
    reader = TraceReader(tmp_path / "t")
    with TraceWriter(tmp_path / "t", INFO) as writer:
        writer.write(1, *step_of(INFO, 100))
    assert np.array_equal(reader.read(1).ids, step_of(INFO, 100)[0].ids)
    assert TraceReader(tmp_path / "t").steps == (0, 1, 2)


def test_cut_off_while_a_step_is_replaced(tmp_path, monkeypatch):
    """The step is gone, not half of one and half of another; the next writing of it makes the trace whole."""
    append = TraceWriter._append

    def refuse(self, body):
        if body["objects"]:
            raise OSError(28, "No space left on device")
        append(self, body)

    write(tmp_path / "t", finish=False)
    with monkeypatch.context() as patch, pytest.raises(TraceError, match="cannot write step 1 .*: No space left on device$"):
        patch.setattr(TraceWriter, "_append", refuse)
        with TraceWriter(tmp_path / "t", INFO) as writer:
            writer.write(1, *step_of(INFO, 100))
    reader = TraceReader(tmp_path / "t", partial=True)
    assert reader.steps == (0, 2) and reader.verify() == 2
    write(tmp_path / "t", steps=[1])
    assert all(same(TraceReader(tmp_path / "t"), step) for step in range(3))


def test_the_queue_is_bounded(tmp_path, monkeypatch):
    begun, go_on = [], threading.Event()
    monkeypatch.setattr(TraceWriter, "_save", lambda self, step, *_: (begun.append(step), go_on.wait(10)))
    writer = TraceWriter(tmp_path / "t", INFO)
    for step in range(4):
        writer.write(step, *step_of(INFO, step))
    threading.Timer(0.1, go_on.set).start()
    assert len(begun) <= 1 and not go_on.is_set()
    writer.write(4, *step_of(INFO, 4))  # the fifth waits for the first
    assert go_on.is_set()
    writer.close()
    assert begun == [0, 1, 2, 3, 4]


def test_an_exception_leaves_it_unfinished(tmp_path):
    with pytest.raises(KeyboardInterrupt), TraceWriter(tmp_path / "t", INFO) as writer:
        writer.write(0, *step_of(INFO, 0))
        raise KeyboardInterrupt
    assert TraceReader(tmp_path / "t", partial=True).steps == (0,)
    with pytest.raises(TraceError, match="1 complete steps"):
        TraceReader(tmp_path / "t")


def test_another_trace_in_the_folder(tmp_path):
    write(tmp_path / "t")
    with pytest.raises(TraceError, match=r"holds another trace: info.model_hash: was \"abc\", now \"x\"; info.num_experts: was 8, now 16"):
        TraceWriter(tmp_path / "t", dataclasses.replace(INFO, model_hash="x", num_experts=16))
    assert TraceReader(tmp_path / "t").verify() == 3


def test_one_writer_of_a_part(tmp_path):
    with TraceWriter(tmp_path / "t", INFO):
        with pytest.raises(TraceError, match="another process writes it"):
            TraceWriter(tmp_path / "t", INFO)
    TraceWriter(tmp_path / "t", INFO).close()


# --- what is refused at writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message", [([3, 3], "no expert can be chosen twice"), ([3, 8], "the model has 8 experts"), ([3, 255], "whole or not at all")]
)
def test_bad_ids(tmp_path, row, message):
    """An error appears at the next call, once; the steps around it are written."""
    writer = TraceWriter(tmp_path / "t", INFO)
    writer.write(0, *step_of(INFO, 0))
    bad, tokens, logits = step_of(INFO, 1)
    bad.ids[2, 3, 1] = row
    writer.write(1, bad, tokens, logits)
    with pytest.raises(TraceError, match=f"cannot write step 1 of .*{message}.*layer 2, sequence 3, position 1 holds"):
        writer.flush()
    writer.write(2, *step_of(INFO, 2))
    writer.close()
    assert TraceReader(tmp_path / "t").steps == (0, 2)


def test_a_failed_step_leaves_the_trace_unfinished(tmp_path):
    bad, tokens, logits = step_of(INFO, 1)
    bad.ids[0, 0, 0] = 3
    with pytest.raises(TraceError, match="cannot write step 0 "), TraceWriter(tmp_path / "t", INFO) as writer:
        writer.write(0, bad, tokens, logits)
    assert TraceReader(tmp_path / "t", partial=True).steps == ()
    with pytest.raises(TraceError, match="still being written"):
        TraceReader(tmp_path / "t")


def test_bad_shapes(tmp_path):
    trace, tokens, logits = step_of(INFO, 0)
    with TraceWriter(tmp_path / "t", INFO) as writer:
        for changed, match in (
            (RoutingTrace(trace.ids[:2], trace.weights[:2], trace.layer_index[:2]), "2 layers where .* have 3"),
            (RoutingTrace(trace.ids[:, :3], trace.weights[:, :3], trace.layer_index), "3 sequences where .* have 4"),
            (RoutingTrace(trace.ids.astype(np.uint16), trace.weights, trace.layer_index), "ids in uint16"),
            (RoutingTrace(trace.ids, None, trace.layer_index), "has arrays of shape .*, and this part records .*'weights'"),
        ):
            with pytest.raises(TraceError, match=match):
                writer.write(0, changed, tokens, logits)
        with pytest.raises(TraceError, match="has arrays of shape .* records .*'logits'"):
            writer.write(0, trace, tokens)
        with pytest.raises(TraceError, match=r"'tokens': \(4, 5\).* records .*'tokens': \(4, 6\)"):
            writer.write(0, trace, tokens[:, :5], logits)
        writer.write(0, trace, tokens.astype(np.int64) - 2**33, logits)
        with pytest.raises(TraceError, match="its tokens are not whole numbers from 0 to 4294967295"):
            writer.flush()
        writer.write(0, RoutingTrace(trace.ids, trace.weights, np.array([0, 1, 2])), tokens, logits)
        with pytest.raises(TraceError, match="the layers 0, 1, 2"):
            writer.flush()
        writer.write(-1, trace, tokens, logits)
        with pytest.raises(TraceError, match="step -1"):
            writer.flush()
        writer.write(0, trace, tokens, logits)
    assert TraceReader(tmp_path / "t").verify() == 1


@pytest.mark.parametrize(
    "change", [{"top_k": 9}, {"layers": ()}, {"layers": (2, 1)}, {"layers": (-1,)}, {"batch": 0}, {"source": "rolout"}]
)
def test_bad_info(change):
    with pytest.raises(TraceError, match="no trace is of this .*source one of"):
        dataclasses.replace(INFO, **change)


def test_extra_is_plain_json(tmp_path):
    with pytest.raises(TraceError, match="not object"):
        TraceWriter(tmp_path / "t", dataclasses.replace(INFO, extra={"x": object()}))


# --- what is refused at reading -----------------------------------------------------------------------------------------------


def test_tokens_must_be_those_recorded(tmp_path):
    write(tmp_path / "t")
    reader, tokens = TraceReader(tmp_path / "t"), step_of(INFO, 1)[1].astype(np.int64)
    reader.read(1, tokens)
    was, tokens[2, 3] = tokens[2, 3], 7
    with pytest.raises(
        TraceError, match=rf"step 1 .* row 2, position 3 was {was} when recorded and 7 here \(1 of 24 differ\): the text or the data"
    ):
        reader.read(1, tokens)
    with pytest.raises(TraceError, match=r"of shape \(4, 6\), and here they are \(4, 5\)"):
        reader.read(1, tokens[:, :5])
    with TraceWriter(tmp_path / "none", IDS_ONLY) as writer:
        writer.write(0, step_of(INFO, 0)[0])
    with pytest.raises(TraceError, match="step 0 .* was recorded without tokens"):
        TraceReader(tmp_path / "none").read(0, tokens)
    with pytest.raises(TraceError, match="was recorded without logits"):
        TraceReader(tmp_path / "none").logits(0)
    assert TraceReader(tmp_path / "none").read(0).weights is None


def test_one_batch_of_another_model(tmp_path):
    """The numbers that differ; without a model nothing is asked."""
    config = ModelConfig.preset("tiny", num_layers=3, num_experts=8, dense_layers=(0,))
    info = TraceInfo(config.routing_hash(), config.moe_layers, 8, config.experts_per_token, batch=4, length=6)
    write(tmp_path / "t", info, steps=[0])
    found = read_trace(tmp_path / "t", config)
    assert np.array_equal(found.ids, step_of(info, 0)[0].ids) and np.array_equal(found.ids, read_trace(tmp_path / "t").ids)
    for changes, said in (
        (dict(num_experts=16), "recorded with 8 experts, the model has 16; recorded with .* as model hash"),
        (dict(dense_layers=()), r"recorded with \(1, 2\) as MoE layers, the model has \(0, 1, 2\)"),
        (dict(d_expert=config.d_expert * 2), "as model hash"),
    ):
        with pytest.raises(TraceError, match=said):
            read_trace(tmp_path / "t", config.replace(**changes))


def test_another_model(tmp_path):
    write(tmp_path / "t")
    reader = TraceReader(tmp_path / "t")
    reader.check("abc", [1, 2, 4], 8, 2, 4, 6)
    reader.check("abc", [1, 2, 4], 8, 2)
    with pytest.raises(TraceError, match="recorded with 8 experts, the model has 128$"):
        reader.check("abc", [1, 2, 4], 128, 2)
    with pytest.raises(TraceError) as error:
        reader.check("abd", range(3), 128, 4, 5, 7)
    for part in (
        "8 experts, ",
        "2 experts per token, ",
        r"\(1, 2, 4\) as MoE layers, ",
        "4 rows, ",
        "6 positions, ",
        "abc as model hash, ",
    ):
        assert re.search(f"recorded with {part}the model has ", str(error.value))


def test_a_missing_step(tmp_path):
    write(tmp_path / "t", steps=(3, 5, 9))
    with pytest.raises(TraceError, match="no step 4 in .*part-0.jsonl: it has 3 complete steps, 3 to 9"):
        TraceReader(tmp_path / "t").read(4)
    write(tmp_path / "empty", steps=())
    with pytest.raises(TraceError, match="no step 0 in .*: it has 0 complete steps, none to none"):
        TraceReader(tmp_path / "empty").logits(0)


@pytest.mark.parametrize("name", ["r.pkl", "r.npz", "r.pt", "r"])
def test_files_of_others(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    for use in (TraceReader, read_trace, lambda path: TraceWriter(path, INFO)):
        with pytest.raises(TraceError, match="a routing trace is a folder with trace.json.*write_trace"):
            use(tmp_path / name)


def test_not_a_trace(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(TraceError, match="is no routing trace, which is a folder with trace.json: No such file"):
            TraceReader(path)


def test_a_future_schema(tmp_path):
    write(tmp_path / "t")
    header = tmp_path / "t" / "trace.json"
    header.write_text(header.read_text().replace("routing_trace/1", "routing_trace/2"))
    for use in (TraceReader, lambda path: TraceWriter(path, INFO)):
        with pytest.raises(
            TraceError, match="trace.json was written as 'moe_jax.routing_trace/2', and this code reads 'moe_jax.routing_trace/1'"
        ):
            use(tmp_path / "t")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished trace of two parts, never changed."""
    folder = tmp_path_factory.mktemp("whole") / "t"
    for part in ((0, 2), (1, 2)):
        write(folder, part=part)
    return folder


def damages(folder: Path):
    """(file, what is done to it, its new bytes or None): flips at several offsets, cuts and deletion, for each file in turn."""
    rng = random.Random(0)
    for name, raw in contents(folder).items():
        for at in {0, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(6))}:
            flip = rng.randrange(1, 256)
            yield name, f"byte {at} xor {flip}", raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :]
        for size in (0, rng.randrange(len(raw)), len(raw) - 1):
            yield name, f"cut to {size}", raw[:size]
        yield name, "deleted", None


@pytest.mark.parametrize("partial", [False, True])
def test_every_damage_is_named(tmp_path, whole, partial):
    folder = tmp_path / "t"
    shutil.copytree(whole, folder)
    count = 0
    for name, what, raw in damages(whole):
        path, good = folder / name, (whole / name).read_bytes()
        path.unlink()
        if raw is not None:
            path.write_bytes(raw)
        if partial and raw is None and re.fullmatch(r"part-\d\.json", name):
            assert TraceReader(folder, partial=True).verify() == 3  # a trace whose manifest is not there yet
        else:
            with pytest.raises(TraceError) as error:
                TraceReader(folder, partial=partial).verify()
            unfinished = raw is None and name in ("part-0.json", "part-1.json")
            assert name in str(error.value), (name, what, str(error.value))
            assert "still being written" in str(error.value) if unfinished else re.search(DAMAGE, str(error.value)), (name, what)
            object_ = re.search(r"/c\.(\d)\.", name)
            assert object_ is None or f"step {object_[1]} of" in str(error.value)
            assert "\n" not in str(error.value)
        path.write_bytes(good)
        count += 1
    assert count > 300 and TraceReader(folder).verify() == 3


def test_every_flip_in_an_unfinished_trace(tmp_path):
    """Without a manifest too: every second byte of the header and the lines, and every fifth of the metadata and the objects."""
    info = dataclasses.replace(IDS_ONLY, batch=1, length=2)
    write(tmp_path / "t", info, steps=range(2), finish=False)
    for name, raw in contents(tmp_path / "t").items():
        for at in {*range(0, len(raw), 5 if "/" in name else 2), len(raw) - 1}:
            (tmp_path / "t" / name).write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
            with pytest.raises(TraceError, match=DAMAGE):
                TraceReader(tmp_path / "t", partial=True).verify()
        (tmp_path / "t" / name).write_bytes(raw)


def test_the_header_of_another_trace(tmp_path):
    """Intact in itself, and not the one that the lines belong to."""
    write(tmp_path / "t", finish=False)
    write(tmp_path / "other", dataclasses.replace(INFO, model_hash="other"), steps=[])
    shutil.copy(tmp_path / "other" / "trace.json", tmp_path / "t" / "trace.json")
    with pytest.raises(TraceError, match="is damaged: trace.json is gone, cannot be read, or does not have the sha256"):
        TraceReader(tmp_path / "t", partial=True)


def test_the_codec_checks_too(tmp_path, monkeypatch):
    """A byte that changes between the hash and the read is caught by crc32c, and a file that goes is not read as unrecorded."""
    write(tmp_path / "t")
    monkeypatch.setattr(trace_store, "_check_files", lambda folder, files, what="": files)
    path = tmp_path / "t" / "weights" / "c.1.0.0.0.0"
    raw = bytearray(path.read_bytes())
    raw[40] ^= 4
    path.write_bytes(raw)
    reader = TraceReader(tmp_path / "t")
    assert same(reader, 0)
    with pytest.raises(TraceError, match="step 1 .* is damaged: .*weights/c.1.0.0.0.0.*Digest mismatch"):
        reader.read(1)
    path.unlink()
    with pytest.raises(TraceError, match="step 1 .* is damaged: .*missing"):
        reader.read(1)


# --- kills, full disks, and reading beside a writer ---------------------------------------------------------------------------

CHILD = """
import sys, resource
sys.path[:0] = sys.argv[4:]
from test_trace_store import INFO, step_of
from moe_jax.trace_store import TraceWriter
from moe_jax.errors import TraceError
if sys.argv[2] == "small":
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    with TraceWriter(sys.argv[1], INFO) as writer:
        for step in range(int(sys.argv[3])):
            writer.write(step, *step_of(INFO, step))
            if step % 3 == 2:
                writer.flush()
                print(step, flush=True)
except TraceError as error:
    print(error)
    sys.exit(4)
"""


def child(folder: Path, how: str, steps: int) -> subprocess.Popen:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", CHILD, str(folder), how, str(steps), *paths]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_kill_and_resume(tmp_path):
    """kill -9 of a real writer, twice: no acknowledged step is lost, a reader beside it sees whole steps, and the resumed trace is the unbroken one."""
    for kill in range(2):
        process = child(tmp_path / "t", "kill", 100_000)
        assert process.stdout is not None
        for line in process.stdout:
            acknowledged = int(line)
            if acknowledged % 15 == 14:
                beside = TraceReader(tmp_path / "t", partial=True)
                assert beside.steps[: acknowledged + 1] == tuple(range(acknowledged + 1)) and same(beside, acknowledged)
                with pytest.raises(TraceError, match="is still being written"):
                    TraceReader(tmp_path / "t")
            if acknowledged >= 30 * (kill + 1):
                break
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        acknowledged = int(rest[-1]) if rest else acknowledged
        reader = TraceReader(tmp_path / "t", partial=True)
        assert reader.steps == tuple(range(len(reader.steps))) and len(reader.steps) > acknowledged
        assert reader.verify() == len(reader.steps) and same(reader, acknowledged)
    steps = range(len(reader.steps) + 3)
    write(tmp_path / "t", steps=steps)
    write(tmp_path / "whole", steps=steps)
    resumed = {name: raw for name, raw in contents(tmp_path / "t").items() if not name.endswith("__lock")}
    assert resumed == contents(tmp_path / "whole")


def test_a_torn_line(tmp_path):
    """Cut anywhere in its last line, an unfinished trace has one step less, and goes on to be the whole one."""
    write(tmp_path / "whole")
    write(tmp_path / "t", finish=False)
    path = tmp_path / "t" / "part-0.jsonl"
    raw = path.read_bytes()
    last = raw.rindex(b"\n", 0, -1) + 1
    for size in (last, last + 1, (last + len(raw)) // 2, len(raw) - 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        assert TraceReader(tmp_path / "t", partial=True).steps == (0, 1)
    write(tmp_path / "t")
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    path.write_bytes(b"")
    (tmp_path / "t" / "part-0.json").unlink()
    write(tmp_path / "t")
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_disk_full(tmp_path):
    """A file that may not grow, as on a full disk: one line with the bytes, and what was whole stays."""
    process = child(tmp_path / "t", "small", 30)
    text = process.communicate()[0].splitlines()[-1]
    assert process.returncode == 4
    assert re.search(r"cannot write step \d+ of .* \(a step needs 3,120 bytes\): \S.*", text)
    reader = TraceReader(tmp_path / "t", partial=True)
    assert 0 < len(reader.steps) < 30 and reader.verify() == len(reader.steps)
    write(tmp_path / "t")
    assert TraceReader(tmp_path / "t").verify() >= 3


def test_unwritable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TraceError, match=r"cannot write the header of .*file/t \(a step needs 3,120 bytes\): Not a directory$"):
        TraceWriter(tmp_path / "file" / "t", INFO)


def test_memory_is_one_step(tmp_path):
    """Reading a step allocates that step, however many there are, and opens its file alone."""
    info = dataclasses.replace(IDS_ONLY, batch=8, length=512)
    step_bytes = info.bytes_per_token * 8 * 512
    write(tmp_path / "t", info, steps=range(40))
    reader = TraceReader(tmp_path / "t")
    for step in range(39):
        (tmp_path / "t" / "tokens" / f"c.{step}.0.0").unlink()  # what is not asked for is not read
    tracemalloc.start()
    for step in reader.steps:
        reader.read(step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        for step in reader.steps:
            reader.read(step)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert peak < 4 * step_bytes + 2**19 and grown < 40 * step_bytes, (peak, grown, step_bytes)
