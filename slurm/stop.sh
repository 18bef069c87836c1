#!/bin/bash
# Stops a job in order: a training saves at the end of its step and leaves; the job does not come back, and the jobs that wait for it are cancelled.
# Submit the chain again to go on. (scancel ends a job at once; what it did since its last checkpoint is then lost.)
#
#   slurm/stop.sh JOBID
set -euo pipefail

[ $# = 1 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
state() { scontrol show job -o "$1" 2>/dev/null | tr ' ' '\n' | sed -n 's/^JobState=//p' | sed -n 1p; }

case $(state "$1") in
  "") echo "error: Slurm knows no job $1" >&2; exit 2 ;;
  PENDING) scancel "$1"; echo "job $1 had not started: cancelled" ;;
  RUNNING | COMPLETING | CONFIGURING | SUSPENDED)
    scancel --batch --signal=USR2 "$1"
    echo "job $1 was asked to save and leave; waiting (Ctrl-C ends the waiting only)"
    while [[ $(state "$1") =~ ^(|RUNNING|COMPLETING|CONFIGURING|SUSPENDED|SIGNALING)$ ]]; do sleep 1; done # "": Slurm did not answer
    echo "job $1: $(state "$1")"
    ;;
  *) echo "job $1 has ended: $(state "$1")" ;;
esac
