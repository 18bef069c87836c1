#!/bin/bash
# Trains one cell of a recipe, 7b.
#
#   sbatch slurm/sap_7b.sh                                        # launch/recipes/llama_7b_sap.yaml, method sap, seed 0
#   SAP_METHOD=sft SAP_SEED=1 sbatch slurm/sap_7b.sh RECIPE --train.lr 2e-4
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
