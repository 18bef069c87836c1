"""Find the harmful samples of a cell's training data (SAFT) on the ranks this was launched with.

torchrun --nproc-per-node 8 launch/filter.py --config launch/recipes/compare.yaml --method saft
"""

from pipeline.running import entry
from pipeline.stages import command_line


def main() -> None:
    options, experiment = command_line.arguments(__doc__, checkable=True)
    cell = command_line.choose_cell(experiment, options.method, options.seed)

    from pipeline.stages import checks

    checks.check(experiment, cell, light=options.check)
    if options.check:
        return checks.check_upstream(experiment, "filter", cell)
    from pipeline.engines.open import leave
    from pipeline.stages import stages

    stages.filter_data(experiment, cell)
    leave()


if __name__ == "__main__":
    entry.run(main)
