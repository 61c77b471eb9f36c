"""Variables of the processes of a command: what all get, what workers get, what is hidden."""

import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import InputError
from pipelines.redaction import hide, redacted

# Ray and MLflow read these when they are imported; what the user has set stays.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in training workers
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a checkpoint commits within half a second
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_agent_register_timeout_ms": "120000",  # a busy machine starts Ray slowly
    "RAY_worker_niceness": "0",  # the default of 15 starves workers on a machine that does more
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    "RAY_COLOR_PREFIX": "0",  # logs are files, in which colours are noise
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # workers of a finished pool announce harmless deaths
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads of OpenMP that wait for each other soon sleep. On a machine that does more, a thread
    # that spins takes the core from the one that it waits for; on a quiet one a short spin is
    # cheaper than to be woken (of `evaluate`: 53 s instead of 62; 90 and 87 beside other work).
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "300",
    "GIT_PYTHON_REFRESH": "quiet",  # MLflow's, where no git is: an image has none
}
NAMED = "BEIT_ENV"
"""Variable that names others, with commas: workers of a cluster get those, too."""
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_SECRET = re.compile(
    r"SECRET|TOKEN(?![A-Z])|PASSW|PASSPHRASE|CREDENTIAL|ACCESS_?KEY|ACCOUNT_?KEY|API_?KEY|PRIVATE_?KEY"
)
SECRETS_FILE = ".beit-secrets.json"
"""Of a job's working directory."""
TAKE_SECRETS = "jobs.environment.take_secrets"
LEAST_SECRET = 6  # characters; shorter values stand in too many words


def prepare_environment() -> None:
    """Quiet defaults for the libraries below; nothing the user has set is overridden."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; ours are printed, not warned


def hide_secrets() -> None:
    """From now on no error and no log shows the value of a variable that sounds secret."""
    hide(
        value
        for name, value in os.environ.items()
        if _sounds_secret(name)
        and len(value) >= LEAST_SECRET
        and not (value.startswith("/") and Path(value).exists())
    )


def _sounds_secret(name: str) -> bool:
    no_value = name.upper().endswith(("_FILE", "_PATH", "_MODE", "_DIR"))
    return bool(_SECRET.search(name.upper())) and not no_value


def is_secret(name: str, value: str) -> bool:
    """Whether a variable is one that nobody may read in a log: by its name, or a URI's password."""
    return _sounds_secret(name) or redacted(value) != value


def take_secrets() -> None:
    """Variables that came as a file of the job's working directory. In the driver, and by Ray in
    each worker of the job before anything else: Ray logs and shows what a job's `env_vars` say.

    Raises:
        FileNotFoundError: none came. A worker of a job that has secrets must not go on without.
    """
    os.environ.update(json.loads(Path(SECRETS_FILE).read_text()))


def named_variables(names: Sequence[str], source: str) -> dict[str, str]:
    """Variables of this shell by name. Raises InputError for one that is not set."""
    for name in names:
        if name not in os.environ:
            raise InputError(f"{source} {name}: not set in this shell")
    return {name: os.environ[name] for name in names}


def worker_environment() -> dict[str, str]:
    """What workers on a cluster get of this process: what every command sets, and what the user
    names in BEIT_ENV. They inherit nothing else, for their nodes were started by others.

    What the job's own runtime environment says (of `beit submit --env`, of a RayJob) they have
    already, and Ray refuses to be told twice.

    Raises:
        InputError: a named variable is not set.
    """
    names = [name for name in re.split(r"[,\s]+", os.environ.get(NAMED, "")) if name]
    wanted = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    wanted |= named_variables(names, NAMED)
    job = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    return {name: value for name, value in wanted.items() if name not in job.get("env_vars", {})}
