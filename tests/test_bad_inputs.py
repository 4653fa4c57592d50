"""Two thousand inputs made by chance, most of them wrong: each is accepted, or refused by one line that says what is wrong.

Fields of a config by --set, noise, meshes and schedules as text, flags of every command, and (slow) damaged files. All by number: a failure names its case.
"""

import json
import random
import shutil

import numpy as np
import pytest

import moe_jax as mj
from moe_jax.config_tools import flatten
from moe_jax.errors import MoeJaxError
from moe_jax.model import ModelConfig
from moe_jax.optim.plan import OptimizerConfig
from moe_jax.train.data import DataConfig
from moe_jax.train.run_config import RunConfig, parse_aqn
from tests.launch.here import Done, call

VALUES = (
    "-1 0 1 2 7 1.5 -0.5 abc nan inf -inf 1e400 1e-400 [] true none 99999999999 9999999999999999999999 1,2 , = \" ' é 0x10 1e3 / ../x full muon".split()
    + ["", " 3 ", "\n", "\0", "a=b", "x:y:z"]
)
SITES = "router_gemm router_logits router_input experts expert_up attention lm_head embedding norm_moe norms all seed_gate_0.1 e7b_as_run x".split()
KINDS = "relative additive rms_relative centred_relative accumulation jitter learned quantise bit_flip bias gauss".split()
OPTIONS = [
    f"{name}={value}"
    for name, values in {
        "passes": ("forward", "forward+grad_input", "back", ""),
        "layers": ("0-1", "1-0", "-1", "9", "0+1", "0-99999999999", "x"),
        "phases": ("train", "eval+train", "tran"),
        "reach": ("both", "experts", "selection"),
        "draws": ("fixed", "frozen"),
        "format": ("mxfp4", "fp8"),
        "pases": ("forward",),
    }.items()
    for value in values
]
COMMANDS = {
    "study": "--experiment=noise_factorial:smoke --mesh=data=8 --set=updates=5 --set=optimizer.router=frozen --dry_run",
    "report": "--workdir=/no/such/folder",
    "train": "--preset=tiny --data=synthetic --steps=3 --noise=experts=relative:0.1 --replay_what=ids --aqn=qerl_code:1e-2:1e-4:3 --mesh=data=8 --dry_run",
    "sensitivity": "--model=tiny --data=synthetic --noise=experts=relative:0.1 --seeds=2 --windows=3 --batch=2 --seq_len=16 --phase=eval --dry_run",
    "record": "--model=tiny --data=synthetic --steps=2 --split=train --seed=3 --noise=experts=relative:0.1 --ids_only --dry_run",
    "convert": "--from=tiny --to=/no/such/folder --step=3 --dtype=float32 --shard_gb=1 --upcycle_experts=4 --router_std=0.1 --dense_layers=1 --dry_run",
    "data": "--describe=synthetic --tokenizer=bytes --seq_len=16 --split=clean",
    "plan": "--preset=tiny --topology=v5e:2x2 --batch=4 --seq=16 --remat=full --noise=all=relative:0.1 --steps=train --mesh=data=4 --dry_run",
    "local": "--processes=2 --devices_per_process=1 --grace=3",
    "rl": "--experiment=e7b:smoke --arms=clean --models=moe --seeds=1 --set=steps=2 --dry_run",
    "generate": "--model=tiny --max_tokens=0 --temperature=-1 --top_k=0 --seed=-1",
    "noise": "--preset=tiny --noise=experts=relativ:0.1 --data=synthetic",
}


def refused_or_done(done: Done) -> bool:
    """Whether it was refused; asserts that this took one line."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    if done.returncode == 0:
        return False
    assert done.returncode in (2, 3, 4) and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return True


def test_fields_of_a_config():
    base = RunConfig(ModelConfig.preset("tiny"), DataConfig("synthetic", seq_len=32), OptimizerConfig(), 3)
    fields, refused = list(flatten(base)), 0
    for case in range(1200):
        rng = random.Random(case)
        settings = [part for _ in range(rng.choice((1, 1, 2))) for part in ("--set", f"{rng.choice(fields)}={rng.choice(VALUES)}")]
        refused += refused_or_done(call("train", "--preset=tiny", "--data=synthetic", "--steps=3", "--dry_run", *settings))
    assert 800 < refused < 1200


def noise_text(rng: random.Random) -> str:
    sites = []
    for _ in range(rng.choice((1, 1, 2))):
        scale = rng.choice(["0.1", "2", "0.1/0.2", "mxfp4", *VALUES])
        parts = [f"{rng.choice(SITES)}={rng.choice(KINDS)}", scale, *rng.choices(OPTIONS, k=rng.choice((0, 0, 1, 2)))]
        sites.append(rng.choice(("::", ",", "=", *[":"] * 9)).join(parts))
    return ",".join(sites)


def mesh_text(rng: random.Random) -> str:
    axes = "data fsdp expert tensor slices dta".split()
    return ",".join(
        f"{rng.choice(axes)}{rng.choice(('=', '=', '=', ':'))}{rng.choice(['1', '2', '4', '8', *VALUES])}"
        for _ in range(rng.choice((1, 2, 3)))
    )


def aqn_text(rng: random.Random) -> str:
    parts = ["1e-2", "1e-4", "10", "3", "reach=experts", "reach=router", "stages=3", "start=1", *VALUES]
    return ":".join([rng.choice(("qerl_code", "qerl_paper", "epochs", "qerl")), *rng.choices(parts, k=rng.choice((0, 1, 2, 3, 4)))])


READ = {
    "noise": (noise_text, lambda text: ModelConfig.preset("tiny").resolve(mj.NoiseSpec.parse(text))),
    "mesh": (mesh_text, lambda text: mj.MeshSpec.parse(text).build()),
    "aqn": (aqn_text, lambda text: parse_aqn(text).stage_table(100)),
}


@pytest.mark.parametrize("what", READ)
def test_what_is_written_as_text(what):
    write, read = READ[what]
    refused = 0
    for case in range(200):
        text = write(random.Random(case))
        try:
            read(text)
        except MoeJaxError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 or "\n" in text, (text, str(error))
    assert 50 < refused < 200


@pytest.mark.timeout(120)
def test_flags():
    """One flag of each call without its value or with another, misspelt, missing, or without its dashes."""
    refused = 0
    for case in range(200):
        rng = random.Random(case)
        command = rng.choice(list(COMMANDS))
        *flags, last = COMMANDS[command].split()
        at = rng.randrange(len(flags)) if flags else None
        if at is not None:
            name, _, value = flags[at].partition("=")
            letter = rng.randrange(2, len(name))
            other = f"{name[:letter]}{rng.choice('xyz_')}{name[letter + 1 :]}={value}"
            flags[at] = rng.choice([*(f"{name}={rng.choice(VALUES)}" for _ in range(3)), other, name, "--", flags[at].lstrip("-")])
        done = call(command, *flags, last)
        refused += refused_or_done(done)
    assert 130 < refused < 200


# --- damaged files ----------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, cut off, doubled, replaced, or another value somewhere in its JSON."""
    how = rng.choice(("flip", "cut", "double", "junk", "zeros", "json", "json"))
    at = rng.randrange(len(data)) if data else 0
    if how == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == "json":
        try:
            lines = (
                [json.loads(line) for line in data.decode().splitlines()]
                if b"\n{" in data[:-1] and data[:1] == b"{" and data[1:2] != b"\n"
                else [json.loads(data)]
            )
        except ValueError:
            return data[:at]
        place = rng.choice(lines)
        while isinstance(place, dict | list) and len(place):
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and len(place[key]) and rng.random() < 0.7:
                place = place[key]
                continue
            place[key] = rng.choice([None, -1, 0, 1.5, "x", "", [], {}, [1], 1e308, True, 10**30, "../../x", "\0"])
            break
        return "\n".join(map(json.dumps, lines)).encode()
    return {"cut": data[:at], "double": data + data, "junk": rng.randbytes(64), "zeros": data[:at] + bytes(8) + data[at + 8 :]}.get(
        how, b""
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, its routes, and the same model as Hugging Face's files."""
    folder = tmp_path_factory.mktemp("made")
    flags = ("--set", "data.max_documents=40", "--set", "data.batch_size=2")
    train = call(
        "train", "--preset=tiny", "--data=synthetic", "--steps=2", *flags, f"--workdir={folder / 'run'}", f"--record={folder / 'routes'}"
    )
    assert train.returncode == 0, train.stderr
    assert call("convert", f"--from={folder / 'run'}", f"--to={folder / 'model'}").returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a checkpoint that is passed over
@pytest.mark.parametrize("what", ["run", "routes", "model"])
def test_damaged_files(made, tmp_path, what):
    """Never taken for what they are not: what is read is what was written, or refused. A Hugging Face folder has no checksums; its numbers may differ."""
    whole = {} if what == "model" else {"run": load, "routes": routes}[what](made / what)
    refused = 0
    for case in range(150):
        rng, folder = random.Random(case), tmp_path / str(case)
        shutil.copytree(made / what, folder)
        file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock"))
        file.write_bytes(damaged(file.read_bytes(), rng))
        try:
            found = {"run": load, "routes": routes, "model": model}[what](folder)
        except MoeJaxError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, (case, file, str(error))
        else:
            for name in whole:
                np.testing.assert_array_equal(found[name], whole[name], err_msg=f"case {case}, {file}")
        shutil.rmtree(folder)
    assert refused > 30


def load(folder):
    from moe_jax.paths import flatten as by_path
    from moe_jax.train.saved import load_model

    return {path: np.asarray(leaf) for path, leaf in by_path(load_model(folder, step=2).params).items()}


def routes(folder):
    reader = mj.TraceReader(folder)
    reader.verify()
    return {f"{step}/{name}": getattr(reader.read(step), name) for step in reader.steps for name in ("ids", "layer_index")}


def model(folder):
    mj.load_hf(folder)
    return {}
