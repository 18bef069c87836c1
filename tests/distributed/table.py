"""The measured equivalence matrix as Markdown, as docs/correctness.md shows it.

python -m tests.distributed.table                 # trains all cases (minutes), prints the tables
python -m tests.distributed.table --results DIR   # prints what `EQUIVALENCE_RESULTS=DIR make matrix` measured
python -m tests.distributed.table --write         # either, and puts the tables into docs/correctness.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.cases import Case, matrix_cases
from tests.distributed.matrix import BOUND, Results, measure, read_results

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "correctness.md"
BEGIN, END = "<!-- begin: python -m tests.distributed.table -->", "<!-- end -->"
_FLAGS = (
    "unequal",
    "checkpointing",
    "clipping",
    "persistence",
    "offload_optimizer",
    "offload_param",
)


def summary(cases: Sequence[Case], results: Results) -> list[str]:
    """One row per engine and adapter: the worst of its cases."""
    lines = [
        "| engine | trained | cases | largest difference | allowed | smallest with SAP left out |",
        "|---|---|---|---|---|---|",
    ]
    for engine, adapter in sorted({(case.engine, case.adapter) for case in cases}):
        found = [
            results[str(case)] for case in cases if (case.engine, case.adapter) == (engine, adapter)
        ]
        worst, least = max(row["difference"] for row in found), min(row["control"] for row in found)
        lines.append(
            f"| {engine} | {adapter} | {len(found)} | {worst:.1e} | {BOUND[adapter]:.0e} | {least:.2f} |"
        )
    return lines


def details(cases: Sequence[Case], results: Results) -> list[str]:
    lines = [
        (
            "| engine | ranks | trained | schedule | family | embeddings | accumulation | also | "
            "difference | loss and norms | SAP left out |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        row = results[str(case)]
        lines.append(
            f"| {factors(case)} | {row['difference']:.1e} | {row['logged']:.1e} | {row['control']:.2f} |"
        )
    return lines


def factors(case: Case) -> str:
    """The first columns of the case's row."""
    also = ", ".join(flag.replace("_", " ") for flag in _FLAGS if getattr(case, flag)) or "-"
    tied = "tied" if case.tied else "untied"
    return (
        f"{case.engine} | {case.ranks} | {case.adapter} | {case.schedule} | {case.family} | {tied} "
        f"| {case.accumulation} | {also}"
    )


def markdown(cases: Sequence[Case], results: Results) -> str:
    missing = [str(case) for case in cases if "difference" not in results.get(str(case), {})]
    if missing:
        raise ValueError(f"{len(missing)} cases have no result, the first is {missing[0]}")
    return "\n".join([*summary(cases, results), "", *details(cases, results)])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.table")
    parser.add_argument(
        "--results", type=Path, help="folder that `EQUIVALENCE_RESULTS=DIR make matrix` filled"
    )
    parser.add_argument(
        "--write", action="store_true", help="put the tables into docs/correctness.md"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        results = (
            read_results(options.results)
            if options.results
            else measure(matrix_cases(), Path(folder))
        )
    text = markdown(matrix_cases(), results)
    if options.write:
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
