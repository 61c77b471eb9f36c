"""Servers for tests that are really there: MLflow's own, over SQLite or PostgreSQL.

Each is a group of processes of this test's own; killing it kills all of them, as a machine dies.
"""

import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 240


class Server:
    """A server that may die and come back at the same port.

    `log` takes what it prints; `user` is who runs it, "" for who runs the tests.
    """

    def __init__(self, command: list[str], port: int, log: Path, *, user: str = "", **variables):
        self.command, self.port, self.log, self.user = command, port, log, user
        self.environment = {**os.environ, **variables}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log,
                start_new_session=True, **_as_user(self.user),
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.port):
            alive = self.process.poll() is None and time.monotonic() < deadline
            assert alive, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the whole group; back when the port is free, for its children die later."""
        if self.process is None:
            return
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        deadline = time.monotonic() + 60
        while answers(self.port):
            assert time.monotonic() < deadline, f"port {self.port} is still held"
            time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Started, and killed at the end."""
    try:
        server.start()
        yield server
    finally:
        server.kill()


def mlflow_server(directory: Path, store: str, artifacts: str, **variables: str) -> Server:
    """MLflow over a database (`store`) that hands files on to `artifacts`."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", store, "--artifacts-destination", artifacts,
    ]  # fmt: skip
    return Server(command, port, directory / "mlflow.log", **variables)


@contextmanager
def postgres_server() -> Iterator[str]:
    """An empty PostgreSQL of this test's own: its address as SQLAlchemy reads it."""
    # Below /tmp: the directories of pytest are closed to the user that it must run as.
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    user = _unprivileged()
    if user:
        shutil.chown(directory, user)
    port, data = free_port(), str(directory / "data")
    subprocess.run(
        [postgres_program("initdb"), "--pgdata", data, "--username", "mlflow", "--auth", "trust",
         "--no-sync"],
        check=True, capture_output=True, cwd="/", **_as_user(user),
    )  # fmt: skip
    command = [
        postgres_program("postgres"), "-D", data, "-p", str(port), "-k", str(directory),
        "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off",
    ]  # fmt: skip
    try:
        with running(Server(command, port, directory.with_suffix(".log"), user=user)):
            yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        directory.with_suffix(".log").unlink(missing_ok=True)


@functools.cache
def postgres_program(name: str) -> str:
    """Path of a program of PostgreSQL; "" where it is not installed."""
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(installed[-1]) if installed else "")


def _unprivileged() -> str:
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return ""
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _as_user(user: str) -> dict:
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
