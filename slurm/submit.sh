#!/bin/bash
# Submits every stage of a recipe that is not complete, chained: prepare -> [align] -> [filter] -> direction -> train -> evaluate -> report.
#
#   slurm/submit.sh RECIPE [options] [-- --dotted.override value ...]
#
#   --size 7b|13b|70b   whose script trains (slurm/sap_SIZE.sh); default: as the recipe's file name says, else 7b
#   --from STAGE        begin here; the stages before must be complete
#   --methods a,b       only these methods of the recipe, with a report of their own
#   --nodes N           nodes of align, filter, direction and train; default: the script's
#   --shards N          jobs per evaluated subject; default 1
#   --dry-run           print what would be submitted, and stop
#
# Submit again after anything: what is complete is left out, what is unfinished goes on. Site settings: slurm/site.env.
set -euo pipefail

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }
fail() {
  echo "error: $*" >&2
  exit 2
}

RECIPE="" SIZE="" FROM=prepare METHODS="" NODES="" SHARDS=1 DRY=no OVERRIDES=()
while [ $# -gt 0 ]; do
  case $1 in
    --size | --from | --methods | --nodes | --shards)
      [ $# -gt 1 ] || fail "$1 needs a value"
      declare "$(tr '[:lower:]' '[:upper:]' <<<"${1#--}")=$2"
      shift
      ;;
    --dry-run) DRY=yes ;;
    --help | -h) usage; exit 0 ;;
    --) OVERRIDES=("${@:2}"); break ;;
    -*) fail "unknown option $1: options are --size, --from, --methods, --nodes, --shards, --dry-run; overrides of the recipe follow --" ;;
    *) [ -z "$RECIPE" ] || fail "two recipes, $RECIPE and $1: give one"; RECIPE=$1 ;;
  esac
  shift
done
[ -n "$RECIPE" ] || { usage >&2; exit 2; }
[[ $SHARDS =~ ^[1-9][0-9]*$ ]] || fail "--shards is '$SHARDS': it takes a number from 1"
[[ $NODES =~ ^([1-9][0-9]*)?$ ]] || fail "--nodes is '$NODES': it takes a number from 1"
SAP_HOME=${SAP_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
[ ! -r "${SAP_SITE_ENV:-$SAP_HOME/slurm/site.env}" ] || {
  set +eu -a # modules and conda know neither -e nor -u
  # shellcheck source=slurm/site.env.example
  source "${SAP_SITE_ENV:-$SAP_HOME/slurm/site.env}"
  set -eu +a
}
export SAP_HOME
[ -r "$RECIPE" ] || [ ! -r "$SAP_HOME/$RECIPE" ] || RECIPE=$SAP_HOME/$RECIPE
[ -r "$RECIPE" ] || fail "there is no recipe $RECIPE"
RECIPE=$(realpath "$RECIPE")
if [ -z "$SIZE" ]; then
  SIZE=7b
  [[ ! $(basename "$RECIPE") =~ (^|_)(7b|13b|70b)(_|\.) ]] || SIZE=${BASH_REMATCH[2]}
fi
TRAIN=slurm/sap_$SIZE.sh
[ -r "$SAP_HOME/$TRAIN" ] || fail "--size is '$SIZE': it takes 7b, 13b or 70b"

read -ra PYTHON <<<"${SAP_EXEC:-}"
PYTHON+=("${SAP_PYTHON:-$SAP_HOME/.venv/bin/python}")
if [ -d "$SAP_HOME/pipeline" ]; then
  export PYTHONPATH=$SAP_HOME${PYTHONPATH:+:$PYTHONPATH} # a checkout need not be what the environment has installed
fi
CHAIN=$("${PYTHON[@]}" -m pipeline.cli stages) || exit 2 # name, where it runs, whether of cells, whether it saves, needs
mapfile -t STAGES < <(cut -f 1 <<<"$CHAIN")
[[ " ${STAGES[*]} " == *" $FROM "* ]] || fail "--from is '$FROM': it takes ${STAGES[*]}"
export SAP_METHODS=$METHODS SAP_EVALUATE_SHARDS=$SHARDS
STATUS=$("${PYTHON[@]}" -m pipeline.cli status "$RECIPE" --portable ${METHODS:+--methods "$METHODS"} ${OVERRIDES[@]+"${OVERRIDES[@]}"}) || exit 2
mapfile -t OVERRIDES < <(sed -n 's/^# override\t//p' <<<"$STATUS") # with absolute paths: jobs start elsewhere
cd "$SAP_HOME"
ROOT=$(dirname "$(awk -F'\t' '$1 == "prepare" { print $5 }' <<<"$STATUS")")
NAME=$(basename "$ROOT")

# ---- submitting ----------------------------------------------------------------------------------------------------------------------------

SAP_CHAIN=$ROOT/slurm/chain-$(date +%Y%m%d-%H%M%S)-$$.tsv # job, the jobs it waits for, what it is, its log: for the message when one gives up
export SAP_CHAIN
LOGS=$ROOT/slurm/logs
[ "$DRY" = yes ] || mkdir -p "$LOGS"

# Nodes, tasks and GPUs of the training script, for the other stages that run on all ranks; NODES and the site's shape win.
shape() {
  local tasks=${SAP_GPUS_PER_NODE:-} line
  while read -r line; do
    case $line in
      --nodes=*) echo "--nodes=${NODES:-${line#*=}}" ;;
      --ntasks-per-node=* | --gpus-per-node=*) echo "${line%%=*}=${tasks:-${line#*=}}" ;;
      --cpus-per-task=*) echo "--cpus-per-task=${SAP_CPUS_PER_GPU:-${line#*=}}" ;;
      --mem=*) echo "$line" ;;
    esac
  done < <(sed -n 's/^#SBATCH //p' "$TRAIN")
}
mapfile -t SHAPE < <(shape)

# submit STAGE WHAT AFTER SCRIPT SBATCH_OPTIONS...: sets JOB. AFTER: job ids, separated by colons, or nothing.
submit() {
  local stage=$1 what=$2 after=$3 script=$4 log dependency command hold=()
  shift 4
  log=$LOGS/$what-%j.log
  [ "$stage" != evaluate ] || log=$LOGS/$what-%A_%a.log
  # The same stage of an earlier submission may still be running: wait for its end, and find its folder complete.
  dependency=${after:+afterok:$after,}singleton
  [ -n "$after" ] || hold=(--hold) # until all are submitted: a first job that gives up at once must find in the chain's file whom to tell
  command=(${CLEAN[@]+"${CLEAN[@]}"} sbatch ${hold[@]+"${hold[@]}"} --parsable --export=ALL --kill-on-invalid-dep=yes --job-name="$NAME.$what" --output="$log" ${dependency:+"--dependency=$dependency"}
    "$@" "$script" "$RECIPE" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
  if [ "$DRY" = yes ]; then
    JOB="<$what>"
    printf '%-10s %s\n' "$stage" "${SAP_METHOD:+SAP_METHOD=$SAP_METHOD }${SAP_SEED:+SAP_SEED=$SAP_SEED }${command[*]}"
    return
  fi
  JOB=$("${command[@]}") || fail "sbatch refused stage $stage; to undo what was submitted: scancel $(cut -f 1 "$SAP_CHAIN" 2>/dev/null | paste -sd' ')"
  [ -n "$after" ] || HELD+=("${JOB%%;*}")
  JOB=${JOB%%;*} # with several clusters sbatch prints JOB;CLUSTER
  log=${log//%[jA]/$JOB}
  printf '%s\t%s\t%s\t%s\n' "$JOB" "${after:--}" "$what" "${log//%a/0}" >>"$SAP_CHAIN"
  printf '%-10s job %-8s %s  %s\n' "$stage" "$JOB" "${after:+after ${after//:/, }}" "${log//%a/*}"
}

# todo STAGE: the rows of the stage that are not complete; those before --from must be.
todo() {
  local rows
  rows=$(awk -F'\t' -v stage="$1" '$1 == stage && $4 != "complete" && !seen[$5]++' <<<"$STATUS")
  if [ -n "$rows" ] && [[ "${STAGES[*]}" == *"$1 "*"$FROM"* ]]; then
    fail "$(cut -f 5 <<<"$rows" | sed -n 1p) is not complete: leave --from $FROM out, or begin with --from $1"
  fi
  [ -z "$rows" ] || printf '%s\n' "$rows"
}

BEFORE="" HELD=() # what the next stage waits for; the jobs that wait for none
GPU=("${SHAPE[@]}") CPU=() CLEAN=()
if [ -n "${SAP_CPU_PARTITION:-}" ]; then
  CPU=("--partition=$SAP_CPU_PARTITION")
fi

stage_of_one() { # STAGE SCRIPT OPTIONS...
  local rows
  rows=$(todo "$1")
  if [ -n "$rows" ]; then
    # What GPU jobs ask of nodes and of the queue is not what the CPU partition has.
    CLEAN=()
    [ ${#CPU[@]} = 0 ] || [ "$3" != "${CPU[0]}" ] || CLEAN=(env -u SBATCH_CONSTRAINT -u SBATCH_QOS)
    SAP_STAGE=$1 submit "$1" "$(basename "$(cut -f 5 <<<"$rows")")" "$BEFORE" "$2" "${@:3}"
    CLEAN=()
    BEFORE=$JOB
  fi
}

stage_of_cells() { # STAGE SCRIPT OPTIONS...
  local rows method seed folder jobs=""
  rows=$(todo "$1")
  [ -n "$rows" ] || return 0
  while IFS=$'\t' read -r _ method seed _ folder _; do
    SAP_STAGE=$1 SAP_METHOD=$method SAP_SEED=$seed submit "$1" "$(basename "$folder")" "$BEFORE" "$2" "${@:3}" </dev/null
    jobs+=${jobs:+:}$JOB
    [ "$1" != filter ] || BEFORE=$JOB # one after the other: they may share their embeddings
  done <<<"$rows"
  BEFORE=$jobs
}

# An array over subjects x shards: the tasks of what is not complete. It knows how an evaluation is shared; of another stage that runs
# alone nothing does.
evaluate() {
  local tasks
  [ "$1" = evaluate ] || [ -z "$(todo "$1")" ] || fail "stage $1 runs in processes of its own, and slurm/submit.sh has no script for it: \`sap $1\` makes it"
  [ "$1" = evaluate ] || return 0
  tasks=$(todo evaluate >/dev/null && awk -F'\t' -v shards="$SHARDS" '$1 == "evaluate" { if ($4 != "complete") for (s = 0; s < shards; s++) print n * shards + s; n++ }' <<<"$STATUS" | paste -sd,)
  if [ -n "$tasks" ]; then
    submit evaluate evaluate "$BEFORE" slurm/evaluate.sh --array="$tasks" ${EVALUATE[@]+"${EVALUATE[@]}"}
    BEFORE=$JOB
  fi
}

EVALUATE=()
[ "$SIZE" != 70b ] || EVALUATE=(--gpus-per-node="${SAP_GPUS_PER_NODE:-8}" --mem=0) # 138 GB of weights: a node's GPUs together

mapfile -t LINES <<<"$CHAIN"
for line in "${LINES[@]}"; do
  IFS=$'\t' read -r stage where of_cells _ <<<"$line"
  script=slurm/$stage.sh
  case $where:$of_cells in
    here:*)
      [ -r "$script" ] || script=slurm/prepare.sh
      stage_of_one "$stage" "$script" ${CPU[@]+"${CPU[@]}"}
      ;;
    ranks:*)
      [ -r "$script" ] || script=$TRAIN # which does the stage that SAP_STAGE names
      if [ "$of_cells" = yes ]; then
        stage_of_cells "$stage" "$script" "${GPU[@]}"
      else
        stage_of_one "$stage" "$script" "${GPU[@]}"
      fi
      ;;
    alone:*) evaluate "$stage" ;;
  esac
done

if [ ${#HELD[@]} -gt 0 ]; then
  ids=$(IFS=,; echo "${HELD[*]}")
  scontrol release "$ids" || fail "the chain is submitted, and its first jobs are held: scontrol release $ids"
fi
if [ -z "$BEFORE" ]; then
  echo "complete: $(awk -F'\t' '$1 == "report" { print $5 "/report.html" }' <<<"$STATUS")"
fi
sed -n 's/^# mlflow/mlflow    /p' <<<"$STATUS"
[ "$DRY" = yes ] || [ -z "$BEFORE" ] || echo "stop one: slurm/stop.sh JOBID    all: scancel $(cut -f 1 "$SAP_CHAIN" | paste -sd' ')"
