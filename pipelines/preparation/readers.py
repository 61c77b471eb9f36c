"""From a unit of a source to its items: the bytes of every candidate image, in key order.

Nothing is skipped: what cannot be read comes as an item with a reason.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from beit.images import recognised
from pipelines import storage
from pipelines.preparation import sample_images
from pipelines.preparation.ahead import mapped_ahead
from pipelines.preparation.failures import file_failure
from pipelines.preparation.file_names import claims_picture, is_hidden, is_no_sample
from pipelines.preparation.labels import (
    described_names,
    folder_class,
    member_value,
    whole_number,
)
from pipelines.preparation.parquet_rows import batches, value
from pipelines.preparation.samples import UnclearSample, images_of, labels_of, sample_of
from pipelines.preparation.sources import OTHER_FILE, Format
from pipelines.preparation.tars import COMPRESSED, as_text, member_bytes, tar_members
from pipelines.preparation.walking import HIDDEN, Entry
from pipelines.tables.class_names import comparable

READ_THREADS = 8
HEAD_BYTES = 64
# The text of a label, or the JSON that it stands in.
MAX_LABEL_BYTES = 16 * 2**20
NO_PICTURE, OTHER_IMAGE = "not_an_image", "other_image"


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
    ignored: bool = False
    """It lies beside the data, and `reason` says what it is."""
    claims: bool = True
    """Its name says that it is a picture; if not, it is ignored unless `data` is one."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A member of a tar that is taken for an image."""

    name: str
    member: tarfile.TarInfo
    sample: list[tarfile.TarInfo]
    """All members of its sample."""
    reason: str = ""
    ignored: bool = False


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How the items of one source are read; the same for all its units."""

    root: str
    format: Format
    labels: str
    """folder, field or none."""
    class_names: tuple[str, ...] = ()
    """Names that text labels and folders are looked up in; empty: labels are numbers."""
    label_level: int = 1
    """Which folder on the way to a file is its class: 1, the first below the source."""
    label_field: str = ""
    label_required: bool = False
    """A sample of a tar without the label's member is rejected."""
    image_field: str = ""
    """A column; of tars the extension of the images (`samples.images_of`)."""
    key_field: str = ""
    group_field: str = ""
    group_pattern: str = ""
    max_image_bytes: int

    @cached_property
    def classes(self) -> dict[str, int]:
        return {comparable(name): number for number, name in enumerate(self.class_names)}

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
        folder = folder_class(entry.path, self.label_level) if self.labels == "folder" else None
        if folder is not None:
            label = self.classes.get(folder)
        claims = self.format == "sample" or claims_picture(entry.path)
        item = Item(
            key=entry.path, size=entry.size, label=label, reason=entry.reason, claims=claims
        )
        if entry.ignored:
            return replace(item, reason=entry.ignored, ignored=True)
        if item.reason:
            # A socket is no picture, and a link back leads to what is listed already.
            beside = item.reason in ("not_a_file", "symlink_loop") and not claims
            return replace(item, ignored=beside)
        if self._too_large(entry.size):
            return self._large_file(entry, item)
        if self.format == "sample":
            data = sample_images.read_image(entry.path)
            return replace(item, data=data, group=sample_images.group_of(entry.path))
        try:
            data = storage.read_bytes(storage.join(self.root, entry.path))
        except OSError as error:
            return replace(item, reason=self._failure(error, entry))
        return replace(item, data=data, size=len(data))

    def _large_file(self, entry: Entry, item: Item) -> Item:
        """A film or an archive among pictures is none of them."""
        try:
            with storage.open_input(storage.join(self.root, entry.path)) as file:
                picture = item.claims or recognised(file.read(HEAD_BYTES))
        except OSError as error:
            return replace(item, reason=self._failure(error, entry))
        if picture:
            return replace(item, reason="too_large")
        return replace(item, reason=NO_PICTURE, ignored=True)

    def _failure(self, error: Exception, entry: Entry, *, damaged: str = "unreadable") -> str:
        uri = storage.join(self.root, entry.path)
        return file_failure(error, uri, self.root, damaged=damaged)

    def _too_large(self, size: int) -> bool:
        return size > self.max_image_bytes

    # WebDataset

    def _read_tar(self, entry: Entry) -> Iterator[Item]:
        if entry.ignored or entry.reason:
            yield _whole(entry)
            return
        try:
            with self._open_tar(entry.path) as file:
                yield from self._tar_items(entry, file)
        except OSError as error:
            yield Item(key=entry.path, size=entry.size, reason=self._failure(error, entry))

    @contextmanager
    def _open_tar(self, path: str) -> Iterator[BinaryIO]:
        uri = storage.join(self.root, path)
        if storage.is_local(uri):
            with Path(uri).open("rb") as file:
                yield file
        else:
            yield io.BytesIO(storage.read_bytes(uri))

    def _tar_items(self, entry: Entry, file: BinaryIO) -> Iterator[Item]:
        members, broken_at = tar_members(file)
        if broken_at is not None:
            file.seek(0)
            reason = "compressed_tar" if file.read(8).startswith(COMPRESSED) else "bad_tar"
            yield Item(key=entry.path, size=max(0, entry.size - broken_at), reason=reason)
        yield from self.member_items(entry, file, members)

    def member_items(
        self, entry: Entry, file: BinaryIO, members: Sequence[tarfile.TarInfo]
    ) -> Iterator[Item]:
        """Items of the tar `entry`, which is open as `file`, sorted by key."""
        samples: dict[str, list[tarfile.TarInfo]] = {}
        found: list[_Candidate] = []
        for member in members:
            if is_hidden(member.name):
                found.append(_Candidate(member.name, member, [], HIDDEN, ignored=True))
            else:
                samples.setdefault(sample_of(member.name), []).append(member)
        for name, sample in samples.items():
            found += self._images(name, sample)
        keyed = [(as_text(f"{entry.path}/{image.name}"), image) for image in found]
        for key, image in sorted(keyed, key=lambda one: one[0]):
            item = Item(key=key, size=image.member.size, ignored=image.ignored)
            try:
                yield self._tar_item(file, item, image)
            except OSError as error:
                yield replace(item, reason=self._failure(error, entry))

    def _images(self, name: str, sample: list[tarfile.TarInfo]) -> list["_Candidate"]:
        label = self._label_extension if self.labels == "field" else ""
        try:
            images = images_of(sample, wanted=self.image_field, label=label)
        except UnclearSample as unclear:
            return [
                _Candidate(member.name, member, sample, unclear.reason)
                for member in sample
                if member.name in unclear.names
            ]
        if not images:
            beside = all(is_no_sample(member.name) for member in sample)
            reason = OTHER_FILE if beside else "no_image"
            return [_Candidate(name, sample[0], sample, reason, ignored=beside)]
        chosen = {member.name for member in images}
        others = [one for one in sample if one.name not in chosen and claims_picture(one.name)]
        return [
            *(_Candidate(member.name, member, sample) for member in images),
            *(_Candidate(one.name, one, [], OTHER_IMAGE, ignored=True) for one in others),
        ]

    def _tar_item(self, file: BinaryIO, item: Item, image: "_Candidate") -> Item:
        member = image.member
        if image.reason or not member.isreg():
            return replace(item, reason=image.reason or "not_a_file")
        if self._too_large(member.size):
            return replace(item, reason="too_large")
        data = member_bytes(file, member)
        if len(data) < member.size:
            return replace(item, reason="truncated")
        try:
            label = self._tar_label(file, image) if self.labels == "field" else None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = error.reason if isinstance(error, UnclearSample) else "bad_label"
            return replace(item, reason=reason)
        return replace(item, data=data, label=label)

    @property
    def _label_extension(self) -> str:
        return (self.label_field or "cls").partition(":")[0]

    def _tar_label(self, file: BinaryIO, image: "_Candidate") -> int | None:
        members = labels_of(image.member, image.sample, self._label_extension)
        name = (self.label_field or "cls").partition(":")[2]
        texts = [member_bytes(file, one, at_most=MAX_LABEL_BYTES) for one in members]
        labels = {self._class(member_value(text, name)) for text in texts}
        if len(labels) > 1:
            raise UnclearSample("unclear_label", members)
        if not labels and self.label_required:
            raise KeyError(self._label_extension)
        return labels.pop() if labels else None

    # Parquet

    def _read_parquet(self, entry: Entry) -> Iterator[Item]:
        if entry.ignored or (entry.reason and not entry.rows):
            yield _whole(entry)
        elif entry.reason:
            yield from _lost_rows(entry, entry.row, entry.reason)
        elif self.key_field:
            found = list(self._parquet_rows(entry))
            yield from sorted(found, key=lambda item: item.key)
        else:
            yield from self._parquet_rows(entry)

    def _parquet_rows(self, entry: Entry) -> Iterator[Item]:
        fields = (self.label_field, self.group_field, self.key_field)
        columns = [self.image_field, *(name for name in fields if name)]
        row = entry.row
        try:
            for batch in batches(self.root, entry, columns):
                names = described_names(batch.schema, self.label_field)
                for position in range(batch.num_rows):
                    yield self._parquet_item(entry.path, row, batch.slice(position, 1), names)
                    row += 1
        except Exception as error:  # whatever is wrong with one file, the job goes on
            reason = self._failure(error, entry, damaged="bad_parquet")
            # The rows that cannot be had are known by number and are all listed.
            yield from _lost_rows(entry, row, reason)

    def _parquet_item(
        self, path: str, row: int, values: pa.RecordBatch, names: Sequence[str]
    ) -> Item:
        """`values`: a batch of one row; `names`: what its file says that label numbers mean."""
        item = Item(key=f"{path}/{row:010d}")
        try:
            if self.key_field:
                name = value(values, self.key_field)
                if name is None:
                    return replace(item, reason="no_key")
                item = replace(item, key=f"{path}/{name}")
            group = value(values, self.group_field) if self.group_field else None
        except (ValueError, OverflowError):  # text that is no UTF-8, a date that Python lacks
            return replace(item, reason="bad_name")
        image = value(values, self.image_field)
        data = image["bytes"] if isinstance(image, dict) else image
        item = replace(item, size=len(data or b""), group=None if group is None else str(group))
        if data is None:
            return replace(item, reason="no_image")
        if self._too_large(len(data)):
            return replace(item, reason="too_large")
        try:
            label = None
            if self.labels == "field":
                label = self._class(value(values, self.label_field), names)
        except (ValueError, KeyError, TypeError):
            return replace(item, reason="bad_label")
        return replace(item, data=bytes(data), label=label)

    def _class(self, value: object, names: Sequence[str] = ()) -> int | None:
        """The class of a label as the source has it; `names`: what its numbers stand for."""
        number = None if isinstance(value, str) else whole_number(value)
        if isinstance(value, str):
            return self.classes[comparable(value)]
        if number is None or not self.class_names:
            return number
        if number >= len(names):
            raise ValueError(value)
        return self.classes[names[number]]


def _whole(entry: Entry) -> Item:
    """A container that is one item, since it is not opened."""
    reason, ignored = entry.ignored or entry.reason, bool(entry.ignored)
    return Item(key=entry.path, size=entry.size, reason=reason, ignored=ignored)


def _lost_rows(entry: Entry, first: int, reason: str) -> Iterator[Item]:
    for row in range(first, entry.row + entry.rows):
        yield Item(key=f"{entry.path}/{row:010d}", reason=reason)


def rehearse(text: str) -> None:
    """Reads an entry for nothing: what a child process does to try out a dangerous file.

    `text` is the JSON of [reader, entry].
    """
    fields, entry = json.loads(text)
    reader = Reader(**{**fields, "class_names": tuple(fields["class_names"])})
    for _ in reader.items([Entry(**entry)]):
        pass
