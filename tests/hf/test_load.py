"""Checkpoints into their places: on one device and on meshes, in any type, in little memory; and names that do not fit, listed."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import paths
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.hf import load, shards
from moe_jax.hf.load import load_hf
from moe_jax.hf.save import save_hf
from moe_jax.hf.shards import find_tensors, write_shards
from moe_jax.mesh import MeshSpec
from moe_jax.model import DTypePolicy, Model, ModelConfig

CONFIG = ModelConfig.preset("qwen3_tiny", num_layers=3, dense_layers=(1,), num_experts=8, d_model=16, d_ff=24, d_expert=10)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((np.asarray(x) == np.asarray(y)).all()), a, b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of several files, and its parameters."""
    folder, model = tmp_path_factory.mktemp("saved") / "model", Model(CONFIG)
    params = model.init(3)
    save_hf(model, params, folder, shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder, params


def rewritten(folder, where, change):
    """A copy whose tensors `change` (a dict by name) has changed, in one file."""
    values = {name: tensor.read() for name, tensor in find_tensors(folder).items()}
    change(values)
    where.mkdir()
    (where / "config.json").write_text((folder / "config.json").read_text())
    write_shards(where, {name: (value.shape, value.dtype) for name, value in values.items()}, values.values(), 1 << 30)
    return where


@pytest.mark.parametrize("mesh", ["data=8", "expert=8", "fsdp=2,expert=4", "expert=4,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_on_a_mesh_every_device_gets_its_part(saved, mesh, monkeypatch):
    """Read in pieces of a few rows, as large tensors are."""
    monkeypatch.setattr(load, "_PIECE", 150)
    folder, params = saved
    model, found = load_hf(folder, MeshSpec.parse(mesh).build())
    assert same(found, params)
    assert jax.tree.all(jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim), found, model.shardings))


@pytest.mark.parametrize("piece", [1, 150, 1 << 30])
def test_on_one_device_in_pieces_of_any_size(saved, piece, monkeypatch):
    monkeypatch.setattr(load, "_PIECE", piece)
    assert same(load_hf(saved[0])[1], saved[1])


def test_only_what_the_devices_hold_is_read(saved, monkeypatch):
    """Of an expert that another process has, nothing; of a matrix cut by rows of the file, those rows."""
    folder, _ = saved
    mesh = MeshSpec.parse("expert=8").build()
    read = []
    original = shards.Tensor.read
    monkeypatch.setattr(shards.Tensor, "read", lambda self, index=(): read.append((self.shape, index)) or original(self, index))
    first = jax.devices()[0]
    monkeypatch.setattr(load._Parts, "__init__", _parts_of_one_device(load._Parts.__init__, first))
    monkeypatch.setattr(load._Parts, "array", lambda self: self.buffers)
    found = paths.flatten(load_hf(folder, mesh)[1])
    experts = [shape for shape, _ in read if shape in ((10, 16), (16, 10))]
    assert len(experts) == 2 * 3  # of 8 experts in 2 layers, one each, three matrices
    assert len(found) > 10


def _parts_of_one_device(original, device):
    def init(self, spec, sharding):
        original(self, spec, sharding)
        self.places, self.buffers = {device: self.places[device]}, {device: self.buffers[device]}

    return init


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_of_numbers(saved, tmp_path, stored, dtype):
    _, params = saved
    save_hf(Model(CONFIG), params, tmp_path / "m", dtype=stored)
    model, found = load_hf(tmp_path / "m", dtype=dtype)
    assert model.config.dtypes == DTypePolicy(dtype, dtype)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == stored
    wanted = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(stored)).astype(jnp.dtype(dtype)), params)
    assert same(found, wanted)
    if stored == dtype:
        save_hf(model, found, tmp_path / "again")
        first, second = find_tensors(tmp_path / "m"), find_tensors(tmp_path / "again")
        assert all(first[name].read().tobytes() == second[name].read().tobytes() for name in first.keys() | second.keys())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.pop("model.norm.weight"), "1 are missing: model.norm.weight"),
        (lambda v: [v.pop(name) for name in list(v) if ".mlp.experts." in name], "48 are missing: .*mlp.experts.0.*, …"),
        (lambda v: v.update({"model.extra": np.zeros(3, np.float32)}), "1 are not of this model: model.extra"),
        (
            lambda v: v.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"1 have another shape: model.norm.weight \(3,\) instead of \(16,\)",
        ),
        (
            lambda v: v.update({"model.layers.0.mlp.gate.weight": v["model.layers.0.mlp.gate.weight"].T}),
            r"gate.weight \(16, 8\) instead of \(8, 16\)",
        ),
    ],
)
def test_names_that_do_not_fit_are_listed(saved, tmp_path, change, message):
    folder = rewritten(saved[0], tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_hf(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_what_older_checkpoints_repeat_is_passed_over(saved, tmp_path):
    """Rotary frequencies, which follow from the configuration; a tied head that is written twice, when it is the embedding."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert same(load_hf(rewritten(saved[0], tmp_path / "a", lambda v: v.update({name: np.zeros(4, np.float32)})))[1], saved[1])
    tied = Model(CONFIG.replace(tie_embeddings=True))
    params = tied.init(0)
    save_hf(tied, params, tmp_path / "tied")
    again = rewritten(tmp_path / "tied", tmp_path / "b", lambda v: v.update({"lm_head.weight": v["model.embed_tokens.weight"]}))
    assert same(load_hf(again)[1], params)
    other = rewritten(tmp_path / "tied", tmp_path / "c", lambda v: v.update({"lm_head.weight": v["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match="1 are not of this model: lm_head.weight"):
        load_hf(other)


def test_progress_counts_all_bytes(saved):
    told = []
    load_hf(saved[0], progress=lambda done, total: told.append((done, total)))
    total = sum(tensor.nbytes for tensor in find_tensors(saved[0]).values())
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_folder_that_is_not_empty_is_not_written_into(saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not empty; save into a new folder"):
        save_hf(Model(CONFIG), saved[1], tmp_path / "full")


def test_a_save_that_fails_leaves_nothing(saved, tmp_path, monkeypatch):
    from moe_jax.hf import save

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_shards", fails)
    with pytest.raises(OSError, match="No space left on device: '.*/m'$"):
        save_hf(Model(CONFIG), saved[1], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="[0-9,]{5,} bytes are to be written, and 1,000 are free: '.*/m'$"):
        save_hf(Model(CONFIG), saved[1], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# --- memory, and a kill, at a size that shows ---

SHARDS = """
import json, sys
from pathlib import Path
import numpy as np
from moe_jax.hf.config import config_json, family_of
from moe_jax.hf.names import targets
from moe_jax.hf.shards import write_shards
from moe_jax.model import Model, ModelConfig

config = ModelConfig.preset("qwen3_tiny", vocab_size=16_000, d_model=768, num_layers=8, num_experts=16, d_expert=512, head_dim=64)
model, family, folder, draw = Model(config), family_of(config), Path(sys.argv[1]), np.random.default_rng(0)
folder.mkdir()
(folder / "config.json").write_text(json.dumps(config_json(config, family)))
shapes = {name: (target.shape, np.dtype(np.float32)) for name, target in targets(model, family).items()}
values = (draw.normal(size=shape).astype(np.float32) for shape, _ in shapes.values())
write_shards(folder, shapes, values, model.parameter_count() * 4 // 20 + (1 << 20))
"""
LOAD = """
import re, sys
import jax
from moe_jax.hf.load import load_hf
from moe_jax.hf.shards import find_tensors
from moe_jax.model import Model, ModelConfig

def peak(name="VmHWM"):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

folder = sys.argv[1]
tensors = find_tensors(__import__("pathlib").Path(folder))
load_hf(sys.argv[2])  # what compiling takes
before = peak("VmRSS")
told = 0
def progress(done, total):
    global told
    if done - told > total / 20:
        told = done
        print(f"{done / 1e6:.0f} of {total / 1e6:.0f} MB", flush=True)
model, params = load_hf(folder, progress=progress)
jax.block_until_ready(params)
held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
largest = max(tensor.nbytes for tensor in tensors.values())
print(f"files {len({t.file for t in tensors.values()})}, parameters {held}, largest tensor {largest}, peak over start {peak() - before}")
"""


@pytest.mark.slow
def test_twenty_shards_in_the_memory_of_the_parameters_and_one_tensor(tmp_path, saved):
    """Peak host memory against the bound; killed half-way and started again. A CPU's devices hold their parameters in host memory too."""
    folder = tmp_path / "shards"
    subprocess.run([sys.executable, "-c", SHARDS, str(folder)], check=True, cwd=Path(__file__).parents[2])
    command = [sys.executable, "-c", textwrap.dedent(LOAD), str(folder), str(saved[0])]
    environment = {"XLA_FLAGS": "", "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    start = dict(cwd=Path(__file__).parents[2], text=True, stdout=subprocess.PIPE, env=environment)
    with subprocess.Popen(command, **start) as killed:  # type: ignore[call-overload]
        for line in killed.stdout:
            if float(line.split()[0]) > float(line.split()[2]) / 2:
                killed.send_signal(signal.SIGKILL)
                break
    assert killed.returncode == -signal.SIGKILL
    began = time.monotonic()
    told = subprocess.run(command, check=True, **start).stdout.splitlines()[-1]  # type: ignore[call-overload]
    files, held, largest, peak = (int(number) for number in re.findall(r"\d+", told))
    bound = held + largest
    print(
        f"\n{files} files: peak {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB ({held / 1e6:.0f} parameters + {largest / 1e6:.0f} largest tensor), "
        f"{time.monotonic() - began:.1f} s, after a kill at half"
    )
    assert files == 20
    assert peak <= bound * 1.05
