"""Studies: declared factorials, their ledger, their statistics and their report. Nothing here imports jax."""

from moe_jax.studies.analysis import Analysis, analyse
from moe_jax.studies.design import (
    USAGE_CV_ROUTED,
    USAGE_CV_SEED,
    Comparison,
    Design,
    Factor,
    Metric,
    cell_key,
    difference,
    interaction,
)
from moe_jax.studies.ledger import Ledger, LedgerDamaged, LedgerMissing, Run, StudyMismatch
from moe_jax.studies.stats import Contrast, Summary, contrast, contrasts, holm, paired, summary
