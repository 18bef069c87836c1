"""Check the SAP step on this model and these ranks: a table, and exit code 0, or 1 where a check failed.

Minutes; writes nothing.

deepspeed launch/doctor.py --config launch/recipes/llama_7b_sap.yaml
torchrun --nproc-per-node 8 launch/doctor.py --config launch/recipes/llama_7b_sap.yaml --method sap --json doctor.json
python launch/doctor.py --config launch/recipes/demo.yaml --train.ranks 1
"""

import argparse
from pathlib import Path

from pipeline.running import entry
from pipeline.stages import command_line


def main() -> int:
    """Run the checks on this process's rank; returns the exit code, 0 or 1."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="also write the findings to this file")
    own, rest = parser.parse_known_args()
    options, experiment = command_line.arguments(__doc__, rest)
    if own.json is not None and not own.json.absolute().parent.is_dir():
        raise ValueError(f"--json {own.json}: its folder does not exist")

    from pipeline import artifacts
    from pipeline.doctor.case import choose_cell, open_case
    from pipeline.doctor.checks import diagnose
    from pipeline.engines.open import leave

    case = open_case(experiment, choose_cell(experiment, options.method, options.seed))
    report = diagnose(case.engine, case.probe, case.sap, case.useful, case.pairs, case.facts)
    if case.engine.rank == 0:
        print(report.table(), flush=True)
        if own.json is not None:
            artifacts.write_json(own.json, report.as_json())
    if report.completed:
        leave()
    return report.exit_code


if __name__ == "__main__":
    entry.run(main)
