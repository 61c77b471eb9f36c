"""The driver's part in making a table of unit files: what `tokenize` and `render` share.

Units are done in a pool (`unit_pools.py`); the ledger (`tokenization/ledger.py`) knows what of them
is done.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from pipelines import storage
from pipelines.errors import InputError, StageFailed
from pipelines.progress import Progress
from pipelines.tokenization.ledger import Ledger, refuse_other_options
from pipelines.units import Outcome

FILES_PER_TASK = 64

Check = Callable[[bytes, Any], tuple[bool, str | None]]
"""Bytes of a file and the rows, or row groups, it should have, to whether it is whole, and what of
another identity it carries."""


def take_up(
    ledger: Ledger,
    wanted: Mapping[str, Any],
    read_manifest: Callable[[str], dict[str, Any]],
    *,
    retry_rejected: bool,
) -> bool:
    """Takes over a finished table, less the files that are gone; whether nothing is left to do.

    Raises:
        InputError: the output was made, or begun, with other options.
    """
    try:
        manifest = read_manifest(ledger.uri)
    except (FileNotFoundError, NotADirectoryError):
        ledger.refuse_other(wanted)
        return False
    # Other libraries do not unmake a finished table.
    of_rows = {name: value for name, value in wanted.items() if name != "libraries"}
    refuse_other_options(ledger.uri, manifest, of_rows)
    ledger.load_manifest(manifest)
    lost = ledger.changed_files()
    for unit in lost:  # to be made again
        ledger.forget(unit)
    return not lost and not (retry_rejected and ledger.rejected)


@contextmanager
def kept(ledger: Ledger, progress: Progress, num_rows: int) -> Iterator[None]:
    """Around the work: whatever ends it, receipts are saved.

    Raises:
        KeyboardInterrupt: with what is done, for the user who stopped it.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{ledger.rows_done:,} of {num_rows:,} images are done; the same command goes "
            "on from here."
        ) from None
    finally:
        ledger.save()
        progress.close()


def book(outcome: Outcome, ledger: Ledger, max_rejected_units: int) -> bool:
    """Enters an outcome; whether a unit was computed.

    Raises:
        StageFailed: too many units were rejected.
        InputError: the worker's disk is not the driver's.
    """
    if outcome.rejected:
        ledger.reject(outcome.unit, outcome.rejected)
        refuse_rejections(ledger, max_rejected_units)
        return False
    ledger.add(outcome.unit, outcome.facts["size"], outcome.facts["hash"])
    _check_shared(ledger, outcome.unit)
    return True


def _check_shared(ledger: Ledger, unit: int) -> None:
    """Raises InputError where a worker wrote its file to a disk that only its own node sees."""
    name = ledger.units.name(unit)
    if storage.is_local(ledger.uri) and not storage.exists(storage.join(ledger.uri, name)):
        raise InputError(
            f"output = {ledger.uri}: a worker has written {name}, and it is not there: nodes see "
            "different disks; use a directory that all of them share, or an object store (s3://)"
        )


def refuse_rejections(ledger: Ledger, max_rejected_units: int) -> None:
    """Raises StageFailed if more units were rejected than may be."""
    if len(ledger.rejected) <= max_rejected_units:
        return
    unit, reason = next(iter(sorted(ledger.rejected.items())))
    raise StageFailed(
        f"max_rejected_units = {max_rejected_units}: {len(ledger.rejected)} units could not be "
        f"made, the first is {ledger.units.name(unit)} ({reason}); mend the cause and run again "
        "with --retry_rejected true, or raise --max_rejected_units"
    )


def check_complete(ledger: Ledger, max_rejected_units: int) -> None:
    """Raises StageFailed unless every unit has a file of the size in its receipt, or was rejected
    with leave to be."""
    refuse_rejections(ledger, max_rejected_units)
    for unit in ledger.changed_files():
        ledger.forget(unit)
    todo = ledger.todo()
    if len(todo):
        raise StageFailed(
            f"{ledger.uri}: {len(todo)} of {len(ledger.units)} units have no file of the size that "
            f"was written, the first is {ledger.units.name(todo[0])}; the same command makes them "
            "again"
        )
    if not ledger.done.any():
        raise StageFailed(f"{ledger.uri}: every unit was rejected; there is no table to make")


def verify(
    ledger: Ledger,
    unverified: np.ndarray,
    check: Check,
    rows_of: Callable[[int], Any],
    *,
    num_cpus: float,
) -> None:
    """Takes over files whose receipts were lost with an earlier driver; bad ones are redone.

    `rows_of` a unit are what `check` asks for.

    Raises:
        InputError: a file belongs to a table of another identity.
    """
    units = ledger.units
    names = [(int(unit), units.name(unit), rows_of(int(unit))) for unit in unverified]
    for unit, size, digest, difference in _verified(names, ledger.uri, check, num_cpus):
        if difference:
            raise InputError(
                f"{ledger.uri}: {difference} (what its files were made with != what is asked "
                "for now); use another output"
            )
        if size >= 0:
            ledger.add(unit, size, digest)
    ledger.save()


def _verified(
    names: list[tuple[int, str, Any]], uri: str, check: Check, num_cpus: float
) -> Iterator[tuple[int, int, str, str | None]]:
    """`verify_files` in tasks."""
    task = ray.remote(verify_files).options(num_cpus=num_cpus)
    pieces = range(0, len(names), FILES_PER_TASK)
    waiting = [task.remote(names[start : start + FILES_PER_TASK], uri, check) for start in pieces]
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        yield from ray.get(done)


def verify_files(
    names: Sequence[tuple[int, str, Any]], uri: str, check: Check
) -> list[tuple[int, int, str, str | None]]:
    """Re-reads files of (unit, name, rows): unit, size, hash, difference; size -1: not whole."""
    results: list[tuple[int, int, str, str | None]] = []
    for unit, name, rows in names:
        data = storage.read_bytes(storage.join(uri, name))
        whole, difference = check(data, rows)
        results.append((unit, len(data) if whole else -1, storage.digest(data), difference))
    return results
