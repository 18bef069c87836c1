"""Compute the safety direction of one seed on the ranks this was launched with.

torchrun --nproc-per-node 8 launch/direction.py --config launch/recipes/llama_7b_sap.yaml --method sap
"""

from pipeline.running import entry
from pipeline.stages.command_line import run_stage

if __name__ == "__main__":
    entry.run(lambda: run_stage("direction", __doc__))
