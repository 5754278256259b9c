"""A real Slurm on this machine: munged, slurmctld and three slurmd on loopback, in a folder of their own.

    with SlurmCluster(folder) as cluster:
        cluster.sbatch("script.sbatch")

Nothing of a Slurm that the machine may have is read or touched: every command finds the cluster through
SLURM_CONF, the daemons listen on ports that were free, and only the processes started here are stopped.
"""

import contextlib
import ctypes
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

# Names that every resolver knows: 127.0.0.2 and so on, as the C library reads numbers. The third is a spare.
NODES = ("0x7f000002", "0x7f000003", "0x7f000004")
NEEDED = ("sbatch", "slurmctld", "slurmd", "munged")
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
# cred_expire: a requeued job may not start again before its old credential has expired (two minutes
# otherwise). MessageTimeout: on a busy machine an answer takes longer than ten seconds.
CONF = """
ClusterName=ramoe
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MessageTimeout=100
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
KillWait=20
MinJobAge=3600
SlurmdTimeout=8
SlurmctldTimeout=30
InactiveLimit=0
ReturnToService=2
NodeName=0x7f00000[2-4] NodeHostname=localhost NodeAddr=127.0.0.[2-4] Port=[{ports[1]}-{ports[3]}] \
CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> list[str]:
    """The programs of Slurm and munge that are not there."""
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    return [name for name in NEEDED if shutil.which(name, path=places) is None]


class SlurmCluster:
    """The nodes of `NODES`, each with as many CPUs as `cpus`, in the partition `cpu`."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self.folder, self.cpus = folder, cpus
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "PATH": os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(parents=True)
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        for path in (munge, munge / "key"):
            os.chown(path, _user("munge"), -1)
        munge.chmod(0o755)
        for parent in munge.parents:  # pytest's folders are closed to others, and munged runs as its own user
            if os.stat(parent).st_uid == os.getuid() and parent != Path("/"):
                parent.chmod(os.stat(parent).st_mode | 0o011)
        (self.folder / "slurm.conf").write_text(
            CONF.format(folder=self.folder, ports=_ports(), cpus=self.cpus)
        )
        words = ["munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key"]
        words += [f"--log-file={munge}/log", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"]
        self._run("munged", words, user=_user("munge"))
        wait_for(lambda: (munge / "socket").exists(), 20, "munged's socket")
        self._run("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: set(self.states().values()) == {"idle"}, 60, "idle nodes", self.log)

    def start_node(self, node: str) -> None:
        """Start (again) a node's slurmd."""
        self._run(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """Lose a node: kill its slurmd and everything that runs on it with -9, all together."""
        for leader in (self._processes.pop(node).pid, *self.step_daemons(node)):
            kill_tree(leader)

    def step_daemons(self, node: str) -> list[int]:
        """The slurmstepd of a node, found by its spool folder or name in the environment or the arguments."""
        found = []
        for process, command in processes():
            if "slurmstepd" in command and f"SLURMD_NODENAME={node}" in environment_of_children(process):
                found.append(process)
        return found

    def states(self) -> dict[str, str]:
        """Node -> state, without Slurm's marks (`*`: does not answer)."""
        said = self.call("sinfo", "--noheader", "--Node", "--format=%N %T")
        return {name: state for name, state in (line.split() for line in said.splitlines() if line.strip())}

    def call(self, *words: str, check: bool = True, **more: str) -> str:
        """What a Slurm command says."""
        done = subprocess.run(
            words, env=self.environment | more, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}\n{self.log()}")
        return done.stdout

    def sbatch(self, *words: str, **more: str) -> int:
        """Submit; the job's id."""
        return int(self.call("sbatch", "--parsable", *words, **more).split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` tells, key -> value."""
        return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", self.call("scontrol", "show", "job", str(number))))

    def state(self, number: int) -> str:
        """The job's state, such as RUNNING."""
        return self.job(number)["JobState"]

    def wait(self, *numbers: int, seconds: float = 900) -> list[str]:
        """Wait until the jobs have ended; their states."""
        wait_for(
            lambda: all(self.state(number) in ENDED for number in numbers),
            seconds,
            f"the end of jobs {numbers}",
            self.log,
        )
        return [self.state(number) for number in numbers]

    def log(self) -> str:
        """The end of each daemon's log, for a failed test."""
        logs = [self.folder / f"{name}.log" for name in ("slurmctld", *NODES)]
        return "\n".join(
            f"{path.name}:\n" + "\n".join(path.read_text().splitlines()[-15:])
            for path in logs
            if path.exists()
        )

    def stop(self) -> None:
        """Cancel the jobs and end every process that was started here, those of jobs too."""
        with contextlib.suppress(Exception):
            self.call("scancel", "--user=root", "--signal=KILL", check=False)
            wait_for(lambda: not self.call("squeue", "--noheader").strip(), 15, "an empty queue")
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                process.kill()
                process.wait()
        self._processes = {}
        for process, _ in processes():
            if f"SLURM_CONF={self.environment['SLURM_CONF']}" in environment_of(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _run(self, name: str, words: list[str], user: int | None = None) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, user=user,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )  # fmt: skip


def end_with_parent() -> None:
    """In a child: SIGTERM when the tests' process is killed, so that no daemon outlives it (Linux, prctl)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_for(
    condition: Callable[[], object], seconds: float, what: str, log: Callable[[], str] | None = None
) -> None:
    """Poll until `condition()` holds; RuntimeError with `log()` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds:.0f} s for {what}\n{log() if log else ''}")
        time.sleep(0.3)


def kill_tree(process: int) -> None:
    """SIGKILL to a process and all that descends from it, children first found."""
    tree, parents = [process], {}
    for child, _ in processes():
        with contextlib.suppress(OSError, IndexError):
            parents[child] = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    for member in tree:
        tree += [child for child, parent in parents.items() if parent == member]
    for member in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def processes() -> Iterator[tuple[int, str]]:
    """(process id, command line) of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield (
                int(folder.name),
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
            )


def environment_of(process: int) -> set[str]:
    """NAME=VALUE of a process, empty once it is gone."""
    try:
        return set(Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0"))
    except OSError:
        return set()


def environment_of_children(process: int) -> set[str]:
    """NAME=VALUE of a process's children, taken together."""
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{process}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return set()
    return set().union(*(environment_of(child) for child in children))


def _user(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _ports() -> list[int]:
    """A free port for slurmctld and three that follow each other for the nodes (Slurm wants a range)."""
    for first in range(21001, 31001, 7):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + 4):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return list(range(first, first + 4))
    raise RuntimeError("no four free ports in a row")
