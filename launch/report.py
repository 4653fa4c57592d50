"""Rebuilds a study's report from its ledger, without jax: report.md, report.html (one file, figures inside), report.json, figures/.

  python -m launch.report --workdir=runs/quick

Prints the results, the contrasts and the report's path. A study that is not finished gives a report that says so.
Exit codes: 0 done, 2 usage, 3 there is no ledger or it is damaged.
"""

from absl import flags

from launch.common import run
from moe_jax.studies import Ledger, report

_WORKDIR = flags.DEFINE_string("workdir", None, "The study's folder, the one that holds ledger.jsonl.", required=True)


def main(argv: list[str]) -> None:
    """Builds the report and prints its tables and path."""
    workdir = _WORKDIR.value
    paths = report.build(workdir)
    ledger = Ledger.read(workdir)
    print(report.console_table(ledger.design, ledger.runs()))
    print(f"\nreport: {paths.html}")


if __name__ == "__main__":
    run(main)
