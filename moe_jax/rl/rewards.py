"""Rewards of answers: an answer is text that is compared and never executed, and no text can crash the scorer or hold it up.

Numbers are compared as strings of ASCII digits, so that neither length nor rounding matters. Every expression below is linear in the text.
"""

import re
from typing import Literal

import numpy as np
from jaxtyping import Float

from moe_jax.errors import NonFinite, check_known

MARK = "#### "  # stands before the final answer
PARSES = ("strict", "last")
Parse = Literal["strict", "last"]

_MARKED = re.compile(MARK + r"([+-]?\$?[0-9.,]+)")
_NUMBER = re.compile(r"[+-]?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_PARTS = re.compile(r"([+-]?)\$?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*))(?:\.([0-9]*))?")


def strict_answer(text: str, window: int = 300) -> str | None:
    """The number of the last `#### number` within the last `window` characters, without commas, `$` and full stop; None where there is none.

    What follows the number is not looked at: `#### 72 clips` is 72. Source: verl, utils/reward_score/gsm8k.py, method "strict".
    """
    found = _MARKED.findall(text[-window:]) if window > 0 else []
    number = found[-1].replace(",", "").replace("$", "").rstrip(".") if found else ""
    return number if _digits(number) else None


def last_number(text: str) -> str | None:
    """The last number anywhere in the text, without commas (of thousands: `1,2` is two numbers) and `$`; None where there is none.

    A sign counts as part of the number, also where it stands for minus: the last number of `7-5` is -5. Source: verl, method "flexible".
    """
    number = None
    for match in _NUMBER.finditer(text):
        number = match
    return number and number[0].replace(",", "").replace("$", "")


def same_number(a: str, b: str) -> bool:
    """Whether two texts are the same decimal number, exactly and at any length: 010 is 10, 3.0 is 3, -0 is 0, $1,000 is 1000.

    False where either is no number: only ASCII digits count, and there are no exponents. Space around a number is allowed.
    """
    first, second = _digits(a), _digits(b)
    return first is not None and first == second


def score(text: str, answer: str, parse: Parse = "strict") -> float:
    """1.0 where `text` ends in the answer, else 0.0.

    parse: `strict` takes `strict_answer`, `last` takes `last_number`. An answer that is no number must equal all that follows the last `#### `
    (`last`: or the whole text where there is none), both without the space around them. Raises ConfigError for an unknown parse.
    """
    check_known("parse", parse, PARSES)
    if _digits(answer):
        given = strict_answer(text) if parse == "strict" else last_number(text)
        return float(given is not None and same_number(given, answer))
    _, mark, given = text.rpartition(MARK)
    return float(bool(mark or parse == "last") and bool(answer.strip()) and given.strip() == answer.strip())


def checked(rewards: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The rewards as given. Raises NonFinite where one of them is not a finite number."""
    bad = np.argwhere(~np.isfinite(rewards))
    if len(bad):
        where = tuple(bad[0].tolist())
        raise NonFinite(
            f"{len(bad)} of {np.size(rewards)} rewards are not finite, the first at {list(where)}: {np.asarray(rewards)[where]}; "
            "a reward function must return a number for every answer, 0 for one that it cannot read"
        )
    return rewards


def _digits(text: str) -> tuple[str, str, str] | None:
    """Sign, whole digits and decimals of a number, without the zeros that change nothing; None where the text is no number."""
    match = _PARTS.fullmatch(text.strip())
    if match is None or not (match[2] or match[3]):
        return None
    whole, decimals = match[2].replace(",", "").lstrip("0"), (match[3] or "").rstrip("0")
    return "-" if match[1] == "-" and (whole or decimals) else "", whole, decimals
