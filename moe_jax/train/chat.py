"""What a tokenizer's folder says besides its words: the template that makes a prompt of a conversation, and the tokens that end an answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_jax.errors import ConfigError, DataError
from moe_jax.files import read_object

FILES = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Chat:
    """How to talk to a model."""

    template: str = ""  # in Jinja; "": there is none
    words: tuple[tuple[str, str], ...] = ()  # bos_token and the like, as the template calls them
    stops: tuple[int, ...] = ()  # tokens that end an answer

    @classmethod
    def beside(cls, tokenizer: Path) -> "Chat":
        """What tokenizer_config.json, generation_config.json and chat_template.jinja beside a tokenizer.json say; each may be absent. Raises DataError."""
        config, generation = (read_object(tokenizer.parent / name, DataError) or {} for name in FILES[:2])
        template, own = config.get("chat_template") or "", tokenizer.parent / FILES[2]
        if isinstance(template, list):  # several by name
            template = next((one.get("template", "") for one in template if isinstance(one, dict) and one.get("name") == "default"), "")
        if own.is_file():
            template = own.read_text(encoding="utf-8")
        words = {
            name: value.get("content") if isinstance(value, dict) else value for name, value in config.items() if name.endswith("_token")
        }
        stops = generation.get("eos_token_id", [])
        stops = stops if isinstance(stops, list) else [stops]
        if not isinstance(template, str) or not all(isinstance(stop, int) for stop in stops):
            raise DataError(f"the chat template or eos_token_id beside {tokenizer} is of another kind than text and whole numbers")
        return cls(template, tuple((name, word) for name, word in words.items() if isinstance(word, str)), tuple(stops))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, up to where the answer begins. The template runs in Jinja's sandbox. Raises ConfigError, DataError."""
        if not self.template:
            raise ConfigError("this tokenizer has no chat template; leave --chat out, or put chat_template.jinja beside its tokenizer.json")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise DataError("a chat template needs jinja2: pip install 'moe-jax[hf]'") from None

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            return environment.from_string(self.template).render(messages=list(messages), add_generation_prompt=True, **dict(self.words))
        except Exception as error:  # whatever a template does
            raise DataError(f"the chat template does not take this conversation: {type(error).__name__}: {str(error)[:200]}") from None

    def write(self, folder: Path) -> None:
        """The files that `beside` reads."""
        (folder / FILES[0]).write_text(json.dumps({**dict(self.words), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
        if self.stops:
            (folder / FILES[1]).write_text(json.dumps({"eos_token_id": list(self.stops)}, indent=2) + "\n")
        if self.template:
            (folder / FILES[2]).write_text(self.template, encoding="utf-8")
