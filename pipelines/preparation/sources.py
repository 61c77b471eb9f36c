"""What a source holds: its format told by names, its files in the order of the table, in units."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from beit.git_lfs import MAX_POINTER_BYTES, REMEDY, is_pointer
from pipelines import storage, stores
from pipelines.errors import InputError
from pipelines.preparation import sample_images
from pipelines.preparation.file_names import (
    NO_PICTURES,
    PACKED,
    SIDE_FILES,
    claims_picture,
    is_side_name,
)
from pipelines.preparation.globs import WILD, WILD_REMOTE, Glob, exactly
from pipelines.preparation.labels import MAX_CLASSES, folder_class
from pipelines.preparation.walking import Entry, Listings, walk

Format = Literal["folder", "webdataset", "parquet", "sample"]
SUFFIXES: dict[str, str] = {"webdataset": ".tar", "parquet": ".parquet"}
OTHER_FILE = "other_file"
PEEK = 1000
# A tar from an object store, or a Parquet file sorted by its keys, is held in memory.
MAX_CONTAINER_BYTES = 4 * 2**30
# Names of the parts of a data set; also `train2017`, `val_1`, `test-a`, `train_images`.
_PART = re.compile(
    r"(?:.*[-_.])?(?:(?P<train>train(?:ing|val)?)|(?P<val>val(?:id(?:ation)?)?|minival|dev)|"
    r"(?P<test>test(?:ing)?|eval(?:uation)?|hold[-_ ]?out)|(?P<rest>extra|unlabell?ed))"
    r"(?:[-_. ]?(?:[0-9]+|[a-z]|set|data|images?|split))?"
)
# Pieces of a data set (`fold1`), and what lies beside its pictures (`images`, `masks`, `depth`).
_PIECE = re.compile(
    r"(?:fold|split|part|subset|shard|chunk|batch)[-_. ]?[0-9]+|(?:jpe?g|png)?images?|imgs?|"
    r"pictures|photos|frames|rgb|depth|masks?|labels?|annotations?|ground[-_ ]?truth|gt|"
    r"(?:semantic|instance)?[-_ ]?seg(?:mentation)?s?(?:class|object)?|thumb(?:nail)?s?"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A place to read images from."""

    uri: str
    """As given, local paths made absolute."""
    root: str
    """What keys are relative to."""
    glob: Glob
    """Which paths below the root are meant."""
    format: Format
    listings: Listings

    def entries(self) -> Iterator[Entry]:
        """The source's files in key order, also those beside its data (`Entry.ignored`).

        Raises:
            InputError: there are compressed tars among containers.
        """
        if self.format == "sample":
            listed = sample_images.list_images()
            return (Entry(path=key, size=size) for key, size in listed)
        suffix = SUFFIXES.get(self.format, "")
        files = walk(self.listings, may_hold=self.glob.may_hold, container_suffix=suffix)
        return (self._judged(entry, suffix) for entry in files if self.glob.matches(entry.path))

    def _judged(self, entry: Entry, suffix: str) -> Entry:
        if self.glob.exact:  # whatever its name, the user has given it
            return replace(entry, ignored="")
        if entry.ignored or entry.path.lower().endswith(suffix):
            return entry
        if entry.path.lower().endswith(PACKED):
            raise InputError(
                f"source = {self.uri!r}: {entry.path} is compressed and cannot be read beside "
                f"*{suffix}; unpack it to .tar, or choose files by a glob"
            )
        return replace(entry, ignored=OTHER_FILE)


def _is_own(path: str) -> bool:
    """Whether a file or one of its directories is a program's own (`.git`, `_metadata`)."""
    return any(name.startswith("_") or is_side_name(name) for name in path.split("/"))


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
        return Source(uri=uri, root=uri, glob=Glob(), format="sample", listings=Listings(uri))
    uri = storage.absolute(uri)
    root, glob = _split_glob(uri)
    listings = Listings(root)
    listings.keep = True
    files = _visible(listings, glob)
    head = list(islice(files, PEEK))
    listings.keep = False
    if not head:  # a source may consist of nothing but hidden files
        files = (
            entry for entry in walk(listings, may_hold=glob.may_hold) if glob.matches(entry.path)
        )
        head = list(islice(files, PEEK))
    if not head:
        raise InputError(f"source = {uri!r}: no files there; check the path, or quote the glob")
    if not glob.exact and all(entry.ignored for entry in head):
        raise InputError(
            f"source = {uri!r}: only files there that belong to programs ({head[0].path}); give "
            "the hidden directory itself if it is meant"
        )
    told = _format(uri, wanted, [entry.path for entry in head])
    suffix = SUFFIXES.get(told, "")
    if not any(entry.path.lower().endswith((suffix, *PACKED)) for entry in chain(head, files)):
        raise InputError(f"source = {uri!r}: no *{suffix} files there")
    return Source(uri=uri, root=root, glob=glob, format=told, listings=listings)


def _visible(listings: Listings, glob: Glob) -> Iterator[Entry]:
    files = walk(listings, may_hold=lambda path: not _is_own(path) and glob.may_hold(path))
    return (entry for entry in files if not _is_own(entry.path) and glob.matches(entry.path))


def _format(uri: str, wanted: str, names: list[str]) -> Format:
    if wanted in ("folder", "webdataset", "parquet"):
        return wanted  # type: ignore[return-value]
    containers = [name for name in names if name.lower().endswith((".tar", ".parquet", *PACKED))]
    others = [
        name
        for name in names
        if not name.lower().endswith((".tar", ".parquet", *PACKED, *SIDE_FILES))
    ]
    if not containers:
        return "folder"
    if others:
        raise InputError(
            f"format = 'auto': {uri} holds {containers[0]} beside {others[0]}; set --format "
            "folder, webdataset or parquet, or choose files by a glob"
        )
    for name in containers:
        if name.lower().endswith(PACKED):
            raise InputError(f"source = {uri!r}: {name} is compressed; unpack it to .tar")
    tars = any(name.lower().endswith(".tar") for name in containers)
    return "webdataset" if tars else "parquet"


def _split_glob(uri: str) -> tuple[str, Glob]:
    """The root, and what is meant below it."""
    if storage.is_local(uri):
        path, query, wild = uri, "", WILD
        if Path(path).is_file():
            return str(Path(path).parent), exactly(Path(path).name)
        if Path(path).is_dir():
            return path, Glob()
    else:
        path, _, query = stores.plain(uri).partition("?")
        query, wild = query and f"?{query}", WILD_REMOTE
    pieces = path.split("/")
    for position, piece in enumerate(pieces):
        if wild.search(piece):
            pattern = "/".join(pieces[position:])
            root = "/".join(pieces[:position]) + query
            return root, Glob(pattern if storage.is_local(uri) else stores.unescaped(pattern))
    if storage.is_local(uri):
        raise InputError(f"source = {uri!r}: no such file or folder")
    if storage.is_file(uri):
        above, _, name = path.rpartition("/")
        return above + query, exactly(stores.unescaped(name))
    return uri, Glob()


def cut(entries: Iterable[Entry], unit_bytes: int, *, max_entries: int) -> Iterator[list[Entry]]:
    """Entries in order, cut where a unit has at least `unit_bytes` to read (or `max_entries`)."""
    unit: list[Entry] = []
    size = 0
    for entry in entries:
        unit.append(entry)
        size += 0 if entry.ignored else entry.size
        if size >= unit_bytes or len(unit) >= max_entries:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def check_tars(entries: Iterable[Entry], source: Source) -> Iterator[Entry]:
    """Passes tars on; refuses those that a worker could not hold.

    Raises:
        InputError: a remote tar is too large, or one was not fetched by Git LFS.
    """
    for entry in entries:
        check_fetched(entry, source)
        if entry.size > MAX_CONTAINER_BYTES and not storage.is_local(source.root):
            raise InputError(
                f"source: {entry.path} has {entry.size} bytes, more than {MAX_CONTAINER_BYTES}; "
                "cut it into smaller tars (WebDataset advises 1 GB), or copy it to a local disk"
            )
        yield entry


def check_fetched(entry: Entry, source: Source) -> None:
    """Raises InputError for a container of which only a pointer of Git LFS is there."""
    if entry.size > MAX_POINTER_BYTES or entry.reason or entry.ignored:
        return
    try:
        data = storage.read_bytes(storage.join(source.root, entry.path))
    except OSError:  # for its reader to judge
        return
    if is_pointer(data):
        raise InputError(f"source: {entry.path} and others may be {REMEDY}")


def class_folders(entries: Iterable[Entry], seen: set[str], level: int = 1) -> Iterator[Entry]:
    """Passes entries on and notes in `seen` the folders `level` steps below the source.

    Raises:
        InputError: these are too many for classes.
    """
    for entry in entries:
        folder = folder_class(entry.path, level)
        # A folder of notes is no class.
        text = entry.path.lower().endswith(NO_PICTURES) and not claims_picture(entry.path)
        # What lies between the slashes of `s3://bucket//a.png` is none either.
        if folder and not entry.ignored and not text:
            seen.add(folder)
            if len(seen) > MAX_CLASSES:
                raise InputError(
                    f"labels = 'folder': more than {MAX_CLASSES} folders are no classes; "
                    "set labels = 'none'"
                )
        yield entry


def look_like_parts(folders: Iterable[str]) -> bool:
    """Whether folders are called like the parts of a data set (`train`, `val`; `images`, `masks`),
    not like classes.

    `train` among other names may be the vehicle.
    """
    names = {name.lower() for name in folders}
    parts = [match for name in names if (match := _PART.fullmatch(name))]
    pieces = [name for name in names if _PIECE.fullmatch(name)]
    every = 0 < len(parts) + len(pieces) == len(names)
    return every or len({match.lastgroup for match in parts}) > 1
