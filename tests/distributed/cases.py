"""The equivalence classes: what may differ between two trainings that must end at the same weights.

`matrix_cases()` holds every pair of factors within every engine, hence every pair of factors and every engine x adapter
x schedule; `all_cases()` is the full product without what EXCLUSIONS names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product

from tests.distributed.covering import cover, groups_with
from tests.tiny import FAMILIES

FACTORS: dict[str, tuple] = {
    "engine": ("single", "zero3", "fsdp2"),
    "ranks": (1, 2, 3),
    # lora: small enough for an engine to hold it whole in a step's passes; wide: above 5% of all weights
    "adapter": ("lora", "wide", "full"),
    # reused: exact, with a direction that serves three steps
    "schedule": ("exact", "lagged", "reused"),
    "family": tuple(FAMILIES),
    "tied": (True, False),
    "accumulation": (1, 3),
    "unequal": (False, True),  # token counts of ranks and micro-batches
    "checkpointing": (False, True),
    "clipping": (False, True),
    # DeepSpeed's persistence threshold and reuse distance: 0, or larger than the model
    "persistence": (False, True),
    "offload_optimizer": (False, True),
    "offload_param": (False, True),
}


@dataclass(frozen=True)
class Reference:
    """What the resulting weights may depend on: the single process is trained once for each.
    schedule 'none': SAP left out.
    """

    adapter: str
    schedule: str
    family: str
    tied: bool
    unequal: bool
    clipping: bool

    def __str__(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())

    @property
    def control(self) -> Reference:
        return replace(self, schedule="none")


@dataclass(frozen=True)
class Case:
    """One combination of FACTORS."""

    engine: str
    ranks: int
    adapter: str
    schedule: str
    family: str
    tied: bool
    accumulation: int
    unequal: bool
    checkpointing: bool
    clipping: bool
    persistence: bool
    offload_optimizer: bool
    offload_param: bool

    def __str__(self) -> str:
        flags = (
            "unequal",
            "checkpointing",
            "clipping",
            "persistence",
            "offload_optimizer",
            "offload_param",
        )
        always = [
            self.engine,
            f"{self.ranks}r",
            self.adapter,
            self.schedule,
            self.family,
            "tied" if self.tied else "untied",
        ]
        return "-".join(
            [*always, f"acc{self.accumulation}", *(flag for flag in flags if getattr(self, flag))]
        )

    @property
    def reference(self) -> Reference:
        return Reference(
            self.adapter, self.schedule, self.family, self.tied, self.unequal, self.clipping
        )


EXCLUSIONS: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    ("engine single is refused above one rank", lambda c: c.engine == "single" and c.ranks > 1),
    (
        "one rank shards nothing: no padding, no collective that could be wrong",
        lambda c: c.engine != "single" and c.ranks == 1,
    ),
    (
        "persistence threshold and reuse distance are DeepSpeed's",
        lambda c: c.engine != "zero3" and c.persistence,
    ),
    (
        "offloading the optimizer is DeepSpeed's",
        lambda c: c.engine != "zero3" and c.offload_optimizer,
    ),
    ("offloading weights is DeepSpeed's", lambda c: c.engine != "zero3" and c.offload_param),
)


def exclusion(case: Case) -> str | None:
    """Why there is no such case; None where there is."""
    return next((reason for reason, applies in EXCLUSIONS if applies(case)), None)


def product_of_factors() -> Iterator[Case]:
    return (Case(*values) for values in product(*FACTORS.values()))


def all_cases() -> list[Case]:
    return [case for case in product_of_factors() if exclusion(case) is None]


@cache
def matrix_cases() -> tuple[Case, ...]:
    """The cases of `make test-all`, those of one process group together."""
    rows = cover([asdict(case) for case in all_cases()], requirements)
    return tuple(sorted((Case(**row) for row in rows), key=lambda case: (case.ranks, case.engine)))


def requirements(row: dict) -> set:
    """Pairs of factors, each within its engine: no engine may rely on another for a pair. How weights are fetched,
    which two factors decide together, counts as one more.
    """
    return groups_with(row | {"fetched": fetched(Case(**row))}, "engine", 3)


def fetched(case: Case) -> str:
    """Who fetches frozen layers, and whether what is trained comes at once or by layers."""
    if case.adapter == "full":
        return "all by the engine"
    if case.offload_param:
        return "DeepSpeed's, in host memory"
    return "at once" if case.adapter == "lora" else "by layer"
