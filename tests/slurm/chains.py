"""The chain through slurm/submit.sh, each script alone, and the launchers, on a real Slurm cluster (make slurm).

python -m pytest -s tests/slurm/chains.py
"""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.minicluster import why_not
from tests.slurm.site import (
    NODES,
    RANKS_PER_NODE,
    SHAPE,
    STEPS,
    crashing_python,
    manifest,
    same_adapter,
)

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("nothing_left"),
]


def test_chain(site, undisturbed):
    report = next((undisturbed / "tiny").glob("report-*"))
    assert "sap" in (report / "table.txt").read_text() and (report / "report.html").is_file()
    assert (
        manifest(undisturbed, "train-sap-")["world_size"]
        == manifest(undisturbed, "train-sft-")["world_size"]
        == NODES * RANKS_PER_NODE
    )
    for what in (
        "prepare",
        "direction",
        "train",
        "evaluate",
        "report",
        "mlflow",
        *site.jobs.values(),
    ):
        assert what in site.submitted
    assert str(report) in site.log(site.jobs["report"])
    tasks = [site.cluster.job(f"{site.jobs['evaluate']}_{task}") for task in range(6)]
    spans = sorted((task["StartTime"], task["EndTime"]) for task in tasks)
    assert any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans)), (
        "tasks of one evaluation wait for no other"
    )


def test_resubmission_runs_only_what_is_missing(site, undisturbed):
    assert site.chain(undisturbed, "--shards", "2") == {} and "complete: " in site.printed
    one = next((undisturbed / "tiny").glob("evaluate-sft-*"))
    shutil.rmtree(one)
    (next((undisturbed / "tiny").glob("report-*")) / "DONE").unlink()
    before = {
        path: path.stat().st_mtime_ns
        for path in (undisturbed / "tiny").glob("train-*/manifest.json")
    }
    jobs = site.chain(undisturbed, "--shards", "2")
    assert jobs.keys() == {"evaluate", "report"}
    site.wait(jobs["report"])
    assert one.is_dir() and {path: path.stat().st_mtime_ns for path in before} == before


def test_each_script_is_right_alone(site, undisturbed):
    """Without submit.sh: the recipe as an argument or in SAP_RECIPE, evaluation of whatever is missing in one job."""
    output = site.output("alone")
    for folder in (undisturbed / "tiny").glob("train-*"):
        shutil.copytree(folder, output / "tiny" / folder.name)
    direction = next((output / "tiny").glob("direction-*"))
    shutil.rmtree(direction)
    where = f"--output_dir={output}"
    site.wait(site.sbatch(*SHAPE, "slurm/direction.sh", where, SAP_RECIPE=str(site.recipe)))
    again, first = (
        load_file(next((runs / "tiny").glob("direction-*/direction*.safetensors")))
        for runs in (output, undisturbed)
    )
    assert again.keys() == first.keys() and all(
        torch.equal(again[name], first[name]) for name in first
    )
    site.wait(site.sbatch("slurm/evaluate.sh", site.recipe, where))
    report = site.sbatch("slurm/report.sh", site.recipe, where)
    site.wait(report)
    tables = [
        next((runs / "tiny").glob("report-*/table.txt")).read_text()
        for runs in (output, undisturbed)
    ]
    assert tables[0] == tables[1] and tables[0].strip() in site.log(report)
    # as modules and conda write it: a false test, a variable that is not set
    loose = site.folder / "site.env"
    loose.write_text('purge() { [ -n "$NOT_SET_ANYWHERE" ] && true; }; purge\n')
    done = site.sbatch("slurm/prepare.sh", site.recipe, where, SAP_SITE_ENV=str(loose))
    site.wait(done)
    assert "complete already" in site.log(done)


def test_afterok_alone_is_not_believed(site, undisturbed):
    """slurmctld forgets jobs, and takes what it has forgotten for done."""
    output = site.output("forgotten")
    for folder in (output / "tiny").glob("prepare-*"):
        shutil.rmtree(folder)
    job = site.train(output, "--dependency=afterok:4242")
    site.wait(job, "FAILED")
    assert "is not complete: run the stage that writes it again" in site.log(job)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launcher(site, undisturbed, launcher):
    """Under the launchers that run one task a node a job saves on request, comes back and ends alike."""
    output = site.output(launcher)
    job = site.train(output, overrides=(f"--train.save_every={10 * STEPS}",), SAP_LAUNCHER=launcher)
    site.cluster.wait_for(lambda: "step 1/" in site.log(job), 400, "the first step")
    site.shell("scancel", "--batch", "--signal=USR1", job)
    site.wait(job)
    assert site.restarted(job) and "stopped after step" in site.log(job)
    same_adapter(output, undisturbed)


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_every_rank_is_distinct_and_ports_differ_by_job_and_restart(site, undisturbed, launcher):
    """Ranks write who they are and end; two such runs, and the job gives up."""
    output, seen = site.output(f"ranks-{launcher}"), site.folder / f"seen-{launcher}"
    seen.mkdir()
    (site.folder / "ranks.py").write_text(
        "import json, os, pathlib, sys, time\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', "
        "'CUDA_VISIBLE_DEVICES', 'SLURMD_NODENAME')\n"
        "restart = os.environ.get('SLURM_RESTART_COUNT', '0')\n"
        f"seen, run = pathlib.Path({str(seen)!r}), f\"{{os.environ['SLURM_JOB_ID']}}-{{restart}}\"\n"
        "(seen / f\"{run}-{os.environ['RANK']}\").write_text(json.dumps({name: "
        "os.environ.get(name) for name in names}))\n"
        "deadline = time.time() + 60  # a launcher ends the others when the first one fails: it "
        "must not be before they have said who they are\n"
        "while len(list(seen.glob(f'{run}-*'))) < 4 and time.time() < deadline:\n"
        "    time.sleep(0.1)\n"
        "sys.exit(7 if restart == '0' else 0)\n"
    )
    own = f'set -- "${{@/*launch\\/train.py/{site.folder}/ranks.py}}"'
    python = crashing_python(site, own)
    job = site.train(output, SAP_LAUNCHER=launcher, SAP_PYTHON=str(python), SAP_MAX_FRUITLESS="2")
    site.wait(job, "FAILED")
    runs: dict[str, list[dict[str, str]]] = {}
    for path in seen.iterdir():
        runs.setdefault(path.name.rpartition("-")[0], []).append(json.loads(path.read_text()))
    assert len(runs) == 2
    for ranks in runs.values():
        assert sorted(rank["RANK"] for rank in ranks) == ["0", "1", "2", "3"]
        assert {(rank["SLURMD_NODENAME"], rank["LOCAL_RANK"]) for rank in ranks} == {
            (n, r) for n in ("n1", "n2") for r in "01"
        }
        assert {rank["CUDA_VISIBLE_DEVICES"] for rank in ranks} == {"0,1"}, (
            "every rank sees its node's GPUs; LOCAL_RANK is the index"
        )
        assert {rank["WORLD_SIZE"] for rank in ranks} == {"4"} and {
            rank["MASTER_ADDR"] for rank in ranks
        } == {"n1"}
    ports = [{rank["MASTER_PORT"] for rank in ranks} for ranks in runs.values()]
    assert all(len(port) == 1 for port in ports) and ports[0] != ports[1]


def test_a_method_that_filters_its_data(site):
    """filter.sh on all ranks, then the training without what was dropped."""
    output = site.output("filtered")
    saft = (
        "--methods.sap.saft.enabled=true",
        "--methods.sap.saft.labelled=50",
        "--methods.sap.saft.min_auroc=0",
        "--methods.sap.saft.min_precision=0",
        "--train.steps=4",
    )
    jobs = site.chain(output, "--methods", "sap", overrides=saft)
    site.wait(jobs["train-sap-s0"])
    site.shell("scancel", "--user=root", check=False)
    assert (
        site.cluster.state(jobs["filter"]) == "COMPLETED"
        and f"after {jobs['filter']}" in site.printed
    )
    assert (
        manifest(output, "embeddings-")["world_size"]
        == manifest(output, "train-sap-")["world_size"]
        == NODES * RANKS_PER_NODE
    )
    facts = json.loads(next((output / "tiny").glob("filter-*/facts.json")).read_text())
    assert facts["dropped"] > 0 and facts["samples"] > facts["dropped"]


def test_a_filter_that_refuses_ends_the_chain_with_its_reason(site):
    output = site.output("refused")
    saft = (
        "--methods.sap.saft.enabled=true",
        "--methods.sap.saft.min_auroc=1",
        "--methods.sap.saft.layer=0",
        "--methods.sap.saft.position=response_start",
    )
    jobs = site.chain(output, "--methods", "sap", overrides=saft)
    site.wait(jobs["train-sap-s0"], "FAILED")
    assert "saft refuses to filter: its AUROC on" in site.log(
        jobs["train-sap-s0"]
    ) and "warning: saft refuses" in site.log(jobs["filter"])
    site.cluster.wait_for(
        lambda: site.cluster.state(jobs["report"]) == "CANCELLED", 60, "the report to be cancelled"
    )
    assert "saft refuses to filter" in site.cluster.job(jobs["report"])["Comment"]
