"""Checkpoints that are complete or do not exist, at any URI.

`checkpoints/step_00012000/` holds `model.safetensors`, `optimizer.safetensors`, `state.json` and,
written last, `COMPLETE` with size and hash of the others. A checkpoint whose marker is missing or
whose files do not match it is passed over, with its reason. The names follow from the step, so a
run that is killed between two files writes the same ones again.

Ray's own registry of checkpoints is not used: it learns of one only when its controller polls the
workers (it lost the newest in most kills tried), and a second list could disagree with this one.
"""

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from typing_extensions import TypedDict

from pipelines import storage
from pipelines.errors import InputError
from pipelines.records import Count, FileRecord, read_values
from pipelines.training.distributed import World

MARKER = "COMPLETE"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"step_(\d{8,})")
SCHEMA_VERSION = 1


class Marker(TypedDict):
    """What must stand in COMPLETE."""

    schema_version: Literal[1]
    step: Count
    files: dict[str, FileRecord]


class DamagedCheckpointError(Exception):
    """A checkpoint cannot be used; says which file and why."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything needed to continue after `step` steps."""

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    """AdamW's state, by `moment.parameter`."""
    state: Mapping[str, Any]
    """JSON: how randomness is derived, configuration, fingerprints, health memory, ..."""


def checkpoint_name(step: int) -> str:
    """Directory of the checkpoint made after `step` steps."""
    return f"step_{step:08d}"


def save(
    root: str, checkpoint: Checkpoint, *, check: Callable[[], None] = storage.unchecked
) -> str:
    """Writes a checkpoint below `root`, its marker last, and returns its URI.

    `check` is called before each file, and ends it by an error of its own.

    Raises:
        DamagedCheckpointError: a weight or moment is not finite; nothing was written.
        OSError: the store refused (disk full); what was written has no marker.
    """
    for name, tensor in [*checkpoint.weights.items(), *checkpoint.moments.items()]:
        if not bool(torch.isfinite(tensor).all()):
            raise DamagedCheckpointError(f"{name} holds values that are not finite; not saved")
    uri = storage.join(root, checkpoint_name(checkpoint.step))
    check()
    # An older, complete one of the same name must not vouch for files that are being replaced.
    storage.delete(storage.join(uri, MARKER))
    record = {}
    for name, data in (
        (MODEL, save_tensors(dict(checkpoint.weights))),
        (OPTIMIZER, save_tensors(dict(checkpoint.moments))),
        (STATE, storage.canonical_json({**checkpoint.state, "step": checkpoint.step})),
    ):
        storage.write_bytes(storage.join(uri, name), data, check=check)
        record[name] = {"bytes": len(data), "hash": storage.digest(data)}
    marker = {"schema_version": SCHEMA_VERSION, "step": checkpoint.step, "files": record}
    storage.write_json(storage.join(uri, MARKER), marker, check=check)
    return uri


def load(root: str, step: int) -> Checkpoint:
    """Reads a checkpoint and checks every byte of it.

    Raises:
        DamagedCheckpointError: marker or file missing, of the wrong size, or altered.
    """
    uri = storage.join(root, checkpoint_name(step))
    files = {name: _read_checked(uri, name, entry) for name, entry in _marker(uri).items()}
    try:
        state = json.loads(files[STATE])
        weights, moments = load_tensors(files[MODEL]), load_tensors(files[OPTIMIZER])
    except Exception as error:  # safetensors raises its own, undocumented, types
        raise DamagedCheckpointError(f"{uri}: {error}") from error
    return Checkpoint(step=step, weights=weights, moments=moments, state=state)


def _marker(uri: str) -> dict[str, Any]:
    try:
        marker = read_values(storage.join(uri, MARKER), Marker, "it is passed over")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{uri}: {MARKER} is missing; it was never finished"
        ) from error
    except InputError as error:
        raise DamagedCheckpointError(str(error)) from error
    files: dict[str, Any] = marker["files"]
    if files.keys() != {MODEL, OPTIMIZER, STATE}:
        raise DamagedCheckpointError(f"{uri}/{MARKER}: lists other files than a checkpoint has")
    return files


def _read_checked(uri: str, name: str, entry: Mapping[str, Any]) -> bytes:
    try:
        data = storage.read_bytes(storage.join(uri, name))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{uri}/{name}: missing, though {MARKER} lists it") from error
    if len(data) != entry["bytes"]:
        raise DamagedCheckpointError(
            f"{uri}/{name}: {len(data)} bytes instead of {entry['bytes']}; it was cut off"
        )
    if storage.digest(data) != entry["hash"]:
        raise DamagedCheckpointError(f"{uri}/{name}: its hash is not the one in {MARKER}")
    return data


def list_steps(root: str) -> list[int]:
    """Steps of all checkpoint directories, complete or not, ascending."""
    directories = {file.path.partition("/")[0] for file in storage.list_files(root)}
    matches = (NAME.fullmatch(name) for name in directories)
    return sorted(int(match[1]) for match in matches if match)


def complete_steps(root: str) -> list[int]:
    """Steps of the checkpoints that have a marker, ascending; their files are not read."""
    files = storage.list_files(root, suffix="/" + MARKER)
    matches = (NAME.fullmatch(file.path.partition("/")[0]) for file in files)
    return sorted(int(match[1]) for match in matches if match)


def load_newest(root: str, *, rejected: Callable[[int, str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None.

    `rejected(step, reason)` is told of every newer one that is not.
    """
    for step in reversed(list_steps(root)):
        try:
            return load(root, step)
        except DamagedCheckpointError as error:
            rejected(step, str(error))
    return None


def resume_point(
    root: str, world: World, *, rejected: Callable[[int, str], None]
) -> Checkpoint | None:
    """The newest whole checkpoint, the same one on all workers: worker 0 chooses and checks.

    A rejected one loses its marker: it must not count as one of those that are kept.
    """
    found: Checkpoint | None = None
    if world.rank == 0:
        damaged: list[int] = []

        def discarded(step: int, reason: str) -> None:
            damaged.append(step)
            rejected(step, reason)

        found = load_newest(root, rejected=discarded)
        for step in damaged:
            discard(root, step)
    chosen = world.broadcast(found.step if found else None)
    return found if found or chosen is None else load(root, chosen)


def retain(root: str, keep: int) -> list[int]:
    """Deletes all complete checkpoints but the newest `keep`, and unfinished ones before those.

    The marker goes first: a deletion that is cut short leaves no checkpoint that looks whole.
    Returns the deleted steps.
    """
    complete = complete_steps(root)
    if len(complete) < keep:
        return []
    oldest_kept = complete[-keep]
    deleted = [step for step in list_steps(root) if step < oldest_kept]
    for step in deleted:
        uri = storage.join(root, checkpoint_name(step))
        storage.delete(storage.join(uri, MARKER))
        storage.delete_prefix(uri)
    return deleted


def discard(root: str, step: int) -> None:
    """Makes a checkpoint incomplete, for good: nothing will continue from it."""
    storage.delete(storage.join(root, checkpoint_name(step), MARKER))


class Saver:
    """Saves checkpoints in order, in the background if asked for; used by one worker.

    A failure (disk full) does not stop training: `failed(step, reason)` is told, and the previous
    checkpoint stays what a killed run continues from. `check` is asked before each write; what it
    raises ends the run.
    """

    def __init__(
        self,
        root: str,
        *,
        keep: int,
        asynchronous: bool,
        failed: Callable[[int, str], None],
        check: Callable[[], None] = storage.unchecked,
    ) -> None:
        self.root, self.keep, self.failed, self.check = root, keep, failed, check
        self.asynchronous = asynchronous
        self.last_saved: int | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Hands the checkpoint over; waits for the one before, and without `asynchronous` for it.

        At most one is in flight, so that memory holds one copy.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, checkpoint)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> int | None:
        """Returns when nothing is in flight: the step of the newest one saved here."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        return self.last_saved

    def close(self) -> None:
        """Waits, and ends the thread."""
        with contextlib.suppress(Exception):
            self.wait()
        self._pool.shutdown(wait=True)

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            save(self.root, checkpoint, check=self.check)
        except (OSError, DamagedCheckpointError) as error:
            self.failed(checkpoint.step, str(error))
            return
        self.last_saved = checkpoint.step
        self.check()
        with contextlib.suppress(OSError):  # what cannot be deleted now goes with the next one
            retain(self.root, self.keep)
