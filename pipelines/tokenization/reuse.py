"""Tokens that older tables have already: which rows of a table they belong to, and their copies.

A view follows from an image's digest and size, so equal images have equal tokens, whatever their
keys. An *origin* says where the tokens of a row are: the row of an older table, counted through all
older tables; -1 where they are nowhere. The driver finds them by `tables/digests.py`.
"""

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import storage
from pipelines.config.tokenize_images import TokenizeConfig
from pipelines.errors import InputError
from pipelines.steps import say, say_step
from pipelines.tables.digests import buckets, deal, digest_records, read_bucket
from pipelines.tables.image_table import ImageParts
from pipelines.tables.token_files import ROW_GROUP_ROWS, UNKNOWN_LEVEL, Identity
from pipelines.tables.token_table import MISSING, TokenTable
from pipelines.tables.unit_files import differing_field
from pipelines.tracking.datasets import Dataset

# Wanted rows of an older table that are no further apart are read as one range: then hardly a row
# group is read twice, or in vain.
MAX_GAP = ROW_GROUP_ROWS
# A range ends at multiples of so many rows, which bounds its memory.
RANGE_ROWS = 16 * ROW_GROUP_ROWS
# Fields of the identity that may differ: of each view of each image the tokens are the same.
OF_THE_IMAGES = ("image_fingerprint", "num_rows", "views")


@dataclass(frozen=True, kw_only=True)
class Older:
    """A token table whose tokens are copied, with the image table that it is of."""

    tokens: str
    images: str
    first: int
    """Number of its first row among the rows of all older tables."""
    rows: int


def older_tables(
    config: TokenizeConfig, images: ImageParts, wanted: dict[str, Any], libraries: dict[str, str]
) -> tuple[Older, ...]:
    """The tables of `reuse`, checked to hold the tokens that are asked for.

    `wanted` is an identity, or what is known of it; `libraries` are the versions that this run
    computes with; others are said, not refused.

    Raises:
        InputError: one was made otherwise, or the image table that it is of is not given; names
            the field and both values.
    """
    by_fingerprint = {images.fingerprint: images.uri}
    for uri in config.reuse_images:
        older = ImageParts.open(uri)
        by_fingerprint.setdefault(older.fingerprint, older.uri)
    found: list[Older] = []
    first = 0
    for uri in map(storage.absolute, config.reuse):
        table = TokenTable.open(uri)
        _refuse_other_tokens(table, wanted)
        if table.image_fingerprint not in by_fingerprint:
            raise InputError(
                f"reuse = {uri}: it is of an image table with the fingerprint "
                f"{table.image_fingerprint}, which is neither --images nor among --reuse_images; "
                "its digests are needed: name it with --reuse_images"
            )
        then = table.manifest["libraries"]
        if then != libraries:
            say(
                f"reuse = {uri}: made with other versions ({differing_field(then, libraries)}); "
                "where those round otherwise, its tokens are not what this run would compute"
            )
        of = by_fingerprint[table.image_fingerprint]
        found.append(Older(tokens=uri, images=of, first=first, rows=table.num_rows))
        # A number between two tables that no row has: consecutive rows are of one table.
        first += table.num_rows + 1
    return tuple(found)


def refuse_other_tokens(older: Sequence[Older], wanted: dict[str, Any]) -> None:
    """Raises InputError unless tokens of equal images would be equal."""
    for table in older:
        _refuse_other_tokens(TokenTable.open(table.tokens), wanted)


def _refuse_other_tokens(table: TokenTable, wanted: dict[str, Any]) -> None:
    theirs = table.identity.to_dict()
    free = dict.fromkeys(OF_THE_IMAGES)
    difference = differing_field({name: theirs[name] for name in wanted} | free, wanted | free)
    begin, end = wanted["views"]
    if difference is None and not (table.views.start <= begin and end <= table.views.stop):
        difference = f"views: {theirs['views']} != {wanted['views']}"
    if difference:
        raise InputError(
            f"reuse = {table.uri}: {difference} (older table != what is asked for): its tokens are "
            "not those of this table; leave it out, or ask for what it has"
        )


def reused_datasets(older: Sequence[Older]) -> list[Dataset]:
    """The older token tables as inputs of a run."""
    tables = [TokenTable.open(table.tokens) for table in older]
    return [Dataset.of_table("token_table", table, "reuse") for table in tables]


def find_origins(images: ImageParts, older: Sequence[Older]) -> "Origins | None":
    """The origins of all rows, told with their number; None where there are no older tables."""
    if not older:
        return None
    say_step(f"reuse: looking for the images of {len(older)} older tables")
    origins = Origins(images, older)
    say_step(f"reuse: {origins.num_reused:,} of {images.num_rows:,} images have their tokens there")
    return origins


class Origins:
    """The origin of every row of an image table, in a file without a name on this disk."""

    def __init__(self, images: ImageParts, older: Sequence[Older]) -> None:
        """Reads the digests of all tables.

        Takes 24 bytes of the disk for each row of any table and 8 more for each of `images`, and
        some 300 MB of memory, however many rows there are.

        Raises:
            InputError: a part is missing or damaged.
        """
        total = images.num_rows + sum(table.rows for table in older)
        with tempfile.TemporaryFile() as file:
            self._rows = np.memmap(file, np.int64, "w+", shape=(images.num_rows,))
        self._rows[:] = -1
        self.num_reused = 0
        with buckets(total) as new, buckets(total) as old:
            for table in older:
                deal(_tokenized(table), old)
            deal(digest_records(images), new)
            for ours, theirs in zip(map(read_bucket, new), map(read_bucket, old), strict=True):
                self._join(ours, theirs)

    def _join(self, ours: NDArray[np.void], theirs: NDArray[np.void]) -> None:
        if not len(theirs):
            return
        # Of equal images the first row of the first table is taken.
        theirs = theirs[np.argsort(theirs["digest"], kind="stable")]
        at = np.searchsorted(theirs["digest"], ours["digest"])
        at[at == len(theirs)] = 0
        same = theirs["digest"][at] == ours["digest"]
        self._rows[ours["row"][same]] = theirs["row"][at[same]]
        self.num_reused += int(same.sum())

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Origins of rows [start, stop) as (row less start, origin, number of rows) of each run."""
        origins = np.asarray(self._rows[start:stop])
        rows = np.flatnonzero(origins >= 0)
        if not len(rows):
            return []
        jumps = (np.diff(rows) != 1) | (np.diff(origins[rows]) != 1)
        runs = np.split(rows, np.flatnonzero(jumps) + 1)
        return [(int(run[0]), int(origins[run[0]]), len(run)) for run in runs]


def _tokenized(older: Older) -> Iterator[NDArray[np.void]]:
    """`digest_records` of the rows of an older table that have tokens."""
    images, tokens = _opened(older)
    for records in digest_records(images, older.first):
        yield records[tokens.have_file(records["row"] - older.first)]


@functools.lru_cache(maxsize=8)
def _opened(older: Older) -> tuple[ImageParts, TokenTable]:
    return ImageParts.open(older.images), TokenTable.open(older.tokens)


def copied_tokens(
    older: Sequence[Older],
    runs: Sequence[Sequence[int]],
    digests: Sequence[bytes],
    identity: Identity,
) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Token ids (rows, V, N) of images with these digests, `MISSING` in rows outside of `runs`,
    and grey levels (rows, V), `UNKNOWN_LEVEL` there and where an older table has none.

    Raises:
        InputError: an older table is damaged, or was replaced since the runs were found.
    """
    token_ids = np.full((len(digests), identity.num_views, identity.num_patches), MISSING)
    levels = np.full((len(digests), identity.num_views), UNKNOWN_LEVEL)
    origins = np.full(len(digests), -1, np.int64)
    for row, origin, count in runs:
        origins[row : row + count] = np.arange(origin, origin + count)
    for table in older:
        rows = np.flatnonzero((origins >= table.first) & (origins < table.first + table.rows))
        rows = rows[np.argsort(origins[rows], kind="stable")]
        there = origins[rows] - table.first
        ends = (np.diff(there) > MAX_GAP) | (np.diff(there // RANGE_ROWS) > 0)
        gaps = np.flatnonzero(ends) + 1
        for some, wanted in zip(np.split(rows, gaps), np.split(there, gaps), strict=True):
            if len(some):
                expected = [digests[row] for row in some]
                found = _read(table, wanted, expected, identity.views)
                token_ids[some], levels[some] = found
    return token_ids, levels


def _read(
    older: Older, rows: NDArray[np.int64], digests: list[bytes], views: tuple[int, int]
) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    """Token ids and grey levels of ascending rows of an older table, of images of these digests."""
    images, tokens = _opened(older)
    start, stop = int(rows[0]), int(rows[-1]) + 1
    keys, token_ids, levels = tokens.read_with_levels(start, stop)
    columns = images.read_rows(start, stop, ["key", "digest"])
    picked = rows - start
    same_keys = [columns["key"][row].as_py() == keys[row] for row in picked]
    if not all(same_keys) or columns["digest"].take(picked).to_pylist() != digests:
        raise InputError(
            f"reuse = {older.tokens}: rows {start:,} to {stop:,} are not of the images of "
            f"{older.images}: one of the two was replaced or altered; `beit audit` says which"
        )
    first = views[0] - tokens.views.start
    wanted = slice(first, first + views[1] - views[0])
    return token_ids[picked, wanted], levels[picked, wanted]
