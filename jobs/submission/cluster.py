"""The Jobs API of a Ray cluster, with time limits and errors that a person can act on."""

import logging
import sys
import time
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from jobs.submission.access import TOKEN_FILE, ClusterAwayError
from pipelines.errors import InputError, StageFailed

CONNECT_SECONDS, ANSWER_SECONDS, UPLOAD_SECONDS = 8.0, 30.0, 300.0
START_SECONDS = 120.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Client(JobSubmissionClient):
    """Ray's own client waits for ever for an address that swallows packets."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer = UPLOAD_SECONDS if method == "PUT" else ANSWER_SECONDS
        options.setdefault("timeout", (CONNECT_SECONDS, answer))
        try:
            response: requests.Response = super()._do_request(method, endpoint, **options)
        except requests.RequestException as error:
            raise ClusterAwayError(f"{method} {endpoint}: {type(error).__name__}") from error
        if response.status_code in (502, 503, 504):
            raise ClusterAwayError(f"{method} {endpoint}: {response.status_code}")
        return response

    def cluster_status(self) -> str:
        """What the cluster has and what is asked of it, as `ray status` prints; "" if unknown."""
        response = self._do_request("GET", "/api/cluster_status?format=1")
        if response.status_code != 200:
            return ""
        data = response.json().get("data", {})
        return str(data.get("clusterStatus") or data.get("formattedStatus") or "")


def connect(address: str, token_place: str) -> Client:
    """A client of the cluster at `address`, which has answered.

    Raises:
        InputError: nothing answers there within seconds, it is no Ray dashboard, or it refuses the
            token.
    """
    for module in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk",
                   "_private.runtime_env.packaging"):  # fmt: skip
        logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)  # uploads, closed connections
    try:
        return Client(address)
    except AuthenticationError as error:
        if token_place:
            known = f"the token in {token_place} is not that of the cluster"
        else:
            known = "the cluster, or RAY_AUTH_MODE here, asks for a token, and none was found"
        raise InputError(
            f"--address {address}: {known}; get it there with `ray get-auth-token` and put it into "
            f"RAY_AUTH_TOKEN or {TOKEN_FILE}"
        ) from error
    except (ClusterAwayError, ConnectionError, requests.RequestException) as error:
        raise InputError(
            f"--address {address}: no Ray dashboard answers there ({error}); is the cluster up, "
            "and its port 8265 reachable from here?"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--address {address}: what answers there is no Ray dashboard ({error})"
        ) from error


def submit(client: Client, **job: Any) -> None:
    """Submits, and waits for a cluster that has just started.

    Raises:
        StageFailed: the cluster does not take it; says why.
    """
    give_up_at = time.monotonic() + START_SECONDS
    while True:
        try:
            client.submit_job(**job)
        except RuntimeError as error:
            starting = "No available agent" in str(error)
            if not starting or time.monotonic() > give_up_at:
                name = job["submission_id"]
                raise StageFailed(f"{name}: not taken by the cluster: {error}") from error
            print("waiting: no node of the cluster is ready to run a driver yet", file=sys.stderr)
            time.sleep(5.0)
        else:
            return


def job_info(client: Client, submission_id: str) -> JobDetails:
    """The job's state. Raises InputError for an id that the cluster does not know."""
    try:
        return client.get_job_info(submission_id)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            raise InputError(
                f"{submission_id}: the cluster knows no such job; `beit submit list` shows them"
            ) from error
        raise StageFailed(f"{submission_id}: {error}") from error


def job_log(client: Client, submission_id: str) -> str:
    """The job's whole log; "" where it went with the node that held it."""
    try:
        log: str = client.get_job_logs(submission_id)
    except RuntimeError as error:
        print(f"-- its log cannot be had any more ({error}) --", file=sys.stderr)
        return ""
    return log


def newest_attempt(client: Client, prefix: str) -> tuple[int, JobDetails | None]:
    """How many jobs of this prefix there were, and the one that has not ended, if any."""
    jobs = {
        job.submission_id: job
        for job in client.list_jobs()
        if job.submission_id and job.submission_id.rpartition("-")[0] == prefix
    }
    numbers = [int(name.rpartition("-")[2]) for name in jobs if name.rpartition("-")[2].isdigit()]
    alive = [job for job in jobs.values() if str(job.status.value) not in ENDED]
    return max(numbers, default=0), (alive[-1] if alive else None)
