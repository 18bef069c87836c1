"""Train one cell on the ranks this was launched with.

deepspeed launch/train.py --config launch/recipes/llama_7b_sap.yaml --method sap
torchrun --nproc-per-node 8 launch/train.py --config launch/recipes/llama_7b_sap.yaml --method sap
python launch/train.py --config launch/recipes/demo.yaml --method sft --train.ranks 1
"""

from pipeline.running import entry
from pipeline.stages import command_line


def main() -> None:
    options, experiment = command_line.arguments(__doc__, checkable=True)
    cell = command_line.choose_cell(experiment, options.method, options.seed)

    from pipeline.stages import checks

    checks.check(experiment, cell, light=options.check)
    if options.check:
        return checks.check_upstream(experiment, "train", cell)
    from pipeline.engines.open import leave
    from pipeline.stages import stages

    stages.train(experiment, cell)
    leave()


if __name__ == "__main__":
    entry.run(main)
