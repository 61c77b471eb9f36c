"""A Slurm of its own for a test: hosts out of Linux namespaces, munge, slurmctld, slurmd.

Needs root, iproute2, util-linux and, on Debian,
`apt-get install --no-install-recommends slurmctld slurmd slurm-client munge`. Each host has an own
address, processes and /tmp, so that `ray stop` at the end of a job ends the Ray of its host alone;
the disk is shared, as a laboratory's is. Nothing leaves the machine.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

NETWORK = "10.79.0"
BRIDGE = "beit-slurm"
REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
# As a site sets it, but for the times: a requeued job begins after `cred_expire` seconds.
CONFIG = """
ClusterName=beit
SlurmctldHost=node1({network}.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=10
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/cgroup
TaskPlugin=task/affinity
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
OverTimeLimit=0
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""
CGROUP_CONFIG = "CgroupPlugin=cgroup/v1\n"


class Slurm:
    """Two nodes or more, started by `started`."""

    def __init__(self, home: Path, count: int) -> None:
        self.home, self.count = home, count
        self.processes: list[subprocess.Popen[bytes]] = []
        self.inits: dict[int, int] = {}

    def run(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """A Slurm command on the first node; raises with what it printed when it fails."""
        variables = {
            "PATH": os.environ["PATH"],
            "SLURM_CONF": str(self.home / "slurm.conf"),
            **(environment or {}),
        }
        inside = ["nsenter", "--target", str(self.inits[1]), "--all"]
        done = subprocess.run(
            [*inside, *command], env=variables, text=True, capture_output=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}{self.logs()}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, CANCELLED, FAILED ... with its exit code."""
        said = self.run("scontrol", "show", "job", "--oneliner", job)
        fields = dict(field.split("=", 1) for field in said.split() if "=" in field)
        return f"{fields['JobState']} {fields['ExitCode']} restarts {fields['Restarts']}"

    def wait(self, job: str, *states: str, seconds: float) -> str:
        """The job's state as soon as it is one of these."""
        until = time.monotonic() + seconds
        while not (state := self.state(job)).startswith(states):
            if time.monotonic() > until:
                raise TimeoutError(f"job {job} is {state}, not {states}\n{self.logs()}")
            time.sleep(0.5)
        return state

    def log(self, job: str) -> str:
        """What a job has printed, to its last lines."""
        return (self.home / f"slurm-{job}.out").read_text()[-3000:]

    def logs(self) -> str:
        """The ends of all logs of the daemons."""
        texts = [f"{path.name}: {path.read_text()[-1500:]}" for path in self.home.glob("*.log")]
        return "\n".join(texts)

    def _start(self, node: int, *command: str) -> None:
        environment = {"PATH": os.environ["PATH"], "SLURM_CONF": str(self.home / "slurm.conf")}
        inside = ["nsenter", "--target", str(self.inits[node]), "--all"] if node else []
        log = (self.home / f"{Path(command[0]).name}-{node}.out").open("wb")
        self.processes.append(
            subprocess.Popen([*inside, *command], env=environment, stdout=log, stderr=log)
        )

    def _up(self) -> None:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("link", "set", BRIDGE, "up")
        nodes = []
        for node in range(1, self.count + 1):
            name = f"{BRIDGE}-{node}"
            _ip("netns", "add", name)
            _ip("link", "add", f"{BRIDGE}{node}", "type", "veth", "peer", "eth0", "netns", name)
            _ip("link", "set", f"{BRIDGE}{node}", "master", BRIDGE, "up")
            _ip("-n", name, "addr", "add", f"{NETWORK}.{node}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            self.inits[node] = self._host(node, name)
            nodes.append(f"NodeName=node{node} NodeAddr={NETWORK}.{node} CPUs={os.cpu_count()}")
        text = CONFIG.format(home=self.home, network=NETWORK, nodes="\n".join(nodes))
        (self.home / "slurm.conf").write_text(text)
        (self.home / "cgroup.conf").write_text(CGROUP_CONFIG)
        key = self.home / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._start(
            0, "munged", "--foreground", "--force", f"--socket={self.home}/munge.socket",
            f"--key-file={key}", f"--pid-file={self.home}/munged.pid",
            f"--log-file={self.home}/munged.log", f"--seed-file={self.home}/munge.seed",
        )  # fmt: skip
        _until((self.home / "munge.socket").exists, "munged", self)
        (self.home / "state").mkdir()
        self._start(1, "slurmctld", "-D")
        for node in self.inits:
            self._start(node, "slurmd", "-D", "-N", f"node{node}")
        _until(lambda: self._idle() == self.count, "nodes", self)

    def _host(self, node: int, network: str) -> int:
        """Starts a host's first process, which ends all others with it; returns its id here."""
        own = self.home / f"node{node}-tmp"
        (own / "home").mkdir(parents=True)
        hosts = self.home / "hosts"
        names = (f"{NETWORK}.{each} node{each}" for each in range(1, self.count + 1))
        hosts.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        # What lies in /tmp here and is to be seen there all the same.
        shown = [self.home, REPOSITORY, Path(sys.prefix)]
        places = {path: own / path.relative_to("/tmp") for path in shown if _in_tmp(path)}
        binds = [f"mkdir -p {at}; mount --bind {path} {at}" for path, at in places.items()]
        lines = [
            f"hostname node{node}; mount --make-rprivate /; mount --bind {hosts} /etc/hosts",
            *binds,
            f"mount -t tmpfs -o size=2g tmpfs /dev/shm; mount --rbind {own} /tmp",
            # The first process buries orphans, as an init does: `ray stop` waits for that.
            "mount -t proc proc /proc; touch /tmp/up; while :; do sleep 1000 & wait; done",
        ]
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{network}", "unshare", "--mount", "--pid", "--uts",
             "--ipc", "--fork", "--kill-child", "bash", "-c", "; ".join(lines)],
        )  # fmt: skip
        self.processes.append(process)
        _until((own / "up").exists, f"host {node}", self)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return int(children[0])

    def _idle(self) -> int:
        with contextlib.suppress(RuntimeError):
            return self.run("sinfo", "--noheader", "-N", "-o", "%t").split().count("idle")
        return 0

    def _down(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGKILL)
            process.wait()
        for node in range(1, self.count + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", f"{BRIDGE}-{node}")
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", BRIDGE)
        for left in Path("/sys/fs/cgroup/freezer").glob("slurm_node*"):
            subprocess.run(["find", left, "-depth", "-type", "d", "-delete"], check=False)


@contextlib.contextmanager
def started(home: Path, *, count: int) -> Iterator[Slurm]:
    """A Slurm of `count` nodes, which is gone afterwards."""
    slurm = Slurm(home, count)
    try:
        slurm._up()
        yield slurm
    finally:
        slurm._down()


def missing() -> list[str]:
    """Programs that are not here."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _in_tmp(path: Path) -> bool:
    return path.resolve().is_relative_to("/tmp")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _until(condition, what: str, slurm: Slurm) -> None:
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not there after 60 s\n{slurm.logs()}")
        time.sleep(0.2)
