"""A design is checked when it is declared, keeps its identity through JSON, and says what differs from another."""

import dataclasses
import json

import pytest

from moe_jax.errors import ConfigError
from moe_jax.studies import Comparison, Design, Factor, Metric, cell_key, difference, interaction
from moe_jax.studies.design import differences


def _design(**changes):
    given = {
        "name": "d",
        "question": "q",
        "factors": (Factor("noise", (0.0, 0.1)), Factor("gate", ("muon", "adamw"))),
        "seeds": (1, 2),
        "metrics": (Metric("ppl"),),
        "comparisons": (difference("c", "ppl", {"noise": 0.1, "gate": "muon"}, {"noise": 0.0, "gate": "muon"}),),
        "rule": "r",
    }
    return Design(**{**given, **changes})


def test_cells_are_the_product_with_the_last_factor_fastest():
    levels = [(cell["noise"], cell["gate"]) for cell in _design().cells()]
    assert levels == [(0.0, "muon"), (0.0, "adamw"), (0.1, "muon"), (0.1, "adamw")]


def test_runs_go_seed_by_seed():
    runs = _design().runs()
    assert len(runs) == 8
    assert [seed for _, seed in runs] == [1] * 4 + [2] * 4


def test_only_the_listed_cells_run():
    only = ({"gate": "adamw", "noise": 0.0}, {"gate": "muon", "noise": 0.1}, {"gate": "muon", "noise": 0.0})
    design = _design(only=only)
    assert [tuple(cell) for cell in design.cells()] == [("noise", "gate")] * 3  # in the order of the factors
    assert [cell["gate"] for cell in design.cells()] == ["adamw", "muon", "muon"]
    assert len(design.runs()) == 6


def test_json_round_trip_keeps_equality_digest_and_number_types(seed_design):
    again = Design.from_json(json.loads(json.dumps(seed_design.to_json())))
    assert again == seed_design
    assert again.digest() == seed_design.digest()
    assert [type(level) for level in again.factors[0].levels] == [float] * 3


def test_digest_sees_every_field(seed_design):
    changed = {
        "question": "another",
        "seeds": (42, 43),
        "alpha": 0.01,
        "rule": "another",
        "settings": {**seed_design.settings, "micro_batches": 401},
        "notes": (),
        "comparisons": seed_design.comparisons[:-1],
        "metrics": (*seed_design.metrics[:2], dataclasses.replace(seed_design.metrics[2], decimals=3)),
    }
    digests = {dataclasses.replace(seed_design, **{name: value}).digest() for name, value in changed.items()}
    assert len(digests | {seed_design.digest()}) == len(changed) + 1


def test_differences_name_the_field(seed_design):
    other = dataclasses.replace(seed_design, seeds=(42, 43), settings={**seed_design.settings, "micro_batches": 401})
    assert differences(seed_design, other) == ["seeds: was [42, 43, 44], now [42, 43]", "settings.micro_batches: was 400, now 401"]
    factors = (Factor("noise_std", (0.0, 0.1, 0.5, 1.0)), seed_design.factors[1])
    assert differences(seed_design, dataclasses.replace(seed_design, factors=factors)) == [
        "factors.noise_std.levels: was [0.0, 0.1, 0.5], now [0.0, 0.1, 0.5, 1.0]"
    ]


def test_difference_and_interaction_have_the_declared_signs():
    made = difference("c", "ppl", of={"noise": 0.1}, minus={"noise": 0.0})
    assert made.terms == ((1.0, (("noise", 0.1),)), (-1.0, (("noise", 0.0),)))
    made = interaction("i", "ppl", "noise", (0.0, 0.1), "gate", ("muon", "adamw"), rest={"k": 2})
    weights = {(dict(cell)["noise"], dict(cell)["gate"]): weight for weight, cell in made.terms}
    assert weights == {(0.1, "adamw"): 1, (0.0, "adamw"): -1, (0.1, "muon"): -1, (0.0, "muon"): 1}
    assert all(dict(cell)["k"] == 2 for _, cell in made.terms)


def test_cell_key_ignores_the_order_of_factors():
    assert cell_key({"a": 1, "b": 2}) == cell_key({"b": 2, "a": 1}) == cell_key((("b", 2), ("a", 1)))


def _term(weight, noise, gate="muon"):
    return weight, {"noise": noise, "gate": gate}


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: Factor("noise", (0.0, 0.1, 0)), r"'noise' has 3 levels, but 0 is there twice"),
        (lambda: Factor("noise", ()), "has no levels"),
        (lambda: Factor("noise", ((1, 2),)), "a tuple, not a JSON scalar"),
        (lambda: Factor("noise", (float("nan"),)), "not finite"),
        (lambda: Metric("ppl", better="lowr"), "did you mean 'lower'"),
        (lambda: _design(seeds=(42,)), r"has 1 seed\(s\); at least 2"),
        (lambda: _design(seeds=(42, 42)), r"\(42, 42\) are not all different"),
        (lambda: _design(seeds=(42, 1.5)), "seed 1.5 is not an int"),
        (lambda: _design(alpha=5), r"alpha=5 is outside \(0, 1\)"),
        (lambda: _design(factors=()), "declares no factor"),
        (lambda: _design(metrics=(Metric("ppl"), Metric("ppl"))), "metric 'ppl' is declared twice"),
        (lambda: _design(metrics=(Metric("ppl"), Metric("seconds"))), "declare no metric of that name"),
        (lambda: _design(settings={"x": object()}), "not object"),
        (lambda: _design(only=()), "0 cells"),
        (lambda: _design(only=({"noise": 0.0},)), "gives no level for gate"),
        (lambda: _design(comparisons=(Comparison("c", "", "pplx", (_term(1, 0.1), _term(-1, 0.0))),)), "did you mean 'ppl'"),
        (lambda: _design(comparisons=(Comparison("c", "", "ppl", (_term(1, 0.2), _term(-1, 0.0))),)), r"no level 0.2 \(did you mean '0.1'"),
        (lambda: _design(comparisons=(Comparison("c", "", "ppl", ((1, {"nois": 0.1}), _term(-1, 0.0))),)), "did you mean 'noise'"),
        (lambda: _design(comparisons=(Comparison("c", "", "ppl", ((1, {"noise": 0.1}), _term(-1, 0.0))),)), "gives no level for gate"),
        (lambda: Comparison("c", "", "ppl", (_term(1, 0.1), _term(-0.5, 0.0))), r"\[1.0, -0.5\] sum to 0.5, not 0"),
        (lambda: Comparison("c", "", "ppl", (_term(1, 0.1), _term(-1, 0.1))), "same cell twice"),
        (lambda: Comparison("c", "", "ppl", ((1, {"noise": 1}),)), "1 term"),
        (lambda: interaction("i", "ppl", "noise", (0, 1), "noise", (0, 1)), "cannot interact with itself"),
        (lambda: _design().metric("perplexity"), "known: ppl"),
        (lambda: Design.from_json({**_design().to_json(), "seed": [1]}), "did you mean 'seeds'"),
        (lambda: Design.from_json({"name": "d"}), "lacks question, factors"),
    ],
)
def test_a_wrong_declaration_is_one_clear_line(declare, message):
    with pytest.raises(ConfigError, match=message) as caught:
        declare()
    assert "\n" not in str(caught.value)


def test_a_comparison_must_be_among_the_cells_that_run():
    only = ({"noise": 0.0, "gate": "muon"}, {"noise": 0.1, "gate": "adamw"})
    with pytest.raises(ConfigError, match="is not one of the 2 cells that run"):
        _design(only=only)
