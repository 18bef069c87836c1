#!/bin/bash
# Trains one cell (method, seed) of a recipe for a 70B model on all ranks of the job. What it does on each fault: docs/slurm.md.
#
#   sbatch slurm/sap_70b.sh                                        # launch/recipes/llama_70b_sap.yaml, method sap, seed 0
#   SAP_METHOD=sft SAP_SEED=1 sbatch slurm/sap_70b.sh RECIPE --train.lr 2e-4
#
# Why two nodes of 8 GPUs, each of 40 GB or more; per GPU, in GB (`sap plan launch/recipes/llama_70b_sap.yaml`; arithmetic, not run on a GPU):
#   weights 138 / 16                  8.6     logits, 2 x 512 tokens x 32,000                0.4
#   LoRA, AdamW, SAP's vectors        0.03    activations: 80 hidden states, one layer       1.9
#   gradients being reduced           0.15    CUDA and NCCL (assumed)                        2.0
#   weights that ZeRO-3 has gathered  7.8     together 20.9: 52% of 40 GB, 26% of 80 GB
# One node holds it on 80 GB (31.9):  slurm/submit.sh launch/recipes/llama_70b_sap.yaml --nodes 1 -- --train.ranks 8 --train.micro_batch_size 4
# In 4 bits it fits one node of 40 GB (16.1):  slurm/submit.sh launch/recipes/llama_70b_qlora_sap.yaml --nodes 1
# A step takes 2.8 times the FLOPs of plain fine-tuning, about 11 s at 35% of an A100, if the network keeps up: every GPU receives the
# weights about six times in a step, 0.8 TB. Between nodes that wants InfiniBand or the like.
#
#SBATCH --job-name=sap_70b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
SAP_HOME=${SAP_HOME:-${SLURM_SUBMIT_DIR:?submit this script: sbatch slurm/sap_70b.sh}}
[ -r "$SAP_HOME/slurm/common.sh" ] || { echo "error: $SAP_HOME is not the project: submit from its root, or set SAP_HOME" >&2; exit 2; }
source "$SAP_HOME/slurm/common.sh"

job_arguments launch/recipes/llama_70b_sap.yaml "$@"
run_on_ranks "${SAP_STAGE:-train}"
