"""Evaluate one subject in one process: a method's cell, or the shipped or aligned model.

python launch/evaluate.py --config launch/recipes/demo.yaml --method sap --seed 0
python launch/evaluate.py --config launch/recipes/demo.yaml --method aligned
"""

import sys

from pipeline import entry


def main() -> None:
    options, experiment = entry.arguments(__doc__)

    from pipeline import stages
    from pipeline.layout import Layout

    layout = Layout(experiment)
    baselines = {subject.name: subject for subject in layout.subjects() if subject.seed is None}
    subject = baselines.get(options.method) or layout.subject(entry.choose_cell(experiment, options.method, options.seed))
    stages.evaluate(experiment, subject)


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
