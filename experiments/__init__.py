"""Studies, declared: each module states its question, cells, seeds, contrasts, rule and cost, and returns configurations."""
