"""Configs as plain data: round trips through JSON, differences by dotted name, and overrides typed by the dataclass."""

import dataclasses
import json
from typing import Literal

import pytest

from moe_jax.config_tools import apply_overrides, config_dict, differences, digest, flatten
from moe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    top_k: int = 2
    experts: int = 8
    rate: float = 0.1
    ceiling: float = float("inf")

    def __post_init__(self):
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than {self.experts} experts")


@dataclasses.dataclass(frozen=True)
class Outer:
    model: Inner = Inner()
    name: str = "tiny"
    remat: bool = False
    window: int | None = None
    label: str | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    layers: tuple[int, ...] = (0, 1)
    pair: tuple[float, str] = (0.5, "x")
    extra: dict | None = None
    teacher: Inner | None = None
    amount: int | float | str = 1


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.top_k=4", ("model", "top_k"), 4),
        ("model.rate=1e-3", ("model", "rate"), 1e-3),
        ("name=a=b", ("name",), "a=b"),
        ("name=", ("name",), ""),
        ("remat=Yes", ("remat",), True),
        ("remat=0", ("remat",), False),
        ("window=128", ("window",), 128),
        ("window=none", ("window",), None),
        ("label=None", ("label",), None),
        ("score=sigmoid", ("score",), "sigmoid"),
        ("layers=3,4, 5", ("layers",), (3, 4, 5)),
        ("layers=(7,)", ("layers",), (7,)),
        ("layers=", ("layers",), ()),
        ("pair=2,y", ("pair",), (2.0, "y")),
        ("amount=7", ("amount",), 7),
        ("amount=7.5", ("amount",), 7.5),
        ("amount=lots", ("amount",), "lots"),
    ],
)
def test_an_override_takes_the_declared_type(override, path, value):
    got = apply_overrides(Outer(), [override])
    for name in path:
        got = getattr(got, name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.topk=4", ["unknown config field 'model.topk'", "did you mean 'model.top_k'?", "model.experts"]),
        ("modle.top_k=4", ["did you mean 'model'?"]),
        ("top_k=4", ["did you mean 'model.top_k'?"]),
        ("model.zzz=4", ["unknown config field 'model.zzz'; known: model.top_k"]),
        ("model.top_k=2.5", ["model.top_k", "a whole number", "'2.5'"]),
        ("model.rate=nan", ["model.rate", "a finite number", "'nan'"]),
        ("model.rate=1e999", ["a finite number"]),
        ("model.ceiling=inf", ["a finite number"]),
        ("model.rate=fast", ["a number", "'fast'"]),
        ("remat=maybe", ["true or false", "'maybe'"]),
        ("window=x", ["a whole number", "'x'", "none"]),
        ("score=sigmoyd", ["softmax, sigmoid", "did you mean 'sigmoid'?"]),
        ("pair=1", ["2 values"]),
        ("layers=1,,2", ["a whole number"]),
        ("model=3", ["is a group", "model.top_k"]),
        ("name.x=3", ["'name'", "not a group"]),
        ("teacher.top_k=3", ["'teacher' is null"]),
        ("extra=3", ["cannot be set on the command line"]),
        ("steps", ["field=value"]),
        ("=3", ["field=value"]),
        ("model.top_k=9", ["top_k 9 is more than 8 experts"]),
        ("..=1", ["unknown config field"]),
    ],
)
def test_a_wrong_override_is_one_clear_line(override, words):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Outer(), [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_overrides_apply_together_and_the_last_one_wins():
    both = apply_overrides(Outer(), ["model.top_k=16", "model.experts=32", "model.top_k=12"])
    assert (both.model.top_k, both.model.experts) == (12, 32)
    assert apply_overrides(Outer(), []) == Outer()
    with_teacher = Outer(teacher=Inner())
    assert apply_overrides(with_teacher, ["teacher.top_k=3"]).teacher == Inner(top_k=3)
    assert apply_overrides(with_teacher, ["teacher=none"]).teacher is None
    with pytest.raises(ConfigError, match="'teacher' is null"):
        apply_overrides(with_teacher, ["teacher=none", "teacher.top_k=3"])


def test_a_config_survives_strict_json():
    plain = config_dict(Outer(extra={"a": (1, 2.5), "r": range(3)}))
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert again == plain
    assert plain["model"]["ceiling"] == "inf" and plain["layers"] == [0, 1]
    assert plain["extra"] == {"a": [1, 2.5], "r": [0, 1, 2]}
    with pytest.raises(ConfigError, match="not object"):
        config_dict({"a": object()})


def test_flatten_and_differences_name_every_field():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}
    assert flatten({}) == {}
    old, new = Outer(), apply_overrides(Outer(), ["model.top_k=4", "layers=1", "name=big"])
    assert differences(old, new) == ["layers: was [0, 1], now [1]", "model.top_k: was 2, now 4", 'name: was "tiny", now "big"']
    assert differences({"a": 1}, {"b": None}) == ["a: was 1, now absent", "b: was absent, now null"]
    assert differences({"a": 1, "b": 1}, {"a": 1.0, "b": True}) == ["b: was 1, now true"]
    assert differences(new, json.loads(json.dumps(config_dict(new)))) == []


def test_the_digest_ignores_order_and_sees_every_value():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": (2, 3), "a": 1})
    assert digest({"a": 1}) != digest({"a": 2}) != digest({"b": 2})
