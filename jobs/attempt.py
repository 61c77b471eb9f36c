"""An attempt of a job: its log kept beside the output, how it ended, and whether to try at all.

A job is what a scheduler starts and may start again: `beit submit`, a RayJob, a Slurm job. It is
named by BEIT_JOB; without it nothing here does anything. Logs and exit codes go with their cluster,
so what an attempt says and how it ended also stand beside the output, as `OUTPUT.logs/` and
`OUTPUT.result.json`.
"""

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from jobs.submission.access import JOB, RETRY
from pipelines.config.checks import to_dict
from pipelines.errors import InputError
from pipelines.redaction import redacted_text

FLUSH_SECONDS = 60.0
SEGMENT_BYTES = 4 * 2**20
# Ends with the last who may write. A target that fails (a full disk, a reader that is gone) holds
# up nobody, and whoever ends all processes of a job is to be told of its end.
PUMP = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while data := os.read(0, 65536):
    for target in sys.argv[1:]:
        try:
            os.write(int(target), data)
        except OSError:
            pass
"""


class Attempt:
    """This process as an attempt of the job that BEIT_JOB names; of none where it is not set."""

    def __init__(self) -> None:
        self.job = os.environ.get(JOB, "")
        self.name = f"{self.job}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        self.output = ""
        self.identity = ""
        self.log = KeptLog() if self.job else None

    def begin(self, stage: str, config: Any, output: str) -> None:
        """Says what begins, and keeps the log beside the output.

        Raises:
            InputError: a scheduler repeats an attempt whose input was bad, and nothing has changed.
        """
        if self.log is None:
            return
        from pipelines import storage
        from pipelines.code_digest import code_digest

        self.identity = storage.fingerprint([stage, to_dict(config), code_digest()])
        address = os.environ.get("RAY_ADDRESS", "this machine")
        print(
            f"beit {stage}: attempt {self.name} on {platform.node()}, cluster {address}",
            file=sys.stderr,
        )
        if output:
            self.log.keep_at(storage.beside(output, ".logs"), self.name)
            self._refuse_repetition(storage.beside(output, ".result.json"))
        self.output = output

    def _refuse_repetition(self, record_uri: str) -> None:
        from pipelines import storage

        try:
            earlier: dict[str, Any] = storage.read_json(record_uri)
        except (OSError, InputError):
            return
        same = earlier.get("job") == self.job and earlier.get("identity") == self.identity
        if same and earlier.get("exit_code") == 2 and os.environ.get(RETRY, "") in ("", "0"):
            raise InputError(
                f"{self.job} has ended with bad input before, and neither configuration nor code "
                f"has changed since ({earlier.get('cause')}). Nothing was started. If what it "
                f"reads is mended: set {RETRY}=1, or delete {record_uri}"
            )

    def end(self, code: int, cause: str) -> None:
        """Leaves the outcome as the log's last line and beside the output."""
        if self.log is None:
            return
        record = {
            "job": self.job,
            "attempt": self.name,
            "identity": self.identity,
            "exit_code": code,
            "cause": cause,
        }
        if self.output:
            from pipelines import storage

            with contextlib.suppress(OSError, InputError):  # the log says it, too
                storage.write_json(storage.beside(self.output, ".result.json"), record)
        self.log.end_errors()
        told = "; ".join(" ".join(line.split()) for line in cause.splitlines())
        print(f"beit: exit code {code}" + (f": {told}" if told else ""), flush=True)
        self.log.close()


class KeptLog:
    """What this process prints, also in files beside its output.

    Copied where all of it passes, at the descriptors, so that what libraries print in C is there,
    too; by processes of their own, because such a library may hold the GIL while it prints more
    than a pipe takes. A new file begins every few megabytes: object stores know no appending.
    """

    def __init__(self) -> None:
        self.place = self.name = ""
        self.number, self.begin, self.kept = 0, 0, 0
        self.stop = threading.Event()
        sys.stdout.flush()
        sys.stderr.flush()
        self.spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - until the process ends
        self.real = os.dup(1), os.dup(2)
        # Where both go to one file, as in Ray's log of a job, they stay in their order.
        one = os.path.sameopenfile(1, 2)
        self.pumps = [self._copied(1, 2)] if one else [self._copied(1), self._copied(2)]
        self.flusher = threading.Thread(target=self._flush_often, name="kept log", daemon=True)
        self.flusher.start()

    def keep_at(self, place: str, name: str) -> None:
        """From now on the log is stored in this directory, from its beginning."""
        self.place, self.name = place, name

    def end_errors(self) -> None:
        """What is printed from now on stands after all that went to standard error."""
        sys.stderr.flush()
        if len(self.pumps) > 1:
            os.dup2(self.real[1], 2)
            _ended(self.pumps[1])

    def close(self) -> None:
        """Stores the rest; the descriptors are what they were."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(self.real, start=1):
            os.dup2(descriptor, number)
        for pump in self.pumps:
            _ended(pump)
        self.stop.set()
        self.flusher.join(timeout=30)
        self._flush()

    def _copied(self, *numbers: int) -> subprocess.Popen:
        """A process through which all goes that is written to these descriptors."""
        source, target = os.pipe()
        for number in numbers:
            os.dup2(target, number)
        os.close(target)
        targets = self.real[numbers[0] - 1], self.spool.fileno()
        pump = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PUMP, *map(str, targets)],
            stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=targets, start_new_session=True,
        )  # fmt: skip
        os.close(source)
        return pump

    def _flush_often(self) -> None:
        while not self.stop.wait(FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        """Stores what is not there yet; what cannot be stored is tried again later."""
        from pipelines import storage

        while self.place and (data := self._piece()):
            name = f"{self.name}.{self.number:03d}.log"
            text = redacted_text(data.decode(errors="replace"))
            try:
                storage.write_bytes(storage.join(self.place, name), text.encode())
            except (OSError, InputError):
                return  # the cluster has it, too
            if len(data) <= SEGMENT_BYTES:
                self.kept = len(data)
                return  # what was printed meanwhile goes with the next one: each sends all again
            self.number, self.begin, self.kept = self.number + 1, self.begin + len(data), 0

    def _piece(self) -> bytes:
        """The file that grows; empty if all of it is stored."""
        size = os.fstat(self.spool.fileno()).st_size - self.begin
        if size == self.kept:
            return b""
        return os.pread(self.spool.fileno(), min(size, 2 * SEGMENT_BYTES), self.begin)


def _ended(pump: subprocess.Popen) -> None:
    """Waits until all is copied; a child of this process may still hold the other end."""
    try:
        pump.wait(timeout=5)
    except subprocess.TimeoutExpired:
        pump.kill()
