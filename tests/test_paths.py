"""Paths flatten and unflatten nested dicts, and rules must cover every path and match something."""

import hypothesis
import pytest
from hypothesis import strategies

from moe_jax import paths

NAMES = strategies.sampled_from(["a", "b", "up", "layers_0"])
LEAVES = strategies.integers(0, 9)
TREES = strategies.dictionaries(NAMES, LEAVES | strategies.dictionaries(NAMES, LEAVES, min_size=1))


def test_flatten_by_hand():
    tree = {"layers": {"up": 1, "attention": {"q": 2}}, "embedding": 3}
    assert paths.flatten(tree) == {"embedding": 3, "layers/attention/q": 2, "layers/up": 1}
    assert list(paths.flatten(tree)) == ["embedding", "layers/attention/q", "layers/up"]


@hypothesis.given(TREES)
@hypothesis.settings(max_examples=25, deadline=None, database=None)
def test_unflatten_is_the_inverse(tree):
    assert paths.unflatten(paths.flatten(tree)) == tree


def test_the_first_matching_rule_wins():
    rules = [("*/norm/*", "norm"), ("layers/*", "layer"), ("*", "rest")]
    names = ["layers/norm/scale", "layers/up", "embedding"]
    assert paths.assign(names, rules) == {"layers/norm/scale": "norm", "layers/up": "layer", "embedding": "rest"}


def test_uncovered_paths_and_idle_rules_are_named():
    with pytest.raises(ValueError, match=r"leave 1 of 2 paths uncovered \['b'\]; patterns that match nothing: \[\]"):
        paths.assign(["a", "b"], [("a", 0)])
    with pytest.raises(ValueError, match=r"leave 0 of 1 paths uncovered \[\]; patterns that match nothing: \['ruter'\]"):
        paths.assign(["router"], [("ruter", 0), ("*", 1)])
    with pytest.raises(ValueError, match="uncovered"):  # case matters on every system
        paths.assign(["Router"], [("router", 0)])
