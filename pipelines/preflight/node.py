"""What one node answers: what it sees and may write, what it is made of, whether its GPUs work."""

import json
import platform
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from pipelines import storage
from pipelines.code_digest import code_digest
from pipelines.errors import InputError
from pipelines.preflight.accelerator import accelerator_trouble
from pipelines.tracking.store import require_answer

Result = TypeVar("Result")

LIBRARIES = ("ray", "torch", "pyarrow", "numpy", "pillow")
# By what an artefact is known; the first that is there decides.
MARK = "preflight-"
"""How names begin of the files by which nodes show that they see one place."""
IDENTITIES = ("manifest.json", "config.json", "config.yaml")
MOST_NAMES = 10_000
# Clients of stores try for minutes by themselves.
PLACE_SECONDS = 45.0
OPEN = "start the MLflow server, or open the way to it from the nodes"
SHARE = "use a directory that all nodes share, or an object store (s3://)"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A URI that a stage reads or writes."""

    field: str
    """The flag that names it."""
    uri: str
    written: bool = False
    mark: str = ""
    """Of a place that is written: the file that the driver leaves there for the others to find."""
    seen: str = ""
    """What the driver saw there; "": this is the driver."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a node is asked."""

    node: str
    places: tuple[Place, ...]
    gpus: float
    """GPUs that Ray promises there; 0: none, or none are wanted."""
    tracking_uri: str


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Something that does not fit."""

    subject: str
    reason: str
    remedy: str

    def sentence(self, where: str) -> str:
        """What a person reads."""
        return f"{self.subject}: on {where}: {self.reason}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a node has answered."""

    versions: Mapping[str, str]
    troubles: tuple[Trouble, ...]
    seen: Mapping[str, str]
    """By field: what is there, the same text wherever the same is there."""


def examine(question: Question) -> Report:
    """Answers for the node that this runs on."""
    troubles: list[Trouble] = []
    seen: dict[str, str] = {}
    for place, outcome in _all_at_once(question):
        if isinstance(outcome, Trouble):
            troubles.append(outcome)
        else:
            seen[place.field] = outcome
    if question.tracking_uri.startswith("http"):
        try:
            require_answer(question.tracking_uri)
        except InputError as error:
            reason = str(error).removeprefix("tracking.uri: ").partition(";")[0]
            troubles.append(Trouble(subject="tracking.uri", reason=reason, remedy=OPEN))
    if question.gpus and (found := accelerator_trouble(question.gpus)):
        troubles.append(Trouble(subject="GPUs", reason=found[0], remedy=found[1]))
    return Report(versions=versions(), troubles=tuple(troubles), seen=seen)


def _all_at_once(question: Question) -> list[tuple[Place, str | Trouble]]:
    """Looks at all places, and waits for none longer than `PLACE_SECONDS`."""
    outcomes: dict[Place, str | Trouble] = {}

    def look_at(place: Place) -> None:
        outcomes[place] = _outcome(place, question.node)

    threads = [
        threading.Thread(target=look_at, args=(place,), daemon=True) for place in question.places
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PLACE_SECONDS)
    return [(place, outcomes.get(place) or _silent(place)) for place in question.places]


def _silent(place: Place) -> Trouble:
    return _trouble(
        place, f"no answer within {PLACE_SECONDS:.0f} s",
        "check the endpoint, and the way to it from the nodes",
    )  # fmt: skip


def _trouble(place: Place, reason: str, remedy: str) -> Trouble:
    return Trouble(subject=f"{place.field} = {place.uri}", reason=reason, remedy=remedy)


def _outcome(place: Place, node: str) -> str | Trouble:
    action: Callable[[Place, str], str] = _write if place.written else _read
    try:
        seen = action(place, node)
    except (OSError, InputError) as error:
        if isinstance(error, FileNotFoundError) and place.seen and storage.is_local(place.uri):
            return _trouble(place, "what the driver's node has there is not there", SHARE)
        if isinstance(error, FileNotFoundError) and not place.written:
            return _trouble(place, "nothing is there", "correct it, or make it first")
        verb = "written" if place.written else "read"
        reason = " ".join(str(error).split())[:400]
        return _trouble(place, f"cannot be {verb} ({reason})", "correct it, or allow it there")
    if place.seen and seen != place.seen:
        return _trouble(place, "the driver's node has something else there", SHARE)
    return seen


def _read(place: Place, _: str) -> str:
    """What is there, as a short text. Raises FileNotFoundError where nothing is."""
    uri = existing_part(place.uri)
    for name in IDENTITIES:
        try:
            identity = storage.read_bytes(storage.join(uri, name))
        except (FileNotFoundError, NotADirectoryError):
            continue
        return storage.digest(b"".join([identity, *_joined(identity)]))
    if not storage.exists(uri):
        raise FileNotFoundError(place.uri)
    return _names(uri) if storage.is_local(uri) else "there"


def _joined(manifest: bytes) -> Iterator[bytes]:
    """Manifests of the tables whose parts a joined image table has: a stage reads those."""
    if b'"tables"' not in manifest:
        return
    try:
        uris = [str(table["uri"]) for table in json.loads(manifest)["tables"]]
    except (ValueError, TypeError, KeyError):
        return  # the stage says what is wrong there
    for uri in uris:
        try:
            yield storage.read_bytes(storage.join(uri, "manifest.json"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"the table {uri}, which is joined there, is not seen") from error


def existing_part(uri: str) -> str:
    """A URI of files up to its first wildcard: the directory that must be there."""
    marks = r"[*?[{]" if storage.is_local(uri) else r"[*[{]"
    found = re.search(marks, uri)
    if found is None or (storage.is_local(uri) and storage.exists(uri)):
        return uri
    return uri[: found.start()].rpartition("/")[0] or "/"


def _names(uri: str) -> str:
    path = Path(storage.absolute(uri))
    if not path.is_dir():
        return f"{path.stat().st_size} bytes"
    names: list[str] = []
    for entry in path.iterdir():
        # Marks come and go while other nodes look.
        if not entry.name.startswith(MARK):
            names.append(entry.name)
        if len(names) > MOST_NAMES:
            return "many files"
    return storage.fingerprint(sorted(names))


def _write(place: Place, node: str) -> str:
    """Leaves the driver's mark; elsewhere finds it, leaves one of its own and takes that away."""
    if not place.seen:
        storage.write_bytes(place.mark, storage.digest(place.mark.encode()).encode())
        return storage.read_bytes(place.mark).decode()
    seen = storage.read_bytes(place.mark).decode()
    own = storage.beside(place.mark, f".{node}.tmp")
    storage.write_bytes(own, seen.encode())
    storage.delete(own)
    return seen


def existing_directory(uri: str) -> Path:
    """The place itself, or what is there of the way to it."""
    path = Path(storage.absolute(uri))
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def versions() -> dict[str, str]:
    """What the node computes with. Builds of one version (`+cpu`, `+cu130`) count as equal."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "missing"
    return found | {"beit and pipelines": code_digest()}
