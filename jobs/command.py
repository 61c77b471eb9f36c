"""What every command does: flags to a configuration, environment, Ray, exit code.

`--config FILE` reads a YAML recipe (several merge in order), dotted flags override it, and
`--print_config` shows the outcome. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

import contextlib
import dataclasses
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pipelines.errors import InputError, StageFailed

Config = TypeVar("Config")

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
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # workers of a finished pool announce harmless deaths
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TOKENIZERS_PARALLELISM": "false",
}


def parse(config_class: type[Config], argv: Sequence[str] | None, *, stage: str) -> Config:
    """Flags and recipes to a frozen configuration.

    Raises:
        SystemExit: 0 after --help and --print_config, 2 on unknown keys and wrong types.
        InputError: the configuration's own checks refused a value.
    """
    from jsonargparse import auto_cli, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        config: Config = auto_cli(
            config_class,
            as_positional=False,
            args=_bracket_lists(config_class, arguments),
            prog=f"beit {stage}",
            allow_abbrev=False,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return config


def _bracket_lists(config_class: type, arguments: list[str]) -> list[str]:
    """Lets a list be written `--tokens A` or `--tokens A,B`, beside YAML's `--tokens=[A, B]`."""
    lists = {
        f"--{field.name}"
        for field in dataclasses.fields(config_class)
        if get_origin(field.type) is list
    }
    bracketed: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in lists and equals and not value.startswith("["):
            bracketed.append(f"{flag}=[{value}]")
        elif bracketed and bracketed[-1] in lists and not argument.startswith("["):
            bracketed.append(f"[{argument}]")
        else:
            bracketed.append(argument)
    return bracketed


def stage_main(
    stage: str,
    config_class: type[Config],
    module: str,
    argv: Sequence[str] | None = None,
    *,
    needs_ray: bool | Callable[[Config], bool] = True,
) -> int:
    """Runs `module.run(config)` for the given flags and returns the exit code."""

    def run() -> None:
        config = parse(config_class, argv, stage=stage)
        prepare_environment()
        if needs_ray(config) if callable(needs_ray) else needs_ray:
            connect_to_ray()
        result = importlib.import_module(module).run(config)
        summary = getattr(result, "summary", None)
        if summary is not None:
            print(summary())

    return exit_code(run)


def exit_code(action: Callable[[], None]) -> int:
    """Runs `action`; expected failures become one message on stderr and a code."""
    try:
        action()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"interrupted. {interrupt}".rstrip(), file=sys.stderr)
        print("Run the same command again to go on from what is done.", file=sys.stderr)
        return 130
    return 0


def prepare_environment() -> None:
    """Quiet defaults for the libraries below; nothing the user has set is overridden."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; ours are printed, not warned


def connect_to_ray() -> None:
    """Joins the cluster of RAY_ADDRESS (set inside a submitted job), or starts Ray here.

    A local Ray counts at least four CPUs, so that two training workers leave room for the tasks
    that feed them also on a small machine.
    """
    import ray

    if ray.is_initialized():
        return
    verbose = os.environ.get("BEIT_VERBOSE", "") not in ("", "0")
    quiet: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    with contextlib.nullcontext() if verbose else _muted_stderr():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", **quiet)
        else:
            cpus = max(4, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=verbose, **quiet)


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Without what Ray's C++ core prints while it starts; exceptions are shown all the same."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
