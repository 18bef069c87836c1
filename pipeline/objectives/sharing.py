"""How ranks share a global batch, as numbers: what is checked before any batch is made.

Needs no torch; batches.py does the sharing.

check_shares("train.batch_size", 32, ranks=8)
accumulation(32, micro_batch_size=4, ranks=2)      # 4 passes a rank
"""

from __future__ import annotations


def check_shares(field: str, batch_size: int, ranks: int) -> None:
    """ValueError where the ranks' shares of a global batch are not equal.

    field: of the recipe, e.g. train.batch_size.
    """
    if batch_size % ranks:
        fewer = max(
            count for count in range(1, min(ranks, batch_size + 1)) if batch_size % count == 0
        )
        raise ValueError(
            f"{field} {batch_size} is not divisible by {ranks} ranks: use a multiple of {ranks}, "
            f"or {fewer} rank{'s' * (fewer > 1)}"
        )


def accumulation(batch_size: int, micro_batch_size: int, ranks: int) -> int:
    """Passes of a rank over its share of a global batch."""
    return -(-batch_size // (micro_batch_size * ranks))


def share_of(batch_size: int, share: float) -> int:
    """Samples in a share of a global batch: the nearest number, at least one."""
    return max(1, round(share * batch_size))


def fillers(field: str, pairs: int, micro_batch_size: int, ranks: int) -> str | None:
    """A sentence where some ranks have nothing to compute in a pass over the pairs and take copies
    of weight 0; None where all have.
    """
    idle = ranks * accumulation(pairs, micro_batch_size, ranks) - pairs
    return (
        (
            f"{field} {pairs} leaves {idle} of {ranks} ranks without a pair of their own: "
            f"{pairs + idle} would take the same time"
        )
        if idle > 0
        else None
    )
