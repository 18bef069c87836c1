"""The job scripts without a training: shellcheck, sbatch --test-only,
and what slurm/submit.sh would submit or refuses.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.project import ROOT, write_recipe
from tests.slurm.minicluster import Cluster, why_not
from tests.slurm.site import make_recipe

JOBS = ["sap_7b", "sap_13b", "sap_70b", "prepare", "filter", "direction", "evaluate", "report"]
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    return write_recipe(folder, make_recipe(folder))


def submit(
    *arguments: str | Path, cwd: str | Path = "/", **environment: str
) -> subprocess.CompletedProcess:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SAP_", "SLURM_", "SBATCH_"))
    }
    clean |= {"SAP_PYTHON": sys.executable, "SAP_SITE_ENV": "/nowhere", **environment}
    command = [str(ROOT / "slurm/submit.sh"), *map(str, arguments)]
    return subprocess.run(command, env=clean, capture_output=True, text=True, cwd=cwd, timeout=900)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    paths = [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "tests/slurm").glob("*.sh")]
    assert len(paths) > 10
    found = subprocess.run(
        ["shellcheck", "-S", "warning", "-x", *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_slurm_takes_every_script_where_the_nodes_suffice():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with Cluster(folder, nodes=2, gpus=8, cpus=64) as cluster:
            for name in JOBS:
                assert (
                    "to start at"
                    in cluster.run(["sbatch", "--test-only", f"slurm/{name}.sh"], cwd=ROOT).stderr
                ), name
        shutil.rmtree(folder)
        with Cluster(folder, nodes=1, gpus=8, cpus=64) as cluster:
            refused = cluster.run(
                ["sbatch", "--test-only", "slurm/sap_70b.sh"], cwd=ROOT, check=False
            )
            assert refused.returncode and "not available" in refused.stderr
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_script_requeues_saves_in_time_appends_and_names_no_site(name):
    text = (ROOT / f"slurm/{name}.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.M))
    assert {
        "requeue",
        "open-mode",
        "signal",
        "time",
        "output",
        "job-name",
    } <= options.keys() and options["open-mode"] == "append"
    assert options["signal"].startswith("B:USR1@")
    assert not re.search(
        r"--(partition|account|qos|constraint|mail-user)|module load|/(home|scratch)/", text
    )
    assert "SLURM_PROCID" not in text, "the batch shell's own is 0"


@pytest.mark.parametrize("name", JOBS)
def test_a_job_script_outside_a_job_says_how_to_submit_it(name):
    found = subprocess.run(
        ["bash", f"slurm/{name}.sh"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert found.returncode and f"sbatch slurm/{name}.sh" in found.stderr


COUNTED = [
    "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_NUM_NODES",
    "SLURM_CPUS_PER_TASK", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SAP_EVALUATE_SHARDS", "SAP_MAX_FRUITLESS",
    "SAP_MAX_UNSTARTED", "SAP_RETRY_SECONDS",
]  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("script", ["evaluate.sh", "sap_7b.sh", "rank.sh"])
def test_what_is_counted_with_is_a_number_and_never_a_command(tmp_path, script, name):
    if script == "rank.sh" and name != "SLURM_CPUS_PER_TASK":
        name = "SAP_RANKS_PER_NODE"
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_PROCID": "1",
        "SAP_SITE_ENV": "/nowhere",
        "SAP_LAUNCHER": "torchrun",
        "SAP_RANKS_PER_NODE": "1",
    }
    environment = {"PATH": os.environ["PATH"], **job, name: f"x[$(touch {tmp_path}/ran)]"}
    found = subprocess.run(
        ["bash", str(ROOT / "slurm" / script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 2 and name in found.stderr and "error: " in found.stderr
    assert not (tmp_path / "ran").exists()


def test_every_variable_of_the_environment_that_a_script_counts_with_is_checked():
    """Names inside of $((...)): locals of the scripts, or checked."""
    own = {"INDEX", "NTASKS", "code", "tries", "try", "fruitless", "unstarted", "refused", "ranks_per_node", "end",
           "shards", "cpus", "SRUN_CPUS_PER_TASK", "SAP_RANKS_PER_NODE", "STEPS", "UNIT", "starts", "date", "grep",
           "cx", "s", "true"}  # fmt: skip
    used = set()
    for path in (ROOT / "slurm").glob("*.sh"):
        for counted in re.findall(r"\$\(\(((?:[^()]|\([^()]*\))*)\)\)", path.read_text()):
            used |= set(re.findall(r"[A-Za-z_]\w*", counted))
    assert used - own <= set(COUNTED), used - own - set(COUNTED)
    assert {"SLURM_ARRAY_TASK_ID", "SLURM_JOB_NUM_NODES"} <= used, "the pattern finds nothing"


def test_dry_run_prints_the_chain_and_touches_nothing(recipe):
    found = submit(
        recipe,
        "--dry-run",
        "--size",
        "13b",
        "--nodes",
        "4",
        "--shards",
        "3",
        "--",
        "--train.lr=1e-3",
        SAP_GPUS_PER_NODE="4",
        SAP_CPU_PARTITION="small",
    )
    assert found.returncode == 0, found.stderr
    lines = {line.split()[0]: line for line in found.stdout.splitlines()}
    assert list(lines) == ["prepare", "direction", "train", "evaluate", "report", "mlflow"]
    assert (
        "--partition=small" in lines["prepare"]
        and "--partition=small" in lines["report"]
        and "--partition" not in lines["train"]
    )
    assert (
        "SAP_METHOD=sap SAP_SEED=0" in lines["direction"]
        and "afterok:<prepare-" in lines["direction"]
    )
    for part in (
        "slurm/sap_13b.sh",
        "--nodes=4",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "afterok:<direction-",
        "singleton",
        "--kill-on-invalid-dep=yes",
    ):
        assert part in lines["train"]
    assert (
        "--array=0,1,2,3,4,5,6,7,8" in lines["evaluate"] and lines["evaluate"].count("<train-") == 2
    )
    assert [stage for stage in list(lines)[:-1] if "--hold" in lines[stage]] == ["prepare"], (
        "released once all are submitted"
    )
    assert all("--train.lr=0.001" in lines[stage] for stage in list(lines)[:-1])
    assert not (recipe.parent / "runs").exists()


def test_methods_choose_cells_and_a_report_of_their_own(recipe):
    both, one = (
        submit(recipe, "--dry-run").stdout,
        submit(recipe, "--dry-run", "--methods", "sft").stdout,
    )
    assert (
        "train-sap-" in both
        and "train-sap-" not in one
        and "direction" not in one
        and "train-sft-" in one
    )
    report = re.compile(r"report-\w+")
    assert report.search(both).group() != report.search(one).group()


def test_jobs_are_given_the_paths_that_overrides_have_where_they_are_submitted(recipe, tmp_path):
    overrides = ["--data.task.source", "own.jsonl", "--output_dir", "$OWN/runs"]
    found = submit(recipe, "--dry-run", "--", *overrides, cwd=tmp_path, OWN=str(tmp_path / "own"))
    lines = found.stdout.splitlines()[:-1]
    assert lines and all(f'--data.task.source="{tmp_path}/own.jsonl"' in line for line in lines), (
        found.stderr
    )
    assert all(f'--output_dir="{tmp_path}/own/runs"' in line for line in lines)
    assert all(f"--output={tmp_path}/own/runs/tiny/slurm/logs/" in line for line in lines)
    found = submit(
        "launch/recipes/llama_7b_sap.yaml", "--dry-run", cwd=tmp_path, HF_HUB_OFFLINE="1"
    )
    assert (
        f'{ROOT}/launch/recipes/llama_7b_sap.yaml --output_dir="{tmp_path}/runs"' in found.stdout
    ), found.stderr


def test_what_is_complete_is_left_out(recipe, tmp_path):
    first = submit(recipe, "--dry-run", "--", f"--output_dir={tmp_path}").stdout
    folder = tmp_path / "tiny" / re.search(r"prepare-\w+", first).group()
    folder.mkdir(parents=True)
    (folder / "DONE").touch()
    found = submit(recipe, "--dry-run", "--from", "direction", "--", f"--output_dir={tmp_path}")
    lines = found.stdout.splitlines()
    assert lines[0].startswith("direction") and "afterok" not in lines[0], found.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--from", "train"],
            "is not complete: leave --from train out, or begin with --from prepare",
        ),
        (
            ["--from", "sing"],
            "--from is 'sing': it takes prepare align filter direction train evaluate report",
        ),
        (["--size", "8b"], "--size is '8b': it takes 7b, 13b or 70b"),
        (["--shards", "0"], "--shards is '0': it takes a number from 1"),
        (["--nodes"], "--nodes needs a value"),
        (["--speed"], "unknown option --speed"),
        (["--methods", "spa"], "no method 'spa'"),
        (["again.yaml"], "two recipes"),
        (["--", "--train.learning_rate=1"], "unknown key 'train.learning_rate'"),
        (
            ["--", "--model.dtype=auto"],
            "model.dtype auto means something else on another machine: set it to bfloat16 or float32",
        ),
    ],
)
def test_bad_submissions_are_one_sentence(recipe, arguments, sentence):
    found = submit(recipe, "--dry-run", *arguments)
    assert (
        found.returncode == 2
        and sentence in found.stderr
        and len(found.stderr.strip().splitlines()) == 1
    )


def test_ports_differ_between_jobs_and_restarts_and_lie_below_the_ephemeral_ones():
    function = re.search(
        r"^master_port\(\) .*$", (ROOT / "slurm/common.sh").read_text(), re.M
    ).group()
    loop = (
        f"{function}; for SLURM_JOB_ID in {{99990..100009}}; do for SLURM_RESTART_COUNT in "
        f"{{0..15}}; do master_port; done; done"
    )
    ports = [
        int(line)
        for line in subprocess.run(
            ["bash", "-c", loop], capture_output=True, text=True, check=True
        ).stdout.split()
    ]
    assert len(set(ports)) == len(ports) == 320 and min(ports) >= 10000 and max(ports) < 32768


def test_a_site_file_may_be_as_loose_as_modules_are(recipe, tmp_path):
    (tmp_path / "site.env").write_text(
        'purge() { [ -n "$NOT_SET_ANYWHERE" ] && true; }; purge\nSAP_CPU_PARTITION=small\n'
    )
    found = submit(recipe, "--dry-run", SAP_SITE_ENV=str(tmp_path / "site.env"))
    assert found.returncode == 0 and "--partition=small" in found.stdout, found.stderr


def test_no_recipe_is_told_how(recipe):
    assert submit().returncode == 2 and "slurm/submit.sh RECIPE" in submit().stderr
    assert "there is no recipe" in submit(recipe.parent / "none.yaml").stderr


def test_size_follows_from_the_recipes_name():
    for size in ("7b", "13b", "70b"):
        found = submit(
            ROOT / f"launch/recipes/llama_{size}_sap.yaml", "--dry-run", HF_HUB_OFFLINE="1"
        )
        assert f"slurm/sap_{size}.sh" in found.stdout, found.stderr
        assert yaml.safe_load((ROOT / f"launch/recipes/llama_{size}_sap.yaml").read_text())


# Stands in for the Python of SAP_PYTHON: it answers `sap stages`, and fails as it is told.
STAND_IN = """#!/bin/bash
[ "$3" = stages ] && [ -z "${FAILS:-}" ] || { echo "the node is broken" >&2; exit ${FAILS:-3}; }
exec "$REAL_PYTHON" "$@"
"""


def job(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess:
    """A job script where every program of Slurm's only says how it is called; what asks for a requeue ends there."""
    programs = folder / "bin"
    programs.mkdir()
    texts = {
        "scontrol": '#!/bin/bash\necho "scontrol $*" >&2\n[ "$1" != requeue ] || kill -KILL $PPID\n',
        "squeue": "#!/bin/bash\n",
        "scancel": "#!/bin/bash\n",
        "python": STAND_IN,
    }
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o700)
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / script), "recipe.yaml"],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SAP_SITE_ENV": "/nowhere",
            "SAP_PYTHON": str(programs / "python"),
            "SAP_RETRY_SECONDS": "0",
            "REAL_PYTHON": sys.executable,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_a_job_that_was_right_once_is_requeued_from_a_node_where_nothing_works(tmp_path):
    found = job(tmp_path, "sap_7b.sh", FAILS="1", SLURM_RESTART_COUNT="1")
    assert found.stderr.count("the node is broken") == 5, found.stderr
    assert "requeue: sap stages failed with exit code 1" in found.stderr
    assert "scontrol requeue 7" in found.stderr


def test_a_job_that_is_refused_at_first_gives_up(tmp_path):
    found = job(tmp_path, "sap_7b.sh", FAILS="2")
    assert found.returncode == 2 and "gives up: the recipe" in found.stderr
    assert "requeue" not in found.stderr


@pytest.mark.parametrize(
    ("script", "stage", "takes"),
    [
        ("sap_7b.sh", "evaluate", "align filter direction train"),
        ("sap_7b.sh", "no-such", "align filter direction train"),
        ("prepare.sh", "train", "prepare report"),
    ],
)
def test_a_stage_that_a_script_does_not_run_is_refused(tmp_path, script, stage, takes):
    found = job(tmp_path, script, SAP_STAGE=stage)
    assert found.returncode == 2
    assert f"SAP_STAGE is '{stage}': this script takes {takes}" in found.stderr
