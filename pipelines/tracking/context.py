"""Who made a run: the version of the code, the machine, the libraries, the job."""

import importlib.metadata
import json
import socket
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

CODE_VERSION_FILE = "code_version.json"
"""In the package `pipelines`, where a copy of the code has left its repository."""
CHANGES = ("status", "--porcelain", "--untracked-files=no")


@lru_cache(maxsize=1)
def code_version() -> dict[str, str]:
    """Commit of the code that runs, and whether it was changed since; {} where nothing tells.

    MLflow's own look-up finds nothing where the program lies in a folder that git ignores, as
    `.venv/bin/beit` does.
    """
    package = Path(__file__).parents[1]
    told = package / CODE_VERSION_FILE
    if told.is_file():
        version: dict[str, str] = json.loads(told.read_text())
        return version
    # Not the repository that an installed copy happens to lie in: the one that knows this file.
    if _git(package, "ls-files", "--error-unmatch", "errors.py") is None:
        return {}
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, *CHANGES)
    return {"commit": commit or "", "dirty": str(bool(changes)).lower()}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def context_tags(stage: str, job_id: str) -> dict[str, str]:
    """Tags that say by what and where a run was made; `job_id` is that of the scheduler."""
    from mlflow.tracking.context.registry import resolve_tags

    version = code_version()
    tags = {
        # Of MLflow's own tags the user's name stays; the program's would be that of the launcher.
        **resolve_tags(),
        "mlflow.source.name": f"beit {stage}",
        "mlflow.source.git.commit": version.get("commit", ""),
        "beit.code.dirty": version.get("dirty", ""),
        "beit.version": _version("beit-ray"),
        "beit.host": socket.gethostname(),
        "beit.torch": _version("torch"),
        "beit.ray": _version("ray"),
        "beit.job_id": job_id,
        "beit.ray_job_id": _ray_job_id(),
    }
    return {name: value for name, value in tags.items() if value}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _ray_job_id() -> str:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    return str(ray.get_runtime_context().get_job_id())
