"""What imports what: the rooms (modules), their wings, and the floors that imports climb; and the picture of them.

    python -m tests.tools.architecture        # counts, and docs/architecture.png

A wing is a package of pipeline/, or a module in its root. FLOORS is the one place that says who may import whom: a
module imports from floors below its own and from its own wing. tests/unit/repository/test_architecture.py holds the
code to it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (
    ("shipped", "system", "libraries"),
    ("artifacts", "recipe", "objectives"),
    ("running", "tracking", "data", "attacks"),
    ("model", "judges"),
    ("engines", "generation"),
    ("defences", "evaluation"),
    ("training", "planner"),
    ("stages",),
    ("report", "doctor", "bench"),
    ("cli", "launch"),
)


def floor(wing: str) -> int:
    """From 1, the ground."""
    return next(number for number, wings in enumerate(FLOORS, 1) if wing in wings)


def wing(module: str) -> str:
    """pipeline.data.rows -> data; launch.train -> launch."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "pipeline" else first


@cache
def modules() -> dict[str, Path]:
    """Every module of pipeline/ and launch/ by its dotted name; packages that hold no code are left out."""
    found = {}
    for path in sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "launch").glob("*.py")]):
        # which holds the version
        if path.read_text().strip() and path != ROOT / "pipeline" / "__init__.py":
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text())


def imports(module: str) -> Iterator[tuple[str, str, int]]:
    """What a module imports of this project, wherever it does:
    (module, name bound to it or to something of it, line).
    """
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name in modules():
                    yield name.name, name.asname or name.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                target = whole if whole in modules() else node.module
                if target in modules():
                    yield target, name.asname or name.name, node.lineno


def arrows() -> set[tuple[str, str]]:
    """(module, what it imports)."""
    return {
        (module, target)
        for module in modules()
        for target, _, _ in imports(module)
        if target != module
    }


def circles() -> list[list[str]]:
    """Modules that import each other, directly or by others; one circle for each that is met."""
    after: dict[str, list[str]] = {module: [] for module in modules()}
    for module, target in sorted(arrows()):
        after[module].append(target)
    found, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in after[module]:
                walk(target, [*path, module])
            done.add(module)

    for module in after:
        walk(module, [])
    return found


def climbed() -> int:
    """The longest chain of imports, in modules."""
    below: dict[str, set[str]] = {module: set() for module in modules()}
    for module, target in arrows():
        below[module].add(target)

    @cache
    def height(module: str) -> int:
        return 1 + max((height(target) for target in below[module]), default=0)

    return max(map(height, below))


def draw(path: Path) -> None:
    """The wings on their floors, and an arrow from each to those that it imports."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 9))
    place = {}
    for number, wings in enumerate(FLOORS):
        for index, name in enumerate(wings):
            place[name] = (
                (index + 0.5) / len(wings) + 0.06 * (-1) ** number * (len(wings) == 1),
                number,
            )
    between = sorted(
        {
            (wing(module), wing(target))
            for module, target in arrows()
            if wing(module) != wing(target)
        }
    )
    for above, below in between:
        (x0, y0), (x1, y1) = place[above], place[below]
        axes.annotate(
            "",
            (x1, y1 + 0.17),
            (x0, y0 - 0.17),
            arrowprops={"arrowstyle": "->", "color": "#8894a3", "linewidth": 0.7, "alpha": 0.7},
        )
    for name, (x, y) in place.items():
        rooms = sum(wing(module) == name for module in modules())
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#e8eef5", "edgecolor": "#3b6ea5"}
        axes.text(x, y, f"{name} ({rooms})", ha="center", va="center", fontsize=10, bbox=box)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(FLOORS) - 0.4)
    axes.set_axis_off()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    wings = {wing(module) for module in modules()}
    between = {
        (wing(module), wing(target)) for module, target in arrows() if wing(module) != wing(target)
    }
    in_root = sum(path.parent == ROOT / "pipeline" for path in modules().values())
    print(
        f"rooms {len(modules())} ({in_root} in pipeline's root), wings {len(wings)}, floors {len(FLOORS)}"
    )
    print(
        f"arrows between modules {len(arrows())}, between wings {len(between)}; longest chain of "
        f"modules {climbed()}; circles {len(circles())}"
    )
    draw(ROOT / "docs" / "architecture.png")


if __name__ == "__main__":
    sys.exit(main())
