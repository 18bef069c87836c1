"""Align the recipe's model on the ranks this was launched with.

torchrun --nproc-per-node 2 launch/align.py --config launch/recipes/demo.yaml
"""

from pipeline.running import entry
from pipeline.stages import command_line


def main() -> None:
    options, experiment = command_line.arguments(__doc__, checkable=True)

    from pipeline.stages import checks

    checks.check(experiment, "align", light=options.check)
    if options.check:
        return checks.check_upstream(experiment, "align")
    from pipeline.engines.open import leave
    from pipeline.stages import stages

    stages.align(experiment)
    leave()


if __name__ == "__main__":
    entry.run(main)
