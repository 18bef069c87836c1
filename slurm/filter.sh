#!/bin/bash
# Finds the harmful samples of a method's training data (SAFT, saft.enabled): a pass over all samples on the ranks of the job. It needs the
# nodes that training needs (submit.sh takes them over from the size's script); minutes.
#
#   SAP_METHOD=saft sbatch slurm/filter.sh RECIPE [--dotted.override value]
#   sbatch --nodes=2 slurm/filter.sh launch/recipes/llama_70b_sap.yaml --saft.enabled true
#
#SBATCH --job-name=sap_filter
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
SAP_HOME=${SAP_HOME:-${SLURM_SUBMIT_DIR:?submit this script: sbatch slurm/filter.sh}}
[ -r "$SAP_HOME/slurm/common.sh" ] || { echo "error: $SAP_HOME is not the project: submit from its root, or set SAP_HOME" >&2; exit 2; }
source "$SAP_HOME/slurm/common.sh"

job_arguments launch/recipes/llama_7b_sap.yaml "$@"
run_on_ranks filter
