#!/bin/bash
# Trains one cell (method, seed) of a recipe for a 7B model on all ranks of the job. What it does on each fault: docs/slurm.md.
#
#   sbatch slurm/sap_7b.sh                                        # launch/recipes/llama_7b_sap.yaml, method sap, seed 0
#   SAP_METHOD=sft SAP_SEED=1 sbatch slurm/sap_7b.sh RECIPE --train.lr 2e-4
#
# Why one node of 8 GPUs, each of 24 GB or more; per GPU, in GB (`sap plan launch/recipes/llama_7b_sap.yaml`; arithmetic, not run on a GPU):
#   weights 13.5 / 8                  1.7     logits, 4 x 512 tokens x 32,000                0.8
#   LoRA, AdamW, SAP's vectors        0.02    activations: 32 hidden states, one layer       1.0
#   gradients being reduced           0.2     CUDA and NCCL (assumed)                        2.0
#   weights that ZeRO-3 has gathered  2.5     together 8.3: 34% of 24 GB, 10% of 80 GB
# One GPU of 40 GB would hold it (17.6). Eight are for time: a step takes 2.8 times the FLOPs of plain fine-tuning, about 2 s at 35% of an A100.
#
#SBATCH --job-name=sap_7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
SAP_HOME=${SAP_HOME:-${SLURM_SUBMIT_DIR:?submit this script: sbatch slurm/sap_7b.sh}}
[ -r "$SAP_HOME/slurm/common.sh" ] || { echo "error: $SAP_HOME is not the project: submit from its root, or set SAP_HOME" >&2; exit 2; }
source "$SAP_HOME/slurm/common.sh"

job_arguments launch/recipes/llama_7b_sap.yaml "$@"
run_on_ranks "${SAP_STAGE:-train}"
