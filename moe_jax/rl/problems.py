"""What a task is: three splits of problems that share none, how they become ids, and what a response is worth."""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np

from moe_jax.rl import rewards
from moe_jax.rl.rewards import MARK

DIRECT, WRONG = 0.5, 0.2  # shares of imperfect demonstrations: with the working left out; with another answer
MISSES = (-10, -2, -1, 1, 2, 10)  # what is added to a wrong answer
_WHOLE = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class Problem:
    """A question as the model reads it, and its answer."""

    prompt: str
    answer: str
    solution: str = ""  # a worked text that ends in '#### answer'; "": there is none, and the answer alone is shown


@dataclass(frozen=True)
class Problems(Sequence[Problem]):
    """`size` problems of which each is made when it is asked for."""

    size: int
    make: Callable[[int], Problem] = field(repr=False)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self.make(one) for one in range(self.size)[number]]
        if not -self.size <= index(number) < self.size:
            raise IndexError(f"problem {number} of {self.size}")
        return self.make(index(number) % self.size)


@dataclass(frozen=True)
class Language:
    """Text to ids and back, and the ids that mean something."""

    encode: Callable[[str], list[int]] = field(repr=False)
    decode: Callable[[Sequence[int]], str] = field(repr=False)
    vocab_size: int  # ids are 0 … vocab_size - 1
    stop: tuple[int, ...]  # ids that end a response; the first ends the demonstrations
    fingerprint: str  # sha256, hex, of everything that decides the ids


@dataclass(frozen=True, eq=False)
class Task:
    """Problems whose answers can be checked. No problem is in two splits or twice in `tune` or `test`."""

    name: str  # the spec it was made from
    train: Sequence[Problem]
    tune: Sequence[Problem]  # to choose learning rates and the like on
    test: Sequence[Problem]  # to report
    language: Language
    fingerprint: str  # sha256, hex, of everything that decides the problems and the ids
    needs_stop: bool = False  # whether a response that was cut off scores 0 whatever it says
    parse: rewards.Parse = "strict"
    repeats: int = 0  # problems left out because they had been asked before

    encode = property(lambda self: self.language.encode)
    decode = property(lambda self: self.language.decode)
    vocab_size = property(lambda self: self.language.vocab_size)
    stop = property(lambda self: self.language.stop)

    def score(self, problem: Problem, response_ids: Sequence[int] | np.ndarray) -> float:
        """1.0 for the right answer before the first stop token, else 0.0; ids outside the vocabulary, which mean nothing, score 0 too."""
        ids = np.asarray(response_ids, np.int64).tolist()
        end = next((place for place, one in enumerate(ids) if one in self.stop), None)
        if (end is None and self.needs_stop) or not all(0 <= one < self.vocab_size for one in ids[:end]):
            return 0.0
        return rewards.score(self.decode(ids[:end]), problem.answer, self.parse)

    def demonstration(self, problem: Problem, seed: int, imperfect: bool = False) -> list[int]:
        """The encoded solution and a stop token, for supervised warm-up. The same (seed, problem) gives the same demonstration.

        imperfect: half of those that show working give the answer alone, and a fifth of all whose answer is a whole number have it off by 1, 2 or
        10, which leaves reinforcement something to find.
        """
        solution = problem.solution or MARK + problem.answer
        if imperfect:
            direct, wrong, miss = words(seed, "demonstration", problem.prompt)[:3]
            off = MISSES[miss % len(MISSES)] if wrong < WRONG * 2**32 and _WHOLE.fullmatch(problem.answer) else 0
            working = "" if direct < DIRECT * 2**32 else solution.rpartition(MARK)[0]
            solution = working + MARK + (str(int(problem.answer) + off) if off else problem.answer)
        return [*self.encode(solution), self.stop[0]]


def shuffled(number: int, count: int, key: str) -> int:
    """Where a fixed permutation of 0 … count - 1, chosen by `key`, sends `number`: a Feistel network, walked until it lands inside."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)  # bits
    mask = (1 << half) - 1
    while True:
        for turn in range(4):
            left, right = number >> half, number & mask
            number = (right << half) | (left ^ (words(key, turn, right)[0] & mask))
        if number < count:
            return number


def words(*parts: Any) -> tuple[int, ...]:
    """Eight 32-bit words that only the parts decide: the same on every machine and with every version of a library."""
    return struct.unpack(">8I", hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest())


def fingerprint(*parts: Any) -> str:
    """The sha256, hex, of parts that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
