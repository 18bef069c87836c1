"""What starting processes costs: a grid of tiny cells, warm and with every process a Python of its own, in turn.

    python -m tests.tools.measure_start [ROUNDS [CELLS]]      # default 1 and 6

Training and evaluating a cell is a second's work here, so what is measured is its start. Printed are wall time and CPU
time of `sap run` from nothing, data preparation and report included, and that all adapters and answers are the same.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from tests.project import make_project, sap, write_recipe


def main(rounds: int = 1, cells: int = 6) -> int:
    """Exit code 1 where a run fails, or products differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = make_project(folder)
        content["align"]["enabled"] = content["evaluate"]["baselines"] = False
        content["train"] |= {"engine": "single", "ranks": 1}
        content["methods"] = {f"lr{i}": {"train": {"lr": 1e-3 * (i + 1)}} for i in range(cells)}
        path = write_recipe(folder, content)
        products, lines = [], []
        for number in range(rounds):
            for way, options in (("separate", ["--no-warm"]), ("warm", [])):
                output = folder / f"{way}{number}"
                before, started = os.times(), time.monotonic()
                done = sap("run", path, f"--output_dir={output}", *options)
                wall, after = time.monotonic() - started, os.times()
                if done.returncode:
                    print(done.stderr, file=sys.stderr)
                    return 1
                cpu = (
                    after.children_user
                    + after.children_system
                    - before.children_user
                    - before.children_system
                )
                lines.append(f"| {way} | {wall:.0f} | {cpu:.0f} |")
                found = [
                    *output.glob("tiny/train-*/adapter/*.safetensors"),
                    *output.glob("tiny/evaluate-*/answers.jsonl"),
                ]
                products.append({file.relative_to(output): file.read_bytes() for file in found})
                print(
                    f"[start] round {number + 1}, {way}: {wall:.0f} s", file=sys.stderr, flush=True
                )
        print("| processes | seconds | CPU seconds |", "| --- | --- | --- |", *lines, sep="\n")
        same = all(one == products[0] for one in products) and len(products[0]) == 2 * cells
        print("adapters and answers: the same to the bit" if same else "adapters or answers DIFFER")
        return int(not same)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
