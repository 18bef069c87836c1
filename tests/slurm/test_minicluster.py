"""The test cluster is a cluster: nodes of their own, GPUs, loss, return, preemption; and nothing of it stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.minicluster import Cluster, ClusterError, Process, Settings, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, shared):
    """In a folder whose path has blanks and is longer than a unix socket's may be."""
    folder = tmp_path_factory.mktemp("cluster") / "a folder with blanks" / ("x" * 100)
    with Cluster(folder, shared=[shared], grace=2, kill_wait=2, first_job_id=70) as cluster:
        yield cluster


def submit(cluster: Cluster, folder: Path, name: str, body: str, *options: str) -> tuple[str, Path]:
    """A job's id and the file that it prints to."""
    script, log = folder / f"{name}.sh", folder / f"{name}.log"
    script.write_text(f"#!/bin/bash\n{body}\n")
    return cluster.run(
        ["sbatch", "--parsable", "--open-mode=append", "-o", log, *options, script], cwd=folder
    ).stdout.strip(), log


def prints(log: Path, line: str, times: int = 1):
    return lambda: log.is_file() and log.read_text().splitlines().count(line) >= times


def processes_in(folder: Path) -> set[Process]:
    """All that runs where this folder is mounted somewhere, that is, inside the cluster which is kept there."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder) in (entry / "mountinfo").read_text():
                found.add(Process.of(int(entry.name)))
        except (OSError, ClusterError):  # it ended meanwhile
            continue
    return found


def gone(folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := processes_in(folder):
        assert time.monotonic() < deadline, f"{len(left)} processes of the cluster are left"
        time.sleep(0.1)


def tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-m", "tests.slurm.minicluster", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )


def test_nodes_are_machines_of_their_own(cluster, shared):
    assert (
        cluster.run(["hostname"]).stdout == "ctl\n"
        and cluster.on("n2", ["hostname"]).stdout == "n2\n"
    )
    assert sorted(cluster.run(["srun", "-N2", "hostname"]).stdout.split()) == ["n1", "n2"]
    assert cluster.on("n1", ["getent", "hosts", "n2"]).stdout.split() == ["10.77.0.2", "n2"]
    for folder in ("/tmp", "/dev/shm"):
        cluster.on("n1", ["touch", f"{folder}/of-n1"])
        assert (
            not Path(folder, "of-n1").exists()
            and cluster.on("n2", ["test", "-e", f"{folder}/of-n1"], check=False).returncode == 1
        )
    cluster.on("n1", ["touch", "of-all"], cwd=shared)
    assert (shared / "of-all").exists() and cluster.on(
        "n2", ["ls"], cwd=shared
    ).stdout == "of-all\n"


def test_gpus_are_given_to_the_job_that_asks_for_them(cluster, shared):
    body = 'echo "$(hostname) $CUDA_VISIBLE_DEVICES"; srun sh -c \'echo "task $SLURM_PROCID $CUDA_VISIBLE_DEVICES"\''
    job, log = submit(
        cluster,
        shared,
        "gpus",
        body,
        "-N1",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--comment=a b = c",
    )
    assert int(job) >= 70 and cluster.wait(job, 200) == "COMPLETED"
    assert sorted(log.read_text().splitlines()) == ["n1 0,1", "task 0 0,1", "task 1 0,1"]
    assert cluster.job(job)["Comment"] == "a b = c" and cluster.job(job)["NodeList"] == "n1"


def test_the_environment_is_the_callers_without_its_slurm(cluster, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "of-another-cluster")
    monkeypatch.setenv("OF_THE_CALLER", "yes")
    printed = cluster.run(["env"], env={"SLURM_GIVEN": "1"}).stdout.splitlines()
    assert {"SLURM_GIVEN=1", "OF_THE_CALLER=yes"} <= set(printed) and not any(
        "of-another" in line for line in printed
    )


def test_a_failure_is_told_with_what_was_printed(cluster, shared):
    with pytest.raises(
        ClusterError,
        match=r"^sbatch -p absent --wrap=true ended with 1\.\nsbatch: error: invalid partition",
    ):
        cluster.run(["sbatch", "-p", "absent", "--wrap=true"])
    job, log = submit(cluster, shared, "endless", "echo the last words; sleep 100", "-N1")
    cluster.wait_for(prints(log, "the last words"), 200, "the job is to start")
    with pytest.raises(
        AssertionError,
        match=r"(?s)is RUNNING, not COMPLETED, after 0 s.*NumNodes=1.*the last words.*slurmctld.log",
    ):
        cluster.wait(job, 0, until="COMPLETED")
    cluster.run(["scancel", job])
    assert cluster.wait(job, 200) == "CANCELLED"


def test_an_urgent_job_warns_and_requeues_another(cluster, shared):
    body = "trap 'echo warned' USR1; echo running; sleep 100 & wait; wait; wait"
    job, log = submit(
        cluster,
        shared,
        "warned",
        body,
        "-N2",
        "--gpus-per-node=2",
        "--signal=B:USR1@30",
        "--requeue",
    )
    cluster.wait_for(prints(log, "running"), 200, "the job is to run")
    urgent, _ = submit(
        cluster, shared, "urgent", "true", "-N2", "--gpus-per-node=2", "-p", "urgent"
    )
    assert cluster.wait(urgent, 200) == "COMPLETED"
    assert prints(log, "warned")() and cluster.job(job)["Restarts"] == "1"
    cluster.run(["scancel", job])
    assert cluster.wait(job, 200) == "CANCELLED"


def test_a_job_is_requeued_when_a_node_is_lost_and_runs_when_it_is_back(cluster, shared):
    body = '[ -n "$SLURM_RESTART_COUNT" ] && exit; srun sh -c "echo running; sleep 100"'
    job, log = submit(cluster, shared, "lost", body, "-N2", "--gpus-per-node=2", "--requeue")
    # an srun that is still starting its tasks fails at once, and the job with it
    cluster.wait_for(prints(log, "running", 2), 200, "the tasks are to run")
    cluster.power_off("n2")
    with pytest.raises(ClusterError, match="node n2 is powered off"):
        cluster.on("n2", ["true"])
    cluster.wait_for(
        lambda: cluster.job(job)["Restarts"] == "1", 200, "Slurm is to requeue the job"
    )
    assert "DOWN" in cluster.run(["scontrol", "show", "node", "n2"]).stdout
    cluster.boot("n2")
    assert (
        cluster.on("n2", ["hostname"]).stdout == "n2\n"
        and cluster.on("n1", ["ls", "/tmp"]).stdout.split().count("of-n1") == 1
    )
    assert cluster.wait(job, 200) == "COMPLETED"


def test_from_a_shell_and_nothing_stays_but_the_folder(tmp_path):
    def seen() -> tuple[str, str]:
        return Path("/proc/mounts").read_text(), subprocess.run(
            ["ip", "-o", "link"], capture_output=True, text=True, check=True
        ).stdout

    folder, before = tmp_path / "shell", seen()
    assert tool("up", folder, "--nodes", 1, "--gpus", 0).returncode == 0
    assert (
        tool("run", folder, "sbatch", "-N1", "-o", "/dev/null", "--wrap", "sleep 100").stdout
        == "Submitted batch job 1\n"
    )
    assert (
        tool("on", folder, "n1", "hostname").stdout == "n1\n"
        and tool("run", folder, "--", "sh", "-c", "exit 7").returncode == 7
    )
    assert tool("power-off", folder, "n1").returncode == 0
    off = tool("on", folder, "n1", "hostname")
    assert (off.returncode, off.stderr) == (1, "minicluster: node n1 is powered off.\n")
    assert tool("boot", folder, "n1").returncode == 0
    assert "already" in tool("up", folder).stderr
    assert len(processes_in(folder)) > 4
    assert tool("down", folder).returncode == 0
    assert not processes_in(folder) and seen() == before
    assert (
        tool("down", folder).returncode == 0
        and tool("run", folder, "true").stderr == f"minicluster: no cluster is up in {folder}.\n"
    )
    assert not any(Process(*process).alive() for process in _recorded(folder))


def _recorded(folder: Path) -> list[list[int]]:
    state = json.loads((folder / "cluster.json").read_text())
    return [state["init"], state["holder"]] + [
        process for node in state["nodes"].values() for process in node.values()
    ]


def test_a_cluster_ends_with_its_owner(tmp_path):
    program = f"""
import time
from tests.slurm.minicluster import Cluster
Cluster({str(tmp_path / "owned")!r}, nodes=1).up()
print("up", flush=True)
time.sleep(1000)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout.readline() == "up\n" and processes_in(tmp_path)
        os.kill(owner.pid, signal.SIGKILL)
        gone(tmp_path, 5)


def test_a_machine_without_slurm_or_root_says_so(monkeypatch):
    monkeypatch.setattr(
        "tests.slurm.minicluster.shutil.which",
        lambda program, path: None if "slurm" in program else program,
    )
    assert (
        why_not.__wrapped__()
        == "a test cluster needs slurmctld, slurmd: apt-get install slurmctld slurmd."
    )
    monkeypatch.setattr("tests.slurm.minicluster.os.geteuid", lambda: 1000)
    assert why_not.__wrapped__() == "a test cluster needs root, to make namespaces."


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "log").mkdir()
    with pytest.raises(ClusterError, match="holds something else than a cluster"):
        Cluster(tmp_path).up()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ClusterError, match="is not a folder"):
        Cluster(tmp_path / "new", shared=[tmp_path / "absent"]).up()
    with pytest.raises(ClusterError, match="which there is not"):
        Cluster(tmp_path / "new", owner=2**22 - 1).up()
    # and not that the folder is in use
    with pytest.raises(ClusterError, match="which there is not"):
        Cluster(tmp_path / "new", owner=2**22 - 1).up()
    with pytest.raises(ClusterError, match="at least one CPU"):
        Settings(cpus=0)
