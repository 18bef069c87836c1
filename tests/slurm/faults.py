"""What the job scripts do when things go wrong, on a real Slurm cluster with ZeRO-3 over two nodes
x two ranks (make slurm).

    python -m pytest -s tests/slurm/chains.py tests/slurm/faults.py

Every fault hits the project's own scripts, submitted with sbatch, while a training is under way. Whatever happens, the
adapter that comes out equals, bit for bit, the one of the chain that nobody disturbed. The table printed at the end is
the one in docs/slurm.md.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from datetime import datetime
from pathlib import Path

import pytest

from tests.slurm.minicluster import why_not
from tests.slurm.site import (
    SAVE_EVERY,
    SEEN,
    SHAPE_OF_ALL,
    STEPS,
    Site,
    Stopwatch,
    crashing_python,
    make_recipe_in,
    opened,
    same_adapter,
)

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("nothing_left"),
]


def events(output: Path, run: str) -> list[str]:
    """The events of the one MLflow run of this name, in order."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    found = client.search_runs(
        [client.get_experiment_by_name("tiny").experiment_id], f"attributes.run_name = '{run}'"
    )
    assert len(found) == 1, "one run, however often the job came back"
    tags = found[0].data.tags
    return [tags[name] for name in sorted(tags) if name.startswith("event.")]


def test_time_limit(site, undisturbed):
    """The ranks are held after their first step until the warning comes.

    Slurm looks every 30 s and rounds towards early, so at least the 10 s are left that they need to save.
    """
    output = site.output("time")
    job = site.train(
        output, "--time=10", "--signal=B:USR1@10", overrides=(f"--train.save_every={10 * STEPS}",)
    )
    site.cluster.wait_for(lambda: "step 1/" in site.log(job), 400, "the first step")
    site.signal_ranks("STOP")
    clock = Stopwatch()
    started = datetime.fromisoformat(site.cluster.job(job)["StartTime"])
    elapsed = (datetime.now() - started).total_seconds()
    site.shell("scontrol", "update", f"JobId={job}", f"TimeLimit={math.ceil((elapsed + 45) / 60)}")
    site.cluster.wait_for(
        lambda: "asked to leave by time limit" in site.log(job), 120, "the warning"
    )
    site.signal_ranks("CONT")
    site.wait(job)
    restarts = site.cluster.job(job)["Restarts"]
    assert int(restarts) >= 1, site.log(job)
    assert "asked to leave by time limit" in site.log(job) and "stopped after step" in site.log(job)
    same_adapter(output, undisturbed)
    SEEN.append(
        ("time limit", f"saved at the step's end, requeued ({restarts} times), went on", clock())
    )


@pytest.mark.parametrize(
    ("signal", "reason"),
    [
        ("CONT", "time limit, without the time to save"),
        ("USR1", "time limit or preemption, the step has not left in time"),
    ],
    ids=["no warning", "ranks that do not leave"],
)
def test_time_limit_without_time_to_save(site, undisturbed, signal, reason):
    """A job whose signal was changed, so that the SIGTERM at the limit is the first it hears;
    ranks that see no stop file.
    """
    output = site.output(f"late-{signal}")
    python = crashing_python(site, "exec sleep 300")
    job = site.train(
        output, "--time=1", f"--signal=B:{signal}@1", SAP_PYTHON=str(python), SAP_MAX_FRUITLESS="1"
    )
    site.wait(job, "FAILED")
    assert site.restarted(job) and f"requeue: {reason}" in site.log(job)
    assert (
        f"1 runs in a row brought no checkpoint after step 0; the last ended by: {reason}"
        in site.log(job)
    )


def test_a_stage_without_checkpoints_starts_again_and_a_stop_is_final(site, undisturbed):
    """An evaluation's array task; then slurm/stop.sh and, while the job leaves, the warning of the time limit."""
    output = site.output("again")
    for folder in (undisturbed / "tiny").glob("train-*"):
        shutil.copytree(folder, output / "tiny" / folder.name)
    slow = crashing_python(
        site,
        'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then exec sleep 300; fi',
        "launch/evaluate.py",
    )
    array = site.sbatch(
        "--array=0-1",
        "slurm/evaluate.sh",
        site.recipe,
        f"--output_dir={output}",
        SAP_PYTHON=str(slow),
    )
    for task in (f"{array}_0", f"{array}_1"):
        site.cluster.wait_for(
            lambda task=task: "evaluate-" in task_log(site, task), 60, f"the start of task {task}"
        )
        site.shell("scancel", "--batch", "--signal=USR1", task)
        site.wait(task)
        assert int(site.cluster.job(task)["Restarts"]) == 1, "its own requeue, not the array's"
    assert len(list((output / "tiny").glob("evaluate-*/DONE"))) == 2
    job = site.train(
        output,
        "--nodes=1",
        "--ntasks-per-node=1",
        overrides=("--train.lr=0.02",),
        SAP_METHOD="sft",
        SAP_PYTHON=str(crashing_python(site, "trap '' TERM; sleep 8; exit 0")),
    )
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
    site.cluster.wait_for(lambda: "step 1/" in site.log(job), 400, "the first step")
    clock = Stopwatch()
    urgent = site.sbatch("--partition=urgent", *SHAPE_OF_ALL, "--wrap=sleep 1")
    site.wait(urgent)
    site.wait(job)
    assert site.restarted(job) and "stopped after step" in site.log(job)
    same_adapter(output, undisturbed)
    assert any("time limit or preemption" in event for event in events(output, "sap-s0"))
    SEEN.append(
        ("preemption", "saved at the step's end within the grace time, requeued, went on", clock())
    )


def lose(site: Site, undisturbed: Path, name: str, node: str, what: str) -> None:
    """Power a node off in mid-training and on again once Slurm has noticed."""
    output = site.output(name)
    job = site.train(output)
    site.wait_for_step(output, SAVE_EVERY, job)
    clock = Stopwatch()
    site.cluster.power_off(node)
    site.cluster.wait_for(
        lambda: site.restarted(job) or site.cluster.state(job) == "PENDING", 120, "Slurm notices"
    )
    noticed = clock()
    site.cluster.boot(node)
    site.wait(job)
    same_adapter(output, undisturbed)
    assert any("restart 1: " in event for event in events(output, "sap-s0"))
    SEEN.append(
        (
            what,
            f"requeued by Slurm after {noticed:.0f} s, went on from the last checkpoint when a node was there",
            clock(),
        )
    )


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
    assert any(
        "resumed after step" in event and "restart 1: exit code" in event
        for event in events(output, "sap-s0")
    )
    SEEN.append(
        (
            "kill -9 of a rank",
            "the others ended, requeued by the script, went on from the last checkpoint",
            clock(),
        )
    )


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
    SEEN.append(
        (
            "a rank hangs (watchdog 20 s)",
            "the others said so, with stacks, and ended; requeued, went on",
            clock(),
        )
    )


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
    assert (
        reason
        in next((output / "tiny/slurm/logs").glob(f"report-*-{jobs['report']}.log")).read_text()
    )
    SEEN.append(
        (
            "a rank that always crashes",
            "given up after the runs that SAP_MAX_FRUITLESS allows; the chain cancelled with the reason",
            clock(),
        )
    )


def test_failing_stage_cancels_what_waits_for_it(site, undisturbed):
    recipe = make_recipe_in(site, "failing")
    (site.folder / "failing" / "data" / "task.jsonl").write_text("")
    output = site.output("failing")
    for folder in (output / "tiny").iterdir():
        shutil.rmtree(folder)
    clock = Stopwatch()
    jobs = site.chain(output, recipe=recipe)
    site.wait(jobs["prepare"], "FAILED")
    assert "error: " in site.log(jobs["prepare"]) and "gives up" in site.log(jobs["prepare"])
    for waiting in set(jobs) - {"prepare"}:
        site.wait(jobs[waiting], "CANCELLED")
        assert f"job {jobs['prepare']} gave up: " in site.cluster.job(jobs[waiting])["Comment"]
    SEEN.append(
        (
            "a stage refuses its input",
            "not tried again; the chain cancelled with the reason",
            clock(),
        )
    )


def test_scancel_never_comes_back_and_the_work_is_kept(site, undisturbed):
    output = site.output("scancel")
    job = site.train(output)
    site.wait_for_step(output, SAVE_EVERY, job)
    clock = Stopwatch()
    site.shell("scancel", job)
    site.wait(job, "CANCELLED")
    ended = clock()
    assert "asked to leave by SIGTERM" in site.log(job) and "(common.sh, line" not in site.log(
        job
    ), "the shell's own end is in order too"
    again = site.train(output)
    site.wait(again)
    assert not site.restarted(job) and site.cluster.state(job) == "CANCELLED"
    assert "resumed after step" in site.log(again)
    same_adapter(output, undisturbed)
    SEEN.append(
        (
            "scancel",
            f"gone after {ended:.0f} s, did not come back; submitted again it went on",
            clock(),
        )
    )


def test_stop_saves_first(site, undisturbed):
    output = site.output("stop")
    job = site.train(output, overrides=(f"--train.save_every={10 * STEPS}",))
    site.cluster.wait_for(lambda: "step 1/" in site.log(job), 400, "the first step")
    clock = Stopwatch()
    assert f"job {job}: FAILED" in site.shell("slurm/stop.sh", job).stdout
    ended, saved = clock(), site.step(output)
    assert saved > 0 and site.cluster.job(job)["ExitCode"] == "75:0" and not site.restarted(job)
    again = site.train(output)
    site.wait(again)
    assert f"resumed after step {saved}" in site.log(again)
    same_adapter(output, undisturbed)
    SEEN.append(
        (
            "slurm/stop.sh",
            f"saved at the step's end and gone after {ended:.0f} s; submitted again it went on",
            clock(),
        )
    )


def test_stop_ends_every_task_of_an_array_also_those_that_wait(site):
    array = site.sbatch("--array=0-3%2", "--wrap=sleep 300 & wait")
    site.cluster.wait_for(
        lambda: (
            site.shell("squeue", "-h", "-r", "-t", "RUNNING", "-j", array).stdout.count("\n") == 2
        ),
        30,
        "two tasks run",
    )
    site.shell("slurm/stop.sh", array)
    records = site.shell("scontrol", "show", "job", "-o", array).stdout
    # The two that waited were never records of their own.
    assert (
        records.count("JobState=FAILED") == 2
        and records.count("JobState=CANCELLED") == len(records.splitlines()) - 2 == 1
    ), records


def test_what_may_pass_is_tried_again(site, undisturbed):
    """A job that has run before meets a node where nothing can be read: first the batch shell's own question fails,
    then the ranks' input is "wrong".
    """
    output = site.output("passes")
    body = (
        'case ${SLURM_RESTART_COUNT:-0} in 0) exit 7 ;; 2) echo "prepare is not complete" '
        '>"$SAP_ERROR_FILE"; exit 2 ;; esac'
    )
    ranks = crashing_python(site, body)
    python = crashing_python(
        site,
        'if [ "${SLURM_RESTART_COUNT:-0}" = 1 ]; then exit 1; fi',
        "pipeline.cli status",
        ranks,
    )
    job = site.train(output, SAP_PYTHON=str(python))
    site.wait(job)
    for reason in (
        "exit code 7",
        "sap status failed with exit code 1 on n1",
        "prepare is not complete",
    ):
        assert f"requeue: {reason}" in site.log(job)
    assert int(site.cluster.job(job)["Restarts"]) == 3
    same_adapter(output, undisturbed)


def test_wrong_recipe_fails_in_the_first_seconds(site, undisturbed):
    recipe = site.folder / "wrong.yaml"
    recipe.write_text(site.recipe.read_text() + "\nlearning_rat: 1\n")
    clock = Stopwatch()
    job = site.sbatch(*SHAPE_OF_ALL, "--ntasks-per-node=2", "slurm/sap_7b.sh", recipe)
    site.wait(job, "FAILED")
    assert (
        "unknown key 'learning_rat'" in site.log(job)
        and site.cluster.job(job)["ExitCode"] == "2:0"
        and not site.restarted(job)
    )
    SEEN.append(("a wrong recipe", "one sentence in the log, exit code 2", clock()))


def test_batch_size_that_does_not_divide_by_the_ranks_fails_before_any_rank(site, undisturbed):
    job = site.train(site.output("divide"), overrides=("--train.batch_size=6",))
    site.wait(job, "FAILED")
    assert (
        "is not divisible by 4 ranks" in site.log(job)
        and site.cluster.job(job)["ExitCode"] == "2:0"
        and not site.restarted(job)
    )


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
            slow.cluster.wait_for(
                lambda: "requeue: exit code" in slow.log(job),
                400,
                "the ranks that are left end, and the script requeues",
            )
            noticed = clock()
            slow.cluster.boot("n2")
            slow.wait(job)
            same_adapter(output, undisturbed)
            SEEN.append(
                (
                    "a node is lost, Slurm has not noticed (watchdog 20 s)",
                    f"requeued by the script after {noticed:.0f} s, went on",
                    clock(),
                )
            )
    finally:
        shutil.rmtree(folder)
