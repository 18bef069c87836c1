"""Align the recipe's model on the ranks this was launched with.

torchrun --nproc-per-node 2 launch/align.py --config launch/recipes/demo.yaml
"""

from pipeline import entry


def main() -> None:
    options, experiment = entry.arguments(__doc__, checkable=True)

    from pipeline import checks

    checks.check(experiment, "align", light=options.check)
    if options.check:
        return checks.check_upstream(experiment, "align")
    from pipeline import stages
    from pipeline.sharding.launch import leave

    stages.align(experiment)
    leave()


if __name__ == "__main__":
    entry.run(main)
