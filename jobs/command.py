"""What every command does: flags to a configuration, environment, Ray, exit code.

`--config FILE` reads a YAML recipe (several merge in order), dotted flags override it, and
`--print_config` shows the outcome. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import os
import secrets
import site
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

import jobs
from jobs.attempt import Attempt
from jobs.environment import hide_secrets, prepare_environment, worker_environment
from jobs.interrupts import interrupted_as_ray_starts, terminated_as_interrupted
from jobs.recipes import recipe_names, with_lists, with_recipes
from jobs.submission.access import JOB, NO_CLUSTER, require_cluster, token_file, use_token
from jobs.terminal import printable_output
from pipelines.config.checks import to_dict
from pipelines.config.lease import LeaseConfig
from pipelines.config.pretrain import PretrainConfig, run_uri
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError, StageFailed, of_system, printable
from pipelines.redaction import redacted, redacted_text
from pipelines.steps import say_step

Config = TypeVar("Config")


RAY_STARTS = 3


def parse(config_class: type[Config], arguments: Sequence[str], *, stage: str) -> Config:
    """Flags and recipes to a frozen configuration.

    Raises:
        SystemExit: 0 after --help and --print_config.
        InputError: unknown keys, wrong types, or what the configuration's own checks refuse.
    """
    read = with_recipes(config_class, with_lists(config_class, arguments))
    return _typed(config_class, read, stage=stage, recipes=recipe_names(arguments))


def with_changes(config: Config, changes: Mapping[str, Any], *, label: str) -> Config:
    """The configuration with other values in some fields, written as in a recipe.

    Raises:
        InputError: an unknown field or a wrong value; names `label`.
    """
    try:
        values = yaml.safe_dump(_merged(to_dict(config), changes))
        return _typed(type(config), [f"--config={values}"], stage=label, recipes=())
    except InputError as error:
        raise InputError(f"{label}: {error}") from error


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(values)
    for name, new in changes.items():
        if not isinstance(values.get(name), dict):
            both[name] = new
        elif isinstance(new, dict):
            both[name] = _merged(values[name], new)
        else:
            raise InputError(f"{name} = {new!r}: give those of its fields that differ, or none")
    return both


def _typed(
    config_class: type[Config], arguments: list[str], *, stage: str, recipes: Sequence[str]
) -> Config:
    from jsonargparse import DefaultHelpFormatter, auto_cli, set_parsing_settings

    class Help(DefaultHelpFormatter):
        def format_help(self) -> str:  # `--print_config \b[=flags]` is for terminals alone
            shown: str = super().format_help()
            return shown.replace(" \b", "")

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        config: Config = auto_cli(
            config_class,
            as_positional=False,
            args=arguments,
            prog=f"beit {stage}",
            allow_abbrev=False,
            formatter_class=Help,
            exit_on_error=False,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    except argparse.ArgumentError as error:
        named = "".join(f" (recipe {name})" for name in recipes)
        said = " ".join(str(error).split())
        meant = _meant(config_class, said)
        raise InputError(f"{said}{named}{meant}; `beit {stage} --help` lists all fields") from error
    return config


def _meant(config_class: type, said: str) -> str:
    """The flags that are nearest to those that an error says are not known."""
    _, _, unknown = said.partition("unrecognized arguments: ")
    flags = [flag.partition("=")[0] for flag in unknown.split() if flag.startswith("--")]
    known = [f"--{name}" for name in _field_names(config_class)]
    near = [match for flag in flags for match in difflib.get_close_matches(flag, known, n=1)]
    return f"; did you mean {', '.join(near)}?" if near else ""


def _field_names(config_class: type) -> Iterator[str]:
    for name, hint in get_type_hints(config_class).items():
        yield name
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from (f"{name}.{below}" for below in _field_names(hint))


def stage_main(
    stage: str, config_class: type[Config], module: str, argv: Sequence[str], *, ray: str
) -> int:
    """Runs `module.run(config)` for the given flags and returns the exit code.

    `ray` says when Ray is needed: always, never, or `workers`. It takes seconds to start, so the
    stage itself calls for it, as `start_ray`, when nothing can be refused any more without it.
    """

    def run(attempt: Attempt) -> None:
        config = parse(config_class, argv, stage=stage)
        config = with_job_name(with_tracking_environment(config))
        prepare_environment()
        attempt.begin(stage, config, output_of(config))
        options: dict[str, Any] = {}
        if ray == "always" or (ray == "workers" and _asks_for_workers(config)):
            find_ray()
            options["start_ray"] = functools.cache(lambda: start_ray(stage, config))
        say_step(f"{stage}: opening what it reads")
        result = importlib.import_module(module).run(config, **options)
        summary = getattr(result, "summary", None)
        if summary is not None:
            print(summary())

    with terminated_as_interrupted(), printable_output():
        return exit_code(run)


def start_ray(stage: str, config: Any) -> None:
    """What a stage calls once it has looked at all that can be refused without Ray."""
    connect_to_ray()
    preflight(stage, config)


def preflight(stage: str, config: Any) -> None:
    """Asks the nodes whether they can do it, before accelerators are asked for.

    A Ray that has just been started here is asked for its GPUs alone; the stage itself looks at
    the rest from the same machine.
    """
    from jobs.needs import is_done, needs_of
    from pipelines.preflight import Needs, require

    needs = needs_of(stage, config)
    if not os.environ.get("RAY_ADDRESS"):
        needs = Needs(gpu=needs.gpu)
    if not is_done(stage, config):
        require(needs)


def _asks_for_workers(config: Any) -> bool:
    executor = getattr(getattr(config, "data", None), "executor", "")
    return config.scaling.num_workers != 0 or executor == "ray_tasks"


def with_tracking_environment(config: Config) -> Config:
    """MLflow's own variables count where a stage's flag is not given, and that is said."""
    variables = {
        "MLFLOW_TRACKING_URI": "uri",
        "MLFLOW_EXPERIMENT_NAME": "experiment",
        "SLURM_JOB_ID": "job_id",
        JOB: "job_id",
    }
    source = {field: name for name, field in variables.items() if os.environ.get(name)}
    given = {field: os.environ[name] for field, name in source.items()}
    said: set[str] = set()

    def filled(section: TrackingConfig) -> TrackingConfig:
        default = TrackingConfig()
        new: dict[str, Any] = {
            f: v for f, v in given.items() if getattr(section, f) == getattr(default, f)
        }
        said.update(new if section.enabled else ())
        return dataclasses.replace(section, **new)

    updated = _with_sections(config, TrackingConfig, filled) if given else config
    for field in sorted(said):
        print(f"tracking.{field}: {redacted(given[field])} (from {source[field]})", file=sys.stderr)
    return updated


def with_job_name(config: Config) -> Config:
    """The lease of an output tells others which job holds it."""
    names = (os.environ.get(name, "") for name in (JOB, "SLURM_JOB_ID"))
    job = next(filter(None, names), "")
    return _with_sections(
        config, LeaseConfig, lambda lease: dataclasses.replace(lease, job=lease.job or job)
    )


def _with_sections(section: Config, kind: type, change: Callable[[Any], Any]) -> Config:
    """The configuration with `change` applied to all its sections of one kind."""
    fields = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}  # type: ignore[arg-type]
    parts = {
        name: change(part) if isinstance(part, kind) else _with_sections(part, kind, change)
        for name, part in fields.items()
        if dataclasses.is_dataclass(part)
    }
    return dataclasses.replace(section, **parts)  # type: ignore[type-var]


def output_of(config: Any) -> str:
    """What a stage writes to; "" where it has no output of its own."""
    return run_uri(config) if isinstance(config, PretrainConfig) else getattr(config, "output", "")


def exit_code(action: Callable[[Attempt], None]) -> int:
    """Runs `action`; expected failures become one message on stderr and a code.

    Of an attempt of a job (`jobs.attempt`) every end is written down, a crash too.
    """
    hide_secrets()
    attempt = Attempt()
    code, cause = 0, ""
    try:
        action(attempt)
    except KeyboardInterrupt as interrupt:
        code, cause = 130, f"interrupted. {interrupt}".rstrip()
    except SystemExit as end:  # flags that do not parse, --help
        attempt.end(2 if end.code else 0, "error: the flags do not parse" if end.code else "")
        raise
    except Exception as error:
        code, cause = _expected(error)
        if not code and not attempt.job:
            raise
        if not code:
            print(redacted_text(traceback.format_exc()), file=sys.stderr)
            attempt.end(1, redacted_text(f"crashed: {type(error).__name__}: {error}"))
            return 1
    if cause:
        print(printable(redacted_text(cause), keep="\n"), file=sys.stderr)
    if code == 130:
        print("Run the same command again to go on from what is done.", file=sys.stderr)
    attempt.end(code, redacted_text(cause))
    return code


def _expected(error: Exception) -> tuple[int, str]:
    """Code and cause of a failure that needs no traceback; (0, "") of any other."""
    if isinstance(error, OSError) and error.errno is not None and not is_verbose():
        error = of_system(error) if not isinstance(error, InputError) else error
    if isinstance(error, InputError):
        return 2, f"error: {error}"
    if isinstance(error, StageFailed):
        return 1, f"failed: {error}"
    if isinstance(error, MemoryError):
        return 1, f"failed: not enough memory {error}".rstrip()
    return 0, ""


def is_verbose() -> bool:
    """Whether the user wants to see what is kept out of sight."""
    return os.environ.get("BEIT_VERBOSE", "") not in ("", "0")


def find_ray() -> None:
    """Whether somebody is at RAY_ADDRESS, and the token. Before anything imports Ray.

    Raises:
        InputError: RAY_ADDRESS names no Ray cluster that answers.
    """
    if address := os.environ.get("RAY_ADDRESS", ""):
        require_cluster(address)
        use_token()
    else:
        _own_token()


def connect_to_ray() -> None:
    """Joins the cluster of RAY_ADDRESS (set inside a submitted job), or starts Ray here.

    A local Ray counts at least four CPUs, so that two training workers leave room for the tasks
    that feed them also on a small machine.

    Raises:
        InputError: RAY_ADDRESS names no Ray cluster that answers.
    """
    find_ray()
    address = os.environ.get("RAY_ADDRESS", "")
    import ray

    if ray.is_initialized():
        return
    say_step(f"joining the Ray cluster at {address}" if address else "starting Ray here")
    runtime_env = {"env_vars": worker_environment()} if address else None
    verbose = is_verbose()
    quiet: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        muted = contextlib.nullcontext() if verbose else _muted_stderr()
        with muted, contextlib.chdir(import_root()), interrupted_as_ray_starts():
            if address:
                ray.init(address="auto", runtime_env=runtime_env, **quiet)
            else:
                _start_ray(include_dashboard=verbose, **quiet)
    except Exception as error:  # Ray says most of what goes wrong with the plain class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if address:
            raise InputError(f"RAY_ADDRESS = {address!r}: {reason}; {NO_CLUSTER}") from error
        raise StageFailed(
            f"Ray did not start on this machine: {reason.rstrip('.')}; run the same command again "
            "when it is less busy. BEIT_VERBOSE=1 shows Ray's own log"
        ) from error
    have = ray.cluster_resources()
    say_step(f"Ray is there: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs")


def import_root() -> Path:
    """Where Ray is started: its workers import from that directory first of all.

    In the user's it would be his `queue.py` that they import. It is a checkout, where workers need
    it, and else one in which nobody keeps modules.
    """
    root = Path(jobs.__file__).parents[1]
    installed = {Path(path).resolve() for path in (*site.getsitepackages(), site.USER_SITE) if path}
    return Path("/") if root.resolve() in installed else root


def _start_ray(**options: Any) -> None:
    """Ray waits for its own processes for 30 s, too short for a machine that is busy."""
    import ray

    cpus = max(4, os.cpu_count() or 1)
    for attempt in range(RAY_STARTS):
        try:
            ray.init(address="local", num_cpus=cpus, **options)
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == RAY_STARTS - 1:
                raise
            ray.shutdown()
        else:
            return


def _own_token() -> None:
    """A token of this run alone, for the Ray that starts here.

    Ray would write one to ~/.ray/auth_token, and every `ray start --head` after that would ask for
    it.
    """
    known = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(os.environ.get(name) for name in known) and not token_file().is_file():
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


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
