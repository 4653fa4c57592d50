"""Paths flatten and unflatten nested dicts."""

import hypothesis
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
