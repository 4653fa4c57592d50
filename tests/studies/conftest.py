"""The first study as a fixture: its 18 published numbers, with made-up curves and loads around them."""

import numpy as np
import pytest

from moe_jax.studies import USAGE_CV_ROUTED, USAGE_CV_SEED, Design, Factor, Ledger, Metric, Run, difference, interaction

SEEDS = (42, 43, 44)
# (noise_std, balance_weight): validation perplexity and usage CV of seeds 42, 43, 44, as the first study printed them
SEED_TABLE = {
    (0.0, 0.01): ((129.75, 131.55, 129.40), (0.0661, 0.0867, 0.0560)),
    (0.0, 0.0): ((130.99, 131.50, 129.13), (0.2169, 0.2426, 0.1598)),
    (0.1, 0.01): ((130.86, 132.79, 130.51), (0.0620, 0.0835, 0.0465)),
    (0.1, 0.0): ((131.90, 132.94, 130.30), (0.2505, 0.2667, 0.1665)),
    (0.5, 0.01): ((144.55, 145.99, 142.57), (0.0541, 0.0808, 0.0567)),
    (0.5, 0.0): ((145.03, 144.13, 143.73), (0.4388, 0.3138, 0.2510)),
}


def _cell(noise, balance):
    return {"noise_std": noise, "balance_weight": balance}


def _comparisons():
    noise = [
        difference(f"noise {high} - 0.0, balance {weight}", "val_ppl", _cell(high, weight), _cell(0.0, weight), "Does gate noise hurt?")
        for high in (0.1, 0.5)
        for weight in (0.01, 0.0)
    ]
    balance = [
        difference(f"balance 0 - 0.01, noise {std}", "val_ppl", _cell(std, 0.0), _cell(std, 0.01), "Does balance help?", "balance")
        for std in (0.0, 0.1, 0.5)
    ]
    both = interaction(
        "noise 0.5 x balance", "val_ppl", "noise_std", (0.0, 0.5), "balance_weight", (0.01, 0.0), family="interaction", question="Both?"
    )
    usage = difference("usage: balance 0 - 0.01, noise 0", "usage_cv_seed", _cell(0.0, 0.0), _cell(0.0, 0.01), family="usage")
    return (*noise, *balance, both, usage)


@pytest.fixture(scope="session")
def seed_design():
    """The first study's factorial, declared as this project declares it."""
    return Design(
        name="noise_factorial",
        question="Does noise on the gate hurt, and does the balance loss help?",
        factors=(Factor("noise_std", (0.0, 0.1, 0.5)), Factor("balance_weight", (0.01, 0.0))),
        seeds=SEEDS,
        metrics=(Metric("val_ppl", "Val PPL"), USAGE_CV_ROUTED, USAGE_CV_SEED),
        comparisons=_comparisons(),
        rule="A difference counts when its Holm p within the family is at most .05.",
        settings={"preset": "seed_79m", "micro_batches": 400, "split": "leaky", "data": {"window": 512, "stride": 1}},
        notes=("Made from the numbers that the first study printed.",),
    )


@pytest.fixture(scope="session")
def seed_runs(seed_design):
    """The 18 runs; perplexity and the seed's CV are published, the rest is made up."""
    rng = np.random.default_rng(0)
    runs = []
    for cell, seed in seed_design.runs():
        at = SEEDS.index(seed)
        ppl, cv = (column[at] for column in SEED_TABLE[cell["noise_std"], cell["balance_weight"]])
        load = 24 * 512 * 2 / 8 * np.exp((0.08 if cell["balance_weight"] else 0.4) * rng.standard_normal((6, 8)))
        steps = np.arange(0, 101, 5)
        loss = np.log(ppl) + 5.9 * np.exp(-steps / 18) + 0.03 * rng.standard_normal(steps.size)
        runs.append(
            Run(
                cell,
                seed,
                metrics={"val_ppl": ppl, "usage_cv_routed": 1.3 * cv, "usage_cv_seed": cv},
                series={"train_loss": np.stack([steps, loss], 1)},
                arrays={"load": load},
                seconds=96.0 + at + 30 * cell["noise_std"],
                provenance={"commit": "0123abc", "versions": {"jax": "0.10.2"}, "device": "cpu"},
            )
        )
    return runs


@pytest.fixture
def seed_ledger(tmp_path, seed_design, seed_runs):
    """The ledger of the whole study, on disk."""
    return _written(tmp_path / "study", seed_design, seed_runs)


@pytest.fixture(scope="session")
def shared_ledger(tmp_path_factory, seed_design, seed_runs):
    """The same, written once: for tests that only read it or build its report."""
    return _written(tmp_path_factory.mktemp("shared"), seed_design, seed_runs)


def _written(workdir, design, runs):
    ledger = Ledger.open(workdir, design)
    for run in runs:
        ledger.append(run)
    return ledger


@pytest.fixture(scope="session")
def seed_table():
    """The published values: [metric][(noise_std, balance_weight)] -> (seed 42, 43, 44)."""
    return {name: {cell: columns[i] for cell, columns in SEED_TABLE.items()} for i, name in enumerate(("ppl", "cv"))}
