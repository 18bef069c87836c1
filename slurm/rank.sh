#!/bin/bash
# One task of a job's step; srun starts it (common.sh). It becomes a rank or, with the other launchers, the launcher of its node.
# A script of its own, because the batch shell would put its own SLURM_PROCID, 0, into a command line for every rank.
#
#   srun bash slurm/rank.sh launch/train.py --config RECIPE --method sap
set -euo pipefail

cpus=${SLURM_CPUS_PER_TASK:-1}
[[ $cpus/${SAP_RANKS_PER_NODE:-1} =~ ^[1-9][0-9]*/[1-9][0-9]*$ ]] || # bash would run a command that stands inside of $((...))
  { echo "error: SLURM_CPUS_PER_TASK is '$cpus', SAP_RANKS_PER_NODE '${SAP_RANKS_PER_NODE:-}': they take numbers from 1" >&2; exit 2; }
[ "$SAP_LAUNCHER" = srun ] || cpus=$((cpus / SAP_RANKS_PER_NODE)) # there a task has the cores of all ranks of its node
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
if [ "$SLURM_PROCID" = 0 ]; then
  echo "$SAP_PROGRESS" >>"$SAP_RUNS_FILE" # this run has started; common.sh counts such lines
fi
read -ra command <<<"${SAP_EXEC:-}"
command+=("$SAP_PYTHON")

case $SAP_LAUNCHER in
  srun)
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SAP_RANKS_PER_NODE
    exec "${command[@]}" "$@"
    ;;
  torchrun)
    exec "${command[@]}" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$SAP_RANKS_PER_NODE" \
      --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" "$@"
    ;;
  deepspeed)
    exec "${command[@]}" -m deepspeed.launcher.runner --no_ssh --hostfile="$SAP_HOSTFILE" --node_rank="$SLURM_NODEID" \
      --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" "$@"
    ;;
esac
