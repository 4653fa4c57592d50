"""`launch.record` and `--replay`: a route recorded by one command is taken by another, or refused in one line."""

import json

import numpy as np
import pytest

from moe_jax import TraceReader
from moe_jax.platforms import tracing_for
from moe_jax.train.data import build
from moe_jax.train.saved import load_model
from tests.launch.here import call

SMALL = ("--data=synthetic", "--set", "data.batch_size=2", "--set", "data.max_documents=40")


def test_recorded_routes_are_replayed_and_other_text_is_refused(tmp_path):
    routes, text = str(tmp_path / "routes"), [flag.replace("data.", "") for flag in SMALL]
    recorded = call("record", "--model=tiny", "--steps=3", f"--out={routes}", *text)
    assert recorded.returncode == 0 and "3 steps of 2 x 64 tokens" in recorded.stdout, recorded.stderr
    assert "4 bytes of experts a token" in recorded.stdout  # 2 layers, top-2, a byte each

    train = ("--preset=tiny", "--steps=3", "--noise=router_gemm=relative:0.5", f"--replay={routes}", *SMALL)
    held = call("train", *train, f"--workdir={tmp_path / 'held'}")
    assert held.returncode == 0, held.stderr
    assert json.loads((tmp_path / "held" / "versions.json").read_text())["device"].endswith(" (cpu)")
    rows = (tmp_path / "held" / "metrics.jsonl").read_text()
    assert '"replay/live_rows": 0.0' in rows and '"router/flips"' in rows and '"router/flips_predicted"' in rows

    other = call("train", *train, "--seed=1", f"--workdir={tmp_path / 'other'}")
    assert other.returncode == 4 and "Traceback" not in other.stderr and other.stderr.strip().splitlines()[-1].startswith("error: "), (
        other.stderr
    )


@pytest.mark.slow
def test_a_mesh_records_the_routes_of_one_device(tmp_path):
    text, found = [flag.replace("data.", "") for flag in SMALL], []
    for name, mesh in (("one", ()), ("eight", ("--mesh=data=2,expert=4",))):
        done = call("record", "--model=tiny", "--steps=2", "--noise=matmuls=relative:0.05", f"--out={tmp_path / name}", *mesh, *text)
        assert done.returncode == 0, done.stderr
        reader = TraceReader(tmp_path / name)
        found.append([reader.read(step).ids for step in reader.steps])
    assert len(found[0]) == 2
    np.testing.assert_array_equal(*found)


def test_what_would_be_recorded_of_the_validation_windows():
    """As many batches as there are, however many are asked for; and whether it is a clean pass."""
    text = [flag.replace("data.", "") for flag in SMALL]
    there = len(list(build(load_model("tiny").text("synthetic").replace(batch_size=2, max_documents=40), 0).validation_batches()))
    asked = ("--model=tiny", "--split=validation", "--dry_run", *text)
    for steps, noise, source in ((there - 1, "phases=train", "reference"), (10_000, "phases=eval", "noisy")):
        shown = call("record", *asked, f"--steps={steps}", f"--noise=router_logits=additive:0.1:{noise}")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"{min(steps, there)} steps of 2 x 64 tokens") and f"(source: {source})" in shown.stdout
        assert f"{4 * min(steps, there) * 128 / 1e6:,.1f} MB" in shown.stdout


def test_a_run_that_begins_with_another_reads_its_text(tmp_path):
    """The text, its batches and its words are those of the first run; flags and --set change them, but not what the words mean."""
    words = ("--set", "model.vocab_size=300", "--set", "data.tokenizer=bpe:300", "--set", "data.split=leaky", "--set", "data.seq_len=16")
    small = ("--set", "model.d_model=16", "--set", "model.d_expert=16", "--steps=1")
    first = call("train", "--preset=tiny", *small, *SMALL, *words, f"--workdir={tmp_path / 'first'}")
    assert first.returncode == 0, first.stderr

    def shown(*flags):
        done = call("train", f"--start={tmp_path / 'first'}", "--dry_run", *flags)
        assert done.returncode == 0, done.stderr
        return json.JSONDecoder().raw_decode(done.stdout)[0]["data"]

    own = json.loads((tmp_path / "first" / "config.json").read_text())["data"]
    assert shown() == shown("--data=synthetic") == own and own["batch_size"] == 2 and own["split"] == "leaky"
    assert shown("--set", "data.batch_size=4", "--set", "data.seq_len=8") == own | {"batch_size": 4, "seq_len": 8}
    start = f"--start={tmp_path / 'first'}"
    for module, flags in (("train", [start]), ("record", [f"--model={tmp_path / 'first'}"])):
        refused = call(module, *flags, "--data=wiki", "--dry_run")
        assert refused.returncode == 2 and "on source=wiki its ids would mean other words" in refused.stderr, refused.stderr
    refused = call("train", start, "--set", "data.max_documents=30", "--dry_run")
    assert refused.returncode == 2 and "on max_documents=30 its ids would mean other words" in refused.stderr, refused.stderr


def test_products_are_in_bfloat16_on_an_accelerator_unless_told_otherwise():
    def shown(*flags):
        return json.JSONDecoder().raw_decode(call("train", "--preset=tiny", "--dry_run", *flags).stdout)[0]["model"]["dtypes"]["compute"]

    assert shown() == "float32"
    with tracing_for("gpu"):
        assert shown() == "bfloat16" and shown("--set", "model.dtypes.compute=float32") == "float32"


def test_frozen_gate_stands_in_the_optimizer_table_and_unknown_flags_are_refused(tmp_path):
    shown = call("train", "--preset=tiny", "--freeze=freeze_params,stop_gate_gradient", "--dry_run")
    row = next(line for line in shown.stdout.splitlines() if line.startswith("layers/feed_forward/router"))
    assert "frozen" in row
    assert "1 program for training" in shown.stdout and "FLOPs of training" in shown.stdout
    cases = (["--freeze=gate"], "unknown freeze 'gate'"), (["--mesh=data=8", "--set", "data.batch_size=6", "--dry_run"], "does not divide")
    for flags, said in cases:
        refused = call("train", "--preset=tiny", "--data=synthetic", "--steps=1", f"--workdir={tmp_path}", *flags)
        assert refused.returncode in (2, 4) and said in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
