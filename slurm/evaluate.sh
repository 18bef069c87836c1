#!/bin/bash
# Evaluates: answers to harmful, harmless and task prompts, judged. As an array, one task per subject (method and seed, or a baseline) and
# shard of its prompts, each in one process; the last shard of a subject puts them together. Task number = subject x SAP_EVALUATE_SHARDS
# + shard, subjects in the order of `sap status RECIPE --stage evaluate`. Without --array: all subjects, one after the other.
#
#   SAP_EVALUATE_SHARDS=4 sbatch --array=0-15 slurm/evaluate.sh RECIPE [--dotted.override value]
#   sbatch slurm/evaluate.sh RECIPE
#
# One GPU holds a 7B or 13B model in bfloat16 (14 and 26 GB); a 70B model (138 GB) is spread over the GPUs that the task is given: ask for more of them.
#
#SBATCH --job-name=sap_evaluate
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
SAP_HOME=${SAP_HOME:-${SLURM_SUBMIT_DIR:?submit this script: sbatch slurm/evaluate.sh}}
[ -r "$SAP_HOME/slurm/common.sh" ] || { echo "error: $SAP_HOME is not the project: submit from its root, or set SAP_HOME" >&2; exit 2; }
source "$SAP_HOME/slurm/common.sh"

job_arguments launch/recipes/llama_7b_sap.yaml "$@"
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  look_at report # whatever is missing below it
  run_single -m pipeline.cli evaluate "$RECIPE" ${SAP_METHODS:+--methods "$SAP_METHODS"} ${OVERRIDES[@]+"${OVERRIDES[@]}"}
fi
shards=${SAP_EVALUATE_SHARDS:-1}
[ "$shards" -ge 1 ] || fail "SAP_EVALUATE_SHARDS is '$shards': it takes a number from 1"
INDEX=$((SLURM_ARRAY_TASK_ID / shards))
look_at evaluate
leave_if_complete
subject=(--method "$METHOD")
[ "$SEED" = - ] || subject+=(--seed "$SEED")
run_single "$SAP_HOME/launch/evaluate.py" --config "$RECIPE" "${subject[@]}" --shard "$((SLURM_ARRAY_TASK_ID % shards))/$shards" \
  ${OVERRIDES[@]+"${OVERRIDES[@]}"}
