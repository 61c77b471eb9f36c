"""Writes of whole files on disks: under another name, to the disk, and then by the right name.

`check`, which whoever may have lost an output to another driver gives, is asked before anything is
written and once more when only the renaming is left. A driver that begins removes what is not
renamed yet. So nothing arrives any more of one that was asked before another one began, however
long it stands still in between.
"""

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from pipelines.store_writes import warn_of

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)
TRIES = 8


def write(target: Path, data: bytes | pa.Buffer, check: Callable[[], None]) -> None:
    """Writes the file; what was there before is seen until all of the new one is."""
    _put(target, data, check, lambda temporary: bool(temporary.replace(target)))


def create(target: Path, data: bytes, check: Callable[[], None]) -> bool:
    """Writes the file only if nothing is there; whether it did."""
    return _put(target, data, check, lambda temporary: _link(temporary, target))


def remove_half_written(root: Path, *, below: str = "") -> None:
    """Removes what writers below a directory have not given its name yet: killed ones, and those
    whose next `check` fails.

    Not in directories that hold `below`, which others write.
    """
    for directory, inside, names in os.walk(root):
        if below and below in inside:
            if Path(directory) != root:
                inside.clear()
                continue
            inside.remove(below)
        for name in filter(TEMPORARY.fullmatch, names):
            with contextlib.suppress(OSError):
                Path(directory, name).unlink()


def _put(
    target: Path,
    data: bytes | pa.Buffer,
    check: Callable[[], None],
    rename: Callable[[Path], bool],
) -> bool:
    """Writes under another name, and gives it this one."""
    for attempt in range(TRIES):
        with _temporary_file(target, data) as temporary:
            check()
            try:
                return rename(temporary)
            except FileNotFoundError:
                # A driver that begins here has removed it: we go on if `check` lets us.
                if attempt == TRIES - 1:
                    raise
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _temporary_file(target: Path, data: bytes | pa.Buffer) -> Iterator[Path]:
    """A file beside `target` with `data` on disk; what is left of it goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(memoryview(data))
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        # A full disk is told by `write`, which knows no names.
        error.filename = str(target)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: Path) -> bool:
    """Gives the file this name, too, if nothing has it."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        # Many network and USB file systems have no hard links.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if target.exists():
            return False
        warn_of(str(target.parent))
        temporary.replace(target)
    return True
