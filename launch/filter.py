"""Find the harmful samples of a cell's training data (SAFT) on the ranks this was launched with.

torchrun --nproc-per-node 8 launch/filter.py --config launch/recipes/compare.yaml --method saft
"""

from pipeline.running import entry
from pipeline.stages.command_line import run_stage

if __name__ == "__main__":
    entry.run(lambda: run_stage("filter", __doc__))
