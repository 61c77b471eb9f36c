"""What a source holds, in the order of the table: files found, told apart, cut into units.

Keys are paths below the source, so that sorting directories as `name/` among files makes a walk
through the tree deliver them sorted: a billion files need no sorting and no memory. A tar or a
Parquet file takes the place of a directory: its rows are `FILE/MEMBER` or `FILE/ROW`.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from pyarrow import fs as pafs

from pipelines import storage
from pipelines.errors import InputError
from pipelines.preparation import sample_images

T = TypeVar("T")
S = TypeVar("S")

Format = Literal["folder", "webdataset", "parquet", "sample"]
SUFFIXES: dict[str, str] = {"webdataset": ".tar", "parquet": ".parquet"}
# Files beside the data of a WebDataset or Parquet directory that say nothing about its format.
SIDE_FILES = (".json", ".txt", ".md", ".idx", ".yaml", ".csv", ".crc", "_SUCCESS", "LICENSE")
PEEK = 1000
LIST_THREADS = 16
# A tar from an object store, or a Parquet file sorted by its keys, is held in memory.
MAX_CONTAINER_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class Source:
    """A place to read images from."""

    uri: str
    """As given, local paths made absolute."""
    root: str
    """What keys are relative to."""
    pattern: str
    """Regular expression that paths below the root match; empty: all do."""
    format: Format

    def entries(self) -> Iterator[Entry]:
        """The source's files in key order."""
        if self.format == "sample":
            listed = sample_images.list_images()
            return (Entry(path=key, size=size) for key, size in listed)
        suffix = SUFFIXES.get(self.format, "")
        matches = re.compile(self.pattern or ".*", re.DOTALL).fullmatch
        depth = self.pattern.count("/") if self.pattern and ".*" not in self.pattern else None
        return (
            entry
            for entry in walk(self.root, max_depth=depth, container_suffix=suffix)
            if matches(entry.path) and entry.path.lower().endswith(suffix)
        )


def open_source(uri: str, wanted: str = "auto") -> Source:
    """Finds out what `uri` is.

    Args:
        wanted: One of the formats, or "auto" to tell by the names of the first files.

    Raises:
        InputError: nothing is there, or nothing of that format.
    """
    if uri.startswith("sample:"):
        if uri != sample_images.SAMPLE:
            raise InputError(f"source = {uri!r}: the only sample is {sample_images.SAMPLE!r}")
        return Source(uri=uri, root=uri, pattern="", format="sample")
    uri = storage.absolute(uri)
    root, pattern = _split_glob(uri)
    source = Source(uri=uri, root=root, pattern=pattern, format="folder")
    head = list(islice(source.entries(), PEEK))
    if not head:
        raise InputError(f"source = {uri!r}: no files there; check the path, or quote the glob")
    source = Source(uri=uri, root=root, pattern=pattern, format=_format(uri, wanted, head))
    if source.format != "folder" and next(source.entries(), None) is None:
        raise InputError(f"source = {uri!r}: no *{SUFFIXES[source.format]} files there")
    return source


def _format(uri: str, wanted: str, head: list[Entry]) -> Format:
    if wanted in ("folder", "webdataset", "parquet"):
        return wanted  # type: ignore[return-value]
    names = [entry.path for entry in head]
    telling = [
        name.lower()
        for name in names
        if not name.endswith(SIDE_FILES) and not name.rpartition("/")[2].startswith(".")
    ]
    if telling and all(name.endswith((".tar.gz", ".tgz", ".tar.zst")) for name in telling):
        raise InputError(f"source = {uri!r}: compressed tars cannot be read; unpack them to .tar")
    if telling and all(name.endswith(".tar") for name in telling):
        return "webdataset"
    if telling and all(name.endswith(".parquet") for name in telling):
        return "parquet"
    return "folder"


def _split_glob(uri: str) -> tuple[str, str]:
    """(root, regular expression for paths below it; empty for everything)."""
    if storage.is_local(uri):
        path, query = uri, ""
        if Path(path).is_file():
            return str(Path(path).parent), re.escape(Path(path).name)
        if Path(path).is_dir():
            return path, ""
        wild = re.compile(r"[*?[]")
    else:
        path, _, query = uri.partition("?")
        wild = re.compile(r"[*[]")  # a question mark starts the options of a remote URI
    pieces = path.split("/")
    for position, piece in enumerate(pieces):
        if wild.search(piece):
            root = "/".join(pieces[:position])
            return root + (query and f"?{query}"), glob_regex("/".join(pieces[position:]))
    if storage.is_local(uri):
        raise InputError(f"source = {uri!r}: no such file or folder")
    filesystem, remote = storage.resolve(uri)
    if storage.retry(lambda: filesystem.get_file_info(remote)).type == pafs.FileType.File:
        parent = path.rpartition("/")[0] + (query and f"?{query}")
        return parent, re.escape(path.rpartition("/")[2])
    return uri, ""


def glob_regex(pattern: str) -> str:
    """`*` and `?` stay within a directory, `**/` is any number of directories, `[ab]` a choice."""
    out = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]+\]|.", pattern, re.DOTALL):
        if token == "**/":
            out.append("(?:.*/)?")
        elif token == "**":
            out.append(".*")
        elif token in ("*", "?"):
            out.append("[^/]*" if token == "*" else "[^/]")
        elif len(token) > 2 and token.startswith("["):
            out.append("[^" + token[2:] if token[1] == "!" else token)
        else:
            out.append(re.escape(token))
    return "".join(out)


@dataclass(frozen=True, kw_only=True)
class _Listed:
    """A name in a directory."""

    name: str
    size: int
    is_dir: bool
    reason: str = ""

    def position(self, container_suffix: str) -> str:
        """What it is sorted by: keys of what is inside go on with a slash."""
        container = container_suffix and self.name.lower().endswith(container_suffix)
        return self.name + "/" if self.is_dir or container else self.name


def walk(root: str, *, max_depth: int | None = None, container_suffix: str = "") -> Iterator[Entry]:
    """All files below `root`, sorted by path; directories are listed a few ahead.

    Files with `container_suffix` (tars, Parquet) are sorted as the keys of what they hold are.

    Memory grows with the largest directory, not with the number of files. What is no regular
    file, or has a name that is no text, comes with a reason.

    Raises:
        InputError: a directory may not be read.
    """
    local = storage.is_local(root)
    list_dir = _list_local if local else _list_remote

    with ThreadPoolExecutor(LIST_THREADS) as pool:

        def visit(path: str, listing: "Future[list[_Listed]]") -> Iterator[Entry]:
            listed = sorted(listing.result(), key=lambda one: one.position(container_suffix))
            depth = path.count("/") + 1 if path else 0
            below = max_depth is None or depth < max_depth
            names = (f"{path}/{one.name}" if path else one.name for one in listed if one.is_dir)
            ahead = _ahead(pool, lambda name: list_dir(root, name), names if below else ())
            for one in listed:
                name = f"{path}/{one.name}" if path else one.name
                if not one.is_dir:
                    yield Entry(path=name, size=one.size, reason=one.reason)
                elif below:
                    yield from visit(name, next(ahead))

        yield from visit("", pool.submit(list_dir, root, ""))


def _ahead(
    pool: ThreadPoolExecutor, action: Callable[[S], T], values: Iterable[S], depth: int = 8
) -> "Iterator[Future[T]]":
    """Futures of `action(value)` in order, `depth` of them running ahead of the reader."""
    rest = iter(values)
    pending = deque(pool.submit(action, value) for value in islice(rest, depth))
    while pending:
        yield pending.popleft()
        pending.extend(pool.submit(action, value) for value in islice(rest, 1))


def mapped_ahead(action: Callable[[S], T], values: Iterable[S], *, num_threads: int) -> Iterator[T]:
    """`map` in threads: results in order, at most 2 x `num_threads` of them waiting."""
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for future in _ahead(pool, action, values, depth=2 * num_threads):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _list_local(root: str, path: str) -> list[_Listed]:
    directory = os.path.join(root, path)  # noqa: PTH118 - a path object per file would be slow
    try:
        with os.scandir(directory) as scan:
            return [_listed_local(directory, found) for found in scan]
    except FileNotFoundError:
        return []
    except PermissionError as error:
        raise InputError(f"source: {directory} may not be read; change its permissions") from error


def _listed_local(directory: str, found: "os.DirEntry[str]") -> _Listed:
    try:
        found.name.encode()
    except UnicodeEncodeError:
        name = os.fsencode(found.name).decode("utf-8", "backslashreplace")
        return _Listed(name=name, size=0, is_dir=False, reason="bad_name")
    try:
        if found.is_dir():
            real = os.path.realpath(directory)
            target = os.path.realpath(found.path) if found.is_symlink() else ""
            if target and (real + "/").startswith(target + "/"):
                return _Listed(name=found.name, size=0, is_dir=False, reason="symlink_loop")
            return _Listed(name=found.name, size=0, is_dir=True)
        if found.is_file():
            return _Listed(name=found.name, size=found.stat().st_size, is_dir=False)
    except OSError:
        return _Listed(name=found.name, size=0, is_dir=False, reason="unreadable")
    return _Listed(name=found.name, size=0, is_dir=False, reason="not_a_file")


def _list_remote(root: str, path: str) -> list[_Listed]:
    filesystem, base = storage.resolve(storage.join(root, path) if path else root)
    selector = pafs.FileSelector(base, allow_not_found=True, recursive=False)
    infos = storage.retry(lambda: filesystem.get_file_info(selector))
    return [
        _Listed(
            name=info.base_name,
            size=int(info.size or 0),
            is_dir=info.type == pafs.FileType.Directory,
        )
        for info in infos
        if info.base_name
    ]


def cut(entries: Iterable[Entry], unit_bytes: int, *, max_entries: int) -> Iterator[list[Entry]]:
    """Entries in order, cut where a unit has at least `unit_bytes` (or `max_entries`)."""
    unit: list[Entry] = []
    size = 0
    for entry in entries:
        unit.append(entry)
        size += entry.size
        if size >= unit_bytes or len(unit) >= max_entries:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def check_container_sizes(entries: Iterable[Entry], source: Source) -> Iterator[Entry]:
    """Passes tars on; refuses those that a worker could not hold.

    Raises:
        InputError: a remote tar is too large.
    """
    for entry in entries:
        if entry.size > MAX_CONTAINER_BYTES and not storage.is_local(source.root):
            raise InputError(
                f"source: {entry.path} has {entry.size} bytes, more than {MAX_CONTAINER_BYTES}; "
                "cut it into smaller tars (WebDataset advises 1 GB), or copy it to a local disk"
            )
        yield entry


def class_folders(entries: Iterable[Entry], seen: set[str]) -> Iterator[Entry]:
    """Passes entries on and notes the first directory of their paths in `seen`."""
    for entry in entries:
        folder, slash, _ = entry.path.partition("/")
        if slash:
            seen.add(folder)
        yield entry
