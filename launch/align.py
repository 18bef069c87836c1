"""Align the recipe's model on the ranks this was launched with.

torchrun --nproc-per-node 2 launch/align.py --config launch/recipes/demo.yaml
"""

from pipeline.running import entry
from pipeline.stages.command_line import run_stage

if __name__ == "__main__":
    entry.run(lambda: run_stage("align", __doc__))
