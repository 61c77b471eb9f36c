"""An attempt of a job: its log kept beside the output, how it ended, and whether to try at all.

A job is what a scheduler starts and may start again: `beit submit`, a RayJob, a Slurm job. It is
named by BEIT_JOB; without it nothing here does anything. Logs and exit codes go with their cluster,
so what an attempt says and how it ended also stand beside the output, as `OUTPUT.logs/` and
`OUTPUT.result.json`.
"""

import contextlib
import os
import platform
import sys
import threading
import time
from typing import Any

from jobs.submission.access import JOB, RETRY
from pipelines.config.checks import to_dict
from pipelines.errors import InputError
from pipelines.redaction import redacted_text

FLUSH_SECONDS = 60.0
SEGMENT_BYTES = 4 * 2**20


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
        if not self.job:
            return
        from pipelines import storage
        from pipelines.code_digest import code_digest

        self.identity = storage.fingerprint([stage, to_dict(config), code_digest()])
        address = os.environ.get("RAY_ADDRESS", "this machine")
        print(
            f"beit {stage}: attempt {self.name} on {platform.node()}, cluster {address}",
            file=sys.stderr,
        )
        if self.log is not None and output:
            self.log.keep_at(storage.beside(output, ".logs"), self.name)
        if output:
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
        if not self.job:
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
        if self.log is not None:
            self.log.end_errors()
        told = "; ".join(" ".join(line.split()) for line in cause.splitlines())
        print(f"beit: exit code {code}" + (f": {told}" if told else ""), flush=True)
        if self.log is not None:
            self.log.close()


class KeptLog:
    """What this process prints, also in files beside its output.

    Copied where all of it passes, at the descriptors, so that what libraries print in C is there,
    too. A new file begins every few megabytes, because object stores know no appending.
    """

    def __init__(self) -> None:
        self.place = self.name = ""
        self.number, self.segment, self.kept = 0, bytearray(), 0
        self.lock = threading.Lock()
        self.stop = threading.Event()
        sys.stdout.flush()
        sys.stderr.flush()
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
            self.pumps[1].join(timeout=5)  # a child may hold the other end

    def close(self) -> None:
        """Stores the rest; the descriptors are what they were."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(self.real, start=1):
            os.dup2(descriptor, number)
        for pump in self.pumps:
            pump.join(timeout=5)
        self.stop.set()
        self.flusher.join(timeout=30)
        self._flush()

    def _copied(self, *numbers: int) -> threading.Thread:
        source, target = os.pipe()
        for number in numbers:
            os.dup2(target, number)
        os.close(target)
        pump = threading.Thread(
            target=self._pump, args=(source, self.real[numbers[0] - 1]), name="log", daemon=True
        )
        pump.start()
        return pump

    def _pump(self, source: int, real: int) -> None:
        while data := os.read(source, 65536):
            with contextlib.suppress(OSError):  # a full disk, a reader that is gone: never wait
                os.write(real, data)
            with self.lock:
                if self.place or len(self.segment) < SEGMENT_BYTES:
                    self.segment += data
        os.close(source)

    def _flush_often(self) -> None:
        while not self.stop.wait(FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        from pipelines import storage

        with self.lock:
            size = len(self.segment)
            if not self.place or size == self.kept:
                return
            text = redacted_text(self.segment.decode(errors="replace"))
            name = f"{self.name}.{self.number:03d}.log"
        try:
            storage.write_bytes(storage.join(self.place, name), text.encode())
        except (OSError, InputError):
            return  # tried again with the next piece; the cluster has it, too
        with self.lock:
            self.kept = size
            if size > SEGMENT_BYTES:
                self.number, self.kept = self.number + 1, 0
                del self.segment[:size]
