"""`beit ui`: MLflow's pages of the runs in a store of this machine, opened at the table of runs."""

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from jobs.command import exit_code
from jobs.environment import prepare_environment
from jobs.interrupts import terminated_as_interrupted
from pipelines.errors import StageFailed

END_SECONDS = 10.0


def main(argv: Sequence[str]) -> int:
    """Serves the store until Ctrl-C, SIGTERM or a closed terminal, each with exit code 0."""
    parser = argparse.ArgumentParser(prog="beit ui", description=__doc__)
    parser.add_argument("--uri", default="", help="sqlite:///file.db; default: mlflow.db here")
    parser.add_argument("--experiment", default="beit")
    parser.add_argument("--port", type=int, default=5000)
    arguments = parser.parse_args(argv)
    with terminated_as_interrupted(signal.SIGHUP):
        return exit_code(lambda _: _serve(arguments.uri, arguments.experiment, arguments.port))


def _serve(uri: str, experiment: str, port: int) -> None:
    prepare_environment()
    from pipelines.config.tracking import TrackingConfig
    from pipelines.tracking import store
    from pipelines.tracking.table import save_views, view_link

    tracking_uri = store.absolute_tracking_uri(uri)
    store.quiet_mlflow()
    client = store.connect(tracking_uri)
    number = store.experiment_id(client, TrackingConfig(experiment=experiment), tracking_uri)
    save_views(client, number)
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri,
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    serve(command, port, f"Open {view_link(f'http://127.0.0.1:{port}', number)}")


def serve(command: Sequence[str], port: int, invitation: str) -> None:
    """Runs a server until it or this process is ended, and ends all of its processes then.

    Raises:
        StageFailed: the server ended by itself.
    """
    print(f"starting MLflow's server on port {port}", file=sys.stderr, flush=True)
    server = subprocess.Popen(command)  # of this group: who kills the group ends it, too
    try:
        while server.poll() is None and not _answers(port):
            time.sleep(0.2)
        if server.poll() is None:  # below what the server says of itself, with its own address
            print(f"{invitation} (Ctrl-C ends the server)", file=sys.stderr, flush=True)
        if code := server.wait():
            raise StageFailed(f"MLflow's server ended with code {code}; what it said stands above")
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        _end(server)
    print("the server has ended", file=sys.stderr, flush=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(server: subprocess.Popen) -> None:
    """Ends the server and its children: ended alone, it leaves them behind."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(server.pid)
        family = [parent, *parent.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(family, timeout=END_SECONDS)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    server.wait()


if __name__ == "__main__":
    from jobs.cli import main as beit

    sys.exit(beit(["ui", *sys.argv[1:]]))
