"""Exit codes are what api.md promises, and typos find their name."""

import pytest

from moe_jax import errors


def test_exit_codes_are_the_published_ones():
    codes = {cls.__name__: cls.exit_code for cls in errors.MoeJaxError.__subclasses__()}
    promised = {"ConfigError": 2, "DataError": 3, "CheckpointError": 4, "Stopped": 75, "NonFinite": 1}
    assert {name: codes[name] for name in promised} == promised


def test_a_config_error_is_also_a_value_error():
    with pytest.raises(ValueError, match="top_k"):
        raise errors.ConfigError("top_k 9 is more than 8 experts")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stpes", " (did you mean 'steps'?)"),
        ("STEPS", " (did you mean 'steps'?)"),
        ("top_k", " (did you mean 'model.top_k'?)"),
        ("zzzzzz", ""),
        ("", ""),
    ],
)
def test_nearest(name, expected):
    assert errors.nearest(name, ["steps", "model.top_k", "seed"]) == expected


def test_nearest_returns_the_known_spelling():
    assert errors.nearest("modelconfig", ["ModelConfig"]) == " (did you mean 'ModelConfig'?)"
    assert errors.nearest("x", []) == ""


def test_check_known():
    errors.check_known("field", "a", {"a": 1})
    errors.check_known("field", None, (None, "abc"))
    with pytest.raises(errors.ConfigError, match=r"^unknown field 'abd' \(did you mean 'abc'\?\); known: abc, x$"):
        errors.check_known("field", "abd", (None, "abc", "", "x"))
    with pytest.raises(errors.ConfigError, match=r"^unknown field None; known: abc$"):
        errors.check_known("field", None, ("abc",))
