"""A walk through the files below a directory or a prefix of a store, in the order of keys.

Keys are paths below the source, so that sorting directories as `name/` among files makes a walk
through the tree deliver them sorted: a billion files need no sorting and no memory. A tar or a
Parquet file takes the place of a directory: its rows are `FILE/MEMBER` or `FILE/ROW`.
"""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipelines import storage, stores
from pipelines.errors import InputError
from pipelines.preparation.ahead import futures_ahead
from pipelines.preparation.file_names import is_side_name

LIST_THREADS = 16
HIDDEN = "hidden"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file of the source, or a piece of one, as the plan lists it."""

    path: str
    """Below the source's root."""
    size: int
    """Bytes to be read, about."""
    first: int = 0
    """First row group (Parquet)."""
    stop: int = 0
    """Row group after the last one (Parquet)."""
    row: int = 0
    """Row of the file at which row group `first` begins (Parquet)."""
    rows: int = 0
    """Rows in the row groups (Parquet)."""
    reason: str = ""
    """Why it cannot even be opened."""
    ignored: str = ""
    """Why it is listed and not opened: it is not of the user's data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A name in a directory."""

    name: str
    size: int
    is_dir: bool
    reason: str = ""

    def position(self, container_suffix: str) -> str:
        """What it is sorted by: keys of what is inside go on with a slash."""
        container = container_suffix and self.name.lower().endswith(container_suffix)
        return self.name + "/" if self.is_dir or container else self.name


class Listings:
    """Lists directories below a root; what was listed while `keep` was set is not listed again.

    A directory's path ends with a slash; that of the root is empty. Object stores know names and
    directories that are empty: `a//1.png` is `1.png` in the directory `` in the directory `a`.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.keep = False
        self.kept: dict[str, list[Listed]] = {}

    def __call__(self, path: str) -> list[Listed]:
        """The names in a directory, in no order."""
        listed = self.kept.pop(path, None)
        if listed is None:
            list_dir = _list_local if storage.is_local(self.root) else _list_remote
            listed = list_dir(self.root, path)
        if self.keep:
            self.kept[path] = listed
        return listed


def walk(
    listings: Listings,
    *,
    may_hold: Callable[[str], bool] = lambda _: True,
    container_suffix: str = "",
) -> Iterator[Entry]:
    """All files, sorted by path; directories are listed a few ahead.

    Files with `container_suffix` (tars, Parquet) are sorted as the keys of what they hold are.
    Directories that `may_hold` denies are not listed. Those of programs (`.git`) are entries that
    are ignored as a whole: they may be large, or nobody's to read (`.Trashes` on a Mac's disk).

    Memory grows with the largest directory, not with the number of files. What is no regular
    file, or has a name that is no text, comes with a reason.

    Raises:
        InputError: a directory may not be read, or has a name that is no text.
    """
    with ThreadPoolExecutor(LIST_THREADS) as pool:

        def visit(above: str, listing: "Future[list[Listed]]") -> Iterator[Entry]:
            listed = sorted(
                (one for one in listing.result() if not one.is_dir or may_hold(above + one.name)),
                key=lambda one: one.position(container_suffix),
            )
            names = (_checked(above, one) + "/" for one in listed if _is_walked(one))
            ahead = futures_ahead(pool, listings, names)
            for one in listed:
                if _is_walked(one):
                    yield from visit(f"{above}{one.name}/", next(ahead))
                else:
                    path = above + one.name + "/" * one.is_dir
                    ignored = HIDDEN if is_side_name(one.name) else ""
                    yield Entry(path=path, size=one.size, reason=one.reason, ignored=ignored)

        yield from visit("", pool.submit(listings, ""))


def _is_walked(one: Listed) -> bool:
    return one.is_dir and not is_side_name(one.name)


def _checked(above: str, directory: Listed) -> str:
    if directory.reason:
        raise InputError(
            f"source: the name of the directory {above}{directory.name} is no UTF-8 text, so that "
            "what is inside can have no keys; rename it"
        )
    return above + directory.name


def _list_local(root: str, path: str) -> list[Listed]:
    directory = os.path.join(root, path)  # noqa: PTH118 - a path object per file would be slow

    @functools.cache
    def real_paths_above() -> list[str]:
        names = path.split("/")[:-1]
        logical = ("/".join([root, *names[:depth]]) for depth in range(len(names) + 1))
        return [os.path.realpath(one) for one in logical]

    def leads_back(found: "os.DirEntry[str]") -> bool:
        target = os.path.realpath(found.path) + "/"
        return any((real + "/").startswith(target) for real in real_paths_above())

    def listed(found: "os.DirEntry[str]") -> Listed:
        try:
            name = found.name.encode().decode()
            reason = ""
        except UnicodeEncodeError:
            name = os.fsencode(found.name).decode("utf-8", "backslashreplace")
            reason = "bad_name"
        try:
            if found.is_dir():
                if found.is_symlink() and leads_back(found):
                    return Listed(name=name, size=0, is_dir=False, reason="symlink_loop")
                return Listed(name=name, size=0, is_dir=True, reason=reason)
            if found.is_file():
                return Listed(name=name, size=found.stat().st_size, is_dir=False, reason=reason)
        except OSError:
            return Listed(name=name, size=0, is_dir=False, reason="unreadable")
        gone = found.is_symlink()  # to nothing: what else it leads to is a device, or a pipe
        reason = "missing" if gone and not Path(found.path).exists() else "not_a_file"
        return Listed(name=name, size=0, is_dir=False, reason=reason)

    try:
        with os.scandir(directory) as scan:
            return [listed(found) for found in scan]
    except FileNotFoundError:
        return []
    except PermissionError as error:
        raise InputError(
            f"source: {directory} may not be read; change its permissions, or choose files by a "
            "glob that leaves it out"
        ) from error


def _list_remote(root: str, path: str) -> list[Listed]:
    try:
        return [
            Listed(name=one.name, size=one.size, is_dir=one.is_dir)
            for one in stores.listed(root, path)
            # What bears the name of the source itself is no file in it.
            if one.name or one.is_dir or path
        ]
    except PermissionError as error:
        raise InputError(
            f"source: {root} may not be listed ({error.strerror}); ask for the right to list the "
            "bucket"
        ) from error
