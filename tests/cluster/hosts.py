"""Several hosts out of one machine: Linux namespaces on a switch. Needs root and iproute2.

A host has an address, processes, a name, /tmp, /dev/shm and HOME of its own; the rest of the disk
is this machine's. The switch is a namespace, too, so nothing of it is seen outside, and all of it
is gone with the process that made it.
"""

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Ends with the process that started it, also if that is killed. Hears Ctrl-C, also where a shell
# started the tests in the background, with SIGINT ignored.
BOUND = ("env", "--default-signal=INT", "setpriv", "--pdeathsig", "KILL")
INIT = """
set -e
hostname "$1"; mount --make-rprivate /
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --bind "$2/$1" /tmp
mount -t proc proc /proc
ip link set lo up
echo up
sleep infinity & wait  # as an init does it: bash buries those whose parent is gone
"""
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
SECONDS = 300  # no command here takes as long
REACH = """
import socket, sys
open(sys.argv[1]).close()
try:
    socket.create_connection(("b", 9), timeout=10)
except ConnectionRefusedError:
    pass  # it is there, and nothing listens
"""


def why_not() -> str:
    """Why this machine cannot be several hosts; "" where it can: two are made, and one asked.

    It is asked for Python, for this checkout and for the other host, by its name.
    """
    if os.geteuid():
        return "hosts of namespaces need root"
    with tempfile.TemporaryDirectory() as directory:
        try:
            network = Network(Path(directory), ["a", "b"])
            try:
                network.hosts["a"].run(sys.executable, "-c", REACH, __file__)
            finally:
                network.close()
        except (OSError, AssertionError, subprocess.TimeoutExpired) as error:
            return f"no hosts of namespaces here: {str(error).strip().splitlines()[-1]}"
    return ""


class Network:
    """A switch, and the hosts on it: `NAME` has the address 10.77.0.N, in the order given."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory = directory
        self.addresses = {name: f"10.77.0.{n}" for n, name in enumerate(names, start=1)}
        lines = [f"{address} {name}\n" for name, address in self.addresses.items()]
        (directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        self.hosts = {name: Host(self, name) for name in names}
        self.switch = _namespace("--net", command=["sh", "-c", "echo up; exec sleep infinity"])
        try:
            self.ip("link", "add", "name", "switch", "type", "bridge")
            self.ip("link", "set", "switch", "up")
            for host in self.hosts.values():
                host.on()
        except BaseException:
            self.close()
            raise

    def ip(self, *command: str) -> None:
        """Runs `ip` in the switch."""
        inside = ["nsenter", "--net", f"--target={self.switch.pid}", "ip", *command]
        _printed(subprocess.Popen(inside, **PIPES), inside)

    def close(self) -> None:
        """Ends every host."""
        for host in self.hosts.values():
            host.off()
        _end(self.switch)


class Host:
    """One host: off at first."""

    init: subprocess.Popen | None = None

    def __init__(self, network: Network, name: str) -> None:
        self.network, self.name, self.address = network, name, network.addresses[name]
        self.directory = network.directory / name
        self.directory.mkdir(exist_ok=True)
        self.directory.chmod(0o1777)

    def on(self) -> None:
        """Switches the host on: a new one, with what was on its disk."""
        name, network = self.name, self.network
        self.init = _namespace(
            "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child",
            command=["bash", "-c", INIT, "init", name, str(network.directory)],
        )  # fmt: skip
        children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text()
        self.pid = int(children)
        network.ip(
            "link",
            "add",
            "name",
            name,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(self.pid),
        )
        network.ip("link", "set", "dev", name, "master", "switch", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def start(
        self, *command: object, env: dict[str, str] | None = None, **options
    ) -> subprocess.Popen:
        """Starts a command on the host. It inherits no variable of this process but PATH."""
        return subprocess.Popen(
            [*BOUND, "nsenter", f"--target={self.pid}", "--all", *map(str, command)],
            env={"PATH": os.environ["PATH"], "HOME": "/tmp", **(env or {})}, cwd="/", **options,
        )  # fmt: skip

    def serve(self, *command: object, env: dict[str, str] | None = None) -> subprocess.Popen:
        """Starts a service; what it prints is in `NAME.log` of the network's directory."""
        with (self.network.directory / f"{self.name}.log").open("ab") as log:
            return self.start(*command, env=env, stdout=log, stderr=log)

    def run(self, *command: object, env: dict[str, str] | None = None) -> str:
        """Runs a command on the host; returns what it prints."""
        return _printed(self.start(*command, env=env, **PIPES), [self.name, *map(str, command)])

    def processes(self) -> dict[int, str]:
        """Command lines of all that runs on the host, by the process id outside of it."""
        mine, found = Path(f"/proc/{self.pid}/ns/pid").readlink(), {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "ns/pid").readlink() == mine and int(entry.name) != self.pid:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    found[int(entry.name)] = b" ".join(words).decode(errors="replace").strip()
            except OSError:  # it has ended
                continue
        return found

    def cut(self) -> None:
        """Pulls the cable."""
        self.network.ip("link", "set", "dev", self.name, "down")

    def heal(self) -> None:
        """Puts the cable back."""
        self.network.ip("link", "set", "dev", self.name, "up")

    def off(self) -> None:
        """Switches the host off: everything on it is gone at once."""
        if self.init:
            _end(self.init)


def _namespace(*kinds: str, command: Sequence[str]) -> subprocess.Popen:
    """A process that holds new namespaces, once it stands. Raises AssertionError if it does not."""
    process = subprocess.Popen([*BOUND, "unshare", *kinds, *command], **PIPES)
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], SECONDS)
    if not ready or process.stdout.readline() != "up\n":
        process.kill()
        _, errors = process.communicate(timeout=SECONDS)
        raise AssertionError(f"{' '.join(kinds)}: {errors}")
    return process


def _printed(process: subprocess.Popen, command: Sequence[str]) -> str:
    """What a process prints until it ends. Raises AssertionError or TimeoutExpired."""
    try:
        out, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        _end(process)
        raise
    assert process.returncode == 0, (
        f"{' '.join(command)}: exit code {process.returncode}. {errors[-3000:]}"
    )
    return out


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait(timeout=SECONDS)
