"""Find the harmful samples of a cell's training data (SAFT) on the ranks this was launched with.

torchrun --nproc-per-node 8 launch/filter.py --config launch/recipes/compare.yaml --method saft
"""

from pipeline import entry


def main() -> None:
    options, experiment = entry.arguments(__doc__, checkable=True)
    cell = entry.choose_cell(experiment, options.method, options.seed)

    from pipeline import checks

    checks.check(experiment, cell, light=options.check)
    if options.check:
        return checks.check_upstream(experiment, "filter", cell)
    from pipeline import stages
    from pipeline.sharding.launch import leave

    stages.filter_data(experiment, cell)
    leave()


if __name__ == "__main__":
    entry.run(main)
