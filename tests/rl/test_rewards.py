"""Rewards: hand-worked numbers, and answers made to crash, hang or deceive the scorer."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.errors import ConfigError, NonFinite
from moe_jax.rl import rewards

LONG = 1_000_000


@pytest.mark.parametrize(
    "text, expected",
    [
        ("so\n#### 72", "72"),
        ("#### 72 clips", "72"),
        ("#### 72.", "72"),
        ("#### 1,234,567.50", "1234567.50"),
        ("#### $5", "5"),
        ("#### -$5", "-5"),
        ("#### -10", "-10"),
        ("#### +3", "+3"),
        ("#### .5", ".5"),
        ("#### 1\n#### 2", "2"),
        ("#### 1\n#### none", "1"),
        ("#### 1\n#### 1.2.3", None),  # the last run of digits counts, and this one is no number
        ("##### 4", "4"),
        ("####4", None),
        ("####  4", None),
        ("### 4", None),
        ("72", None),
        ("#### x", None),
        ("#### ...", None),
        ("#### ,", None),
        ("#### 7" + " " * 294, "7"),  # just inside of the window
        ("#### 7" + " " * 295, None),
        ("#### 1" + " " * 400 + "#### 2", "2"),
    ],
)
def test_strict_answer(text, expected):
    assert rewards.strict_answer(text) == expected


def test_window():
    text = "#### 7 and more"
    assert [rewards.strict_answer(text, window) for window in (0, 5, 14, 15, 1000)] == [None, None, None, "7", "7"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3 and 4", "4"),
        ("7-5", "-5"),
        ("it costs $1,234.50!", "1234.50"),
        ("1,2", "2"),
        ("1,0000", "0000"),
        ("12,345,67", "67"),
        ("5.", "5"),
        ("-.5", "-.5"),
        ("1.2.3", ".3"),
        ("none", None),
        ("", None),
        ("7" + " " * 5000, "7"),
    ],
)
def test_last_number(text, expected):
    assert rewards.last_number(text) == expected


SAME = [
    ("010", "10"), ("3.0", "3"), ("3.", "3"), ("-0", "0"), ("-0.00", "+0"), ("1,000", "1000"), ("$1,000", "1000.0"), (".50", "0.5"), (" 7\n", "7"),
    ("0" * 20_000 + "5" * 20_000, "5" * 20_000), ("1." + "0" * 20_000, "1"),
]  # fmt: skip
DIFFERENT = [
    ("10", "-10"), ("0.1", "0.10000000000000000001"), ("9" * 20_000, "9" * 19_999 + "8"), ("1e3", "1000"), ("1,2", "12"), ("٣", "3"), ("３", "3"), ("²", "2"),
    ("", ""), ("-", "-"), (".", "."), ("nan", "nan"), ("inf", "inf"), ("1_000", "1000"), ("0x10", "16"), ("1\n2", "12"), ("--1", "1"), ("one", "one"),
]  # fmt: skip


@pytest.mark.parametrize(
    "a, b, same", [(*pair, True) for pair in SAME] + [(*pair, False) for pair in DIFFERENT], ids=lambda value: str(value)[:20]
)
def test_same_number(a, b, same):
    assert rewards.same_number(a, b) is same and rewards.same_number(b, a) is same


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_same_number_is_decimal_equality(a, b):
    assert rewards.same_number(f"{a:f}", f"{b:f}") == (a == b)
    assert rewards.same_number(f"{a:,f}", f"00{a.copy_abs():f}0") == (a >= 0)
    assert rewards.score(f"#### {a:,f}", f"{a:f}") == 1 or len(f"{a:f}") > 250


def test_score():
    assert rewards.score("2+3=5\n#### 5", "5") == 1
    assert rewards.score("2+3=5\n#### 6", "5") == 0
    assert rewards.score("2+3=5", "5") == 0 and rewards.score("2+3=5", "5", "last") == 1
    assert rewards.score("#### 5 and not 6", "5") == 1 and rewards.score("#### 5 and not 6", "5", "last") == 0
    with pytest.raises(ConfigError, match=r"unknown parse 'strickt' \(did you mean 'strict'\?\); known: strict, last"):
        rewards.score("5", "5", "strickt")  # type: ignore


def test_score_of_words():
    """An answer that is no number is compared as it stands."""
    assert rewards.score("I think\n#### Tuesday \n", "Tuesday") == 1
    assert rewards.score("#### tuesday", "Tuesday") == 0
    assert rewards.score("Tuesday", "Tuesday") == 0 and rewards.score(" Tuesday", "Tuesday", "last") == 1
    assert rewards.score("#### 12 30", "12 30") == 1 and rewards.score("#### ", "") == 0 and rewards.score("", "", "last") == 0


# Each is scored against 5; the last two columns say what the two parses give.
HOSTILE = [
    ("", 0, 0),
    (" ", 0, 0),
    ("\n" * LONG, 0, 0),
    ("5" * 10_000, 0, 0),
    ("#### " + "5" * 10_000, 0, 0),
    ("#### 5." + "0" * 200, 1, 1),
    ("#### " + "0" * 200 + "5", 1, 1),
    ("#### 5" + "." * 290, 1, 1),
    ("#### 5" + "0" * 10_000, 0, 0),
    ("[" * 10_000, 0, 0),
    ("[" * LONG, 0, 0),
    ("#### " + "[" * 10_000 + "5", 0, 1),
    ("{" * LONG + "5", 0, 1),
    ("(" * LONG + ")" * LONG, 0, 0),
    ("\0", 0, 0),
    ("\0" * LONG, 0, 0),
    ("#### \x005", 0, 1),
    ("#### 5\0", 1, 1),
    ("\0#### 5\0\0", 1, 1),
    ("__import__('os').system('x')", 0, 0),
    ("#### __import__('os').system('exit 5')", 0, 1),
    ("#### 2+3", 0, 0),
    ("#### eval('5')", 0, 1),
    ("#### (lambda: 5)()", 0, 1),
    ("import sys; sys.exit(5)", 0, 1),
    ("while True: pass", 0, 0),
    ("#### 9**9**9**9", 0, 0),
    ("{{ 5 }}{% for x in range(10**9) %}", 0, 0),
    ("'; DROP TABLE rewards; --5", 0, 0),
    ("$(sleep 5)", 0, 1),
    ("%s%s%n" * 1000, 0, 0),
    ("#### {0.__class__}", 0, 0),
    ("#### ٥", 0, 0),
    ("#### ５", 0, 0),
    ("#### ⁵", 0, 0),
    ("#### Ⅴ", 0, 0),
    ("#### \u22125", 0, 1),  # a minus sign that is not ASCII is no sign
    ("#### \u202e5", 0, 1),
    ("####\u00a05", 0, 1),
    ("＃＃＃＃ 5", 0, 1),
    ("\ud800", 0, 0),
    ("#### \ud8005", 0, 1),
    ("#### 5\udfff", 1, 1),
    ("\ud83d" * LONG, 0, 0),
    ("\U0010ffff#### 5", 1, 1),
    ("e\u0301" * LONG, 0, 0),
    ("#### #### 5", 1, 1),
    ("#### ####", 0, 0),
    ("####", 0, 0),
    ("#### ", 0, 0),
    ("#### -", 0, 0),
    ("#### +", 0, 0),
    ("#### $", 0, 0),
    ("#### .", 0, 0),
    ("#### ,,,", 0, 0),
    ("#### --5", 0, 0),
    ("#### 1e309", 0, 0),
    ("#### 5e0", 1, 0),
    ("#### nan", 0, 0),
    ("#### -inf", 0, 0),
    ("#### None", 0, 0),
    ("#### 0x5", 0, 1),
    ("#### 5_0", 1, 0),  # verl's rule: what follows the digits is not looked at
    ("#### -5", 0, 0),
    ("#### 5.0000000000000001", 0, 0),
    ("#### 4.9999999999999999999", 0, 0),
    ("#### 5\r\n", 1, 1),
    ("#### 5" + "<eos>" * 100, 0, 1),
    ("#### " * (LONG // 5), 0, 0),
    ("#### 5" * (LONG // 5), 1, 1),
    ("#" * LONG, 0, 0),
    ("-" * LONG, 0, 0),
    ("+-$" * LONG, 0, 0),
    ("," * LONG, 0, 0),
    ("." * LONG, 0, 0),
    ("1," * LONG, 0, 0),
    ("1." * LONG, 0, 0),
    ("1,000" * LONG, 0, 0),
    ("1" + ",000" * LONG + "0", 0, 0),
    ("1" * LONG, 0, 0),
    ("1" * LONG + ".", 0, 0),
    ("-1" * LONG + "x", 0, 0),
    ("5 " * LONG, 0, 1),
    ("#### 5" + " " * LONG, 0, 1),
]


def test_enough_of_them():
    assert len({text for text, _, _ in HOSTILE}) == len(HOSTILE) >= 50


@pytest.mark.parametrize("text, strict, last", HOSTILE, ids=[f"{number}:{ascii(text[:12])}" for number, (text, _, _) in enumerate(HOSTILE)])
def test_hostile(text, strict, last):
    """Something quadratic in the length would take hours here; pytest's time limit ends it."""
    assert rewards.score(text, "5") == strict
    assert rewards.score(text, "5", "last") == last
    for parse in rewards.PARSES:  # as the text that was asked for, and against an answer that is no number
        assert rewards.score("#### 5", text, parse) in (0, 1)
        assert rewards.score(text, "five", parse) == 0


@given(st.text(alphabet=st.characters(exclude_categories=())), st.text(alphabet="0123456789+-$.,# e\n\0"))
def test_any_text(strange, close):
    for text in (strange, close, "#### " + strange, "#### " + close):
        for answer in ("5", strange, close):
            assert rewards.score(text, answer) in (0, 1) and rewards.score(text, answer, "last") in (0, 1)
        for found in (rewards.strict_answer(text), rewards.last_number(text)):
            assert found is None or rewards.same_number(found, found)
            assert found is None or rewards.same_number(found, f"{Decimal(found):f}")


def test_checked():
    good = np.array([[0.0, 1.0], [-1.0, 1e30]])
    assert rewards.checked(good) is good
    assert rewards.checked(np.zeros(0)).shape == (0,)
    for value in (np.nan, np.inf, -np.inf):
        bad = good.copy()
        bad[1] = value
        with pytest.raises(NonFinite, match=rf"2 of 4 rewards are not finite, the first at \[1, 0\]: {value}; a reward function must"):
            rewards.checked(bad)
