"""Train one cell on the ranks this was launched with.

deepspeed launch/train.py --config launch/recipes/llama_7b_sap.yaml --method sap
torchrun --nproc-per-node 8 launch/train.py --config launch/recipes/llama_7b_sap.yaml --method sap
python launch/train.py --config launch/recipes/demo.yaml --method sft --train.ranks 1
"""

from pipeline.running import entry
from pipeline.stages.command_line import run_stage

if __name__ == "__main__":
    entry.run(lambda: run_stage("train", __doc__))
