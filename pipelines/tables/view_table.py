"""The view table: pixels of the views of every image, as a sidecar of an image table.

A directory at any URI, like a token table, and independent of any: files of row ranges
(`view_files.py`) and `manifest.json`, written last. The manifest has the row groups of the image
table as well: order and masks follow from it and from the digests, so that a training needs no
image. Views that are added later are a further table, of as many views.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beit.views import ViewPolicy, view_of
from pipelines import storage
from pipelines.errors import InputError, parsing
from pipelines.records import Count
from pipelines.tables import unit_files
from pipelines.tables.image_files import Part
from pipelines.tables.open_parts import OpenParts
from pipelines.tables.row_groups import RowGroups
from pipelines.tables.unit_files import (
    MANIFEST,
    FileColumns,
    PartColumns,
    RejectedRecord,
    RejectedUnit,
    UnitFile,
    UnitTable,
    differing_field,
    manifest_of,
)
from pipelines.tables.view_files import (
    CODECS,
    KEYS,
    ViewIdentity,
    ViewIdentityRecord,
    cut_row_groups,
    slot_name,
    stamp_of,
)

KIND = "view_table"
SCHEMA_VERSION = 1
REMEDY = "the manifest was changed after it was written: render again"
# A window of the sample order touches a handful of files; this many stay open in a process.
OPEN_FILES = 128
_OPEN = OpenParts(OPEN_FILES)


@dataclass(frozen=True, kw_only=True)
class ImagesOfViews:
    """What a view table knows of its image table, in place of it."""

    uri: str
    """Of the view table, for messages."""
    fingerprint: str
    num_rows: int


class RenderedParts(PartColumns):
    """The parts of the image table, and the rows of each row group of each."""

    row_groups: list[list[Count]]


class Manifest(ViewIdentityRecord):
    """What must stand in the manifest of a view table."""

    kind: Literal["view_table"]
    schema_version: Literal[1]
    fingerprint: str
    rows_per_unit: Count
    libraries: dict[str, str]
    parts: RenderedParts
    files: FileColumns
    rejected: list[RejectedRecord]


def build_manifest(
    *,
    identity: ViewIdentity,
    parts: Sequence[Part],
    files: Iterable[UnitFile],
    rejected: Sequence[RejectedUnit],
    rows_per_unit: int,
    libraries: dict[str, str],
) -> dict[str, Any]:
    """The manifest of a finished table; `files` come in row order."""
    values = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        **identity.to_dict(),
        "rows_per_unit": rows_per_unit,
        "libraries": libraries,
        "parts": {
            "name": [part.name for part in parts],
            "rows": [part.rows for part in parts],
            "row_groups": [list(part.row_groups) for part in parts],
        },
    }
    return manifest_of(values, files, rejected)


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of the table at `uri`; raises as `unit_files.read_manifest`."""
    return unit_files.read_manifest(
        uri, Manifest, kind=KIND, versions=(SCHEMA_VERSION,), remedy=REMEDY
    )


class ViewTable(UnitTable):
    """Reader of a view table. Safe to use from several threads."""

    again = "render again"

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        super().__init__(uri, manifest)
        self.identity = ViewIdentity.from_dict(manifest)
        self.policy = ViewPolicy.from_dict(self.identity.policy)
        groups: list[list[int]] = manifest["parts"]["row_groups"]
        if [sum(sizes) for sizes in groups] != manifest["parts"]["rows"]:
            raise ValueError("parts: row_groups are not their rows")
        self.image_row_groups = np.array([rows for sizes in groups for rows in sizes], np.int64)
        """Of the image table: what the order of samples is made from."""
        most = self.identity.row_group_rows
        self.row_groups = RowGroups([cut_row_groups(sizes, most) for sizes in groups])

    @classmethod
    def open(cls, uri: str) -> "ViewTable":
        """Opens the table and checks the manifest against itself and against its first file.

        Raises:
            InputError: there is no table, or a field was changed after it was written; the
                message names the field and both values.
        """
        path = storage.join(uri, MANIFEST)
        try:
            manifest = read_manifest(uri)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{path}: not found; this is no finished view table: run `beit render` with "
                "this output, the same command again goes on where it stopped"
            ) from error
        with parsing(path, REMEDY):
            table = cls(uri, manifest)
        table.check_fingerprint()
        if table.num_files:
            table.check_stamp(_stamp(table.file_uri(0)), table.identity.to_dict())
        if CODECS.get(table.identity.form) != table.identity.codec:
            raise InputError(
                f"{path}: codec {table.identity.codec!r} of form {table.identity.form!r} is none "
                f"of those known here ({', '.join(CODECS.values())}); render again"
            )
        return table

    @property
    def images(self) -> ImagesOfViews:
        return ImagesOfViews(
            uri=self.uri, fingerprint=self.image_fingerprint, num_rows=self.num_rows
        )

    def groups_of(self, index: int) -> range:
        """Row groups of the table that are those of file number `index`."""
        rows = self.file_rows(index)
        return self.row_groups.overlapping(rows.start, rows.stop)

    def sizes_of(self, index: int) -> list[int]:
        """Rows of each row group of file number `index`."""
        inside = self.groups_of(index)
        sizes: list[int] = self.row_groups.sizes[inside.start : inside.stop].tolist()
        return sizes

    def read_group(self, position: int, slot: int) -> pa.Table:
        """`key`, `digest` and `image`: row group `position` of the table, in this slot.

        Raises:
            InputError: its file is missing or damaged.
        """
        group = self.row_groups[position]
        index = int(np.searchsorted(self._last, group.start, side="right"))
        size, digest = self.file_record(index)
        uri = self.file_uri(index)
        columns = KEYS.append(pa.field(slot_name(slot), pa.binary(), nullable=False))
        try:
            opened = _OPEN.get(
                uri,
                content_hash=digest,
                num_bytes=size,
                row_groups=tuple(self.sizes_of(index)),
                remedy=f"`beit audit` lists all damage, delete it and render {self.uri} again",
            )
            table = opened.read([position - self.groups_of(index).start], columns)
        except FileNotFoundError as error:
            raise InputError(
                f"{uri}: missing, though the manifest lists it; the same `beit render` makes it "
                "again"
            ) from error
        return table.rename_columns([*KEYS.names, "image"])

    def check_compatible(
        self, *, image_fingerprint: str, policy: ViewPolicy, image_size: int
    ) -> None:
        """Raises InputError, naming field and both values, unless the views are of these."""
        wanted: dict[str, Any] = {
            "image_fingerprint": image_fingerprint,
            "image_size": image_size,
            "policy": policy.to_dict(),
        }
        found = self.identity.to_dict()
        difference = differing_field({name: found[name] for name in wanted}, wanted)
        if difference:
            raise InputError(
                f"{self.uri}: {difference} (view table != what is wanted); render these images "
                "with this policy and size, or leave --views out"
            )
        if self.num_missing:
            raise InputError(
                f"{self.uri}: rejected: {self.num_missing} of {self.num_rows} rows have no views; "
                "see 'rejected' in the manifest for the reasons, then run `beit render` again "
                "with --retry_rejected true"
            )


def check_windows(tables: Sequence[ViewTable], views: Sequence[int] | np.ndarray) -> None:
    """Checks that view tables, in order, have these views in windows of one length.

    Then epoch e shows what slot e mod that length holds, in whichever table a row's view is.

    Raises:
        InputError: naming the views that differ.
    """
    uris = ", ".join(table.uri for table in tables)
    shapes = [table.identity.to_dict() | {"views": None} for table in tables]
    for shape in shapes[1:]:
        difference = differing_field(shapes[0], shape)
        if difference:
            raise InputError(f"{difference} ({uris}): view tables used together must be alike")
    windows = [list(table.views) for table in tables]
    if len({len(window) for window in windows}) > 1:
        raise InputError(
            f"views: {uris} have {' and '.join(str(len(window)) for window in windows)} views; "
            "tables used together must have as many each: render all views as one table"
        )
    stored = [view for window in windows for view in window]
    for view in stored:
        if stored.count(view) > 1:
            raise InputError(
                f"views: view {view} is in both of {uris}; render further views with --first_view"
            )
    wanted = [int(view) for view in views]
    if stored != wanted:
        raise InputError(
            f"views: {uris} hold the pixels of views {stored}, but trained on are {wanted}, "
            "those of the token tables; render these (--first_view, --num_views)"
        )


def read_shown(tables: Sequence[ViewTable], position: int, epoch: int) -> pa.Table:
    """`key`, `digest` and `image` of a row group as an epoch shows it; see `check_windows`.

    Raises:
        InputError: a file is missing or damaged, or the tables are not of the same images.
    """
    num_views = len(tables[0].views)
    groups = [table.read_group(position, epoch % num_views) for table in tables]
    if len(groups) == 1:
        return groups[0]
    first = groups[0].select(KEYS.names)
    for table, group in zip(tables, groups, strict=True):
        if not group.select(KEYS.names).equals(first):
            raise InputError(
                f"{table.uri}: keys or digests of rows from {table.row_groups[position].start} "
                f"are not those of {tables[0].uri}; run `beit audit`, then render it again"
            )
    # Each row's view is in one of the tables.
    numbers = range(num_views * len(tables))
    shown = [view_of(digest, epoch, numbers) for digest in first["digest"].to_pylist()]
    rows = np.array(shown, np.int64) // num_views * len(shown) + np.arange(len(shown))
    return pa.concat_tables(groups).take(rows)


def _stamp(uri: str) -> dict[str, Any]:
    """The identity stored in a file. Raises InputError if it is missing or none of ours."""
    try:
        with storage.open_input(uri) as file, parsing(uri, "not a file of a view table"):
            return stamp_of(pq.read_metadata(file).metadata)
    except FileNotFoundError as error:
        raise InputError(f"{uri}: missing, though the manifest lists it; render again") from error
