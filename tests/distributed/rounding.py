"""How far rounding alone takes two runs of the single process apart that cut the same batch otherwise:
why the cases have their adam_eps.

python -m tests.distributed.rounding              # minutes; prints docs/correctness.md's table
python -m tests.distributed.rounding full         # LoRA or full alone
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median

from pipeline.engines.open import open_engine
from tests.distributed.cases import Reference
from tests.distributed.matrix import StepData, distance, quiet, train_section, trainable, trajectory
from tests.tiny import FAMILIES

SETTINGS = {  # adapter -> (adam_eps, sap.eps)
    "lora": ((1e-8, 0.02), (1e-8, 0.05), (1e-8, 0.1), (1e-3, 0.1)),
    "full": ((1e-8, 0.05), (1e-4, 0.05), (1e-4, 0.1), (1e-3, 0.1)),
}
ACCUMULATIONS = (2, 6)  # micro-batches of 9 and of 3


def runs(of: Reference, adam_eps: float, sap_eps: float) -> Iterator[dict]:
    """The start, then the weights of a run for each of ACCUMULATIONS."""
    for accumulation in ACCUMULATIONS:
        train = train_section(
            of, "single", 1, accumulation, False, Path(tempfile.gettempdir())
        ).model_copy(update={"adam_eps": adam_eps})
        module = trainable(of, train)
        if accumulation == ACCUMULATIONS[0]:
            yield {
                name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
            }
        yield trajectory(
            open_engine(module, train), of, StepData(of.unequal, accumulation, 0, 1), eps=sap_eps
        )["weights"]


def apart(of: Reference, adam_eps: float, sap_eps: float) -> tuple[float, float]:
    """Difference as a share of the update, and the share of its largest element in its square."""
    start, one, other = runs(of, adam_eps, sap_eps)
    largest = max((one[name].double() - other[name].double()).abs().max().item() for name in one)
    total = distance(one, other)
    return total / distance(one, start), (largest / total) ** 2 if total else 0.0


def main(adapters: Sequence[str]) -> int:
    quiet()
    print(
        "| trained | adam_eps | sap.eps | median | largest | of it in one element |\n|---|---|---|---|---|---|"
    )
    for adapter in adapters or SETTINGS:
        for adam_eps, sap_eps in SETTINGS[adapter]:
            combinations = product(FAMILIES, (True, False), (True, False), ("exact", "lagged"))
            found = [
                apart(Reference(adapter, schedule, family, tied, unequal, False), adam_eps, sap_eps)
                for family, tied, unequal, schedule in combinations
            ]
            worst = max(found)
            print(
                f"| {adapter} | {adam_eps:g} | {sap_eps:g} | "
                f"{median(value for value, _ in found):.1e} | {worst[0]:.1e} | {worst[1]:.0%} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
