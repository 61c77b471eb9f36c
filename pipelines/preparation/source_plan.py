"""The plan of a `prepare`: what will be read, in which units, by which rules.

It is made once, by listing the source, and kept beside the output until the table is finished.
An interrupted run goes on with the plan it began with, so a source that grew in the meantime
cannot mix two listings in one table.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage, stores
from pipelines.config.checks import changed_fields
from pipelines.config.prepare import MAY_CHANGE, PrepareConfig, identity
from pipelines.errors import InputError
from pipelines.preparation import sample_images
from pipelines.preparation.ahead import mapped_ahead
from pipelines.preparation.first_samples import check_first_samples
from pipelines.preparation.parquet_source import ParquetPlan
from pipelines.preparation.readers import Reader
from pipelines.preparation.sources import (
    Source,
    check_tars,
    class_folders,
    cut,
    look_like_parts,
    open_source,
)
from pipelines.preparation.walking import Entry
from pipelines.records import encode_record, read_record
from pipelines.redaction import redacted
from pipelines.units import WORK, work_uri

PLAN_VERSION = 3
# Release 0.1.0 counted neither images of a class nor ignored files; its work is finished likewise.
NO_CLASS_COUNTS = 2
OUR_FILES = ("part-00000.parquet", "rejected.parquet", "ignored.parquet", "manifest.json")
MEGABYTE = 1_000_000
# Tiny images: a unit of so many takes seconds to minutes; its listing stays small.
MAX_UNIT_ENTRIES = 20_000
THREADS = 16


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """What a unit's worker and the driver need to know; grows with units, not with images."""

    source: dict[str, str]
    """uri and format."""
    options: dict[str, Any]
    """The options that decide what the table contains."""
    reader: Reader
    num_items: int | None
    """Candidate images; unknown for tars."""
    num_bytes: int
    listings: tuple[str, ...]
    """Hash of the listing of every unit."""
    plan_version: int = PLAN_VERSION

    def to_dict(self) -> dict[str, Any]:
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "reader": dataclasses.asdict(self.reader),
            "listings": list(self.listings),
        }


def check_identity(config: PrepareConfig, output: str, recorded: dict[str, Any]) -> None:
    """Compares the options with those that an output was begun or made with, source and all.

    Raises:
        InputError: naming the first field that differs, and both values.
    """
    uri = config.source
    source = uri if uri.startswith("sample:") else storage.absolute(uri)
    changed = changed_fields(recorded, dataclasses.replace(config, source=source), MAY_CHANGE)
    for name, (before, now) in changed.items():
        raise InputError(
            f"{name} = {now!r}, but {output} was prepared with {name} = {before!r}; give another "
            f"output, or the same {name} to go on"
        )


def read_plan(config: PrepareConfig, output: str) -> SourcePlan | None:
    """The plan that an interrupted run left at `output`.

    Raises:
        InputError: it was made with other options.
    """
    try:
        plan = read_record(work_uri(output, "plan.json"), SourcePlan, f"remove {WORK}/ in {output}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if plan.plan_version not in (NO_CLASS_COUNTS, PLAN_VERSION):
        raise InputError(f"{output}: unfinished work of another version; remove {WORK}/ there")
    check_identity(config, output, {"source": plan.source["uri"], **plan.options})
    return plan


def make_plan(config: PrepareConfig, output: str) -> SourcePlan:
    """Lists the source, writes the listing of every unit and then the plan.

    Raises:
        InputError: the source is not there, or has no such fields; another driver has planned
            with other options meanwhile.
    """
    source = open_source(config.source, config.format)
    _check_apart(source, output)
    _check_fields(config, source)
    counter = _Counter()
    reader = Reader(
        root=source.root,
        format=source.format,
        labels="none",
        group_pattern=config.group_pattern,
        max_image_bytes=int(config.max_image_mb * MEGABYTE),
    )
    folders: set[str] = set()
    parquet = None
    if source.format == "parquet":
        parquet = ParquetPlan(config, source)
        entries = parquet.entries()
    elif source.format == "webdataset":
        entries = check_tars(source.entries(), source)
        labels = "none" if config.labels == "none" else "field"
        reader = dataclasses.replace(
            reader,
            labels=labels,
            label_field=config.label_field,
            label_required=config.labels == "field",
            image_field=config.image_field,
        )
        check_first_samples(config, source, reader)
    elif config.labels == "none":
        entries = source.entries()
    else:
        entries = class_folders(source.entries(), folders, config.label_level)
    units = cut(
        counter.count(entries), int(config.part_mb * MEGABYTE), max_entries=MAX_UNIT_ENTRIES
    )
    listings = tuple(_write_listings(output, units))
    if parquet:
        reader = parquet.with_columns(reader)
    elif source.format in ("folder", "sample"):
        if source.format == "sample":
            folders.discard(sample_images.UNLABELLED)
        reader = _with_folder_labels(config, reader, folders)
    counted = parquet.num_items if parquet else counter.items
    plan = SourcePlan(
        source={"uri": redacted(source.uri), "format": source.format},
        options=identity(config),
        reader=reader,
        num_items=None if source.format == "webdataset" else counted,
        num_bytes=counter.bytes,
        listings=listings,
    )
    if storage.create(work_uri(output, "plan.json"), encode_record(plan.to_dict())):
        return plan
    # Another driver has planned meanwhile: its plan holds, and other options are refused by name.
    return read_plan(config, output) or plan


def read_listing(output: str, unit: int, listing: str) -> list[Entry]:
    """The entries of a unit.

    Raises:
        InputError: the listing is not the planned one: two runs planned at once and found
            different files.
    """
    data = storage.read_bytes(_listing_uri(output, unit))
    if storage.digest(data) != listing:
        raise InputError(
            f"{_listing_uri(output, unit)}: damaged, or the source changed while two runs were "
            f"planning on it; remove {WORK}/ in {output} and run again"
        )
    columns = pq.read_table(pa.BufferReader(data)).to_pydict()
    rows = zip(*columns.values(), strict=True)
    return [Entry(**dict(zip(columns, row, strict=True))) for row in rows]


def _listing_uri(output: str, unit: int) -> str:
    return work_uri(output, "units", f"{unit:08d}.parquet")


def _write_listings(output: str, units: Iterable[list[Entry]]) -> Iterator[str]:
    def write(numbered: tuple[int, list[Entry]]) -> str:
        unit, entries = numbered
        names = [field.name for field in dataclasses.fields(Entry)]
        columns = {name: [getattr(entry, name) for entry in entries] for name in names}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, compression="ZSTD")
        data = sink.getvalue()
        storage.write_bytes(_listing_uri(output, unit), data)
        return storage.digest(data)

    return mapped_ahead(write, enumerate(units), num_threads=THREADS)


class _Counter:
    """Counts items and bytes as they pass."""

    def __init__(self) -> None:
        self.items = 0
        self.bytes = 0

    def count(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            self.items += 1
            self.bytes += 0 if entry.ignored else entry.size
            yield entry


def _check_apart(source: Source, output: str) -> None:
    """Refuses an output that the source would list, or in which it might be overwritten.

    Beside a single file, or below a glob that stays outside, it is nobody's input.
    """
    roots, places = [source.root], [storage.join(output)]
    if storage.is_local(source.root) and storage.is_local(output):
        roots.append(os.path.realpath(source.root))  # both may be reached through links
        places.append(os.path.realpath(places[0]))
    for root, place in zip(roots, places, strict=True):
        _check_below(
            source,
            output,
            root=stores.plain(root).partition("?")[0] + "/",
            place=stores.plain(place).partition("?")[0] + "/",
        )


def _check_below(source: Source, output: str, *, root: str, place: str) -> None:
    if not place.startswith(root):
        return
    folders = place[len(root) :].strip("/").split("/")
    below = ["/".join(folders[: depth + 1]) for depth in range(len(folders))]
    if below == [""]:
        # Parquet files may bear the names of parts.
        own = any(map(source.glob.matches, OUR_FILES)) or source.glob.may_hold(WORK)
        inside = own or source.format == "parquet"
    else:
        inside = all(map(source.glob.may_hold, below))
    if inside:
        raise InputError(
            f"output = {output!r}: lies inside the source {source.root!r}, which would then list "
            "its own output; give a place outside"
        )


def _check_fields(config: PrepareConfig, source: Source) -> None:
    """Refuses options that this kind of source cannot honour."""
    folder = source.format in ("folder", "sample")
    if config.labels == "field" and folder:
        raise InputError("labels = 'field': images in folders have no fields; use 'folder'")
    if config.labels == "folder" and not folder:
        raise InputError(f"labels = 'folder': a {source.format} source has none; use 'field'")
    if config.label_field and folder:
        raise InputError(f"label_field = {config.label_field!r}: images in folders have no fields")
    if config.label_level != 1 and source.format != "folder":
        raise InputError(f"label_level = {config.label_level}: only images in folders have folders")
    if source.format != "parquet":
        columns = ("key_field", "group_field")
        for name in columns if source.format == "webdataset" else ("image_field", *columns):
            if getattr(config, name):
                raise InputError(
                    f"{name} = {getattr(config, name)!r}: only Parquet sources have columns, "
                    f"this one is {source.format!r}; leave it empty"
                )


def _with_folder_labels(config: PrepareConfig, reader: Reader, folders: set[str]) -> Reader:
    names = tuple(sorted(folders))
    level = config.label_level
    if config.labels == "folder" and not names:
        raise InputError(
            f"labels = 'folder': no folders {level} below {config.source!r}; use 'none'"
        )
    # One folder for everything tells no classes apart.
    if config.labels == "none" or (config.labels == "auto" and len(names) < 2):
        return reader
    if config.labels == "auto" and look_like_parts(names):
        raise InputError(
            f"labels = 'auto': the folders in {config.source!r} are called like parts of a data "
            f"set, not like classes ({', '.join(names[:5])}); give --label_level {level + 1} if "
            "the folders inside them are the classes, one of them as the source, --labels none, "
            "or --labels folder if they are the classes"
        )
    return dataclasses.replace(reader, labels="folder", label_level=level, class_names=names)
