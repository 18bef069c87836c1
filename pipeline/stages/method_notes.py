"""What is odd about a recipe's methods beside each other, told before anything runs. No error: it may be meant.

notes(chain)      # "methods sft and mine train the same: ..."
"""

from __future__ import annotations

from pipeline.stages.chain import Chain


def notes(chain: Chain) -> list[str]:
    """What is odd about methods beside each other, and about overrides that none of them uses."""
    return [*_alike(chain), *_other_pairs(chain), *_idle(chain)]


def _other_pairs(chain: Chain) -> list[str]:
    """A sentence where methods that draw safety pairs do not see the same ones."""
    draws: dict[str, list[str]] = {}
    for cell in chain.cells:
        if cell.seed == chain.base.seeds[0] and cell.recipe.draws_pairs:
            pairs = cell.recipe.safety_pairs
            how = f"batch_size {pairs.batch_size} and refresh_every {pairs.refresh_every}"
            draws.setdefault("refresh_every 0" if pairs.refresh_every == 0 else how, []).append(
                cell.method
            )
    if len(draws) < 2:
        return []
    shown = "; ".join(
        f"{', '.join(names[:6])}{f' and {len(names) - 6} more' * (len(names) > 6)} with {how}"
        for how, names in draws.items()
    )
    return [
        f"these methods do not see the same safety pairs, for their safety_pairs differ: {shown}"
    ]


def _idle(chain: Chain) -> list[str]:
    """A sentence for every section that the command line fills in and no method enables."""
    given = chain.experiment.overrides
    return [
        f"--{name}.{next(iter(given[name]))} does nothing, because no method enables {name}"
        for name in chain.base.switched
        if isinstance(given.get(name), dict)
        and given[name]
        and "enabled" not in given[name]
        and not any(getattr(cell.recipe, name).enabled for cell in chain.cells)
    ]


def _alike(chain: Chain) -> list[str]:
    """A sentence for every two methods that train the same: one of them changes nothing."""
    first: dict[str, str] = {}
    found = []
    for cell in chain.cells:
        if cell.seed == chain.base.seeds[0]:
            other = first.setdefault(chain.layout.train_hash(cell), cell.method)
            if other != cell.method:
                found.append(
                    f"methods {other} and {cell.method} train the same: set what makes "
                    f"{cell.method} another one, or take it out"
                )
    return found
