#!/bin/bash
# Writes the report: table, pictures and page from what is complete, and the same in MLflow. One process, no GPU.
#
#   sbatch slurm/report.sh RECIPE [--dotted.override value]
#
#SBATCH --job-name=sap_report
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
SAP_HOME=${SAP_HOME:-${SLURM_SUBMIT_DIR:?submit this script: sbatch slurm/report.sh}}
[ -r "$SAP_HOME/slurm/common.sh" ] || { echo "error: $SAP_HOME is not the project: submit from its root, or set SAP_HOME" >&2; exit 2; }
source "$SAP_HOME/slurm/common.sh"

job_arguments launch/recipes/llama_7b_sap.yaml "$@"
look_at report
run_single -m pipeline.cli report "$RECIPE" ${SAP_METHODS:+--methods "$SAP_METHODS"} ${OVERRIDES[@]+"${OVERRIDES[@]}"}
