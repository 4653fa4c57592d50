"""Tasks by name: sums made on the spot, GSM8K from its files, the generators of reasoning-gym."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_jax.errors import ConfigError, DataError, nearest
from moe_jax.rl import rewards
from moe_jax.rl.problems import Language, Problem, Problems, Task, fingerprint, shuffled
from moe_jax.rl.rewards import MARK
from moe_jax.rl.sums import HELD_OUT, chain_sum
from moe_jax.train import texts
from moe_jax.train.tokenizers import Tokenizer

__all__ = ["Language", "Problem", "Task", "load"]

KNOWN = ("chain_sum", "gsm8k", "reasoning_gym")
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'  # verl's, examples/data_preprocess/gsm8k.py


def load(spec: str, tokenizer: Tokenizer | None = None) -> Task:
    """The task that a spec names.

    spec: `chain_sum` or `chain_sum:terms=2+3:largest=29`, in characters of its own unless a tokenizer is given; `gsm8k:PATH`, a folder with
    train.jsonl and test.jsonl (or parquet files whose names begin so), or one such file, of which a part is then held out;
    `reasoning_gym:NAME` with options of that generator, as in reasoning_gym:chain_sum:max_terms=3:size=5000.
    With a tokenizer a question is followed by the instruction to answer after ####, as a conversation where it has a chat template.
    Raises ConfigError (unknown name or option, no tokenizer), DataError (files missing or damaged, library absent, too few problems).
    """
    kind, _, rest = spec.partition(":")
    if kind not in KNOWN:
        raise ConfigError(f"unknown task {kind!r}{nearest(kind, KNOWN)}; known: chain_sum, gsm8k:PATH, reasoning_gym:NAME")
    if kind == "chain_sum":
        parts = (None, None) if tokenizer is None else (_language(tokenizer), _frame(tokenizer))
        return chain_sum(spec, _options(rest, spec), *parts)
    if not rest:
        raise ConfigError(f"{kind} alone names no problems; write {kind}:{'FOLDER' if kind == 'gsm8k' else 'NAME'}")
    if tokenizer is None:
        raise ConfigError(f"{spec} is text and needs a tokenizer")
    if kind == "gsm8k":
        return _split(spec, *_gsm8k(Path(rest).expanduser()), tokenizer)
    return _split(spec, list(_reasoning_gym(spec, *rest.partition(":")[::2])), None, tokenizer)


def _split(spec: str, train: list[Problem], test: list[Problem] | None, tokenizer: Tokenizer) -> Task:
    """A task of questions (in `prompt`, not yet framed), split by a fixed permutation, a repeated question left out.

    Tune, and test where there is none, are taken out of train: 512 problems, or an eighth of fewer than 4,096.
    """
    given = len(train) + len(test or ())
    test = None if test is None else _new(test)
    train = _new(train, test or ())
    train = [train[shuffled(number, len(train), "split")] for number in range(len(train))]
    share = min(HELD_OUT, len(train) // 8)
    if not share or test == []:
        raise DataError(
            f"{spec}: {len(train)} problems to train on and {'no' if test is None else len(test)} others; at least 8 and 1 are needed"
        )
    if test is None:
        test, train = train[:share], train[share:]
    tune, train = train[:share], train[share:]
    language, frame = _language(tokenizer), _frame(tokenizer)

    def framed(problems: list[Problem]) -> Problems:
        # When asked for: a template takes milliseconds.
        return Problems(len(problems), lambda number: replace(problems[number], prompt=frame(problems[number].prompt)))

    rows = [[[one.prompt, one.answer, one.solution] for one in problems] for problems in (train, tune, test)]
    mark = fingerprint("text 1", rows, language.fingerprint)
    repeats = given - len(train) - len(tune) - len(test)
    return Task(spec, framed(train), framed(tune), framed(test), language, mark, repeats=repeats)


def _new(problems: Iterable[Problem], asked: Iterable[Problem] = ()) -> list[Problem]:
    """The first problem of each question that was not asked before."""
    first = {problem.prompt: problem for problem in reversed(list(problems))}
    for problem in asked:
        first.pop(problem.prompt, None)
    return list(first.values())[::-1]


def _frame(tokenizer: Tokenizer) -> Callable[[str], str]:
    """What makes a prompt of a question: the instruction after it, then the chat template, or a new line where there is none."""

    def frame(question: str) -> str:
        content = f"{question} {INSTRUCTION}"
        return tokenizer.chat.render([{"role": "user", "content": content}]) if tokenizer.chat.template else f"{content}\n"

    return frame


def _language(tokenizer: Tokenizer) -> Language:
    """A tokenizer's part of a task. What ends an answer and what ends a document both stop."""
    chat, end = tokenizer.chat, tokenizer.eos_id
    stop = tuple(dict.fromkeys((*chat.stops, *(() if end is None else (end,)))))
    if not stop:
        raise DataError(f"the tokenizer {tokenizer.name} has no token that ends a text; name one, as in {tokenizer.name}#TOKEN")
    mark = fingerprint(tokenizer.fingerprint, chat.template, chat.words, stop, INSTRUCTION)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).tolist()

    return Language(encode, tokenizer.decode, tokenizer.vocab_size, stop, mark)


def _options(text: str, spec: str) -> dict[str, Any]:
    """`key=value:key=value` as a dict; values that are written as whole or decimal numbers become numbers."""
    options = {}
    for part in filter(None, text.split(":")):
        key, _, value = part.partition("=")
        if not (key and value) or key in options:
            raise ConfigError(f"{spec}: {part!r} is not an option; write key=value, each key once, with colons between")
        kind = int if re.fullmatch(r"-?[0-9]{1,18}", value) else float if re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,18}", value) else str
        options[key] = kind(value)
    return options


def _gsm8k(path: Path) -> tuple[list[Problem], list[Problem] | None]:
    """The questions of the train and the test files; of one file, and None. Calculator notes (<<48/2=24>>) stay in the solutions."""
    if not path.is_dir():
        return list(_read(path)), None

    def files(split: str) -> Sequence[Path]:
        own = path / f"{split}.jsonl"
        found = [own] if own.is_file() else sorted(path.glob(f"{split}*.parquet"))
        if not found:
            raise DataError(
                f"no {split}.jsonl and no {split}*.parquet in {path}; take grade_school_math/data of github.com/openai/grade-school-math, "
                "or the folder main of the hub's openai/gsm8k"
            )
        return found

    train, test = files("train"), files("test")
    return [problem for file in train for problem in _read(file)], [problem for file in test for problem in _read(file)]


def _read(path: Path) -> Iterator[Problem]:
    """The checked records of one file."""
    if path.suffix == ".parquet":
        rows = zip(texts.documents(f"{path}#question"), texts.documents(f"{path}#answer"), strict=True)
        for number, (question, answer) in enumerate(rows, 1):
            yield _record({"question": question, "answer": answer}, f"{path}, row {number}")
        return
    if path.suffix != ".jsonl":
        raise DataError(f"{path} is not a folder, and its name does not end in .jsonl or .parquet")
    for record, where in texts.records(path):
        yield _record(record, where)


def _record(row: Any, where: str) -> Problem:
    """The problem of a record {question, answer}: its answer is the number after the last `#### ` of the field `answer`."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with question and answer, got {type(row).__name__}")
    for name in ("question", "answer"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: no text in field {name!r} (it has: {', '.join(row)}); a record needs question and answer")
        if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can write half of a surrogate pair
            raise DataError(f"{where}: field {name!r} holds half of a surrogate pair, which is not text; repair the record")
    _, mark, gold = row["answer"].rpartition(MARK)
    gold = gold.replace(",", "").strip()
    if not mark or not rewards.same_number(gold, gold):
        raise DataError(f"{where}: the answer must end in '{MARK}' and a number; it ends in {row['answer'][-40:]!r}")
    return Problem(row["question"].strip(), gold, row["answer"].strip())


def _reasoning_gym(spec: str, name: str, options: str) -> Iterator[Problem]:
    """`size` (10,000) draws of a generator with `seed` (0). Its own scorers are not used: some raise, or reward junk."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise DataError(f"{spec} needs the library reasoning-gym ({error}): pip install -e '.[rl]'") from None
    if name not in DATASETS:
        raise ConfigError(f"{spec}: reasoning-gym has no generator {name!r}{nearest(name, DATASETS)}; it has {len(DATASETS)}")
    try:
        items = create_dataset(name, **{"size": 10_000, "seed": 0} | _options(options, spec))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{spec}: reasoning-gym refuses these options: {str(error)[:200]}") from None
    for number in range(len(items)):
        item = items[number]
        answer, work = item["answer"], item["metadata"].get("answer_cot")
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(f"{spec}: problem {number} has no one right text (its answer is {answer!r}); take another generator")
        worked = isinstance(work, str) and rewards.score(work, answer) == 1
        yield Problem(item["question"].strip(), answer.strip(), work.strip() if worked else MARK + answer.strip())
