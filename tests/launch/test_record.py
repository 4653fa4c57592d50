"""`launch.record` and `--replay`: a route recorded by one command is taken by another, or refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
SMALL = ("--data=synthetic", "--set", "data.batch_size=2", "--set", "data.max_documents=40")


def command(module: str, *flags: str):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *flags], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_recorded_routes_are_replayed_and_other_text_is_refused(tmp_path):
    routes, text = str(tmp_path / "routes"), [flag.replace("data.", "") for flag in SMALL]
    recorded = command("record", "--model=tiny", "--steps=3", f"--out={routes}", *text)
    assert recorded.returncode == 0 and "3 steps of 2 x 64 tokens" in recorded.stdout, recorded.stderr
    assert "4 bytes of experts a token" in recorded.stdout  # 2 layers, top-2, a byte each

    train = ("--preset=tiny", "--steps=3", "--noise=router_gemm=relative:0.5", f"--replay={routes}", *SMALL)
    held = command("train", *train, f"--workdir={tmp_path / 'held'}")
    assert held.returncode == 0, held.stderr
    assert json.loads((tmp_path / "held" / "versions.json").read_text())["device"].endswith(" (cpu)")
    rows = (tmp_path / "held" / "metrics.jsonl").read_text()
    assert '"replay/live_rows": 0.0' in rows and '"router/flips"' in rows and '"router/flips_predicted"' in rows

    other = command("train", *train, "--seed=1", f"--workdir={tmp_path / 'other'}")
    assert other.returncode == 4 and "Traceback" not in other.stderr and other.stderr.strip().splitlines()[-1].startswith("error: "), (
        other.stderr
    )


def test_a_run_that_begins_with_another_reads_its_text(tmp_path):
    """The text, its batches and its words are those of the first run; flags and --set change them, but not what the words mean."""
    words = ("--set", "model.vocab_size=300", "--set", "data.tokenizer=bpe:300", "--set", "data.split=leaky", "--set", "data.seq_len=16")
    small = ("--set", "model.d_model=16", "--set", "model.d_expert=16", "--steps=1")
    first = command("train", "--preset=tiny", *small, *SMALL, *words, f"--workdir={tmp_path / 'first'}")
    assert first.returncode == 0, first.stderr

    def shown(*flags):
        done = command("train", f"--start={tmp_path / 'first'}", "--dry_run", *flags)
        assert done.returncode == 0, done.stderr
        return json.JSONDecoder().raw_decode(done.stdout)[0]["data"]

    own = json.loads((tmp_path / "first" / "config.json").read_text())["data"]
    assert shown() == shown("--data=synthetic") == own and own["batch_size"] == 2 and own["split"] == "leaky"
    assert shown("--set", "data.batch_size=4", "--set", "data.seq_len=8") == own | {"batch_size": 4, "seq_len": 8}
    for module, flag in (("train", f"--start={tmp_path / 'first'}"), ("record", f"--model={tmp_path / 'first'}")):
        refused = command(module, flag, "--data=wiki", "--dry_run")
        assert refused.returncode == 2 and "on source=wiki its ids would mean other words" in refused.stderr, refused.stderr


def test_frozen_gate_stands_in_the_optimizer_table_and_unknown_flags_are_refused(tmp_path):
    shown = command("train", "--preset=tiny", "--freeze=freeze_params,stop_gate_gradient", "--dry_run")
    row = next(line for line in shown.stdout.splitlines() if line.startswith("layers/feed_forward/router"))
    assert "frozen" in row
    for flags, said in ((["--freeze=gate"], "unknown freeze 'gate'"),):
        refused = command("train", "--preset=tiny", "--data=synthetic", "--steps=1", f"--workdir={tmp_path}", *flags)
        assert refused.returncode in (2, 4) and said in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
