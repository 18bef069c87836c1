# shellcheck shell=bash
# What the job scripts here share; they source it. Nothing in it belongs to one site: that comes from the environment or site.env.
#
# A job runs one step and decides what its end means (`supervise`):
#   the work is done                        exit 0; jobs that wait for it start
#   near the time limit, or preempted       USR1: a stop file asks the ranks to save at the end of their step; then requeue
#   slurm/stop.sh                           USR2: the same without the requeue; exit 75
#   scancel                                 TERM: never comes back
#   bad input, when the job first runs      exit 2 with the sentence; never tried again
#   anything else (crash, hang, full disk)  requeue; given up after SAP_MAX_FRUITLESS runs that brought no new checkpoint
# Exit codes of ranks do not come through srun (the others are killed with the first that fails, and codes are rewritten): hence files.
set -euo pipefail

say() { echo "[$(date +%FT%T)] job ${SLURM_JOB_ID:-?}, restart ${SLURM_RESTART_COUNT:-0}: $*" >&2; }

fail() {
  echo "error: $*" >&2
  leave 2
}

# ---- being asked to leave: before anything that takes time ---------------------------------------------------------------------------------

INDEX=""     # of the row of `sap status` that an array's task is about
UNIT=""      # prefix of the job's own files, once its folder is known
WANT=""      # why the job is to leave: requeue, stop, cancel
STOPPED=no   # whether slurm/stop.sh has asked, whatever came after
DECIDED=no   # whether this shell ends because it has decided to
STEP=""      # pid of srun
CHECK=()     # command that says before the step whether its input is right
BY_FOLDER=no # whether the folder says that the work is done (exit codes of several ranks do not come through srun), or the exit code
SAVES=no     # whether the stage saves on request (training); others are ended, and start again

trap 'asked requeue "time limit or preemption"' USR1
trap 'asked stop "slurm/stop.sh"' USR2
trap 'asked cancel "SIGTERM (scancel, or the time limit itself)"' TERM
trap 'at_exit $?' EXIT

# leave CODE: end this shell, as decided.
leave() {
  DECIDED=yes
  exit "$1"
}

# A command that failed without anybody expecting it: a full disk, a folder that is not mounted here. What has run before is worth another node.
at_exit() {
  if [ "$DECIDED" = no ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
    requeue "the job's script failed with exit code $1 on $HOSTNAME"
  fi
}

asked() {
  say "asked to leave by $2"
  [ "$1" != stop ] || STOPPED=yes
  case $WANT:$1 in
    cancel:* | stop:requeue) ;; # a time limit does not bring back what somebody has stopped
    *) WANT=$1 ;;
  esac
  [ -z "$STEP" ] || pass_on
}

# Ask the running step to leave. A cancelled job's ranks have had their own TERM.
pass_on() {
  if [ "$WANT" = cancel ]; then
    return 0 # a bare return would hand on the status that the signal interrupted, and end this shell
  elif [ "$SAVES" = yes ]; then
    { mkdir -p "$WORK" && : >"$WORK/STOP"; } || say "$WORK/STOP cannot be written: the step will not save before it is ended"
  else
    kill -TERM "$STEP" 2>/dev/null || true
  fi
}

# ---- settings --------------------------------------------------------------------------------------------------------------------------------

export SAP_HOME
SAP_SITE_ENV=${SAP_SITE_ENV:-$SAP_HOME/slurm/site.env}
if [ -r "$SAP_SITE_ENV" ]; then
  set +eu -a # modules and conda know neither -e nor -u
  # shellcheck source=slurm/site.env.example
  source "$SAP_SITE_ENV"
  set -eu +a
fi
cd "$SLURM_SUBMIT_DIR" # what the paths of overrides are relative to; those of submit.sh are absolute
if [ -d "$SAP_HOME/pipeline" ]; then
  export PYTHONPATH=$SAP_HOME${PYTHONPATH:+:$PYTHONPATH} # a checkout need not be what the environment has installed
fi
set -E
trap 'echo "error: $BASH_COMMAND failed with $? (${BASH_SOURCE[0]##*/}, line $LINENO)" >&2' ERR # no job may end without a word

: "${SAP_PYTHON:=$SAP_HOME/.venv/bin/python}" # of the environment that holds the project's packages
: "${SAP_EXEC:=}"                             # command before it, e.g. apptainer exec --nv /images/sap.sif
: "${SAP_LAUNCHER:=srun}"                     # srun: one task per rank; torchrun, deepspeed: one task per node
: "${SAP_SRUN_ARGS:=}"                        # further arguments of srun
: "${SAP_MAX_FRUITLESS:=5}"                   # runs in a row that may end without a new checkpoint
: "${SAP_MAX_UNSTARTED:=10}"                  # runs whose step may not even start
: "${SAP_RETRY_SECONDS:=30}"                  # between a failure and the requeue: Slurm may not know yet that a node is lost
export SAP_PYTHON SAP_EXEC SAP_LAUNCHER

# numbers NAME...: what these variables hold is counted with below, and bash runs a command that stands inside of $((...)).
numbers() {
  local name
  for name in "$@"; do
    [[ ${!name:-0} =~ ^(0|[1-9][0-9]{0,14})$ ]] || fail "$name is '${!name}': it takes a whole number"
  done
}
numbers SLURM_JOB_ID SLURM_RESTART_COUNT SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_JOB_NUM_NODES SLURM_CPUS_PER_TASK \
  SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SAP_EVALUATE_SHARDS SAP_MAX_FRUITLESS SAP_MAX_UNSTARTED
[[ $SAP_RETRY_SECONDS =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "SAP_RETRY_SECONDS is '$SAP_RETRY_SECONDS': it takes seconds"
NTASKS=${SLURM_NTASKS:-$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))}

read -ra PYTHON <<<"$SAP_EXEC"
PYTHON+=("$SAP_PYTHON")
sap() { "${PYTHON[@]}" -m pipeline.cli "$@"; }

# job_arguments DEFAULT [RECIPE] [--dotted.override value]...: sets RECIPE and OVERRIDES.
job_arguments() {
  RECIPE=${SAP_RECIPE:-$1}
  shift
  if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    RECIPE=$1
    shift
  fi
  if [[ $RECIPE != /* ]] && [ -r "$SLURM_SUBMIT_DIR/$RECIPE" ]; then
    RECIPE=$SLURM_SUBMIT_DIR/$RECIPE
  elif [[ $RECIPE != /* ]] && [ -r "$SAP_HOME/$RECIPE" ]; then
    RECIPE=$SAP_HOME/$RECIPE
  fi
  OVERRIDES=("$@")
}

# look_at STAGE [--method M] [--seed S]: which folder this job is about; INDEX chooses among several.
look_at() {
  LOOK=(--stage "$@" ${SAP_METHODS:+--methods "$SAP_METHODS"})
  look
  mkdir -p "$(dirname "$FOLDER")/slurm"
  local first
  first=$(dirname "$FOLDER")/slurm/job-$SLURM_JOB_ID.folder
  if [ ! -s "$first" ]; then
    echo "$FOLDER" >"$first.tmp"
    mv "$first.tmp" "$first"
  elif ! grep -qxF "$FOLDER" "$first"; then # it would begin something else, from its first step
    give_up "$RECIPE or its data have changed since this job first ran: its folder was $(cat "$first"), now it is $FOLDER" 2
  fi
  UNIT=$(dirname "$FOLDER")/slurm/$(basename "$FOLDER")-$SLURM_JOB_ID
  rm -f "$UNIT.error"
}

# retried COMMAND...: sets ANSWER to what `sap COMMAND...` prints; tried again where a failure may pass, then the job is requeued.
retried() {
  local code tries=0
  until ANSWER=$(sap "$@"); do
    code=$? tries=$((tries + 1))
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && [ -z "$UNIT" ]; then
      [ "$code" != 2 ] || give_up "the recipe $RECIPE is refused: see above" 2
      [ "$code" != 127 ] || give_up "there is no ${PYTHON[*]}: set SAP_PYTHON in slurm/site.env" 2
    fi
    if [ "$tries" = 5 ]; then # it was right once: a file system that hangs, a broken node
      [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ] || give_up "sap $1 fails with exit code $code, also on $HOSTNAME: see above" 1
      requeue "sap $1 failed with exit code $code on $HOSTNAME"
    fi
    sleep "$SAP_RETRY_SECONDS" || true
  done
}

# stage_that_runs WHERE STAGE: sets OF_CELLS and SAVES (yes, no) of a stage; gives up where it runs elsewhere.
stage_that_runs() {
  local found
  retried stages
  found=$(awk -F'\t' -v where="$1" -v name="$2" '$1 == name && $2 == where' <<<"$ANSWER")
  [ -n "$found" ] || give_up "SAP_STAGE is '$2': this script takes $(awk -F'\t' -v where="$1" '$2 == where { print $1 }' <<<"$ANSWER" | paste -sd' ')" 2
  # shellcheck disable=SC2034 # run_on_ranks reads OF_CELLS
  IFS=$'\t' read -r _ _ OF_CELLS SAVES _ <<<"$found"
}

# look: sets STATE (complete, step N, missing), STEPS (safe in a checkpoint), FOLDER, WORK, METHOD and SEED by what is there now.
look() {
  local lines line
  retried status "$RECIPE" --portable "${LOOK[@]}" ${OVERRIDES[@]+"${OVERRIDES[@]}"}
  lines=$ANSWER
  [ -n "$lines" ] || give_up "$RECIPE has nothing to do for ${LOOK[*]}" 2
  line=$lines
  if [ -n "$INDEX" ]; then
    line=$(sed -n "$((INDEX + 1))p" <<<"$lines")
    [ -n "$line" ] || give_up "$RECIPE has no cell number $INDEX for ${LOOK[*]}: it has $(wc -l <<<"$lines")" 2
  elif [ "$(wc -l <<<"$lines")" != 1 ]; then
    give_up "$RECIPE has several cells for ${LOOK[*]}: choose one with SAP_METHOD and SAP_SEED" 2
  fi
  # shellcheck disable=SC2034 # evaluate.sh reads METHOD and SEED
  IFS=$'\t' read -r _ METHOD SEED STATE FOLDER WORK <<<"$line"
  STEPS=0
  [[ $STATE != step* ]] || STEPS=${STATE#step }
}

# run_on_ranks STAGE: a stage on all ranks of the job, of one cell where it is of cells.
run_on_ranks() {
  local arguments=(--config "$RECIPE") choice=()
  stage_that_runs ranks "$1"
  [ "$OF_CELLS" = no ] || choice=(--method "${SAP_METHOD:-sap}" --seed "${SAP_SEED:-0}")
  look_at "$1" ${choice[@]+"${choice[@]}"}
  leave_if_complete
  arguments+=(${choice[@]+"${choice[@]}"} ${OVERRIDES[@]+"${OVERRIDES[@]}"})
  step_command "$SAP_HOME/launch/$1.py" "${arguments[@]}"
  BY_FOLDER=yes
  # Once: a job that comes back was right before, and its ranks check again.
  [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || CHECK=(env "WORLD_SIZE=$NTASKS" "${PYTHON[@]}" "$SAP_HOME/launch/$1.py" "${arguments[@]}" --check)
  supervise
}

# run_single ARGUMENTS...: python ARGUMENTS in the job's one task; its exit code says whether the work is done.
run_single() {
  SAP_LAUNCHER=srun
  step_command "$@"
  supervise
}

# forget: the job is done, and so are its own files.
forget() { rm -f "$UNIT".* "$(dirname "$FOLDER")/slurm/job-$SLURM_JOB_ID.folder"; }

leave_if_complete() {
  if [ "$STATE" = complete ]; then
    say "complete already: $FOLDER"
    forget
    leave 0
  fi
}

# ---- one step: from start to end ----------------------------------------------------------------------------------------------------------

# A rank left over on a lost node must never meet the next run: the port differs by job and by restart. All are below the ephemeral ports.
master_port() { echo $((10000 + SLURM_JOB_ID % 1400 * 16 + ${SLURM_RESTART_COUNT:-0} % 16)); }

# step_command ARGUMENTS...: sets COMMAND to run python ARGUMENTS on every rank of the job.
step_command() {
  local ranks_per_node=$((NTASKS / SLURM_JOB_NUM_NODES)) options
  read -ra options <<<"$SAP_SRUN_ARGS"
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since Slurm 22.05 srun does not take it over from sbatch
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  MASTER_PORT=$(master_port)
  export MASTER_ADDR MASTER_PORT SAP_RANKS_PER_NODE=$ranks_per_node
  case $SAP_LAUNCHER in
    srun) ;;
    torchrun | deepspeed)
      options+=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
      export SRUN_CPUS_PER_TASK=$((ranks_per_node * SRUN_CPUS_PER_TASK)) SAP_HOSTFILE=$UNIT.hosts
      scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$ranks_per_node/" >"$SAP_HOSTFILE"
      ;;
    *) fail "SAP_LAUNCHER is '$SAP_LAUNCHER': it takes srun, torchrun or deepspeed" ;;
  esac
  # Without these a crashed rank leaves the others waiting, and the nodes with them.
  COMMAND=(srun --kill-on-bad-exit=1 --wait=60 ${options[@]+"${options[@]}"} bash "$SAP_HOME/slurm/rank.sh" "$@")
}

# run_step: runs COMMAND; sets CODE. A trap ends `wait` early, so it waits again.
run_step() {
  "${COMMAND[@]}" &
  STEP=$!
  [ -z "$WANT" ] || pass_on
  while kill -0 "$STEP" 2>/dev/null; do
    if [ -z "$WANT" ]; then
      wait "$STEP" || true
    else
      sleep 1 || true
      case $WANT in
        requeue) [ "$(seconds_left)" -ge 10 ] || requeue "time limit or preemption, the step has not left in time: its work since the last checkpoint is lost" ;;
        cancel) requeue_at_the_limit ;;
      esac
    fi
  done
  CODE=0
  wait "$STEP" || CODE=$?
}

# The limit has struck without the warning, or while this shell was busy. Slurm kills everything in seconds, this shell too: ask before.
requeue_at_the_limit() {
  if [ "$STOPPED" = no ] && [ "$(job_field Reason 1)" = TimeLimit ]; then
    WANT=requeue
    requeue "time limit, without the time to save"
  fi
}

# Seconds until the job's time limit; many where there is none, or Slurm does not answer.
seconds_left() {
  local end
  end=$(job_field EndTime 1)
  { [ -n "$end" ] && end=$(date -d "$end" +%s 2>/dev/null); } || end=$(($(date +%s) + 86400))
  echo $((end - $(date +%s)))
}

# job_field NAME [TRIES]: what Slurm says of this job; empty where it says nothing, for a minute where TRIES is not given.
job_field() {
  local record="" try
  for ((try = 1; try <= ${2:-12}; try++)); do
    if record=$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null); then
      break
    fi
    [ "$try" = "${2:-12}" ] || sleep 5 || true
  done
  tr ' ' '\n' <<<"$record" | sed -n "s/^$1=//p" | sed -n 1p
}

# ---- what its end means --------------------------------------------------------------------------------------------------------------------

# supervise: check, run COMMAND, and decide what its end means.
supervise() {
  local name
  name=$(basename "$FOLDER")
  export SAP_ERROR_FILE=$UNIT.error SAP_FAULT_FILE=$UNIT.fault SAP_RUNS_FILE=$UNIT.runs SAP_RESTART_REASON="" SAP_PROGRESS
  rm -f "$SAP_ERROR_FILE" "$SAP_FAULT_FILE" "$WORK/STOP"
  if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then
    SAP_RESTART_REASON=$(cat "$UNIT.reason" 2>/dev/null || echo "requeued by Slurm (lost node, preemption or an operator)")
  fi
  rm -f "$UNIT.reason"
  echo "$STEPS" >>"$UNIT.starts" || true
  SAP_PROGRESS=$STEPS
  give_up_if_fruitless "$SAP_RESTART_REASON"
  CODE=1
  if [ -z "$WANT" ] && { [ ${#CHECK[@]} = 0 ] || "${CHECK[@]}"; }; then
    say "$name on $SLURM_JOB_NODELIST, $NTASKS tasks, from step $SAP_PROGRESS${SAP_RESTART_REASON:+ ($SAP_RESTART_REASON)}"
    run_step
  fi
  [ "$WANT" = cancel ] || look # a cancelled shell has no time left
  if { [ "$BY_FOLDER" = yes ] && [ "$STATE" = complete ]; } || { [ "$BY_FOLDER" = no ] && [ "$CODE" = 0 ]; }; then
    forget
    if [ -e "$WORK/STOP" ]; then # it came with the last step
      rm -r "$WORK"
    fi
    say "$name: done"
    leave 0
  fi
  decide
}

decide() {
  [ "$WANT" != cancel ] || requeue_at_the_limit
  if [ "$WANT" = cancel ] || [[ ! "$(job_field JobState)" =~ ^(RUNNING|SIGNALING|)$ ]]; then
    # After a cancellation a requeue would still be obeyed. Where Slurm itself requeues, it has counted the restart by now.
    if [ "$(job_field Restarts)" = "${SLURM_RESTART_COUNT:-0}" ]; then
      say "cancelled; what was saved stays: submit again to go on"
    else
      say "Slurm requeues this job"
    fi
    leave 143
  elif [ -s "$SAP_ERROR_FILE" ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    give_up "$(cat "$SAP_ERROR_FILE")" 2
  elif [ "$WANT" = stop ]; then
    give_up "stopped on request after step $STEPS: submit again to go on" 75
  elif [ "$WANT" = requeue ]; then
    requeue "time limit or preemption"
  fi
  local reason="exit code $CODE: a crash, a hang or a lost node"
  [ "$CODE" != 0 ] || reason="the ranks were asked to leave" # by a SIGTERM of their own: preemption where the job asks for no signal
  [ ! -s "$SAP_FAULT_FILE" ] || reason=$(cat "$SAP_FAULT_FILE") # a full disk, a folder that is gone: over some time, or not there on another node
  [ ! -s "$SAP_ERROR_FILE" ] || reason=$(cat "$SAP_ERROR_FILE") # the input was right when the job first ran: a file that this node cannot read?
  say "the step ended before the work was done: $reason"
  give_up_if_fruitless "$reason"
  sleep "$SAP_RETRY_SECONDS" || true
  [ -z "$WANT" ] || decide
  requeue "$reason"
}

# Runs are counted when their step starts, with the checkpoint they start from, so that ends nobody saw (a lost batch node) count too.
give_up_if_fruitless() {
  local fruitless unstarted
  touch "$SAP_RUNS_FILE" "$UNIT.starts" || true
  fruitless=$(grep -cx "$STEPS" "$SAP_RUNS_FILE" || true)
  unstarted=$(($(grep -cx "$STEPS" "$UNIT.starts" || true) - fruitless - 1)) # without the present one
  if [ "$fruitless" -ge "$SAP_MAX_FRUITLESS" ]; then
    give_up "$fruitless runs in a row brought no checkpoint after step $STEPS; the last ended by: $1" 1
  elif [ "$unstarted" -ge "$SAP_MAX_UNSTARTED" ]; then
    give_up "the step could not be started $unstarted times in a row; the last reason: $1" 1
  fi
}

# requeue REASON: never returns. The job id of an array's last task is the array's: requeueing by it would restart every task.
requeue() {
  local id=$SLURM_JOB_ID refused=0
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  [ -z "$UNIT" ] || echo "$1" >"$UNIT.reason" || true
  trap - TERM # which the requeue sends to this shell too
  if [ "$WANT" = cancel ]; then
    say "cancelled; what was saved stays: submit again to go on"
    leave 143
  elif [ "$STOPPED" = yes ]; then
    give_up "stopped on request: submit again to go on" 75
  fi
  DECIDED=yes
  say "requeue: $1"
  while [ "$refused" -lt 3 ]; do
    if scontrol requeue "$id"; then
      sleep 600 # Slurm ends this shell
    elif [ -n "$(job_field JobState 1)" ]; then # slurmctld answers; else it is away, and comes back
      refused=$((refused + 1))
    fi
    sleep 10
  done
  give_up "scontrol requeue $id was refused" 1
}

# give_up REASON CODE: the jobs that wait for this one would never start; they are cancelled, with the reason in their logs and comments.
give_up() {
  local gone=" ${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} " id after what log below=()
  say "gives up: $1"
  if [ -r "${SAP_CHAIN:-}" ]; then
    while IFS=$'\t' read -r id after what log; do
      for parent in ${after//:/ }; do
        if [[ $gone == *" $parent "* ]] && [[ $gone != *" $id "* ]]; then
          gone+="$id "
          echo "[$(date +%FT%T)] job $id ($what) was cancelled, because job $SLURM_JOB_ID ($SLURM_JOB_NAME) gave up: $1" >>"${log//%j/$id}" || true
          scontrol update JobId="$id" Comment="cancelled: job $SLURM_JOB_ID gave up: ${1//\"/}" || true
          below+=("$id")
        fi
      done
    done <"$SAP_CHAIN"
    # Only now: slurmctld cancels by itself what waits for a cancelled job, and what is cancelled takes no comment.
    [ ${#below[@]} = 0 ] || scancel "${below[@]}" || true
  fi
  leave "$2"
}
