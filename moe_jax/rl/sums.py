r"""Sums and differences of small whole numbers, made on the spot: the task that is always there, with 18 ids of its own.

A prompt is `17+5-32=`; its worked solution `22-32\n#### -10` has a line for each sum that remains on the way. Every expression is a problem, so 3+5
and 5+3 are two. With the defaults (2 or 3 terms, 0 to 29) there are 1,800 of two terms and 108,000 of three.
"""

from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.errors import ConfigError, DataError, nearest
from moe_jax.rl.problems import Language, Problem, Problems, Task, fingerprint, shuffled
from moe_jax.rl.rewards import MARK

HELD_OUT = 512  # problems in tune, and in test
ALPHABET = "0123456789+-=# \n"
_IDS = {piece: number for number, piece in enumerate(("<pad>", "<eos>", *ALPHABET))}


def chain_sum(spec: str, options: dict[str, Any], language: Language | None, frame: Callable[[str], str] | None) -> Task:
    """The task of sums. language and frame: how to write it with a tokenizer; None: in characters, bare.

    Kinds of problems (numbers of terms) alternate in every split. In train each problem of the largest kind stands once and the others come
    again and again: with the defaults every other problem is one of the 1,288 sums of two terms that are in neither tune nor test.
    Raises ConfigError for options that make no task.
    """
    for name in options:
        if name not in ("terms", "largest"):
            raise ConfigError(f"{spec}: unknown option {name!r}{nearest(name, ('terms', 'largest'))}; known: terms, largest")
    counts, largest = str(options.get("terms", "2+3")).split("+"), options.get("largest", 29)
    if not all(count in ("2", "3", "4", "5") for count in counts) or len(set(counts)) < len(counts):
        raise ConfigError(f"{spec}: terms must be different numbers from 2 to 5, as in terms=2+3; got {'+'.join(counts)}")
    if not isinstance(largest, int) or not 1 <= largest <= 999:
        raise ConfigError(f"{spec}: largest must be a whole number from 1 to 999, got {largest}")
    kinds = [int(count) for count in counts]
    sizes = [(largest + 1) ** terms * 2 ** (terms - 1) for terms in kinds]
    share = -(-HELD_OUT // len(kinds))  # of each kind, in tune and in test
    if min(sizes) <= 2 * share:
        few = kinds[sizes.index(min(sizes))]
        raise ConfigError(
            f"{spec}: there are {min(sizes)} sums of {few} terms up to {largest}; tune and test take {2 * share}: raise largest"
        )

    def split(count: int, first: int) -> Problems:
        def make(number: int) -> Problem:
            place, kind = divmod(number, len(kinds))
            place = first + place % (sizes[kind] - first)
            terms = kinds[kind]
            prompt, working, answer = expression(shuffled(place, sizes[kind], f"chain_sum {terms} {largest}"), terms, largest)
            return Problem(frame(prompt) if frame else prompt, answer, f"{working}{MARK}{answer}")

        return Problems(count, make)

    used = language or characters()
    train, tune, test = split(len(kinds) * (max(sizes) - 2 * share), 2 * share), split(HELD_OUT, share), split(HELD_OUT, 0)
    mark = fingerprint("chain_sum 1", kinds, largest, HELD_OUT, used.fingerprint)
    return Task(spec, train, tune, test, used, mark, needs_stop=language is None)


def expression(number: int, terms: int, largest: int) -> tuple[str, str, str]:
    """Expression `number` among all of `terms` terms up to `largest`: the prompt, the working and the answer."""
    number, total = divmod(number, largest + 1)
    rest = []
    for _ in range(terms - 1):
        number, minus = divmod(number, 2)
        number, value = divmod(number, largest + 1)
        rest.append((minus, value))
    lines = []
    for place, (minus, value) in enumerate(rest):
        lines.append(f"{total}" + "".join(f"{'-' if sign else '+'}{term}" for sign, term in rest[place:]))
        total += -value if minus else value
    return f"{lines[0]}=", "".join(f"{line}\n" for line in lines[1:]), str(total)


def characters() -> Language:
    """An id for each character, <pad> and <eos>. What has no character decodes to a word, which no scorer takes for a number."""
    pieces = list(_IDS)

    def encode(text: str) -> list[int]:
        strange = next((character for character in text if character not in ALPHABET), None)
        if strange is not None:
            raise DataError(f"{strange!r} is not one of the {len(ALPHABET)} characters of chain_sum, {ALPHABET!r}")
        return [_IDS[character] for character in text]

    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[one] if 0 <= one < len(pieces) else "<unknown>" for one in ids)

    return Language(encode, decode, len(pieces), (_IDS["<eos>"],), fingerprint(pieces))
