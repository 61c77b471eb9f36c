"""The token table: visual tokens of the views of every image, as a sidecar of an image table.

A directory at any URI:

- `part-00003-00000512-00001024.parquet`: rows 512 to 1023 of the image table's
  `part-00003.parquet`, in the same order. Columns: `key` (checked against the image table, not
  trusted) and `token_ids`, a fixed-size list of uint16 of length V * N: view-major, and inside a
  view the row-major grid. `grey_levels`, of length V, spare training the whole picture.
- `manifest.json`, written last: without it there is no table. It says of which image table,
  tokenizer, view policy, views and precision the tokens are, and lists the files column by column
  (250,000 files, enough for 10^9 images, are a 21 MB manifest).

Every file carries the identity of its table in the Parquet metadata, and the manifest its own
hash, so that a field changed afterwards is found and named.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from beit.views import ViewPolicy
from pipelines import storage
from pipelines.errors import InputError, parsing
from pipelines.records import Count
from pipelines.tables import unit_files
from pipelines.tables.token_files import (
    UNKNOWN_LEVEL,
    Identity,
    IdentityRecord,
    read_rows,
    read_stamp,
)
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

KIND = "token_table"
# Files of tables of version 1 have no grey levels. In one of version 2 some may lack them, too: it
# was begun by an earlier release.
SCHEMA_VERSIONS = (1, 2)
REMEDY = "the manifest was changed after it was written: tokenize again"
# In `token_ids` where a rejected unit left rows without tokens; no vocabulary reaches it.
MISSING = np.uint16(65535)
MAX_VOCAB_SIZE = 65535


class Manifest(IdentityRecord):
    """What must stand in the manifest of a token table."""

    kind: Literal["token_table"]
    schema_version: Literal[1, 2]
    fingerprint: str
    rows_per_unit: Count
    libraries: dict[str, str]
    parts: PartColumns
    files: FileColumns
    rejected: list[RejectedRecord]


class Images(Protocol):
    """What the checks need to know of an image table."""

    @property
    def uri(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def num_rows(self) -> int: ...


def build_manifest(
    *,
    identity: Identity,
    part_names: Sequence[str],
    part_rows: Sequence[int],
    files: Iterable[UnitFile],
    rejected: Sequence[RejectedUnit],
    rows_per_unit: int,
    libraries: dict[str, str],
) -> dict[str, Any]:
    """The manifest of a finished table; `files` come in row order."""
    values = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSIONS[-1],
        **identity.to_dict(),
        "rows_per_unit": rows_per_unit,
        "libraries": libraries,
        "parts": {"name": list(part_names), "rows": [int(rows) for rows in part_rows]},
    }
    return manifest_of(values, files, rejected)


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of the table at `uri`; raises as `unit_files.read_manifest`."""
    return unit_files.read_manifest(
        uri, Manifest, kind=KIND, versions=SCHEMA_VERSIONS, remedy=REMEDY
    )


class TokenTable(UnitTable):
    """Reader of a token table. Safe to use from several threads."""

    again = "tokenize again"

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        super().__init__(uri, manifest)
        self.identity = Identity.from_dict(manifest)
        self.policy = ViewPolicy.from_dict(self.identity.policy)

    @classmethod
    def open(cls, uri: str) -> "TokenTable":
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
                f"{path}: not found; this is no finished token table: run `beit tokenize` with "
                "this output, the same command again goes on where it stopped"
            ) from error
        with parsing(path, REMEDY):
            table = cls(uri, manifest)
            if table.num_files:
                stamp = read_stamp(table.file_uri(0), table.file_record(0)[1])
                table.check_stamp(stamp, table.identity.to_dict())
            table.check_fingerprint()
        return table

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.identity.tokenizer_fingerprint

    @property
    def vocab_size(self) -> int:
        return self.identity.vocab_size

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.identity.grid_size

    @property
    def precision(self) -> str:
        return self.identity.precision

    def read_rows(self, start: int, stop: int) -> tuple[list[str], NDArray[np.uint16]]:
        """Keys and token ids (stop - start, V, N) of rows [start, stop) of the image table.

        Rows of rejected units come with the key "" and with `MISSING` for every token.

        Raises:
            IndexError: the range does not lie inside the table.
        """
        return self.read_with_levels(start, stop)[:2]

    def read_with_levels(
        self, start: int, stop: int
    ) -> tuple[list[str], NDArray[np.uint16], NDArray[np.int16]]:
        """`read_rows`, and the grey level of each view (`beit.views.View.grey_level`), int16
        (stop - start, V): `UNKNOWN_LEVEL` where the table does not have it."""
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows [{start}, {stop}) of a table of {self.num_rows} rows")
        keys = [""] * (stop - start)
        shape = (stop - start, self.identity.num_views, self.identity.num_patches)
        token_ids = np.full(shape, MISSING, np.uint16)
        levels = np.full(shape[:2], UNKNOWN_LEVEL)
        index = int(np.searchsorted(self._last, start, side="right"))
        while index < self.num_files and self._first[index] < stop:
            base = int(self._first[index])
            first, last = max(start, base), min(stop, int(self._last[index]))
            rows = slice(first - start, last - start)
            keys[rows], token_ids[rows], levels[rows] = read_rows(
                self.file_uri(index),
                self.identity,
                first - base,
                last - base,
                content_hash=self._hash[index],
            )
            index += 1
        return keys, token_ids, levels

    def check_compatible(
        self,
        images: Images,
        *,
        grid_size: tuple[int, int] | None = None,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
        policy: ViewPolicy | None = None,
        allow_missing: bool = False,
    ) -> None:
        """Checks that the tokens are those of `images` and of what else is given.

        Raises:
            InputError: naming the field and both values.
        """
        expected: dict[str, Any] = {
            "image_fingerprint": images.fingerprint,
            "num_rows": images.num_rows,
        }
        if grid_size is not None:
            expected["grid_size"] = list(grid_size)
        if vocab_size is not None:
            expected["vocab_size"] = vocab_size
        if tokenizer_fingerprint is not None:
            expected["tokenizer_fingerprint"] = tokenizer_fingerprint
        if policy is not None:
            expected["policy"] = policy.to_dict()
        found = self.identity.to_dict()
        difference = differing_field({name: found[name] for name in expected}, expected)
        if difference:
            raise InputError(
                f"{self.uri}: {difference} (token table != what is wanted, image table "
                f"{images.uri}); tokenize these images with this tokenizer and policy"
            )
        if self.num_missing and not allow_missing:
            raise InputError(
                f"{self.uri}: rejected: {self.num_missing} of {self.num_rows} rows have no tokens "
                "(0 wanted); see 'rejected' in the manifest for the reasons, then run "
                "`beit tokenize` again with --retry_rejected true"
            )


def check_together(tables: Sequence[TokenTable]) -> None:
    """Checks that token tables can be used side by side: same tokens, different views.

    Raises:
        InputError: naming the field and both values.
    """
    for left, right in itertools.pairwise(tables):
        apart = {"views": None, "batch_size": None}
        difference = differing_field(
            left.identity.to_dict() | apart, right.identity.to_dict() | apart
        )
        if difference:
            raise InputError(
                f"{difference} ({left.uri} != {right.uri}); token tables used together must be "
                "of the same images, tokenizer, policy and precision"
            )
    ranges = sorted((table.views.start, table.views.stop, table.uri) for table in tables)
    for (_, stop, left_uri), (start, _, right_uri) in itertools.pairwise(ranges):
        if start < stop:
            raise InputError(
                f"views: view {start} is in both {left_uri} and {right_uri}; tokenize further "
                "views with --first_view"
            )
