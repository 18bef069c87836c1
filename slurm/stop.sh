#!/bin/bash
# Stops a job in order: a training saves at the end of its step and leaves; the job does not come back, and the jobs that wait for it are
# cancelled. Submit the chain again to go on. (scancel ends a job at once; what it did since its last checkpoint is then lost.)
#
#   slurm/stop.sh JOBID                  a job, an array, or one task of it (ARRAYID_TASKID)
set -euo pipefail

[ $# = 1 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
tasks() { squeue --noheader --array --jobs "$1" --format '%i %T'; } # one line a task that has not ended

scontrol show job "$1" >/dev/null 2>&1 || { echo "error: Slurm knows no job $1" >&2; exit 2; }
asked="" told=no
while left=$(tasks "$1") && [ -n "$left" ]; do
  while read -r id state; do
    if [ "$state" = PENDING ]; then # not started, or back in the queue before it heard us
      scancel "$id"
    elif [[ " $asked " != *" $id "* ]] && [ "$state" = RUNNING ]; then
      scancel --batch --signal=USR2 "$id"
      asked+=" $id"
    fi
  done <<<"$left"
  [ "$told" = yes ] || echo "job $1 was asked to save and leave; waiting (Ctrl-C ends the waiting only)"
  told=yes
  sleep 1
done
scontrol show job -o "$1" | sed 's/^JobId=\([0-9]*\).* JobState=\([A-Z_]*\).*/job \1: \2/'
