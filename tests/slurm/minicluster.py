"""A real, throw-away Slurm cluster on one machine, to test batch scripts on.

    python3 -m tests.slurm.minicluster up DIR [--nodes 2 --gpus 2 --shared FOLDER --owner PID ...]
    python3 -m tests.slurm.minicluster run DIR sbatch job.sh        on the login node, hostname ctl
    python3 -m tests.slurm.minicluster on DIR n2 nproc              inside a compute node
    python3 -m tests.slurm.minicluster power-off DIR n2             everything on it dies, its network is silent
    python3 -m tests.slurm.minicluster boot DIR n2
    python3 -m tests.slurm.minicluster down DIR

`up` returns when the nodes are ready, in about a second. The cluster stays until `down`, or until the process named by
--owner ends, however it ends. In Python, `with Cluster(folder) as cluster:` does both; this process is the owner then.

Needs Linux, root, and Debian's packages slurmctld slurmd slurm-client munge iproute2 util-linux; of Python, its
standard library only. The controller and every node have pid, mount, network, uts and ipc namespaces of their own,
those of the nodes inside those of the controller. So nodes have real hostnames (n1, n2, ...) and addresses, two of them
may listen on one port, nothing is listened on or mounted on the machine itself, and the end of one process, the
controller's pid 1, is the end of all. On one host without namespaces, names that do not resolve and folders that are
not shared go unnoticed.

What a node sees of the disk: all of the machine's, but a /tmp and a /dev/shm of its own, empty at each boot. Shared on
top of these are DIR and the folders declared shared. The login node has the machine's /tmp. There is no way to the
outside network. Jobs run as root. The GPUs are /dev/null under other names: Slurm counts them and sets
CUDA_VISIBLE_DEVICES, programs find none.

Partitions: gpu (the default), urgent (its jobs requeue those of the others if they need the room) and cpu.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, NoReturn

TERMINAL = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "TIMEOUT",
    }
)

# program -> Debian's package
_PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
    "env": "coreutils",
}
# root's PATH lacks the sbin folders in some shells
_PATH = os.pathsep.join(
    [os.environ.get("PATH", "/usr/bin:/bin"), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)
_UNSHARE = [
    "unshare",
    "--mount",
    "--net",
    "--uts",
    "--ipc",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
# what would turn a job of the caller's own cluster, in which the tests may run, into options of this one
_FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_")
_NETWORK = "10.77.0"
_CONTROLLER = f"{_NETWORK}.254"
# Where the cluster sees its own files. A fixed short path, because a unix socket's may have 107 characters and pytest's
# folders are long, and because munged wants folders that everybody may walk, which pytest's are not.
_RUN = "/run/minicluster"
# by which a folder is known to be a cluster's, and so may be written anew
_FIRST_LINE = "ClusterName=minicluster"


class ClusterError(RuntimeError):
    """The cluster could not be had, or a command on it failed: one sentence, then what there is to see."""


@functools.cache
def why_not() -> str | None:
    """One sentence on why this machine cannot host a cluster, or None if it can."""
    if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
        return "a test cluster needs Linux 5.3 or newer, and a Python that knows pidfd_open."
    if os.geteuid() != 0:
        return "a test cluster needs root, to make namespaces."
    missing = [program for program in _PROGRAMS if shutil.which(program, path=_PATH) is None]
    if missing:
        packages = " ".join(sorted({_PROGRAMS[program] for program in missing}))
        return f"a test cluster needs {', '.join(missing)}: apt-get install {packages}."
    if not Path("/etc/slurm").is_dir():
        return "a test cluster needs the folder /etc/slurm (it may be empty) to mount its configuration on."
    trial = "ip link add trial type bridge && ip link add one type veth peer name two && mount -t tmpfs trial /tmp"
    tried = subprocess.run(
        [*_UNSHARE, "sh", "-c", trial],
        env={"PATH": _PATH},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return (
            "a test cluster needs namespaces, a bridge and mounts, which are refused here: "
            f"{' '.join(tried.stderr.split())}"
        )
    return None


@dataclass(frozen=True)
class Settings:
    """What a cluster is made of; times in seconds, short because tests wait for them."""

    nodes: int = 2
    gpus: int = 2  # per node
    cpus: int = 16  # per node, whatever the machine has
    slurmd_timeout: int = 10  # silence after which a node counts as lost
    kill_wait: int = 5  # between SIGTERM and SIGKILL
    grace: int = 30  # what partition urgent leaves a job of partition gpu
    min_job_age: int = 86400  # for which a finished job stays known
    cred_expire: int = 5  # also what a requeued job waits before it starts again
    first_job_id: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 99 or not 0 <= self.gpus <= 99 or self.cpus < 1:
            raise ClusterError(
                "a test cluster has 1 to 99 nodes, with 0 to 99 GPUs and at least one CPU each."
            )

    @property
    def names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def hosts(self) -> str:
        lines = ["127.0.0.1 localhost", f"{_CONTROLLER} ctl"] + [
            f"{_address(name)} {name}" for name in self.names
        ]
        return "\n".join(lines) + "\n"

    def gres(self) -> str:
        return (
            f"NodeName=n[1-{self.nodes}] Name=gpu File={_RUN}/gpu[0-{self.gpus - 1}]\n"
            if self.gpus
            else ""
        )

    def slurm(self) -> str:
        gres = f"Gres=gpu:{self.gpus}" if self.gpus else ""
        return f"""\
{_FIRST_LINE}
SlurmctldHost=ctl({_CONTROLLER})
SlurmUser=root
SlurmdUser=root
FirstJobId={self.first_job_id}
AuthType=auth/munge
AuthInfo=socket={_RUN}/munge.sock,cred_expire={self.cred_expire}
CredType=cred/munge
StateSaveLocation={_RUN}/home/state
SlurmdSpoolDir={_RUN}/spool/%n
SlurmctldPidFile={_RUN}/slurmctld.pid
SlurmdPidFile={_RUN}/slurmd.%n.pid
SlurmctldLogFile={_RUN}/home/log/slurmctld.log
SlurmdLogFile={_RUN}/home/log/slurmd.%n.log
# neither cgroups nor systemd are to be had everywhere
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# the CPUs and the memory are what this file says, not what the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={_RUN}/home/log/jobcomp.txt
# a node that comes back is used again
ReturnToService=2
SlurmdTimeout={self.slurmd_timeout}
KillWait={self.kill_wait}
MinJobAge={self.min_job_age}
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
UnkillableStepTimeout=20
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n[1-{self.nodes}] NodeAddr={_NETWORK}.[1-{self.nodes}] CPUs={self.cpus} RealMemory=256000 {gres}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={self.grace} State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 State=UP
PartitionName=cpu Nodes=ALL MaxTime=INFINITE PriorityTier=1 State=UP
"""


class Process(NamedTuple):
    """A process by its id and its start: ids are used again, and what is killed here is killed as root."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        stat = _stat(pid)
        if stat is None:
            raise ClusterError(f"process {pid} ended as soon as it was started.")
        return cls(pid, int(stat[19]))

    def alive(self) -> bool:
        stat = _stat(self.pid)
        return stat is not None and stat[0] != "Z" and int(stat[19]) == self.started

    def kill(self) -> None:
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)


class Cluster:
    """A cluster in a folder, which also keeps its logs and, in cluster.json, what there is to know of its processes.

    The file rather than this object is the truth about what runs, so that a shell may power off a
    node of a test's cluster.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shared: Sequence[Path] = (),
        owner: int | None = None,
        **settings: int,
    ):
        """See Settings; shared are folders below /tmp or /dev/shm that all nodes see; owner is the process with which
        the cluster ends, this one unless told otherwise.
        """
        self.folder = Path(folder).resolve()
        self.settings = Settings(**settings)
        self.shared = [Path(path).resolve() for path in shared]
        self.owner = os.getpid() if owner is None else owner
        self.log = self.folder / "log"
        self._holders: list[subprocess.Popen] = []  # our children, which nobody else can reap

    @classmethod
    def at(cls, folder: Path) -> Cluster:
        """The cluster which is up in this folder, whoever started it."""
        cluster = cls(folder)
        state = cluster._state()
        cluster.settings = Settings(**state["settings"])
        cluster.shared = [Path(path) for path in state["shared"]]
        return cluster

    def __enter__(self) -> Cluster:
        return self.up()

    def __exit__(self, *_) -> None:
        self.down()

    def up(self) -> Cluster:
        if reason := why_not():
            raise ClusterError(reason)
        for path in self.shared:
            if not path.is_dir():
                raise ClusterError(f"{path} is to be shared between the nodes but is not a folder.")
        self._prepare_folder()
        since = time.time()
        try:
            self._start_controller()
            for name in self.settings.names:
                self._start_node(name)
            self._wait_for_nodes(self.settings.names, since)
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """Power everything off. Only the folder remains; a cluster that is down already stays so."""
        file = self.folder / "cluster.json"
        if file.is_file():
            state = json.loads(file.read_text())
            Process(*state["init"]).kill()
            for holder in [state["holder"]] + [node["holder"] for node in state["nodes"].values()]:
                self._await_end(Process(*holder))
        for holder in self._holders:
            holder.kill()
            holder.wait()
        self._holders.clear()

    def run(
        self,
        command: Sequence[str | Path],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess:
        """Run a command on the login node, in the current folder unless told otherwise,
        and return what it printed, as text.

        It gets this process's environment without the variables that Slurm's commands read, and env. If check, a
        command that fails raises ClusterError.
        """
        return self._run(
            Process(*self._state()["init"]), command, cwd or Path.cwd(), env, check, timeout
        )

    def on(
        self,
        name: str,
        command: Sequence[str | Path],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess:
        """Run a command inside a compute node; in the current folder if the node sees it, or else in /."""
        init = self._node(name)
        return self._run(init, command, cwd or _folder_seen_by(init), env, check, timeout)

    def power_off(self, name: str) -> None:
        """All processes of a node die at once, and no connection of theirs is closed:
        others only hear nothing any more.
        """
        init, holder = self._node(name), Process(*self._state()["nodes"][name]["holder"])
        # first the cable, or the kernel would tell the other ends of the dying processes' connections
        self._setup(Process(*self._state()["init"]), f"ip link del v{name}")
        init.kill()
        self._await_end(holder)

    def boot(self, name: str) -> None:
        """Power a node on again; returns when Slurm knows that it is back."""
        state = self._state()
        if name not in state["nodes"]:
            raise ClusterError(f"there is no node {name}: {' '.join(state['nodes'])}.")
        if Process(*state["nodes"][name]["init"]).alive():
            raise ClusterError(f"node {name} is on already.")
        since = time.time()
        self._start_node(name)
        self._wait_for_nodes([name], since)

    def job(self, jobid: int | str) -> dict[str, str]:
        """All fields of one job, or of one task (ARRAYID_TASKID) of an array."""
        records = (
            self.run(["scontrol", "show", "job", "-o", str(jobid)]).stdout.strip().splitlines()
        )
        if len(records) != 1:
            raise ClusterError(
                f"job {jobid} is an array of {len(records)} records: name one of its tasks, as in {jobid}_0."
            )
        return _fields(records[0])

    def state(self, jobid: int | str) -> str:
        return self.job(jobid)["JobState"]

    def wait(
        self, jobid: int | str, seconds: float, until: Collection[str] | str = TERMINAL
    ) -> str:
        """Wait until the job is in (one of) these states, and return which; in time, or fail with what the logs say."""
        wanted = {until} if isinstance(until, str) else until
        deadline = time.monotonic() + seconds
        while (state := self.state(jobid)) not in wanted:
            if time.monotonic() > deadline:
                job = self.job(jobid)
                described = "\n".join(f"  {key}={value}" for key, value in job.items())
                raise AssertionError(
                    f"job {jobid} is {state}, not {' or '.join(sorted(wanted))}, after {seconds} s\n{described}\n"
                    f"{_tail(Path(job.get('StdOut', '/nowhere')))}\n{_tail(self.log / 'slurmctld.log')}"
                )
            time.sleep(0.5)
        return state

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{what}: not within {seconds} s\n{_tail(self.log / 'slurmctld.log')}"
                )
            time.sleep(0.2)

    def arguments(
        self, name: str | None, command: Sequence[str | Path], cwd: Path | None = None
    ) -> list[str]:
        """The command of this machine that runs a command on the login node, or on the node of this name."""
        if name is None:
            return _entered(Process(*self._state()["init"]), command, cwd or Path.cwd())
        return _entered(self._node(name), command, cwd or _folder_seen_by(self._node(name)))

    # how it is done

    def _prepare_folder(self) -> None:
        state, configuration = self.folder / "cluster.json", self.folder / "etc/slurm/slurm.conf"
        if state.is_file() and Process(*json.loads(state.read_text())["init"]).alive():
            raise ClusterError(f"a cluster is up in {self.folder} already.")
        if configuration.is_file() and configuration.read_text().startswith(_FIRST_LINE):
            # of an earlier cluster, or of one that did not come up
            state.unlink(missing_ok=True)
            for name in ("etc", "state", "log"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ClusterError(
                f"{self.folder} holds something else than a cluster: name a folder that is new or empty."
            )
        for name in ("etc/slurm", "state", "log"):
            (self.folder / name).mkdir(parents=True)
        configuration.write_text(self.settings.slurm())
        configuration.with_name("gres.conf").write_text(self.settings.gres())
        (self.folder / "etc/hosts").write_text(self.settings.hosts())

    def _start_controller(self) -> None:
        try:
            owner = os.pidfd_open(self.owner)
        except ProcessLookupError:
            raise ClusterError(
                f"the cluster is to end with process {self.owner}, which there is not."
            ) from None
        try:
            pid_1 = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), "_init", str(owner)]
            init, holder = self._hold("ctl", [*_UNSHARE, *pid_1], (owner,))
        finally:
            os.close(owner)
        shared = [str(path) for path in self.shared]
        self._save(
            {
                "init": init,
                "holder": holder,
                "nodes": {},
                "settings": asdict(self.settings),
                "shared": shared,
            }
        )
        folder = shlex.quote(str(self.folder))
        # Slurm sets CUDA_VISIBLE_DEVICES only if the files of the GPUs are devices
        self._setup(init, f"""
            hostname ctl
            mount --bind {folder}/etc/hosts /etc/hosts
            mount --bind {folder}/etc/slurm /etc/slurm
            mount -t tmpfs -o mode=755 tmpfs /run
            mkdir -p {_RUN}/home {_RUN}/spool {_RUN}/new
            mount --bind {folder} {_RUN}/home
            for gpu in {" ".join(f"{_RUN}/gpu{number}" for number in range(self.settings.gpus))}; do
                touch $gpu
                mount --bind /dev/null $gpu
            done
            ip link set lo up
            ip link add cluster type bridge
            ip addr add {_CONTROLLER}/24 dev cluster
            ip link set cluster up
            (umask 077 && head -c 1024 /dev/urandom >{_RUN}/munge.key)
            munged --key-file={_RUN}/munge.key --socket={_RUN}/munge.sock --pid-file={_RUN}/munged.pid \
                --log-file={_RUN}/home/log/munged.log --seed-file={_RUN}/munge.seed --num-threads=2
            slurmctld -c -i
        """)  # fmt: skip

    def _start_node(self, name: str) -> None:
        controller = Process(*self._state()["init"])
        # orphans below a pid 1 that ignores SIGCHLD leave no zombies, for which Slurm would wait
        pid_1 = "trap '' CHLD; echo up; exec sleep infinity >/dev/null"
        init, holder = self._hold(name, [*_namespaces(controller), *_UNSHARE, "sh", "-c", pid_1])
        state = self._state()
        state["nodes"][name] = {"init": init, "holder": holder}
        self._save(state)
        # The address of the card stays the same over a reboot, as it does in life, or the others would talk to the old
        # one. The switch's end goes with the card, but some time after the last process of a node that died by itself.
        hardware = f"02:00:0a:4d:00:{_number(name):02x}"
        self._setup(controller, f"""
            ip link del v{name} 2>/dev/null || true
            ip link add v{name} type veth peer name eth0 address {hardware} netns {_pid_within(init.pid)}
            ip link set v{name} master cluster up
        """)  # fmt: skip
        lines = [
            f"hostname {name}",
            "ip link set lo up",
            f"ip addr add {_address(name)}/24 dev eth0",
            "ip link set eth0 up",
        ]
        for local in (Path("/tmp"), Path("/dev/shm")):
            # made aside and then moved there, since what is shared can no longer be seen below what covers it
            lines.append(f"mount -t tmpfs -o mode=1777 tmpfs {_RUN}/new")
            for path in sorted({self.folder, *self.shared}):
                if path.is_relative_to(local) and path != local:
                    inside = shlex.quote(f"{_RUN}/new/{path.relative_to(local)}")
                    lines += [
                        f"mkdir -p {inside}",
                        f"mount --bind {shlex.quote(str(path))} {inside}",
                    ]
            lines.append(f"mount --move {_RUN}/new {local}")
        self._setup(init, "\n".join([*lines, f"slurmd -N {name}"]))

    def _hold(
        self, name: str, command: list[str], descriptors: tuple[int, ...] = ()
    ) -> tuple[Process, Process]:
        """Start the pid 1 of new namespaces: itself, and the process of ours that ends when all in
        the namespaces has.
        """
        console = self.log / f"{name}.console"
        with console.open("wb") as errors:
            # a session of its own, so that Ctrl-C in a terminal ends the tests in order and not the cluster below them
            holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, cwd="/",
                                      env={"PATH": _PATH}, pass_fds=descriptors, start_new_session=True)  # fmt: skip
        self._holders = [other for other in self._holders if other.poll() is None] + [holder]
        with holder.stdout:
            if not holder.stdout.readline():
                raise ClusterError(f"{name} did not start.\n{_tail(console)}")
        pid = holder.pid
        while (child := _child(pid)) is not None:
            pid = child
        return Process.of(pid), Process.of(holder.pid)

    def _await_end(self, holder: Process) -> None:
        deadline = time.monotonic() + 30
        while holder.alive():
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"a process of the cluster in {self.folder} does not end, though killed 30 s ago."
                )
            time.sleep(0.01)

    def _setup(self, where: Process, script: str) -> None:
        """Run a script as root of one of the machines; its daemons get no more of our environment
        than they would at boot.
        """
        command = [*_namespaces(where), "sh", "-euc", script]
        # files rather than pipes: daemons keep them open
        with (self.log / "setup.log").open("ab") as log:
            done = subprocess.run(
                command,
                env={"PATH": _PATH},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if done.returncode:
            logs = "\n".join(map(_tail, [self.log / "setup.log", self.log / "slurmctld.log"]))
            raise ClusterError(f"the cluster in {self.folder} could not be set up.\n{logs}")

    def _run(self, where, command, cwd, env, check, timeout) -> subprocess.CompletedProcess:
        shown = shlex.join(map(str, command))
        try:
            done = subprocess.run(_entered(where, command, cwd), env=_environment(env), stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True, timeout=timeout)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{shown} did not end within {timeout} s.\n{_tail(self.log / 'slurmctld.log')}"
            ) from None
        if check and done.returncode:
            raise ClusterError(
                f"{shown} ended with {done.returncode}.\n{done.stdout}{done.stderr}".rstrip()
            )
        return done

    def _wait_for_nodes(self, names: list[str], since: float) -> None:
        def ready() -> bool:
            shown = self.run(
                ["scontrol", "show", "node", "-o"], cwd=Path("/"), check=False
            ).stdout.splitlines()
            nodes = {node["NodeName"]: node for node in map(_fields, shown) if "NodeName" in node}
            return set(names) <= nodes.keys() and all(_is_up(nodes[name], since) for name in names)

        try:
            self.wait_for(ready, 30, f"Slurm is to find {' '.join(names)} up")
        except AssertionError as error:
            logs = [self.log / "setup.log", *(self.log / f"slurmd.{name}.log" for name in names)]
            raise ClusterError("\n".join([str(error), *map(_tail, logs)])) from None

    def _state(self) -> dict:
        file = self.folder / "cluster.json"
        state = json.loads(file.read_text()) if file.is_file() else None
        if state is None or not Process(*state["init"]).alive():
            raise ClusterError(f"no cluster is up in {self.folder}.")
        return state

    def _save(self, state: dict) -> None:
        partial = self.folder / "cluster.json.partial"
        partial.write_text(json.dumps(state, indent=1))
        partial.replace(self.folder / "cluster.json")

    def _node(self, name: str) -> Process:
        nodes = self._state()["nodes"]
        if name not in nodes:
            raise ClusterError(f"there is no node {name}: {' '.join(nodes)}.")
        init = Process(*nodes[name]["init"])
        if not init.alive():
            raise ClusterError(f"node {name} is powered off.")
        return init


def _number(name: str) -> int:
    return int(name.removeprefix("n"))


def _address(name: str) -> str:
    return f"{_NETWORK}.{_number(name)}"


def _namespaces(init: Process) -> list[str]:
    return [
        "nsenter",
        "--target",
        str(init.pid),
        "--mount",
        "--uts",
        "--ipc",
        "--net",
        "--pid",
        "--",
    ]


def _entered(where: Process, command: Sequence[str | Path], cwd: Path) -> list[str]:
    # nsenter does not pass on its own death, as by a timeout, to what it started
    return [
        *_namespaces(where),
        "setpriv",
        "--pdeathsig",
        "KILL",
        "--",
        "env",
        f"--chdir={cwd}",
        "--",
        *map(str, command),
    ]


def _environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return (
        {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        | {"PATH": _PATH}
        | dict(extra or {})
    )


def _folder_seen_by(init: Process) -> Path:
    here = Path.cwd()
    return here if Path(f"/proc/{init.pid}/root{here}").is_dir() else Path("/")


def _stat(pid: int) -> list[str] | None:
    """The fields of a process after its name: its state first, its parent second, and its start as number 19."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _child(pid: int) -> int | None:
    for entry in Path("/proc").iterdir():
        if (
            entry.name.isdigit()
            and (stat := _stat(int(entry.name))) is not None
            and int(stat[1]) == pid
        ):
            return int(entry.name)
    return None


def _pid_within(pid: int) -> int:
    """The id of a node's pid 1 as the controller knows it: the last but one of its ids,
    from the outermost namespace inwards.
    """
    (line,) = re.findall(r"^NSpid:(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(line.split()[-2])


def _fields(record: str) -> dict[str, str]:
    """Of a line of scontrol show -o. A value may hold blanks, as in Comment=see the log, so only a Key= ends it."""
    parts = re.split(r"(?:^|\s)([A-Z][\w/:]*)=", record.strip())[1:]
    return {key: value.strip() for key, value in zip(parts[::2], parts[1::2], strict=True)}


def _is_up(node: dict[str, str], since: float) -> bool:
    """Whether Slurm heard of a slurmd started since then; before it notes that a node is lost,
    the state alone says nothing.
    """
    if (
        any(word in node["State"] for word in ("UNKNOWN", "DOWN", "NOT_RESPONDING"))
        or not node.get("SlurmdStartTime", "")[:1].isdigit()
    ):
        return False
    return datetime.fromisoformat(node["SlurmdStartTime"]).timestamp() >= int(since)


def _tail(path: Path, lines: int = 40) -> str:
    if not path.is_file():
        return f"--- {path} is not there"
    return "\n".join(
        [f"--- the end of {path}", *path.read_text(errors="replace").splitlines()[-lines:]]
    )


def _be_init(owner: int) -> None:
    """Pid 1 of the controller, with which all ends: it lasts as long as the process behind this descriptor."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so orphans leave no zombies
    print("up", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    select.select([owner], [], [])


def _arguments(argv: list[str]) -> argparse.Namespace:
    written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.slurm.minicluster", description=__doc__, formatter_class=written
    )
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("up")
    up.add_argument("folder", type=Path)
    for field in fields(Settings):
        up.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    up.add_argument(
        "--shared",
        type=Path,
        action="append",
        default=[],
        help="a folder below /tmp or /dev/shm that all nodes see",
    )
    up.add_argument(
        "--owner",
        type=int,
        default=1,
        help="the process with which the cluster ends (default: the machine's first)",
    )
    for action in ("run", "on", "power-off", "boot", "down"):
        sub = actions.add_parser(action)
        sub.add_argument("folder", type=Path)
        if action in ("on", "power-off", "boot"):
            sub.add_argument("node")
        if action in ("run", "on"):
            sub.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    if given.action in ("run", "on"):
        given.command = given.command[given.command[:1] == ["--"] :]
        if not given.command:
            parser.error(f"{given.action} needs a command.")
    return given


def _execute(command: list[str]) -> NoReturn:
    os.execvpe(command[0], command, _environment())


def main(argv: list[str]) -> None:
    if argv[:1] == ["_init"]:
        _be_init(int(argv[1]))
        return
    given = _arguments(argv)
    if given.action == "up":
        settings = {field.name: getattr(given, field.name) for field in fields(Settings)}
        cluster = Cluster(given.folder, shared=given.shared, owner=given.owner, **settings).up()
        print(
            f"{cluster.folder}: {' '.join(cluster.settings.names)} up, logs in {cluster.log}",
            flush=True,
        )
    elif given.action == "down":
        Cluster(given.folder).down()
    elif given.action == "run":
        _execute(Cluster.at(given.folder).arguments(None, given.command))
    elif given.action == "on":
        _execute(Cluster.at(given.folder).arguments(given.node, given.command))
    elif given.action == "power-off":
        Cluster.at(given.folder).power_off(given.node)
    else:
        Cluster.at(given.folder).boot(given.node)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ClusterError as error:
        sys.exit(f"minicluster: {error}")
