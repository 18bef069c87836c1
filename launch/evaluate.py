"""Evaluate one subject in one process: a method's cell, or the shipped or aligned model.

python launch/evaluate.py --config launch/recipes/demo.yaml --method sap --seed 0
python launch/evaluate.py --config launch/recipes/demo.yaml --method aligned
python launch/evaluate.py --config launch/recipes/demo.yaml --method sap --seed 0 --shard 0/4

The last of these is a quarter; the others are 1/4, 2/4, 3/4. Shards may run at once or one after the other, on any node
that sees output_dir; the last to end merges them. Where more than one GPU is visible the model is spread over all of
them.
"""

import argparse

from pipeline.evaluation.shards import WHOLE, PromptSlice
from pipeline.running import entry
from pipeline.stages import command_line


def main() -> None:
    """Evaluate the subjects of the recipe, or the shard of them that --shard names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--shard")
    own, rest = parser.parse_known_args()
    shard = WHOLE if own.shard is None else PromptSlice.parse(own.shard)
    options, experiment = command_line.arguments(__doc__, rest)

    from pipeline.stages import evaluate
    from pipeline.stages.layout import Layout
    from pipeline.system.system_errors import reading_input

    with reading_input():
        layout = Layout(experiment)
    baselines = {subject.name: subject for subject in layout.subjects() if subject.seed is None}
    subject = baselines.get(options.method) or layout.subject(
        command_line.choose_cell(experiment, options.method, options.seed)
    )
    evaluate.evaluate(experiment, subject, shard)


if __name__ == "__main__":
    entry.run(main)
