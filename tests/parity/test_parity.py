"""The library against transformers' own classes: logits, router logits, loss, gradients; and what is saved, loaded there.

The stored checkpoints need nothing; all cases are made on the spot where torch and transformers are installed (BUILD.md).
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import paths
from moe_jax.hf.config import family_of
from moe_jax.hf.load import load_hf
from moe_jax.hf.names import targets
from moe_jax.hf.save import save_hf
from moe_jax.hf.shards import find_tensors

STORED = Path(__file__).parent / "stored"
ORACLE = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
needs_oracle = pytest.mark.skipif(not ORACLE, reason="torch and transformers are not installed")


def checkpoints():
    spec = importlib.util.spec_from_file_location("checkpoints", Path(__file__).parent / "checkpoints.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


CASES = [pytest.param(name, "stored", id=f"{name}-stored") for name in checkpoints().STORED]
CASES += [pytest.param(name, "made", id=f"{name}-made", marks=needs_oracle) for name in checkpoints().CASES]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """folder(case, how): the stored checkpoint, or one made now."""
    root = tmp_path_factory.mktemp("made")

    def folder(case: str, how: str) -> Path:
        if how == "stored":
            return STORED / case
        if not (root / case).is_dir():
            checkpoints().make(case, root / case)
        return root / case

    return folder


def close(found, wanted, relative, what):
    """To a part of the largest value: a small number beside large ones has the rounding of the sums that made it."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    worst = np.abs(found - wanted).max() / (np.abs(wanted).max() or 1.0)
    assert worst <= relative, f"{what} differs by {worst:.1e} of its largest value"


@pytest.mark.parametrize("case, how", CASES)
def test_float32_is_equal_to_1e_5(case, how, made):
    folder = made(case, how)
    model, params = load_hf(folder)
    reference = dict(np.load(folder / "reference.npz"))
    tokens = jnp.asarray(reference["tokens"], jnp.int32)

    def loss(params):
        out = model.apply(params, tokens, capture=("router_logits",))
        total = -jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, :-1]), tokens[:, 1:, None], -1)
        return total.mean(), out

    (value, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(out.logits, reference["logits"], 1e-5, "logits")
    close(value, reference["loss"], 1e-5, "loss")
    if model.config.moe_layers:
        close(out.router_logits, reference["router_logits"], 1e-5, "router logits")
    flat, wanted = paths.flatten(gradient), targets(model, family_of(model.config))
    named = [name for name in reference if name.startswith("gradient ")]
    assert len(named) > 4
    for name in named:
        target = wanted[name.removeprefix("gradient ")]
        found = flat[target.path][target.index]
        close(found.T if target.transposed else found, reference[name], 1e-5, name)


@pytest.mark.parametrize("case, how", CASES)
def test_bfloat16_is_close(case, how, made):
    """As near to float32 as transformers in bfloat16 is, half as far again at most, in the median token: near a tie a rounded router takes another expert."""
    folder = made(case, how)
    model, params = load_hf(folder, dtype="bfloat16")
    reference = dict(np.load(folder / "reference.npz"))
    logits = np.asarray(jax.jit(model.apply)(params, jnp.asarray(reference["tokens"], jnp.int32)).logits, np.float64)
    ours, theirs = (np.median(np.abs(found - reference["logits"]).max(-1)) for found in (logits, reference["logits_bfloat16"]))
    assert 0 < ours <= 1.5 * theirs, (ours, theirs)
    assert ours <= 0.05 * np.abs(reference["logits"]).max()


@pytest.mark.parametrize("case, how", CASES)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 5_000])
def test_a_round_trip_keeps_every_bit(case, how, shard_bytes, made, tmp_path):
    model, params = load_hf(made(case, how))
    save_hf(model, params, tmp_path / "saved", shard_bytes=shard_bytes)
    first, second = find_tensors(made(case, how)), find_tensors(tmp_path / "saved")
    assert first.keys() == second.keys() and len({tensor.file for tensor in second.values()}) == (
        1 if shard_bytes > 5_000 else len({t.file for t in second.values()})
    )
    for name, tensor in first.items():
        assert second[name].read().tobytes() == tensor.read().tobytes(), name
    again, other = load_hf(tmp_path / "saved")
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, other))


@needs_oracle
@pytest.mark.parametrize("case", checkpoints().CASES)
def test_transformers_loads_what_is_saved(case, made, tmp_path):
    import torch
    import transformers

    folder = made(case, "made")
    model, params = load_hf(folder)
    save_hf(model, params, tmp_path / "saved", shard_bytes=20_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    reference = dict(np.load(folder / "reference.npz"))
    with torch.no_grad():
        logits = theirs.float().eval()(torch.from_numpy(reference["tokens"])).logits.numpy()
    close(logits, reference["logits"], 1e-6, "logits")
