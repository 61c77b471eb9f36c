"""From a unit of a source to its items: the bytes of every candidate image, in key order.

Nothing is skipped: what cannot be read comes as an item with a reason.
"""

import errno
import io
import json
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.preparation import sample_images
from pipelines.preparation.sources import Entry, Format, mapped_ahead

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
    ".jp2", ".avif", ".heic", ".img",
)  # fmt: skip
READ_THREADS = 8
BATCH_ROWS = 32
STREAM_BYTES = 4 * 2**20
# Failures of the moment, not of a file: a rejection would be for good.
PASSING = {
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Item:
    """A candidate image."""

    key: str
    data: bytes = b""
    size: int = 0
    label: int | None = None
    group: str | None = None
    reason: str = ""
    """Why there is no image; empty: there may be one in `data`."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How the items of one source are read; the same for all its units."""

    root: str
    format: Format
    labels: str
    """folder, field or none."""
    class_names: tuple[str, ...] = ()
    """Names that text labels and folders are looked up in; empty: labels are numbers."""
    label_field: str = ""
    image_field: str = ""
    key_field: str = ""
    group_field: str = ""
    group_pattern: str = ""
    max_image_bytes: int

    @cached_property
    def classes(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.class_names)}

    def items(self, entries: Sequence[Entry]) -> Iterator[Item]:
        """Items of a unit, sorted by key; of equal keys the first in the source comes first.

        Raises:
            OSError: the store does not answer, in spite of retries.
        """
        if self.format in ("folder", "sample"):
            found = mapped_ahead(self._read_file, entries, num_threads=READ_THREADS)
        elif self.format == "webdataset":
            found = (item for entry in entries for item in self._read_tar(entry))
        else:
            found = (item for entry in entries for item in self._read_parquet(entry))
        for item in found:
            match = re.search(self.group_pattern, item.key) if self.group_pattern else None
            yield replace(item, group=match.group(1)) if match else item

    # Folders

    def _read_file(self, entry: Entry) -> Item:
        label = None
        if self.labels == "folder" and "/" in entry.path:
            label = self.classes.get(entry.path.partition("/")[0])
        item = Item(key=entry.path, size=entry.size, label=label, reason=entry.reason)
        if item.reason or self._too_large(entry.size):
            return replace(item, reason=item.reason or "too_large")
        if self.format == "sample":
            data = sample_images.read_image(entry.path)
            return replace(item, data=data, group=sample_images.group_of(entry.path))
        try:
            data = storage.read_bytes(storage.join(self.root, entry.path))
        except FileNotFoundError:
            return replace(item, reason="missing")
        except OSError as error:
            # A file of this machine that cannot be read stays so; a store may come back.
            if not storage.is_local(self.root) or error.errno in PASSING:
                raise
            return replace(item, reason="unreadable")
        return replace(item, data=data, size=len(data))

    def _too_large(self, size: int) -> bool:
        return size > self.max_image_bytes

    # WebDataset

    def _read_tar(self, entry: Entry) -> Iterator[Item]:
        if entry.reason:
            yield Item(key=entry.path, size=entry.size, reason=entry.reason)
            return
        try:
            with self._open_tar(entry.path) as file:
                yield from self._tar_items(entry, file)
        except FileNotFoundError:
            yield Item(key=entry.path, size=entry.size, reason="missing")

    @contextmanager
    def _open_tar(self, path: str) -> Iterator[BinaryIO]:
        uri = storage.join(self.root, path)
        if storage.is_local(uri):
            with Path(uri).open("rb") as file:
                yield file
        else:
            yield io.BytesIO(storage.read_bytes(uri))

    def _tar_items(self, entry: Entry, file: BinaryIO) -> Iterator[Item]:
        members, complete = tar_members(file)
        if not complete:
            yield Item(key=entry.path, size=entry.size, reason="bad_tar")
        samples: dict[str, list[tarfile.TarInfo]] = {}
        for member in members:
            samples.setdefault(_sample_of(member.name), []).append(member)
        images = [
            (_text(f"{entry.path}/{member.name}"), member, name)
            for name, sample in samples.items()
            for member in sample
            if member.name.lower().endswith(IMAGE_SUFFIXES)
        ]
        keys = {sample for _, _, sample in images}
        empty = [
            (_text(f"{entry.path}/{name}"), sample[0], "")
            for name, sample in samples.items()
            if name not in keys
        ]
        for key, member, sample in sorted(images + empty, key=lambda found: found[0]):
            yield self._tar_item(file, key, member, samples.get(sample, []))

    def _tar_item(
        self, file: BinaryIO, key: str, member: tarfile.TarInfo, sample: list[tarfile.TarInfo]
    ) -> Item:
        item = Item(key=key, size=member.size)
        if not sample:
            return replace(item, reason="no_image")
        if not member.isreg():
            return replace(item, reason="not_a_file")
        if self._too_large(member.size):
            return replace(item, reason="too_large")
        data = _member_bytes(file, member)
        if len(data) < member.size:
            return replace(item, reason="truncated")
        try:
            label = self._tar_label(file, sample) if self.labels == "field" else None
        except (ValueError, KeyError, TypeError):
            return replace(item, reason="bad_label")
        return replace(item, data=data, label=label)

    def _tar_label(self, file: BinaryIO, sample: list[tarfile.TarInfo]) -> int | None:
        extension, _, name = (self.label_field or "cls").partition(":")
        for member in sample:
            if member.name.endswith("." + extension) and member.isreg():
                text = _member_bytes(file, member).decode().strip()
                return self._label(json.loads(text)[name] if name else int(text))
        return None

    # Parquet

    def _read_parquet(self, entry: Entry) -> Iterator[Item]:
        if entry.reason and not entry.rows:
            yield Item(key=entry.path, size=entry.size, reason=entry.reason)
        elif entry.reason:
            yield from _lost_rows(entry, entry.row, entry.reason)
        elif self.key_field:
            found = list(self._parquet_rows(entry))
            yield from sorted(found, key=lambda item: item.key)
        else:
            yield from self._parquet_rows(entry)

    def _parquet_rows(self, entry: Entry) -> Iterator[Item]:
        names = (self.image_field, self.label_field, self.group_field, self.key_field)
        columns = [name for name in names if name]
        uri = storage.join(self.root, entry.path)
        row = entry.row
        try:
            for batch in _batches(uri, entry, columns):
                for values in batch.to_pylist():
                    yield self._parquet_item(entry.path, row, values)
                    row += 1
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error, uri):
                raise
            # The rows that cannot be had are known by number and are all listed.
            yield from _lost_rows(entry, row, "bad_parquet")

    def _parquet_item(self, path: str, row: int, values: dict[str, Any]) -> Item:
        name = values[self.key_field] if self.key_field else f"{row:010d}"
        if name is None:
            return Item(key=f"{path}/{row:010d}", reason="no_key")
        group = values[self.group_field] if self.group_field else None
        item = Item(key=f"{path}/{name}", group=None if group is None else str(group))
        image = values[self.image_field]
        data = image.get("bytes") if isinstance(image, dict) else image
        if data is None:
            return replace(item, reason="no_image")
        item = replace(item, size=len(data))
        if self._too_large(len(data)):
            return replace(item, reason="too_large")
        try:
            label = self._label(values[self.label_field]) if self.labels == "field" else None
        except (ValueError, KeyError, TypeError):
            return replace(item, reason="bad_label")
        return replace(item, data=bytes(data), label=label)

    def _label(self, value: object) -> int | None:
        """The class of a label as the source has it; negative numbers mean none."""
        if value is None:
            return None
        if isinstance(value, str):
            return self.classes[value]
        if not isinstance(value, int) or value >= 2**31:
            raise ValueError(value)
        if self.class_names and value >= len(self.class_names):
            raise ValueError(value)
        return int(value) if value >= 0 else None


def is_damage(error: Exception, uri: str) -> bool:
    """Whether reading Parquet failed because of the file, not because of the way to it."""
    if isinstance(error, FileNotFoundError | pa.ArrowMemoryError | pa.ArrowCancelled):
        return False
    if isinstance(error, OSError) and (
        error.errno in PASSING or (not storage.is_local(uri) and storage.is_transient(error))
    ):
        return False
    if isinstance(error, pa.ArrowException) or storage.is_local(uri):
        return True
    message = str(error).lower()
    return not any(mark in message for mark in ("aws", "curl", "http", "s3"))


def tar_members(file: BinaryIO) -> tuple[list[tarfile.TarInfo], bool]:
    """Members that are no directories, and whether the archive ends as one should.

    Python's tarfile takes a damaged header for the end of the archive, without a word; so the
    place where it stopped is looked at: the end is a block of zeros, or the file's own.
    """
    members: list[tarfile.TarInfo] = []
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isdir():
                    members.append(member)  # noqa: PERF401 - kept when the next one fails
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError):
        return members, False
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    return members, not any(block)


def _member_bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _sample_of(name: str) -> str:
    """WebDataset's rule: files of one directory with the same name up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _text(name: str) -> str:
    """A key that is valid UTF-8, whatever bytes the archive had for a name."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _lost_rows(entry: Entry, first: int, reason: str) -> Iterator[Item]:
    for row in range(first, entry.row + entry.rows):
        yield Item(key=f"{entry.path}/{row:010d}", reason=reason)


def _batches(uri: str, entry: Entry, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Row groups in small pieces, streamed; goes on after a dropped connection."""
    groups = list(range(entry.first, entry.stop))
    done = attempt = 0
    while True:
        try:
            with storage.open_input(uri) as source:
                file = pq.ParquetFile(source, pre_buffer=False, buffer_size=STREAM_BYTES)
                skip = done
                for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
                    fresh = batch.slice(min(skip, batch.num_rows))
                    skip -= batch.num_rows - fresh.num_rows
                    if fresh.num_rows:
                        done += fresh.num_rows
                        attempt = 0
                        yield fresh
                return
        except OSError as error:
            attempt += 1
            final = storage.is_local(uri) or not storage.is_transient(error)
            if final or attempt >= storage.NUM_TRIES:
                raise
            time.sleep(storage.pause(attempt))


def rehearse(text: str) -> None:
    """Reads an entry for nothing: what a child process does to try out a dangerous file.

    `text` is the JSON of [reader, entry].
    """
    fields, entry = json.loads(text)
    reader = Reader(**{**fields, "class_names": tuple(fields["class_names"])})
    for _ in reader.items([Entry(**entry)]):
        pass
