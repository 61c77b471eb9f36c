"""A cluster as a team has one: Ray on a head and two workers, S3, MLflow on PostgreSQL, a client.

Every one of them is a host of its own (`hosts.py`). The client reaches the dashboard's port alone;
what a job needs beyond that it gets by `beit submit --env`.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cluster.hosts import Host, Network

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), Path())
START_SECONDS = 300
HOSTS = ("head", "cpu", "gpu", "store", "tracker", "client")
WORKERS = {"cpu": ("--num-cpus=2",), "gpu": ("--num-cpus=2", "--num-gpus=1")}

# What administrators set where Ray runs. A node that is gone is missed within seconds.
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "a-token-of-this-test-" + "0" * 32,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
}
# A user's shell: variables that `--env` names; nobody may read those that are secrets.
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "testsecret123",
    "MLFLOW_TRACKING_PASSWORD": "planted-geheim-1",
    "HF_TOKEN": "planted-geheim-2",
    "TEAM_API_KEY": "planted-geheim-3",
}
SHELL = SECRETS | {
    "MLFLOW_TRACKING_USERNAME": "anna",  # the server asks for nobody's name, and gets it
    "AWS_ACCESS_KEY_ID": "testkey",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": "http://store:9000",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # Ceph of Debian 12 knows no trailers
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "MLFLOW_TRACKING_URI": "http://tracker:5000",
}
NODE = ("--object-store-memory=100000000", "--disable-usage-stats")
HEAD = """
until "$@"; do ray stop --force; done
"""
# kubelet does the same: a node that was lost comes back as a new one.
WORKER = """
while :; do "$@"; ray stop --force; sleep 1; done
"""
TRACKER = """
as="setpriv --reuid=postgres --regid=postgres --clear-groups"
$as "$1/initdb" -D /tmp/pg -A trust --encoding=UTF8 --locale=C --no-sync
$as "$1/postgres" -D /tmp/pg -h 127.0.0.1 -k /tmp -c fsync=off &
until "$1/createdb" -h 127.0.0.1 -U postgres mlflow; do sleep 0.5; done
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
exec mlflow server --host 0.0.0.0 --port 5000 --workers 1 --allowed-hosts 'tracker:5000' \
  --backend-store-uri postgresql+psycopg://postgres@127.0.0.1/mlflow \
  --artifacts-destination s3://mlflow/artifacts
"""

GET = """
import sys, urllib.request
asked = urllib.request.Request(sys.argv[1], headers={"Authorization": f"Bearer {sys.argv[2]}"})
try:
    print(urllib.request.urlopen(asked, timeout=5).read().decode())
except OSError:
    pass
"""


def missing() -> str:
    """Which program of Debian's this machine lacks for all `HOSTS`; "": none."""
    programs = ("radosgw", "ceph-mon", "ceph-osd", "iptables")
    lacking = [name for name in programs if not shutil.which(name)]
    return ", ".join([*lacking, *([] if POSTGRES.name else ["postgresql"])])


class World:
    """The hosts with their services; everything answers."""

    def __init__(self, directory: Path, names: Sequence[str] = HOSTS) -> None:
        self.directory = directory
        self.network = Network(directory, names)
        self.hosts: dict[str, Host] = self.network.hosts
        path = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/bin"}
        self.here = {**path, "PYTHONPATH": str(REPOSITORY)}
        self.ray = {**path, **RAY}
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        """Nodes one after the other: Ray gives each 30 s to start, which a small machine needs."""
        head, store = self.hosts["head"], self.hosts["store"]
        store.serve("python", "-m", "tests.s3_server", store.address, 9000, env=self.here)
        started = head.serve(
            "bash", "-c", HEAD, "head", "ray", "start", "--head", "--port=6379", "--num-cpus=0",
            "--dashboard-host=0.0.0.0", f"--node-ip-address={head.address}", *NODE, env=self.ray,
        )  # fmt: skip
        self.wait(lambda: "up" in (self.directory / "store.log").read_text().split(), "the store")
        self.look(
            "import boto3; s3 = boto3.client('s3'); "
            "[s3.create_bucket(Bucket=name) for name in ('beit', 'mlflow')]"
        )
        started.wait(timeout=START_SECONDS)
        self._reach("http://head:8265/api/version")
        for count, name in enumerate(filter(self.hosts.get, WORKERS), start=2):
            self.add_worker(name)
            self.wait(lambda count=count: self.nodes() == count, name)
        if "tracker" in self.hosts:
            tracker = self.hosts["tracker"]
            tracker.serve("sh", "-c", TRACKER, "tracker", POSTGRES, env={**self.here, **SHELL})
            self._reach("http://tracker:5000/health")

    def fence_in(self) -> None:
        """From now on the client reaches port 8265 of the head, and itself."""
        for allowed in (
            ("--out-interface", "lo"),
            ("--protocol", "tcp", "--destination", self.hosts["head"].address, "--dport", "8265"),
        ):
            self.hosts["client"].run("iptables", "--append", "OUTPUT", *allowed, "--jump", "ACCEPT")
        self.hosts["client"].run("iptables", "--policy", "OUTPUT", "DROP")

    def add_worker(self, name: str) -> None:
        """Starts Ray on a host, again whenever it ends."""
        self.hosts[name].serve(
            "bash", "-c", WORKER, "worker", "ray", "start", "--address=head:6379", "--block",
            f"--node-ip-address={self.hosts[name].address}", *NODE, *WORKERS[name], env=self.ray,
        )  # fmt: skip

    def nodes(self) -> int:
        """Nodes of Ray that are alive; 0 if the head does not answer."""
        if not (answer := self._get("http://head:8265/api/v0/nodes")):
            return 0
        nodes = json.loads(answer)["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def _get(self, url: str) -> str:
        """What the head gets from there; "" if nothing answers."""
        return self.hosts["head"].run(
            "python", "-c", GET, url, RAY["RAY_AUTH_TOKEN"], env=self.here
        )

    def _reach(self, url: str) -> None:
        self.wait(lambda: self._get(url) != "", url)

    @staticmethod
    def wait(until: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Waits for it. Raises AssertionError where it does not come."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
            time.sleep(0.5)

    def look(self, code: str) -> str:
        """What a few lines of Python print that see the store and the server."""
        return self.hosts["store"].run("python", "-c", code, env={**self.here, **SHELL})

    def beit(self, *command: str, log: Path) -> subprocess.Popen:
        """Starts `beit` on the client; it prints to `log`."""
        environment = {
            **self.here, **SHELL, "RAY_AUTH_TOKEN": RAY["RAY_AUTH_TOKEN"],
            "RAY_API_SERVER_ADDRESS": "http://head:8265",
        }  # fmt: skip
        with log.open("ab") as file:
            return self.hosts["client"].start(
                "python", "-u", "-m", "jobs", *command, env=environment, stdout=file, stderr=file
            )

    def submit(self, stage: str, flags: Sequence[str], log: Path) -> subprocess.Popen:
        """Starts `beit submit` on the client."""
        named = [word for name in SHELL for word in ("--env", name)]
        return self.beit("submit", stage, *named, "--", *flags, log=log)

    def running(self) -> set[str]:
        """What runs where Ray is, by kind: the beginnings of command lines, without numbers."""
        lines = [
            line for name in ("head", *filter(self.hosts.get, WORKERS))
            for line in self.hosts[name].processes().values()
        ]  # fmt: skip
        return {re.sub(r"[.\d]+", "", " ".join(line.split()[:4])) for line in lines if line}

    def drivers(self) -> list[int]:
        """Process ids of the drivers of jobs."""
        return self._jobs("head")

    def clients(self) -> list[int]:
        """Process ids of the submissions that follow a job."""
        return self._jobs("client")

    def _jobs(self, host: str) -> list[int]:
        found = self.hosts[host].processes()
        return [
            pid for pid, line in found.items() if line.startswith("python") and " -m jobs " in line
        ]

    def close(self) -> None:
        """Ends everything."""
        self.network.close()
