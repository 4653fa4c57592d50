"""Chat templates: what stands beside a tokenizer, rendered in a sandbox; anything wrong is one clear line."""

import json

import pytest

from moe_jax.errors import ConfigError, DataError
from moe_jax.train import sources, tokenizers
from moe_jax.train.chat import Chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi {{ 7 * 7 }}"}]


def beside(folder, config=None, generation=None, template=None):
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        if value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Chat.beside(folder / "tokenizer.json")


@pytest.mark.parametrize(
    "config, template",
    [
        ({"chat_template": TEMPLATE, "bos_token": "<s>"}, None),
        (
            {
                "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}],
                "bos_token": {"content": "<s>"},
            },
            None,
        ),
        ({"bos_token": "<s>", "chat_template": "older"}, TEMPLATE),
    ],
)
def test_a_conversation_becomes_a_prompt(tmp_path, config, template):
    """A message's text is data: braces in it are not run."""
    assert beside(tmp_path, config, template=template).render(MESSAGES) == "<s><user>Hi {{ 7 * 7 }}<answer>"


@pytest.mark.parametrize("stops, wanted", [(2, (2,)), ([2, 5], (2, 5))])
def test_the_tokens_that_end_an_answer(tmp_path, stops, wanted):
    assert beside(tmp_path, generation={"eos_token_id": stops}).stops == wanted


def test_without_files_there_is_no_template(tmp_path):
    chat = beside(tmp_path)
    assert chat == Chat()
    with pytest.raises(ConfigError, match="no chat template; leave --chat out"):
        chat.render(MESSAGES)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_one_line(template, message):
    with pytest.raises(DataError, match=message) as caught:
        Chat(template).render(MESSAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, generation",
    [("{", None), ("[]", None), (None, {"eos_token_id": "two"}), ({"chat_template": 3}, None), (None, '{"eos_token_id": [1.5]}')],
)
def test_damaged_files_are_named(tmp_path, config, generation):
    with pytest.raises(DataError, match="cannot read .*json: |of another kind"):
        beside(tmp_path, config, generation)


def test_what_is_written_is_read(tmp_path):
    chat = Chat(TEMPLATE, (("bos_token", "<s>"), ("eos_token", "</s>")), (2,))
    chat.write(tmp_path)
    assert Chat.beside(tmp_path / "tokenizer.json") == chat


def test_a_tokenizer_is_saved_with_its_chat(tmp_path):
    backend = tokenizers.train_bpe(300, ["one two three"] * 9)
    home, copy = tmp_path / "home", tmp_path / "copy"
    home.mkdir(), copy.mkdir()
    (home / "tokenizer.json").write_text(backend.to_str())
    Chat(TEMPLATE, (("bos_token", "<s>"),), (0,)).write(home)
    tokenizers.save(str(home / "tokenizer.json"), copy)
    first, second = (tokenizers.load(str(folder / "tokenizer.json")) for folder in (home, copy))
    assert first.fingerprint == second.fingerprint and second.chat == first.chat and second.chat.stops == (0,)


def test_smollm2_has_its_template():
    if not sources.is_cached(sources.CATALOGUE["smollm2_tokenizer"]):
        pytest.skip("SmolLM2 is not in the cache; python -m launch.data --fetch=smollm2_tokenizer")
    chat = tokenizers.load("smollm2").chat
    assert chat.stops == (2,) and dict(chat.words)["eos_token"] == "<|im_end|>"
    assert chat.render(MESSAGES).endswith("<|im_start|>user\nHi {{ 7 * 7 }}<|im_end|>\n<|im_start|>assistant\n")
