"""`launch.convert`, `launch.generate`, and the other commands on a Hugging Face folder: from a stored checkpoint to a trained mixture and back."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from launch.convert import _save_tokenizer as save_tokenizer
from moe_jax.generate import Generated, Sampler
from moe_jax.hf.shards import find_tensors
from moe_jax.trace_store import read_trace
from moe_jax.train import tokenizers
from moe_jax.train.data import DataConfig
from moe_jax.train.saved import load_model
from tests.launch.here import call

STORED = Path(__file__).parents[1] / "parity" / "stored"


def command(module: str, *flags: str, code: int = 0):
    done = call(module, *flags)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small dense model with a tokenizer of its own, as a Hugging Face folder."""
    from moe_jax.hf.save import save_hf
    from moe_jax.model import Model, ModelConfig

    folder = tmp_path_factory.mktemp("models") / "dense"
    config = ModelConfig.preset("qwen3_tiny", num_experts=0, experts_per_token=1, vocab_size=300, d_model=32, num_layers=2)
    save_hf(Model(config), Model(config).init(0), folder)
    backend = tokenizers.train_bpe(300, ["the capital of France is Paris", "water boils at one hundred degrees"] * 20)
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def mixture(dense, tmp_path_factory):
    """That model as a mixture, and what the command said."""
    folder = tmp_path_factory.mktemp("models") / "mixture"
    flags = ("--upcycle_experts=4", "--experts_per_token=2", "--expert_noise=0.01")
    return folder, command("convert", f"--from={dense}", f"--to={folder}", *flags).stdout


@pytest.mark.slow
def test_a_dense_model_becomes_a_mixture_that_trains_and_goes_back(dense, mixture, tmp_path):
    (mixture, told), run, back = mixture, tmp_path / "run", tmp_path / "back"
    assert "Qwen3MoeForCausalLM" in told and json.loads((mixture / "config.json").read_text())["num_experts"] == 4
    assert (mixture / "tokenizer.json").read_text() == (dense / "tokenizer.json").read_text()
    small = (
        "--set",
        "data.seq_len=32",
        "--set",
        "data.batch_size=2",
        "--set",
        "data.max_documents=40",
        "--set",
        "data.eval_windows=4",
        "--set",
        "eval_batch=4",
    )
    command("train", f"--start={mixture}", "--data=synthetic", "--steps=2", f"--workdir={run}", *small)
    assert load_model(run).run.data.tokenizer == str(mixture / "tokenizer.json")
    command("convert", f"--from={run}", f"--to={back}", "--dtype=bfloat16")
    assert (back / "tokenizer.json").read_text() == (mixture / "tokenizer.json").read_text()  # the run's
    before, after = find_tensors(mixture), find_tensors(back)
    assert before.keys() == after.keys() and {str(tensor.dtype) for tensor in after.values()} == {"bfloat16"}
    moved = [name for name in before if not np.array_equal(before[name].read().astype(after[name].dtype), after[name].read())]
    assert any("experts" in name for name in moved) and any("gate.weight" in name for name in moved)


def test_the_pace_counts_the_sequences_that_go_on(monkeypatch):
    """A second for each step; of two sequences one stops after the fourth token and the other after the sixth."""
    clock = SimpleNamespace(now=0.0)

    def sample(self, params, prompts, sampling, noise, draw, progress):
        for step, going in enumerate((2, 2, 2, 2, 1, 1, 0), 1):
            progress(step, going)
            clock.now += 1
        tokens, lengths = np.full((2, 8), 97), np.array([1, 1])
        return Generated(tokens, lengths, lengths + (4, 6), np.zeros((2, 8), np.float32), np.ones(2, bool), None)

    monkeypatch.setattr(Sampler, "__call__", sample)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    told = command("generate", "--model=qwen3_tiny", "--tokenizer=bytes", "--prompt=a", "--prompt=b").stderr
    assert "10 tokens of 2 sequences in 7.0 s, 1.6 tokens/s after compiling" in told  # 2 + 2 + 2 + 1 + 1 in five seconds


def test_a_dry_run_shows_the_config_that_would_be_written():
    text = command("convert", "--from=qwen3_tiny", "--dtype=bfloat16", "--dry_run").stdout
    assert json.loads(text[: text.index("\n}") + 2])["torch_dtype"] == "bfloat16"


def test_a_tokenizer_that_was_trained_with_a_run_goes_along(tmp_path, monkeypatch, capsys):
    """Of two in the cache, each is found that was trained on the run's own documents; a text that is gone is told."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    paragraphs = [
        f"the {word} of number {number} is {'a' * number} {word}" for number, word in enumerate(["sea", "hill", "lake", "moor"] * 3)
    ]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))

    def save(count):
        (tmp_path / str(count)).mkdir(exist_ok=True)
        data = DataConfig(str(tmp_path / "text.txt#paragraphs"), "bpe:300", max_documents=count)
        save_tokenizer(SimpleNamespace(tokenizer=None, run=SimpleNamespace(data=data)), tmp_path / str(count))
        return capsys.readouterr().err

    assert not save(6) and not save(12)
    found = {count: (tmp_path / str(count) / "tokenizer.json").read_text() for count in (6, 12)}
    assert found[6] != found[12] and json.loads(found[6])["model"]["type"] == "BPE"
    (tmp_path / "text.txt").unlink()
    assert save(6).startswith("no tokenizer.json: ")


def test_generation_continues_prompts_and_records_routes(mixture, tmp_path):
    routes, flags = tmp_path / "routes", (f"--model={mixture[0]}", "--prompt=the capital", "--prompt=water", "--max_tokens=5")
    first = command("generate", *flags, f"--routes={routes}")
    texts = first.stdout.split("\n\n")
    assert texts[0].startswith("the capital") and texts[1].startswith("water") and "10 tokens of 2 sequences" in first.stderr
    trace = read_trace(routes)
    assert trace.ids.shape[0] == 2 and trace.ids.shape[3] == 2
    other = ("--chat", "--noise=experts=relative:0.9", "--temperature=2", "--top_p=0.99", "--seed=1")
    again = command("generate", *flags, *other).stdout
    assert again == command("generate", *flags, *other).stdout and again.startswith("[the capital]")


def test_sensitivity_and_record_take_a_hugging_face_folder(tmp_path):
    model = STORED / "mixtral"
    shown = command("sensitivity", f"--model={model}", "--noise=relative:0.05", "--data=synthetic", "--dry_run").stdout
    assert f'"model": "{model}"' in shown
    told = command("record", f"--model={model}", "--data=synthetic", "--steps=2", "--dry_run").stdout
    assert "2 routing layers, 2 of 4 experts" in told


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["convert", "--from=quick", "--to=x"], 2, "no model of Hugging Face that is known here has gated=False, rope_style='interleaved'"),
        pytest.param(
            ["convert", "--from=qwen3_tiny", "--to=x", "--upcycle_experts=4"], 2, "16 experts in 4 layers already", marks=pytest.mark.slow
        ),
        pytest.param(["convert", "--from=nowhere", "--to=x"], 2, "no model 'nowhere'", marks=pytest.mark.slow),
        pytest.param(["convert", "--from=qwen3_tiny"], 2, "--to is needed", marks=pytest.mark.slow),
        pytest.param(
            ["convert", "--from=qwen3_tiny", "--dense_layers=one", "--upcycle_experts=2"],
            2,
            "--dense_layers takes layer numbers",
            marks=pytest.mark.slow,
        ),
        (["generate", "--model=qwen3_tiny", "--prompt=x"], 2, "has no tokenizer of its own"),
        (["generate", "--model=qwen3_tiny", "--prompt=x", "--noise=experts=relative:0.1:phases=train"], 2, "does not act while sampling"),
        pytest.param(["generate", "--model=qwen3_tiny"], 2, "give --prompt=TEXT", marks=pytest.mark.slow),
        pytest.param(
            ["generate", "--model=qwen3_tiny", "--prompts=/nowhere"], 3, "--prompts=/nowhere cannot be read", marks=pytest.mark.slow
        ),
        (["generate", "--model=qwen3_tiny", "--prompt=x", "--tokenizer=bytes", "--max_tokens=500"], 2, "max_seq_len=128 tokens, got 501"),
        pytest.param(
            ["generate", "--model=qwen3_tiny", "--prompt=x", "--tokenizer=bytes", "--chat"], 2, "no chat template", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_is_one_line(flags, code, message):
    error = command(*flags, code=code).stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
