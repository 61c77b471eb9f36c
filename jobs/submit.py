"""`beit submit STAGE ... -- STAGE FLAGS`: a stage as a job on a Ray cluster, over its Jobs API.

The flags are checked here, sent as one file of configuration beside the code, and run there by
`python -m jobs`. The submission id follows from the stage, its output and the attempt, so that
submitting what already runs attaches to it. `submit status|logs|stop|list` look at jobs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs.command import exit_code, output_of
from jobs.environment import ENVIRONMENT, TAKE_SECRETS, is_secret, named_variables
from jobs.submission.access import JOB, ClusterAwayError, find_address, use_token
from pipelines import storage
from pipelines.config.checks import to_dict
from pipelines.errors import InputError, StageFailed
from pipelines.redaction import redacted

ACTIONS = ("status", "logs", "stop", "list")
# Ray kills a stopped job's driver after so long; until then it saves what it has.
STOP_SECONDS = 60
SECOND_INTERRUPT_SECONDS = 3.0
USAGE = """beit submit STAGE [--address http://head:8265] [options] -- STAGE FLAGS
       beit submit doctor [--address http://head:8265] [-- STAGE STAGE FLAGS]
       beit submit status|logs|stop ID    beit submit list"""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A stage as it is sent."""

    command: str
    """Of `beit` on the cluster, with its flags."""
    prefix: str
    """Of the submission id; the attempt's number follows."""
    config_text: str
    metadata: Mapping[str, str]


def main(argv: Sequence[str]) -> int:
    """Submits, or acts on a job; returns the job's own exit code where it is followed."""
    own, flags = _split(argv)
    options = _parser().parse_intermixed_args(own)
    codes: list[int] = []

    def act(_: object) -> None:
        if options.what in ACTIONS and flags:
            raise InputError(f"submit {options.what}: takes no flags of a stage")
        try:
            codes.append(_act(options) if options.what in ACTIONS else _submit(options, flags))
        except ClusterAwayError as error:
            raise StageFailed(
                f"the cluster does not answer ({error}); jobs run on. Give the command again"
            ) from error

    return exit_code(act) or (codes[0] if codes else 0)


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    if "--" not in arguments:
        return arguments, []
    cut = arguments.index("--")
    return arguments[:cut], arguments[cut + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="beit submit", usage=USAGE, description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "what", help="a stage, as in `beit STAGE`, doctor, or status, logs, stop, list"
    )
    parser.add_argument("id", nargs="?", default="", help="submission id, of status, logs, stop")
    parser.add_argument("--address", default="", help="dashboard; else RAY_API_SERVER_ADDRESS")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME",
        help="variable of this shell that the job's processes get too; by name, may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--include", action="append", default=[], metavar="PATH",
        help="file or directory sent beside the code; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--code", choices=("checkout", "image"), default="checkout",
        help="send this code, or use what the cluster's image has installed: of this version",
    )  # fmt: skip
    parser.add_argument("--detach", action="store_true", help="do not follow the log")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="ask the cluster by a small job (`beit doctor`) whether it can; start nothing else",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _submit(options: argparse.Namespace, flags: Sequence[str]) -> int:
    from jobs.submission.package import write_package

    token_place = use_token()  # before the checks below import Ray
    job = describe(options.what, flags)
    environment, secrets = job_environment(options.env)
    require_shared_tracking(job.config_text, options.env)
    # Where flags read the terminal's log: the packing is refused before anything is sent.
    with tempfile.TemporaryDirectory(prefix="beit-submit-") as folder:
        size = write_package(
            Path(folder), config_text=job.config_text, with_code=options.code == "checkout",
            include=options.include, secrets=secrets,
        )  # fmt: skip
        address = find_address(options.address)
        from jobs.submission import cluster

        client = cluster.connect(address, token_place)
        ended, alive = cluster.newest_attempt(client, job.prefix)
        if options.dry_run:
            _say(options, f"would submit {job.prefix}-{ended + 1} ({size / 1024:.0f} kB)")
            _say(options, json.dumps(dict(job.metadata), indent=1))
            job = job if options.what == "doctor" else _rehearsal(job)
            ended, alive = cluster.newest_attempt(client, job.prefix)
        if alive is not None:
            submission_id = str(alive.submission_id)
            if (alive.metadata or {}).get("beit.config") != job.metadata["beit.config"]:
                raise InputError(
                    f"{submission_id} is {alive.status.value.lower()} at the same output with "
                    f"another configuration; `beit submit stop {submission_id}` first, or give "
                    "another output"
                )
            _say(
                options, f"{submission_id} is {alive.status.value.lower()} already: attached to it"
            )
        else:
            submission_id = f"{job.prefix}-{ended + 1}"
            cluster.submit(
                client,
                entrypoint=f"python -m jobs {job.command}",
                submission_id=submission_id,
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {**environment, JOB: submission_id},
                    **({"worker_process_setup_hook": TAKE_SECRETS} if secrets else {}),
                },
                metadata=dict(job.metadata),
            )
            _say(options, f"submitted {submission_id} ({size / 1024:.0f} kB)")
    _say(options, f"dashboard: {address}/#/jobs/{submission_id}")
    if options.code == "image":
        _say(options, f"code: the image's; it must be that of {job.metadata['beit.code']}, as here")
    if token_place:
        _say(options, f"token: from {token_place}")
    if options.detach:
        _say(options, f"follow it: beit submit logs {submission_id} --address {address}")
        return _report(options, client, submission_id, code=0)
    return _follow(options, client, submission_id)


def describe(stage: str, flags: Sequence[str]) -> Submission:
    """The stage with these flags, or `doctor` alone or with a stage, checked, as it would be sent.

    Raises:
        InputError: no such stage, a value that does not fit, or an output that the nodes of a
            cluster do not share.
    """
    import yaml

    from jobs.cli import parse_stage
    from jobs.needs import READ, named

    if stage == "doctor":
        return _rehearsal(describe(flags[0], flags[1:])) if flags else NODES_ALONE
    config = parse_stage(stage, flags)
    values = to_dict(config)
    for name, value in named(values, (*READ, "output")):
        relative = not Path(value.removeprefix("file://")).is_absolute()
        if storage.is_local(value) and relative:
            raise InputError(
                f"{name} = {value!r}: on a cluster a relative path is a folder of one node that "
                "goes with the job; give s3://... or an absolute path that all nodes share"
            )
    place = place_of(config)
    return Submission(
        command=f"{stage} --config job.yaml",
        prefix=f"beit-{stage}-{storage.fingerprint([stage, place])[:8]}",
        config_text=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        metadata={
            "beit.stage": stage,
            "beit.output": redacted(place),
            "beit.config": storage.fingerprint(values),
            "beit.code": code_version(),
            "beit.tracking": redacted(str(values.get("tracking", {}).get("uri", ""))),
        },
    )


def _rehearsal(job: Submission) -> Submission:
    """What asks the cluster whether it can do the job."""
    return Submission(
        command=f"doctor {job.command}",
        prefix=job.prefix.replace("beit-", "beit-doctor-", 1),
        config_text=job.config_text,
        metadata={**job.metadata, "beit.stage": "doctor"},
    )


# `beit doctor` without a stage: versions and GPUs of every node.
NODES_ALONE = Submission(
    command="doctor",
    prefix="beit-doctor-nodes",
    config_text="{}",
    metadata={"beit.stage": "doctor", "beit.output": "", "beit.config": ""},
)


def place_of(config: Any) -> str:
    """What a job writes: two jobs of one place never run at once."""
    places = [output_of(config)]
    if not places[0]:  # evaluate and audit: what they read
        places = [getattr(config, name, "") for name in ("run", "images", "test_images", "table")]
    return " ".join(place.rstrip("/") for place in places if place)


def require_shared_tracking(config_text: str, names: Sequence[str]) -> None:
    """Raises InputError where a job's runs would be recorded in a folder that goes with it."""
    import yaml

    if "MLFLOW_TRACKING_URI" in names:
        return
    values = yaml.safe_load(config_text)
    for section in [values, *values.values()]:
        tracking = section.get("tracking") if isinstance(section, dict) else None
        if not isinstance(tracking, dict) or not tracking["enabled"]:
            continue
        uri = tracking["uri"]
        if not uri or (uri.startswith("sqlite:///") and not uri.startswith("sqlite:////")):
            raise InputError(
                f"tracking.uri = {uri!r}: on a cluster runs would be recorded in a folder that "
                "goes with the job; name a server (--tracking.uri http://mlflow:5000, or --env "
                "MLFLOW_TRACKING_URI), or pass --tracking.enabled false"
            )


def job_environment(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Variables of the job's processes: what every command sets here, and those that are named;
    apart from them the secret ones among these.

    Raises:
        InputError: a named variable is not set in this shell.
    """
    environment = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
    environment["RAY_JOB_STOP_WAIT_TIME_S"] = str(STOP_SECONDS)
    given = named_variables(names, "--env")
    secrets = {name: value for name, value in given.items() if is_secret(name, value)}
    return environment | {n: v for n, v in given.items() if n not in secrets}, secrets


def code_version() -> str:
    """Commit of the checkout (`-dirty` with changes), or the installed package's version."""
    from jobs.submission.package import checkout

    asked = subprocess.run(
        ["git", "-C", str(checkout()), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return asked.stdout.strip() if asked.returncode == 0 else version("beit-ray")


def _follow(options: argparse.Namespace, client: Any, submission_id: str) -> int:
    """Follows to the end. Ctrl-C lets the job run on; a second one stops it."""
    from jobs.submission.cluster import job_log
    from jobs.submission.follow import LogPrinter, follow, job_exit_code

    printer = LogPrinter(sys.stderr if options.json else sys.stdout)
    while True:
        try:
            details = follow(client, submission_id, printer)
            break
        except KeyboardInterrupt:
            if not _stop_wanted(submission_id):
                return 130
            client.stop_job(submission_id)
            print(f"\nstopping {submission_id}; up to {STOP_SECONDS} s to save", file=sys.stderr)
    code = job_exit_code(details, lambda: job_log(client, submission_id))
    message = (details.message or "").partition(", last available logs")[0]
    _say(options, f"{submission_id}: {details.status.value.lower()}, exit code {code}. {message}")
    return _report(options, client, submission_id, code=code)


def _stop_wanted(submission_id: str) -> bool:
    """Whether a second Ctrl-C follows the first."""
    try:
        print(
            f"\n{submission_id} runs on. Follow it again: beit submit logs {submission_id}\n"
            f"Ctrl-C once more within {SECOND_INTERRUPT_SECONDS:.0f} s stops the job.",
            file=sys.stderr,
        )
        time.sleep(SECOND_INTERRUPT_SECONDS)
    except KeyboardInterrupt:
        return True
    return False


def _act(options: argparse.Namespace) -> int:
    address, token_place = find_address(options.address), use_token()
    from jobs.submission import cluster

    client = cluster.connect(address, token_place)
    if options.what == "list":
        return _list(options, client)
    if not options.id:
        raise InputError(f"submit {options.what}: name the job's submission id")
    details = cluster.job_info(client, options.id)
    if options.what == "logs":
        return _follow(options, client, options.id)
    if options.what == "stop":
        stopped = client.stop_job(options.id)
        _say(options, f"{options.id}: {'stopping' if stopped else details.status.value.lower()}")
    return _report(options, client, options.id, code=0, aloud=options.what == "status")


def _list(options: argparse.Namespace, client: Any) -> int:
    jobs = [job for job in client.list_jobs() if job.submission_id]
    records = [_record(job) for job in sorted(jobs, key=lambda job: job.start_time or 0)]
    if options.json:
        print(json.dumps(records))
        return 0
    for record in records:
        print("{id:<40}{status:<11}{started:<22}{output}".format(**record))
    return 0


def _record(job: Any) -> dict[str, Any]:
    began = time.gmtime((job.start_time or 0) / 1000)
    return {
        "id": job.submission_id,
        "status": job.status.value,
        "started": time.strftime("%Y-%m-%d %H:%M:%SZ", began) if job.start_time else "",
        "stage": (job.metadata or {}).get("beit.stage", ""),
        "output": (job.metadata or {}).get("beit.output", ""),
        "driver_exit_code": job.driver_exit_code,
    }


def _report(
    options: argparse.Namespace, client: Any, submission_id: str, *, code: int, aloud: bool = False
) -> int:
    if options.json:
        record = _record(client.get_job_info(submission_id))
        print(json.dumps({**record, "exit_code": code}))
    elif aloud:
        details = client.get_job_info(submission_id)
        print(f"{submission_id}: {details.status.value.lower()}. {details.message or ''}")
    return code


def _say(options: argparse.Namespace, text: str) -> None:
    print(text, file=sys.stderr if options.json else sys.stdout, flush=True)


if __name__ == "__main__":
    from jobs.cli import main as beit

    sys.exit(beit(["submit", *sys.argv[1:]]))
