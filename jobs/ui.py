"""`beit ui`: MLflow's pages of the runs in a store of this machine, opened at the table of runs."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from jobs.command import exit_code
from jobs.environment import prepare_environment


def main(argv: Sequence[str]) -> int:
    """Serves the store until Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(prog="beit ui", description=__doc__)
    parser.add_argument("--uri", default="", help="sqlite:///file.db; default: mlflow.db here")
    parser.add_argument("--experiment", default="beit")
    parser.add_argument("--port", type=int, default=5000)
    arguments = parser.parse_args(argv)
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
    address = f"http://127.0.0.1:{port}"
    print(f"Open {view_link(address, number)} (Ctrl-C ends the server)", file=sys.stderr)
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri,
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    subprocess.run(command, env=dict(os.environ), check=True)
