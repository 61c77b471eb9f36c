"""What a run has to say to MLflow, kept as files until MLflow has all of it, and after.

    tracking.json          what the run is, what it was made from and made, and how it ended
    metrics.jsonl          one line a logging period, by worker 0
    driver.jsonl           values that the driver has logged
    system.jsonl           load of worker 0's machine
    events/*.json          those of a step become metrics
    pictures/KEY/STEP.png  pictures, by the step that they were made at
    files/**               attached as they are, as are config.yaml and report.json

For a training this is the run directory. Other stages have a directory of their own for it, which
goes once MLflow has everything.
"""

import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from PIL import Image

from pipelines import storage
from pipelines.redaction import redacted_values

RECORD = "tracking.json"
OWN_WEIGHTS = "weights"
PERIODS = "metrics.jsonl"
LINES = (PERIODS, "driver.jsonl", "system.jsonl")
# What lines say of themselves, and nobody wants as a curve.
NO_CURVES = ("first_step", "masked_patches")
ATTACHED = ("config.yaml", "report.json")
EVERYTHING = (RECORD, "driver.jsonl", "system.jsonl")
DIRECTORIES = ("pictures", "files")


@dataclass(frozen=True, kw_only=True)
class Values:
    """Values of one step."""

    step: int
    """Steps that are done: of curves, probes and pictures alike."""
    timestamp: int
    """Milliseconds since the epoch, always the same for the same line: a request that is repeated
    after a lost answer stores nothing twice."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class Place:
    """How far a file of lines has been read."""

    offset: int = 0
    """Bytes, up to the end of a line."""
    last: bytes = b""
    """That line: where it stands no more, the file is another one."""


class Spool:
    """Reads and writes one such directory; `check` is called before each write."""

    def __init__(self, uri: str, check: Callable[[], None] = storage.unchecked) -> None:
        self.uri, self.check = uri, check
        self._record: dict[str, Any] | None = None

    def at(self, *parts: str) -> str:
        """URI of something inside."""
        return storage.join(self.uri, *parts)

    def record(self) -> dict[str, Any]:
        """tracking.json, as this process read it first and changed it since; {} without one."""
        if self._record is None:
            try:
                self._record = storage.read_json(self.at(RECORD))
            except FileNotFoundError:
                self._record = {}
        return self._record

    def update(self, **changes: Any) -> None:
        """Changes fields of tracking.json. Without secrets, as everything that is written."""
        # A new dictionary: a thread may be reading the old one.
        self._record = {**self.record(), **redacted_values(changes)}
        storage.write_json(self.at(RECORD), self._record, check=self.check)

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """Keeps a picture; of two with the same key and step, the last."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        name = f"{step:09d}.png"
        place = self.at("pictures", quote(key, safe=" "), name)
        storage.write_bytes(place, buffer.getvalue(), check=self.check)

    def file(self, name: str, data: bytes) -> None:
        """Keeps a file; `name` may contain directories."""
        storage.write_bytes(self.at("files", name), data, check=self.check)

    def values_after(self, name: str, place: Place, *, size: int) -> tuple[Iterator[Values], Place]:
        """What a file of `size` bytes has got since `place`, and how far that is; all of it where
        its lines have been written anew. Lines cut off by a kill are passed over.

        A long run writes tens of megabytes, and is looked at again and again.
        """
        begin = place.offset
        with storage.open_input(self.at(name), size=size) as file:
            if place.offset <= size:
                file.seek(place.offset - len(place.last))
            if place.offset > size or file.read(len(place.last)) != place.last:
                begin = 0
                file.seek(0)
            data = file.read()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        if lines:
            place = Place(begin + sum(map(len, lines)), lines[-1])
        return self._parsed(name, data), place

    def _parsed(self, name: str, data: bytes) -> Iterator[Values]:
        # A line of a training names the last step that it covers, and the first one is 0.
        shift = self.record().get("curves_from", 0) if name == PERIODS else 0
        for line in data.decode().splitlines():
            try:
                found = json.loads(line)
                step, when = int(found.pop("step")), float(found.pop("time", 0))
            except (ValueError, KeyError, AttributeError):
                continue
            yield Values(step=step + shift, timestamp=int(1000 * when), metrics=_numbers(found))

    def events(self) -> list[str]:
        """Names of all events."""
        return [file.path for file in storage.list_files(self.at("events"), ".json")]

    def values_of_event(self, name: str) -> Iterator[Values]:
        """What it measured, or that it happened; nothing for an event of no step."""
        event = storage.read_json(self.at("events", name))
        if "step" in event:
            measured = _numbers(event.get("figures", {}))
            metrics = measured or {f"event_{event['event']}": 1.0}
            timestamp = int(1000 * event["time"])
            yield Values(step=int(event["step"]), timestamp=timestamp, metrics=metrics)

    def pictures(self) -> list[tuple[str, int, str]]:
        """Key, step and URI of all pictures."""
        found = []
        for file in storage.list_files(self.at("pictures"), ".png"):
            key, _, name = file.path.rpartition("/")
            step = int(name.removesuffix(".png"))
            found.append((unquote(key), step, self.at("pictures", file.path)))
        return sorted(found, key=lambda picture: (picture[1], picture[0]))

    def files(self) -> dict[str, str]:
        """Files to attach: name -> URI."""
        here = {file.path for file in storage.list_files(self.uri, recursive=False)}
        found = {name: self.at(name) for name in ATTACHED if name in here}
        kept = storage.list_files(self.at("files"))
        return found | {file.path: self.at("files", file.path) for file in kept}

    def figures(self) -> dict[str, str]:
        """The newest picture of every key, as a file to attach: the run's description shows it."""
        newest = {key: uri for key, _, uri in self.pictures()}
        return {f"figures/{re.sub('[^A-Za-z0-9.-]', '_', key)}.png": u for key, u in newest.items()}

    def remove(self) -> None:
        """Deletes what stands here for MLflow alone."""
        for name in EVERYTHING:
            storage.delete(self.at(name))
        for name in DIRECTORIES:
            storage.delete_prefix(self.at(name))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    # Lists hold values step by step, null stands for what is not finite.
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in NO_CURVES
    }


class LinesFile:
    """A file of JSON lines, each with its step and time, of one writer at a time.

    Object stores get the whole file at every flush. Opening it for a run that continues at
    `start_step` drops the lines of later steps: they will be written again, equal.

    On a disk each writer has a file of its own, which takes the name over from its predecessor's:
    what one writes that stood still for long goes nowhere. `check` is called before each write.
    """

    def __init__(
        self,
        uri: str,
        *,
        start_step: int | None = None,
        check: Callable[[], None] = storage.unchecked,
    ) -> None:
        self.uri, self.check = uri, check
        try:
            text = storage.read_bytes(uri).decode()
        except FileNotFoundError:
            text = ""
        steps = ((line, _step_of(line)) for line in text.splitlines())
        kept = {
            line: step
            for line, step in steps
            if step is not None and (start_step is None or step < start_step)
        }
        self.next_step = 1 + max(kept.values(), default=-1)
        self.lines = list(kept)
        self._begin()

    def _begin(self) -> None:
        self._write_all()
        if storage.is_local(self.uri):
            self.file = Path(storage.absolute(self.uri)).open("a")  # noqa: SIM115 - kept open
            self.check()  # it is ours that was opened

    def _write_all(self) -> None:
        data = "".join(line + "\n" for line in self.lines).encode()
        storage.write_bytes(self.uri, data, check=self.check)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line; on object stores it becomes visible with the next flush."""
        line = json.dumps({"time": time.time(), **record}, sort_keys=True)
        self.next_step = max(self.next_step, int(record["step"]) + 1)
        self.lines.append(line)
        if not storage.is_local(self.uri):
            return
        self.check()
        if self._is_ours():
            self.file.write(line + "\n")
            self.file.flush()
        else:
            self.file.close()
            self._begin()

    def _is_ours(self) -> bool:
        """Whether none who stood still has put a file of his in place of ours."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), Path(self.file.name).stat())
        except FileNotFoundError:
            return False

    def flush(self) -> None:
        """Makes all lines durable."""
        if self.lines and not storage.is_local(self.uri):
            self._write_all()


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut off by a kill
        return None
