"""The optimizer's table of every preset, as it was read by a person: a leaf that changes its role, axes or optimizer shows here.

python -m tests.optim.test_preset_tables        # writes the tables anew; read the difference before it is committed
"""

from pathlib import Path

import pytest

from moe_jax.model import Model, ModelConfig
from moe_jax.optim.plan import OptimizerConfig, plan

TABLES = Path(__file__).parent / "preset_tables"
PRESETS = ("tiny", "quick", "small", "seed_79m", "qwen3_30b_a3b")


def table(preset: str) -> str:
    return plan(Model(ModelConfig.preset(preset)).specs, OptimizerConfig()).table() + "\n"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_is_the_one_that_was_read(preset):
    assert table(preset) == (TABLES / f"{preset}.txt").read_text()


if __name__ == "__main__":
    for name in PRESETS:
        (TABLES / f"{name}.txt").write_text(table(name))
