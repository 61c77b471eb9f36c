"""Follows a job to its real end: through dropped connections and log streams that end early.

Only a terminal status counts as the end: the stream of a job's log may close, with a code that
says all is well, while the job goes on (ray issue 60665).
"""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import Callable
from typing import TextIO

import aiohttp
from ray.job_submission import JobDetails

from jobs.submission.access import ClusterAwayError
from jobs.submission.cluster import ENDED, Client, job_info, job_log

PAUSE = 2.0
EXPLAIN_AFTER, EXPLAIN_EVERY = 10.0, 30.0
# How long a dashboard may be away before following gives up; the job does not notice.
PATIENCE = 600.0
# The last line of an attempt's log, see `jobs.attempt`.
OUTCOME = re.compile(r"^beit: exit code (\d+)(?:: (.*))?$", re.MULTILINE)


class LogPrinter:
    """Prints a log that is handed over from its beginning again and again, each part once."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.printed = stream, 0
        self._position = 0

    def restart(self) -> None:
        """What comes next begins at the log's beginning."""
        self._position = 0

    def feed(self, text: str) -> None:
        """The next piece of the log; what was printed before is passed over."""
        fresh = text[max(0, self.printed - self._position) :]
        self._position += len(text)
        if fresh:
            self.printed = self._position
            self.stream.write(fresh)
            self.stream.flush()

    def finish(self, whole: str) -> None:
        """The whole log of an ended job: prints what is missing."""
        self.restart()
        self.feed(whole)


def follow(client: Client, submission_id: str, printer: LogPrinter) -> JobDetails:
    """Prints the job's log as it grows and returns its state when it has ended. Interrupted and
    called again with the same printer, it goes on where it was.

    Raises:
        ClusterAwayError: the dashboard has been away for `PATIENCE`.
        InputError: there is no such job.
    """
    seen = time.monotonic()
    explain_at, away = seen + EXPLAIN_AFTER, False
    while True:
        try:
            details = job_info(client, submission_id)
            status = details.status.value
            if away:
                print("-- the cluster answers again --", file=sys.stderr)
            seen, away = time.monotonic(), False
            if status in ENDED:
                printer.finish(job_log(client, submission_id))
                return details
            if status == "RUNNING":
                asyncio.run(_tail(client, submission_id, printer))
            elif time.monotonic() >= explain_at:
                print(explain_waiting(client, details), file=sys.stderr)
                explain_at = time.monotonic() + EXPLAIN_EVERY
        except (ClusterAwayError, aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            if not away:
                print(f"-- the cluster does not answer ({error}); waiting --", file=sys.stderr)
            away = True
            if time.monotonic() - seen > PATIENCE:
                raise ClusterAwayError(f"no answer for {PATIENCE:.0f} s") from error
        time.sleep(PAUSE)


async def _tail(client: Client, submission_id: str, printer: LogPrinter) -> None:
    """One connection's worth of log; returns when the stream ends, however it ends."""
    printer.restart()
    stream = client.tail_job_logs(submission_id)
    try:
        while True:
            # A connection that is cut on the way says nothing: ask for the status now and then.
            printer.feed(await asyncio.wait_for(anext(stream), timeout=EXPLAIN_EVERY))
    except (StopAsyncIteration, TimeoutError, RuntimeError):
        return
    finally:
        with contextlib.suppress(Exception):
            await stream.aclose()


def explain_waiting(client: Client, details: JobDetails) -> str:
    """Why a job has not begun: what Ray says, and what the cluster has."""
    message = " ".join((details.message or "").split())
    status = client.cluster_status()
    resources = re.search(r"Resources\n-+\n(.*)", status, re.DOTALL)
    have = resources[1].strip() if resources else "unknown"
    return f"waiting ({details.status.value}): {message}\nthe cluster:\n{have}"


def job_exit_code(details: JobDetails, log: Callable[[], str]) -> int:
    """The driver's own exit code: 0, 1, 2, or 130 for a job that was stopped.

    Ray's own command turns 2 into 1 and a stopped job into 0.
    """
    status = details.status.value
    if status == "STOPPED":
        return 130
    if status == "SUCCEEDED":
        return 0
    if details.driver_exit_code is not None and details.driver_exit_code >= 0:
        return int(details.driver_exit_code) or 1
    outcomes = OUTCOME.findall(log())
    return int(outcomes[-1][0]) if outcomes else 1
