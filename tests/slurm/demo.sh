#!/bin/bash
# The chain on a real Slurm cluster of two nodes, which loses one of them on the way. As root, with Debian's slurmctld slurmd slurm-client munge
# iproute2 (the cluster lives in namespaces and leaves nothing behind); about four minutes on two cores.
#
#   tests/slurm/demo.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$PWD/.venv/bin/python
[ -x "$python" ] || make .venv/ready
place=$(mktemp -d /tmp/slurm-demo-XXXXXX)
project=$place/project
shared=(--shared "$project")
case $PWD in /tmp/*) shared+=(--shared "$PWD") ;; esac # nodes have a /tmp of their own
cluster() { "$python" -m tests.slurm.minicluster "$1" "$place/cluster" "${@:2}"; }
say() { printf '\n== %s\n' "$*"; }
trap 'cluster down >/dev/null 2>&1; rm -rf "$place"' EXIT

mkdir "$project"
"$python" -c '
import sys, pathlib
from tests.project import write_recipe
from tests.slurm.site import make_recipe
folder = pathlib.Path(sys.argv[1])
write_recipe(folder, make_recipe(folder))' "$project" 2>/dev/null

say "a cluster of two nodes with two GPUs each"
cluster up --nodes 2 --gpus 2 --owner $$ "${shared[@]}"
cluster run sinfo -N -p gpu -o '%N %T %G'

say "slurm/submit.sh recipe.yaml"
export SAP_GPUS_PER_NODE=2 SAP_CPUS_PER_GPU=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore SAP_RETRY_SECONDS=1 SAP_SITE_ENV=$place/none
cluster run slurm/submit.sh "$project/recipe.yaml" --nodes 2 --shards 2
runs=$project/runs/tiny

say "n2 loses power once the SAP training has saved a checkpoint"
until compgen -G "$runs/.train-sap-s0-*.work/checkpoints/step-*/DONE" >/dev/null; do
  sleep 0.5
  [ -z "$(cluster run squeue -h -o %i)" ] && { tail -n 20 "$runs"/slurm/logs/*; exit 1; }
done
cluster power-off n2
until [[ $(cluster run sinfo -h -n n2 -o %T) == down* ]]; do sleep 0.5; done
cluster run sinfo -N -p gpu -o '%N %T'
cluster run squeue -o '%.4i %.34j %.10T %.20r'

say "n2 is back"
cluster boot n2
while [ -n "$(cluster run squeue -h -o %i)" ]; do sleep 1; done

say "the training's log"
cat "$runs"/slurm/logs/train-sap-*.log
say "the report's log"
cat "$runs"/slurm/logs/report-*.log
grep -q 'report.html' "$runs"/slurm/logs/report-*.log
