"""Tasks: the splits share nothing, the reference solutions score 1, and every bad file is one clear line."""

import json
import os
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_jax.errors import ConfigError, DataError
from moe_jax.rl import rewards, sums, tasks
from moe_jax.rl.problems import Problem, shuffled
from moe_jax.train import tokenizers
from moe_jax.train.chat import Chat

BYTES = tokenizers.load("bytes")
CHAT = replace(BYTES, chat=Chat("<user>{{ messages[0]['content'] }}<answer>", (), (10,)))
SUMS = tasks.load("chain_sum")
GSM8K = os.environ.get("GSM8K", "")


def evaluated(prompt: str) -> int:
    """What the expression of a prompt comes to, by another program than the one under test."""
    return eval(prompt.removesuffix("="), {"__builtins__": {}})


# ------------------------------------------------------------------------------------------------------------------ permutation


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100, 1800])
def test_shuffled_is_a_permutation(count):
    places = [shuffled(number, count, "a") for number in range(count)]
    assert sorted(places) == list(range(count))
    if count >= 100:
        assert places != [shuffled(number, count, "b") for number in range(count)]
        assert sum(place == number for number, place in enumerate(places)) < 10
        steps = Counter(np.diff(places).tolist())
        assert max(steps.values()) < count / 10  # not an arithmetic progression
        assert abs(np.corrcoef(np.arange(count), places)[0, 1]) < 0.25


def test_shuffled_is_the_same_everywhere():
    assert [shuffled(number, 108_000, "chain_sum 3 29") for number in range(4)] == [35670, 55591, 15620, 61855]


# ------------------------------------------------------------------------------------------------------------------ sums


@pytest.mark.parametrize(
    "number, terms, expected",
    [
        (0, 2, ("0+0=", "", "0")),
        (17 + 30 * (0 + 2 * 5), 2, ("17+5=", "", "22")),
        (17 + 30 * (0 + 2 * (5 + 30 * (1 + 2 * 32 % 60))), 3, ("17+5-2=", "22-2\n", "20")),
        (5 + 30 * (1 + 2 * (29 + 30 * (1 + 2 * 8))), 3, ("5-29-8=", "-24-8\n", "-32")),
        (1 + 30 * (2 * (2 + 30 * (2 * (3 + 30 * (1 + 2 * 4))))), 4, ("1+2+3-4=", "3+3-4\n6-4\n", "2")),
    ],
)
def test_expression(number, terms, expected):
    assert sums.expression(number, terms, 29) == expected


@pytest.mark.parametrize("terms, largest", [(2, 29), (3, 9), (4, 2), (5, 1)])
def test_expressions_are_all_and_different(terms, largest):
    count = (largest + 1) ** terms * 2 ** (terms - 1)
    made = [sums.expression(number, terms, largest) for number in range(count)]
    assert len({prompt for prompt, _, _ in made}) == count
    for prompt, working, answer in made:
        assert str(evaluated(prompt)) == answer
        assert all(str(evaluated(line)) == answer for line in working.split())
        assert working.count("\n") == terms - 2 and working == "".join(f"{line}\n" for line in working.split())


def test_splits_of_sums():
    """Every problem of both spaces is in exactly one split; only the sums of two terms in train come again."""
    held = {split: [problem.prompt for problem in getattr(SUMS, split)] for split in ("tune", "test")}
    assert [len(set(prompts)) for prompts in held.values()] == [512, 512]
    assert not set(held["tune"]) & set(held["test"])
    for prompts in held.values():
        assert Counter(map(terms_of, prompts)) == {2: 256, 3: 256} and terms_of(prompts[0]) != terms_of(prompts[1])
    assert len(SUMS.train) == 2 * (108_000 - 512)
    pairs = [SUMS.train[2 * number].prompt for number in range(1288)]
    assert set(map(terms_of, pairs)) == {2} and len(set(pairs)) == 1288
    assert [SUMS.train[2 * (1288 + number)].prompt for number in range(10)] == pairs[:10]
    triples = [SUMS.train[1 + 2 * number].prompt for number in range(107_488)]
    assert set(map(terms_of, triples)) == {3} and len(set(triples)) == 107_488
    assert not (set(pairs) | set(triples)) & {*held["tune"], *held["test"]}


def terms_of(prompt: str) -> int:
    return 1 + sum(prompt.count(sign) for sign in "+-")


def test_draws_look_like_the_space():
    """In the middle of the train split as many minus signs and small numbers as the whole space has: s.e. 0.008 of 4,000 draws of one half."""
    prompts = [problem.prompt for problem in SUMS.train[100_000:108_000]]
    for terms in (2, 3):
        some = [prompt.removesuffix("=") for prompt in prompts if terms_of(prompt) == terms]
        first, last = ([int(one.replace("-", "+").split("+")[place]) for one in some] for place in (0, -1))
        assert len(some) == 4000
        for share in (np.mean(["-" in one[-3:] for one in some]), np.mean(np.array(first) < 15), np.mean(np.array(last) < 15)):
            assert abs(share - 0.5) < 0.04


def test_indexing():
    train = SUMS.train
    assert train[-1] == train[len(train) - 1] == train[np.int64(len(train) - 1)] and train[5:8] == [train[5], train[6], train[7]]
    for number in (len(train), -len(train) - 1):
        with pytest.raises(IndexError, match=f"problem {number} of 214976"):
            train[number]
    with pytest.raises(TypeError):
        train["0"]
    assert list(SUMS.tune) == [SUMS.tune[number] for number in range(512)]


def test_characters():
    assert (SUMS.vocab_size, SUMS.stop) == (18, (1,))
    assert SUMS.encode("0+9-\n") == [2, 12, 11, 13, 17]
    assert SUMS.decode(SUMS.encode(sums.ALPHABET)) == sums.ALPHABET and sorted(SUMS.encode(sums.ALPHABET)) == list(range(2, 18))
    assert SUMS.decode([2, 0, 3, 1, 18, -1]) == "0<pad>1<eos><unknown><unknown>"
    with pytest.raises(DataError, match="'x' is not one of the 16 characters"):
        SUMS.encode("1x")


def test_reference_solutions_of_sums():
    for problem in [*SUMS.tune, *SUMS.test, *SUMS.train[50_000:53_000]]:
        assert problem.answer == str(evaluated(problem.prompt))
        shown = SUMS.demonstration(problem, seed=0)
        assert SUMS.decode(shown) == problem.solution + "<eos>" and len(shown) <= 18 and len(SUMS.encode(problem.prompt)) <= 9
        assert SUMS.score(problem, shown) == 1 and SUMS.score(problem, [*shown, 5, 1]) == 1
        assert SUMS.score(problem, shown[:-1]) == 0  # cut off before the stop token
        assert SUMS.score(replace(problem, answer=str(int(problem.answer) + 1)), shown) == 0


def test_imperfect_demonstrations():
    """Half of the sums of three terms without working, a fifth of all wrong; s.e. 0.006 and 0.01 of 4,000 and 2,000."""
    some = SUMS.train[20_000:24_000]
    shown = [SUMS.decode(SUMS.demonstration(problem, 3, imperfect=True)[:-1]) for problem in some]
    right = np.array([SUMS.score(problem, [*SUMS.encode(text), 1]) for problem, text in zip(some, shown, strict=True)])
    three = np.array([terms_of(problem.prompt) == 3 for problem in some])
    direct = np.array([text.startswith("#") for text in shown])
    assert abs(right.mean() - 0.8) < 0.03 and abs(right[three].mean() - 0.8) < 0.04
    assert direct[~three].all() and abs(direct[three].mean() - 0.5) < 0.05
    assert abs(right[three & direct].mean() - right[three & ~direct].mean()) < 0.06  # the two faults are independent
    off = Counter(int(text.split("#### ")[1]) - int(problem.answer) for problem, text in zip(some, shown, strict=True))
    assert set(off) == {0, 1, -1, 2, -2, 10, -10} and min(off.values()) > 90
    for problem, text in zip(some, shown, strict=True):
        assert text.startswith("#") or text.split("####")[0] == problem.solution.split("####")[0]


def test_demonstrations_are_determined():
    some = SUMS.train[:400]
    made = [[SUMS.demonstration(problem, seed, imperfect=True) for problem in some] for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    again = tasks.load("chain_sum")
    assert again.train[:400] == some and again.fingerprint == SUMS.fingerprint
    assert SUMS.demonstration(Problem("1+1=", "2"), 0) == [*SUMS.encode("#### 2"), 1]  # no worked solution


def test_sums_are_the_same_everywhere():
    """Values of one machine, so that another one that draws other problems says so."""
    assert [problem.prompt for problem in SUMS.test[:4]] == ["21+9=", "0-24-9=", "18+2=", "1-26+15="]
    assert SUMS.decode(SUMS.demonstration(SUMS.test[1], 0, imperfect=True)) == "-24-9\n#### -33<eos>"
    assert SUMS.fingerprint.startswith("3a03c7470a818a8a")


@pytest.mark.parametrize(
    "response", [[], [1], [0] * 50, [17] * 50, [15] * 10_000, [2] * 10_000, [18], [-1], [10**12], [-(10**12), 1], [5, 99, 1], [1, 99, -5]]
)
def test_hostile_responses(response):
    for one in (response, np.array(response, np.int64)):
        assert SUMS.score(SUMS.test[0], one) == 0
        assert tasks.load("chain_sum", BYTES).score(SUMS.test[0], one) == 0


def test_padding_is_no_answer():
    problem = Problem("1+1=", "2")
    marked = SUMS.encode("#### ")
    assert SUMS.score(problem, [*marked, 4, 1, 0, 0]) == 1
    assert SUMS.score(Problem("9+9=", "18"), [*marked, 3, 0, 10, 1]) == 0


def test_options_of_sums():
    task = tasks.load("chain_sum:terms=3:largest=9")
    assert set(map(terms_of, (problem.prompt for problem in task.test))) == {3}
    assert len({problem.prompt for split in (task.train, task.tune, task.test) for problem in split}) == len(task.train) + 1024 == 4000
    three = tasks.load("chain_sum:terms=2+3+4:largest=19")
    assert Counter(terms_of(problem.prompt) for problem in three.tune) == {2: 171, 3: 171, 4: 170}
    prompts = [{problem.prompt for problem in split} for split in (three.train[:3000], three.tune, three.test)]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    assert (
        len({tasks.load(spec).fingerprint for spec in ("chain_sum", "chain_sum:largest=30", "chain_sum:terms=3", "chain_sum:terms=3+2")})
        == 4
    )
    assert len(tasks.load("chain_sum:terms=5:largest=999").train) == 16 * 10**15 - 1024
    assert tasks.load("chain_sum:largest=999:terms=5").train[10**15].answer.lstrip("-").isdigit()


@pytest.mark.parametrize(
    "spec, words",
    [
        ("chain_sums", r"unknown task 'chain_sums' \(did you mean 'chain_sum'\?\); known: chain_sum, gsm8k:PATH, reasoning_gym:NAME"),
        ("", "unknown task ''"),
        ("gsm8k", "write gsm8k:FOLDER"),
        ("reasoning_gym:", "write reasoning_gym:NAME"),
        ("gsm8k:/nowhere", "needs a tokenizer"),
        ("chain_sum:term=3", r"unknown option 'term' \(did you mean 'terms'\?\)"),
        ("chain_sum:terms", "'terms' is not an option; write key=value"),
        ("chain_sum:terms=", "'terms=' is not an option"),
        ("chain_sum:largest=9:largest=8", "'largest=8' is not an option"),
        ("chain_sum:terms=1", "from 2 to 5, as in terms=2.3; got 1"),
        ("chain_sum:terms=2+2", "different numbers"),
        ("chain_sum:terms=2+x", "got 2.x"),
        ("chain_sum:largest=0", "from 1 to 999, got 0"),
        ("chain_sum:largest=1000", "got 1000"),
        ("chain_sum:largest=2.5", "got 2.5"),
        ("chain_sum:largest=many", "got many"),
        ("chain_sum:largest=9", "there are 200 sums of 2 terms up to 9; tune and test take 512: raise largest"),
    ],
)
def test_refused_specs(spec, words):
    with pytest.raises(ConfigError, match=words):
        tasks.load(spec)


def test_sums_in_words():
    """With a tokenizer a sum is put as a question, and need not end in a stop token."""
    task = tasks.load("chain_sum", BYTES)
    problem = task.test[1]
    assert problem.prompt == f"{SUMS.test[1].prompt} {tasks.INSTRUCTION}\n" and problem.answer == SUMS.test[1].answer
    assert task.decode(task.encode(problem.prompt)) == problem.prompt
    assert task.score(problem, task.encode(problem.solution)) == 1
    assert (task.vocab_size, task.stop) == (257, (256,)) and task.fingerprint != SUMS.fingerprint


# ------------------------------------------------------------------------------------------------------------------ GSM8K


def record(number: int, **other) -> dict:
    return {"question": f"What is {number} + 1,000?", "answer": f"It is <<{number}+1000={number + 1000}>>\n#### {number + 1000:,}"} | other


def write(folder, name: str, records) -> Path:
    path = folder / name
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records), encoding="utf-8")
    return path


def test_gsm8k(tmp_path):
    write(tmp_path, "train.jsonl", [*map(record, range(40)), "", record(3), record(41)])
    write(tmp_path, "train_socratic.jsonl", ["not read"])
    write(tmp_path, "test.jsonl", map(record, range(40, 52)))
    task = tasks.load(f"gsm8k:{tmp_path}", BYTES)
    assert [len(split) for split in (task.train, task.tune, task.test)] == [35, 5, 12]
    assert task.repeats == 2  # 3 again, and 41, which is in test
    prompts = [problem.prompt for split in (task.train, task.tune, task.test) for problem in split]
    assert len(set(prompts)) == 52
    first = task.test[0]
    assert first.prompt == 'What is 40 + 1,000? Let\'s think step by step and output the final answer after "####".\n'
    assert (first.answer, first.solution) == ("1040", "It is <<40+1000=1040>>\n#### 1,040")
    assert [problem.answer for problem in task.test] == [str(number) for number in range(1040, 1052)]
    assert task.encode(first.prompt) == list(first.prompt.encode())
    for problem in [*task.train, *task.tune, *task.test]:
        shown = task.demonstration(problem, 0)
        assert shown == [*problem.solution.encode(), 256]
        assert task.score(problem, shown) == 1 == task.score(problem, shown[:-1])
        assert task.score(problem, [*b"It is #### 7", 256, *shown]) == 0  # what stands after the stop token is not read
    imperfect = [task.score(problem, task.demonstration(problem, seed, imperfect=True)) for problem in task.train for seed in range(20)]
    assert abs(np.mean(imperfect) - 0.8) < 0.06  # s.e. 0.015


def test_gsm8k_is_determined_by_its_contents(tmp_path):
    marks = []
    for name, numbers in (("a", range(30)), ("b", range(30)), ("c", range(31))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "train.jsonl", map(record, numbers))
        write(tmp_path / name, "test.jsonl", [record(99)])
        marks.append(tasks.load(f"gsm8k:{tmp_path / name}", BYTES))
    assert marks[0].fingerprint == marks[1].fingerprint != marks[2].fingerprint
    assert list(marks[0].tune) == list(marks[1].tune)
    assert tasks.load(f"gsm8k:{tmp_path / 'a'}", CHAT).fingerprint != marks[0].fingerprint


def test_gsm8k_of_one_file(tmp_path):
    """A part of it is test."""
    task = tasks.load(f"gsm8k:{write(tmp_path, 'mine.jsonl', map(record, range(5000)))}", BYTES)
    assert [len(split) for split in (task.train, task.tune, task.test)] == [5000 - 1024, 512, 512]
    answers = [problem.answer for split in (task.train, task.tune, task.test) for problem in split]
    assert len(set(answers)) == 5000
    assert abs(np.mean([int(answer) for answer in answers[-512:]]) - 3500) < 300  # from all over the file: s.e. 64


def test_conversations(tmp_path):
    pytest.importorskip("jinja2")
    task = tasks.load(f"gsm8k:{write(tmp_path, 'mine.jsonl', map(record, range(16)))}", CHAT)
    prompt = task.decode(task.encode(task.test[0].prompt))
    assert prompt.startswith("<user>What is ") and prompt.endswith(f"{tasks.INSTRUCTION}<answer>")
    assert task.stop == (10, 256)
    assert task.demonstration(task.test[0], 0)[-1] == 10


def test_gsm8k_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "jsonl").mkdir()
    for name, numbers in (
        ("train-00000-of-00002", range(20)),
        ("train-00001-of-00002", range(20, 30)),
        ("test-00000-of-00001", range(40, 44)),
    ):
        parquet.write_table(arrow.Table.from_pylist([record(number) for number in numbers]), tmp_path / f"{name}.parquet")
    write(tmp_path / "jsonl", "train.jsonl", map(record, range(30)))
    write(tmp_path / "jsonl", "test.jsonl", map(record, range(40, 44)))
    task = tasks.load(f"gsm8k:{tmp_path}", BYTES)
    assert task.fingerprint == tasks.load(f"gsm8k:{tmp_path / 'jsonl'}", BYTES).fingerprint
    parquet.write_table(arrow.Table.from_pylist([record(1), record(2, answer="3")]), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="test-00000-of-00001.parquet, row 2: the answer must end"):
        tasks.load(f"gsm8k:{tmp_path}", BYTES)
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="no column 'question'"):
        tasks.load(f"gsm8k:{tmp_path}", BYTES)


def test_gsm8k_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="needs pyarrow: pip install pyarrow"):
        tasks.load(f"gsm8k:{tmp_path / 'train.parquet'}", BYTES)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", r"line 2 is not JSON \("),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"question": "a", "answer": ' + "1" * 5000 + "}", "line 2 is not JSON"),
        ("nothing", "line 2 is not JSON .*Fetch it again"),
        ("[1]", "line 2: expected an object with question and answer, got list"),
        ("null", "got NoneType"),
        ({"question": "a"}, r"line 2: no text in field 'answer' \(it has: question\)"),
        ({"answer": "#### 1"}, r"no text in field 'question' \(it has: answer\)"),
        ({}, "no text in field 'question'"),
        ({"question": " ", "answer": "#### 1"}, "no text in field 'question'"),
        ({"question": 5, "answer": "#### 1"}, "no text in field 'question'"),
        ({"question": "a", "answer": None}, "no text in field 'answer'"),
        ({"question": "a", "answer": "1"}, "line 2: the answer must end in '#### ' and a number; it ends in '1'"),
        ({"question": "a", "answer": "####1"}, "it ends in '####1'"),
        ({"question": "a", "answer": "#### "}, "it ends in '#### '"),
        ({"question": "a", "answer": "#### one"}, "it ends in '#### one'"),
        ({"question": "a", "answer": "#### 1\n#### 1 clip"}, "1 clip"),
        ({"question": "a\ud800", "answer": "#### 1"}, "field 'question' holds half of a surrogate pair"),
        ({"question": "a", "answer": "\udfff#### 1"}, "field 'answer' holds half of a surrogate pair"),
    ],
    ids=range(19),
)
def test_gsm8k_refuses(tmp_path, line, words):
    path = write(tmp_path, "mine.jsonl", [record(0), line, *map(record, range(1, 20))])
    with pytest.raises(DataError, match=words) as error:
        tasks.load(f"gsm8k:{path}", BYTES)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 400 + len(str(path))


def test_gsm8k_refuses_files(tmp_path):
    def refused(path, words):
        with pytest.raises(DataError, match=words):
            tasks.load(f"gsm8k:{path}", BYTES)

    refused(tmp_path / "none.jsonl", r"cannot read .*none\.jsonl: No such file")
    refused(tmp_path / "none", r"none is not a folder, and its name does not end in \.jsonl or \.parquet")
    refused(tmp_path, r"no train\.jsonl and no train\*\.parquet in .*openai/grade-school-math")
    write(tmp_path, "train.jsonl", map(record, range(20)))
    refused(tmp_path, r"no test\.jsonl")
    write(tmp_path, "test.jsonl", [])
    refused(tmp_path, "20 problems to train on and 0 others")
    refused(write(tmp_path, "few.jsonl", map(record, range(7))), "7 problems to train on and no others; at least 8")
    refused(write(tmp_path, "same.jsonl", [record(1)] * 100), "1 problems to train on")
    (tmp_path / "test.jsonl").write_bytes(b"\xff\xfe{}")
    refused(tmp_path, r"test\.jsonl is not UTF-8 \(byte 0")
    endless = replace(BYTES, eos_id=None)
    with pytest.raises(DataError, match="bytes has no token that ends a text; name one, as in bytes#TOKEN"):
        tasks.load("chain_sum", endless)


@pytest.mark.skipif(not GSM8K, reason="set GSM8K to a folder that holds the real train.jsonl and test.jsonl")
def test_all_of_gsm8k(capsys):
    """Every reference solution of the real thing scores 1, and 0 against another answer."""
    task = tasks.load(f"gsm8k:{GSM8K}", BYTES)
    assert [len(split) for split in (task.train, task.tune, task.test)] == [7473 - 512, 512, 1319] and task.repeats == 0
    count, prompts = Counter(), set()
    for split in ("train", "tune", "test"):
        for problem in getattr(task, split):
            count[split, rewards.score(problem.solution, problem.answer), rewards.score(problem.solution, problem.answer, "last")] += 1
            assert task.score(problem, task.demonstration(problem, 0)) == 1
            assert rewards.score(problem.solution, f"{problem.answer}1") == 0
            prompts.add(problem.prompt)
    with capsys.disabled():
        print(f"\nGSM8K, (split, strict, last): problems = {dict(count)}; {len(prompts)} different prompts")
    assert count == {("train", 1.0, 1.0): 6961, ("tune", 1.0, 1.0): 512, ("test", 1.0, 1.0): 1319} and len(prompts) == 8792


# ------------------------------------------------------------------------------------------------------------------ reasoning-gym


def gym(monkeypatch, items, refuse: Exception | None = None) -> dict:
    """A stand-in for the library with one generator; returns what it was called with."""
    called = {}

    def create_dataset(name, **options):
        called.update(options, name=name)
        if refuse:
            raise refuse
        return items

    factory = types.ModuleType("reasoning_gym.factory")
    factory.__dict__.update(create_dataset=create_dataset, DATASETS={"leg_counting": None})
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.ModuleType("reasoning_gym"))
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    return called


def item(number: int, **other) -> dict:
    return {"question": f" Legs of {number} dogs?", "answer": str(4 * number), "metadata": {}} | other


def test_reasoning_gym_splits(monkeypatch):
    items = [item(number % 32) for number in range(40)]
    items[3] = item(3, metadata={"answer_cot": "three times four\n#### 12"})
    items[4] = item(4, metadata={"answer_cot": "does not say\n#### 12"})
    items[5] = item(5, answer="twenty")
    called = gym(monkeypatch, items)
    task = tasks.load("reasoning_gym:leg_counting:size=40:ratio=0.5:kind=dog", BYTES)
    assert called == {"name": "leg_counting", "size": 40, "seed": 0, "ratio": 0.5, "kind": "dog"}
    assert ([len(split) for split in (task.train, task.tune, task.test)], task.repeats) == ([24, 4, 4], 8)
    by_answer = {problem.answer: problem for split in (task.train, task.tune, task.test) for problem in split}
    assert by_answer["12"].solution == "three times four\n#### 12" and by_answer["16"].solution == "#### 16"
    assert by_answer["0"].prompt == f"Legs of 0 dogs? {tasks.INSTRUCTION}\n"
    word = by_answer["twenty"]
    assert task.score(word, task.demonstration(word, 0)) == 1 and task.score(word, task.encode("#### 20")) == 0
    assert {task.score(word, task.demonstration(word, seed, imperfect=True)) for seed in range(50)} == {1}  # a word cannot be off by 1


def test_reasoning_gym_refuses(monkeypatch):
    gym(monkeypatch, [item(1, answer=None)])
    with pytest.raises(DataError, match="problem 0 has no one right text .its answer is None"):
        tasks.load("reasoning_gym:leg_counting", BYTES)
    with pytest.raises(ConfigError, match=r"no generator 'leg_count' \(did you mean 'leg_counting'\?\); it has 1"):
        tasks.load("reasoning_gym:leg_count", BYTES)
    for refusal in (TypeError("unexpected keyword"), AssertionError("min_terms must be positive"), ValueError("no")):
        gym(monkeypatch, [], refusal)
        with pytest.raises(ConfigError, match=f"refuses these options: {refusal}"):
            tasks.load("reasoning_gym:leg_counting:min_terms=-1", BYTES)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(DataError, match=r"needs the library reasoning-gym .*: pip install -e '\.\[rl\]'"):
        tasks.load("reasoning_gym:leg_counting", BYTES)


@pytest.mark.filterwarnings("default")  # of its dependencies
@pytest.mark.parametrize(
    "spec", ["chain_sum:size=600:max_terms=3", "gsm_symbolic:size=200", "leg_counting:size=200", "caesar_cipher:size=100"]
)
def test_reasoning_gym_itself(spec):
    pytest.importorskip("reasoning_gym")
    task = tasks.load(f"reasoning_gym:{spec}", BYTES)
    some = [problem for split in (task.train, task.tune, task.test) for problem in split]
    assert len({problem.prompt for problem in some}) == len(some) > 90
    assert all(task.score(problem, task.demonstration(problem, 0)) == 1 for problem in some)
    assert tasks.load(f"reasoning_gym:{spec}", BYTES).fingerprint == task.fingerprint
    if spec.startswith("gsm_symbolic"):
        assert any(len(problem.solution) > 50 for problem in some)
    with pytest.raises(ConfigError, match="refuses these options"):
        tasks.load(f"reasoning_gym:{spec}:nonsense=1", BYTES)
    with pytest.raises(DataError, match="no one right text"):
        tasks.load("reasoning_gym:graph_color:size=9", BYTES)
