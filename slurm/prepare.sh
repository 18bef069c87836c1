#!/bin/bash
# Prepares a recipe's data: tokens and labels, contrastive pairs, evaluation prompts. One process, no GPU.
#
#   sbatch slurm/prepare.sh RECIPE [--dotted.override value]
#
#SBATCH --job-name=sap_prepare
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
SAP_HOME=${SAP_HOME:-${SLURM_SUBMIT_DIR:?submit this script: sbatch slurm/prepare.sh}}
[ -r "$SAP_HOME/slurm/common.sh" ] || { echo "error: $SAP_HOME is not the project: submit from its root, or set SAP_HOME" >&2; exit 2; }
source "$SAP_HOME/slurm/common.sh"

job_arguments launch/recipes/llama_7b_sap.yaml "$@"
STAGE=${SAP_STAGE:-prepare} # any stage that runs in the process of `sap`
[ "$STAGE" = prepare ] || stage_that_runs here "$STAGE"
look_at "$STAGE"
leave_if_complete
run_single -m pipeline.cli "$STAGE" "$RECIPE" ${SAP_METHODS:+--methods "$SAP_METHODS"} ${OVERRIDES[@]+"${OVERRIDES[@]}"}
