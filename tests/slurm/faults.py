"""What the job scripts do when things go wrong, on a real Slurm cluster with ZeRO-3 over two nodes x two ranks (make slurm).

    python -m pytest -s tests/slurm/faults.py

Every fault hits the project's own scripts, submitted with sbatch, while a training is under way. Whatever happens, the adapter that comes out
equals, bit for bit, the one of the chain that nobody disturbed. The table printed at the end is the one in docs/slurm.md.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.project import write_recipe
from tests.slurm.minicluster import why_not
from tests.slurm.site import (
    NODES,
    RANKS_PER_NODE,
    SAVE_EVERY,
    SHAPE,
    STEPS,
    Site,
    Stopwatch,
    adapter,
    make_recipe,
    manifest,
    opened,
    steps_logged,
)

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.timeout(600)]

SHAPE_OF_ALL = [f"--nodes={NODES}", "--exclusive", f"--gpus-per-node={RANKS_PER_NODE}"]
SEEN: list[tuple[str, str, float]] = []  # fault, what happened, seconds from the fault to the end of the job


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own paths are too long for sockets
    try:
        with opened(folder) as site:
            yield site
        print("\n" + "\n".join(f"| {fault} | {what} | {seconds:.0f} s |" for fault, what, seconds in SEEN))
    finally:
        if os.environ.get("KEEP_SLURM"):
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nothing_left_running(site) -> Iterator[None]:
    """A test that failed leaves no job behind for the next."""
    yield
    site.shell("scancel", "--user=root", check=False)


@pytest.fixture(scope="module")
def undisturbed(site) -> Path:
    """The whole chain through slurm/submit.sh, evaluation in two shards; what every fault's adapter is compared with."""
    output = site.output("undisturbed")
    clock = Stopwatch()
    jobs = site.chain(output, "--shards", "2")
    site.wait(jobs["report"], seconds=560)
    SEEN.append(("none: the whole chain", "prepare, direction, two trainings, eight evaluation tasks, report", clock()))
    site.upstream = output / "tiny"
    site.jobs, site.submitted = jobs, site.printed
    return output


def same_adapter(output: Path, undisturbed: Path) -> None:
    found, wanted = adapter(output), adapter(undisturbed)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert manifest(output, "train-sap-")["world_size"] == NODES * RANKS_PER_NODE
    assert steps_logged(output) == list(range(STEPS + 1)), "every step once, whatever was repeated"


def events(output: Path, run: str) -> list[str]:
    """The events of the one MLflow run of this name, in order."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], f"attributes.run_name = '{run}'")
    assert len(found) == 1, "one run, however often the job came back"
    tags = found[0].data.tags
    return [tags[name] for name in sorted(tags) if name.startswith("event.")]


def test_chain(site, undisturbed):
    report = next((undisturbed / "tiny").glob("report-*"))
    assert "sap" in (report / "table.txt").read_text() and (report / "report.html").is_file()
    assert manifest(undisturbed, "train-sap-")["world_size"] == manifest(undisturbed, "train-sft-")["world_size"] == NODES * RANKS_PER_NODE
    for what in ("prepare", "direction", "train", "evaluate", "report", "mlflow", *site.jobs.values()):
        assert what in site.submitted
    assert str(report) in site.log(site.jobs["report"])


def test_resubmission_runs_only_what_is_missing(site, undisturbed):
    assert site.chain(undisturbed, "--shards", "2") == {} and "complete: " in site.printed
    one = next((undisturbed / "tiny").glob("evaluate-sft-*"))
    shutil.rmtree(one)
    (next((undisturbed / "tiny").glob("report-*")) / "DONE").unlink()
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "tiny").glob("train-*/manifest.json")}
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
    again, first = (load_file(next((runs / "tiny").glob("direction-*/direction*.safetensors"))) for runs in (output, undisturbed))
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    site.wait(site.sbatch("slurm/evaluate.sh", site.recipe, where))
    report = site.sbatch("slurm/report.sh", site.recipe, where)
    site.wait(report)
    tables = [next((runs / "tiny").glob("report-*/table.txt")).read_text() for runs in (output, undisturbed)]
    assert tables[0] == tables[1] and tables[0].strip() in site.log(report)
    done = site.sbatch("slurm/prepare.sh", site.recipe, where)
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


def test_time_limit(site, undisturbed):
    """Slurm looks every 30 s and rounds towards early: the signal comes in the first half of the minute."""
    output = site.output("time")
    clock = Stopwatch()
    job = site.train(output, "--time=1", "--signal=B:USR1@1", overrides=(f"--train.save_every={10 * STEPS}",))
    site.wait(job)
    restarts = site.cluster.job(job)["Restarts"]
    assert int(restarts) >= 1, site.log(job)
    assert "asked to leave by time limit" in site.log(job) and "stopped after step" in site.log(job)
    same_adapter(output, undisturbed)
    SEEN.append(("time limit", f"saved at the step's end, requeued ({restarts} times), went on", clock()))


def test_time_limit_without_a_warning(site, undisturbed):
    """A job whose signal was changed: Slurm's SIGTERM at the limit is the first it hears."""
    output = site.output("late")
    python = crashing_python(site, "exec sleep 300")
    job = site.train(output, "--time=1", "--signal=B:CONT@1", SAP_PYTHON=str(python), SAP_MAX_FRUITLESS="1")
    site.wait(job, "FAILED")
    assert site.restarted(job) and "requeue: time limit, without the time to save" in site.log(job)
    assert "1 runs in a row brought no checkpoint after step 0; the last ended by: time limit" in site.log(job)


def test_a_stage_without_checkpoints_starts_again_and_a_stop_is_final(site, undisturbed):
    """An evaluation's array task; then slurm/stop.sh and, while the job leaves, the warning of the time limit."""
    output = site.output("again")
    for folder in (undisturbed / "tiny").glob("train-*"):
        shutil.copytree(folder, output / "tiny" / folder.name)
    slow = crashing_python(site, 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then exec sleep 300; fi', "launch/evaluate.py")
    array = site.sbatch("--array=0-1", "slurm/evaluate.sh", site.recipe, f"--output_dir={output}", SAP_PYTHON=str(slow))
    for task in (f"{array}_0", f"{array}_1"):
        site.cluster.wait_for(lambda task=task: "evaluate-" in task_log(site, task), 60, f"the start of task {task}")
        site.shell("scancel", "--batch", "--signal=USR1", task)
        site.wait(task)
        assert int(site.cluster.job(task)["Restarts"]) == 1, "its own requeue, not the array's"
    assert len(list((output / "tiny").glob("evaluate-*/DONE"))) == 2
    job = site.train(output, "--nodes=1", "--ntasks-per-node=1", overrides=("--train.lr=0.02",), SAP_METHOD="sft", SAP_PYTHON=str(crashing_python(site, "trap '' TERM; sleep 8; exit 0")))
    site.cluster.wait_for(lambda: "1 tasks, from step 0" in site.log(job), 60, "the step's start")
    for number in ("USR2", "USR1"):
        site.shell("scancel", "--batch", f"--signal={number}", job)
    site.wait(job, "FAILED")
    assert site.cluster.job(job)["ExitCode"] == "75:0" and not site.restarted(job)


def task_log(site: Site, task: str) -> str:
    """Log of an array's task: %j is the task's own job id."""
    return site.log(site.cluster.job(task)["JobId"])


def test_preemption(site, undisturbed):
    output = site.output("preempted")
    job = site.train(output, overrides=(f"--train.save_every={10 * STEPS}",))
    site.cluster.wait_for(lambda: "step 1/" in site.log(job), 200, "the first step")
    clock = Stopwatch()
    urgent = site.sbatch("--partition=urgent", *SHAPE_OF_ALL, "--wrap=sleep 1")
    site.wait(urgent)
    site.wait(job)
    assert site.restarted(job) and "stopped after step" in site.log(job)
    same_adapter(output, undisturbed)
    assert any("time limit or preemption" in event for event in events(output, "sap-s0"))
    SEEN.append(("preemption", "saved at the step's end within the grace time, requeued, went on", clock()))



def lose(site: Site, undisturbed: Path, name: str, node: str, what: str) -> None:
    """Power a node off in mid-training and on again once Slurm has noticed."""
    output = site.output(name)
    job = site.train(output)
    site.wait_for_step(output, SAVE_EVERY, job)
    clock = Stopwatch()
    site.cluster.power_off(node)
    site.cluster.wait_for(lambda: site.restarted(job) or site.cluster.state(job) == "PENDING", 120, "Slurm notices")
    noticed = clock()
    site.cluster.boot(node)
    site.wait(job)
    same_adapter(output, undisturbed)
    assert any("restart 1: " in event for event in events(output, "sap-s0"))
    SEEN.append((what, f"requeued by Slurm after {noticed:.0f} s, went on from the last checkpoint when a node was there", clock()))


def test_second_node_lost(site, undisturbed):
    lose(site, undisturbed, "second", "n2", "second node loses power")


def test_batch_node_lost(site, undisturbed):
    lose(site, undisturbed, "batch", "n1", "batch node loses power")


def test_crashed_rank(site, undisturbed):
    output = site.output("crashed")
    job = site.train(output)
    site.wait_for_step(output, SAVE_EVERY, job)
    clock = Stopwatch()
    victim = site.ranks("n2")[0]
    site.cluster.on("n2", ["kill", "-9", str(victim)])
    site.wait(job)
    assert site.restarted(job) and "a crash, a hang or a lost node" in site.log(job)
    same_adapter(output, undisturbed)
    assert any("resumed after step" in event and "restart 1: exit code" in event for event in events(output, "sap-s0"))
    SEEN.append(("kill -9 of a rank", "the others ended, requeued by the script, went on from the last checkpoint", clock()))


def test_hung_rank(site, undisturbed):
    output = site.output("hung")
    job = site.train(output, overrides=("--train.watchdog_seconds=20",))
    site.wait_for_step(output, SAVE_EVERY, job)
    clock = Stopwatch()
    victim = site.ranks("n2")[0]
    site.cluster.on("n2", ["kill", "-STOP", str(victim)])
    site.wait(job)
    log = site.log(job)
    assert site.restarted(job) and "has made no progress for" in log and "Current thread" in log
    same_adapter(output, undisturbed)
    SEEN.append(("a rank hangs (watchdog 20 s)", "the others said so, with stacks, and ended; requeued, went on", clock()))


def crashing_python(site: Site, body: str, script: str = "launch/train.py") -> Path:
    """A python that runs `body` (shell) before what it was asked for, where that is a rank of this script."""
    path = site.folder / f"python-{abs(hash(body))}"
    path.write_text(f'#!/bin/bash\nif [[ "$*" == *{script}* && "$*" != *--check* ]]; then {body}; fi\nexec {site.environment["SAP_PYTHON"]} "$@"\n')
    path.chmod(0o755)
    return path


def test_crash_loop_gives_up_and_cancels_the_chain_with_the_reason(site, undisturbed):
    output = site.output("loop")
    clock = Stopwatch()
    python = crashing_python(site, "echo no such luck; exit 7")
    jobs = site.chain(output, "--methods", "sap", SAP_PYTHON=str(python), SAP_MAX_FRUITLESS="2")
    site.wait(jobs["train-sap-s0"], "FAILED")
    reason = "2 runs in a row brought no checkpoint after step 0"
    assert reason in site.log(jobs["train-sap-s0"])
    for waiting in ("evaluate", "report"):
        site.wait(jobs[waiting], "CANCELLED")
    assert reason in site.cluster.job(jobs["report"])["Comment"]
    assert reason in next((output / "tiny/slurm/logs").glob(f"report-*-{jobs['report']}.log")).read_text()
    SEEN.append(("a rank that always crashes", "given up after the runs that SAP_MAX_FRUITLESS allows; the chain cancelled with the reason", clock()))


def test_failing_stage_cancels_what_waits_for_it(site, undisturbed):
    recipe = make_recipe_in(site, "failing")
    (site.folder / "failing" / "data" / "task.jsonl").write_text("")
    output = site.output("failing")
    for folder in (output / "tiny").iterdir():
        shutil.rmtree(folder)
    clock = Stopwatch()
    jobs = site.chain(output, recipe=recipe)
    site.wait(jobs["prepare"], "FAILED", 60)
    assert "error: " in site.log(jobs["prepare"]) and "gives up" in site.log(jobs["prepare"])
    for waiting in set(jobs) - {"prepare"}:
        site.wait(jobs[waiting], "CANCELLED", 30)
        assert f"job {jobs['prepare']} gave up: " in site.cluster.job(jobs[waiting])["Comment"]
    SEEN.append(("a stage refuses its input", "not tried again; the chain cancelled with the reason", clock()))


def make_recipe_in(site: Site, name: str) -> Path:
    folder = site.folder / name
    folder.mkdir()
    return write_recipe(folder, make_recipe(folder))


def test_scancel_never_comes_back_and_the_work_is_kept(site, undisturbed):
    output = site.output("scancel")
    job = site.train(output)
    site.wait_for_step(output, SAVE_EVERY, job)
    clock = Stopwatch()
    site.shell("scancel", job)
    site.wait(job, "CANCELLED", 60)
    ended = clock()
    assert "asked to leave by SIGTERM" in site.log(job) and "(common.sh, line" not in site.log(job), "the shell's own end is in order too"
    again = site.train(output)
    site.wait(again)
    assert not site.restarted(job) and site.cluster.state(job) == "CANCELLED"
    assert "resumed after step" in site.log(again)
    same_adapter(output, undisturbed)
    SEEN.append(("scancel", f"gone after {ended:.0f} s, did not come back; submitted again it went on", clock()))


def test_stop_saves_first(site, undisturbed):
    output = site.output("stop")
    job = site.train(output, overrides=(f"--train.save_every={10 * STEPS}",))
    site.cluster.wait_for(lambda: "step 1/" in site.log(job), 200, "the first step")
    clock = Stopwatch()
    assert f"job {job}: FAILED" in site.shell("slurm/stop.sh", job).stdout
    ended, saved = clock(), site.step(output)
    assert saved > 0 and site.cluster.job(job)["ExitCode"] == "75:0" and not site.restarted(job)
    again = site.train(output)
    site.wait(again)
    assert f"resumed after step {saved}" in site.log(again)
    same_adapter(output, undisturbed)
    SEEN.append(("slurm/stop.sh", f"saved at the step's end and gone after {ended:.0f} s; submitted again it went on", clock()))


def test_wrong_recipe_fails_in_the_first_seconds(site, undisturbed):
    recipe = site.folder / "wrong.yaml"
    recipe.write_text(site.recipe.read_text() + "\nlearning_rat: 1\n")
    clock = Stopwatch()
    job = site.sbatch(*SHAPE_OF_ALL, "--ntasks-per-node=2", "slurm/sap_7b.sh", recipe)
    site.wait(job, "FAILED", 30)
    assert "unknown key 'learning_rat'" in site.log(job) and site.cluster.job(job)["ExitCode"] == "2:0" and not site.restarted(job)
    SEEN.append(("a wrong recipe", "one sentence in the log, exit code 2", clock()))


def test_batch_size_that_does_not_divide_by_the_ranks_fails_before_any_rank(site, undisturbed):
    job = site.train(site.output("divide"), overrides=("--train.batch_size=6",))
    site.wait(job, "FAILED", 90)
    assert "does not divide" in site.log(job) and site.cluster.job(job)["ExitCode"] == "2:0" and not site.restarted(job)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launcher(site, undisturbed, launcher):
    output = site.output(launcher)
    job = site.train(output, SAP_LAUNCHER=launcher)
    site.wait(job)
    same_adapter(output, undisturbed)


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_every_rank_is_distinct_and_ports_differ_by_job_and_restart(site, undisturbed, launcher):
    """Ranks write who they are and end; two such runs, and the job gives up."""
    output, seen = site.output(f"ranks-{launcher}"), site.folder / f"seen-{launcher}"
    seen.mkdir()
    (site.folder / "ranks.py").write_text(
        "import json, os, pathlib, runpy, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'CUDA_VISIBLE_DEVICES', 'SLURMD_NODENAME')\n"
        "restart = os.environ.get('SLURM_RESTART_COUNT', '0')\n"
        f"pathlib.Path({str(seen)!r}, f\"{{os.environ['SLURM_JOB_ID']}}-{{restart}}-{{os.environ['RANK']}}\")"
        ".write_text(json.dumps({name: os.environ.get(name) for name in names}))\n"
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
        assert {(rank["SLURMD_NODENAME"], rank["LOCAL_RANK"]) for rank in ranks} == {(n, r) for n in ("n1", "n2") for r in "01"}
        assert {rank["CUDA_VISIBLE_DEVICES"] for rank in ranks} == {"0,1"}, "every rank sees its node's GPUs; LOCAL_RANK is the index"
        assert {rank["WORLD_SIZE"] for rank in ranks} == {"4"} and {rank["MASTER_ADDR"] for rank in ranks} == {"n1"}
    ports = [{rank["MASTER_PORT"] for rank in ranks} for ranks in runs.values()]
    assert all(len(port) == 1 for port in ports) and ports[0] != ports[1]


def test_ranks_notice_a_lost_node_before_slurm_does(undisturbed, site):
    """Slurm waits five minutes by default. The ranks that are left end by their watchdog; the job requeues itself."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with opened(folder, site, slurmd_timeout=300, first_job_id=5000) as slow:
            output = slow.output("noticed")
            job = slow.train(output, overrides=("--train.watchdog_seconds=20",))
            slow.wait_for_step(output, SAVE_EVERY, job)
            clock = Stopwatch()
            slow.cluster.power_off("n2")
            slow.cluster.wait_for(lambda: "requeue: exit code" in slow.log(job), 200, "the ranks that are left end, and the script requeues")
            noticed = clock()
            slow.cluster.boot("n2")
            slow.wait(job)
            same_adapter(output, undisturbed)
            SEEN.append(("a node is lost, Slurm has not noticed (watchdog 20 s)", f"requeued by the script after {noticed:.0f} s, went on", clock()))
    finally:
        shutil.rmtree(folder)
