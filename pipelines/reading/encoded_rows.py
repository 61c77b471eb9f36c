"""Rows of an image table and of its sidecars, read together and checked against each other.

What comes out is still encoded: decoding waits until a batch needs the row, so that a large
shuffle window costs little memory.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa

from beit.views import ViewPolicy, view_of
from pipelines.errors import InputError
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_files import UNKNOWN_LEVEL
from pipelines.tables.token_table import TokenTable, check_together
from pipelines.tables.view_table import ImagesOfViews, ViewTable, check_windows, read_shown

COLUMNS = ("key", "image", "digest")
# Row groups that neighbouring reads share (small images: many reads) are kept up to this size.
ROW_GROUP_CACHE_BYTES = 128 * 2**20


@dataclass(kw_only=True)
class EncodedRows:
    """Some rows of one epoch, in any order: lists and first axes are of equal length."""

    row_ids: np.ndarray
    """int64 (n,): global row ids."""
    keys: list[str]
    images: list[bytes]
    """Encoded, as in the table: whole images, or stored views."""
    digests: list[bytes]
    views: np.ndarray
    """int64 (n,): the view of each row in this epoch."""
    token_ids: np.ndarray | None
    """uint16 (n, N): the tokens of that view; None without token tables."""
    grey_levels: np.ndarray
    """int16 (n,): `beit.views.View.grey_level`, `UNKNOWN_LEVEL` where no table has it."""
    labels: np.ndarray | None = None
    """int64 (n,): classes; None where they are not read."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        """Bytes of the encoded images."""
        return sum(map(len, self.images))

    @property
    def to_render(self) -> tuple[list[bytes], list[bytes], np.ndarray, np.ndarray, list[str]]:
        """What `decoding.render_rows` is given of them."""
        return self.images, self.digests, self.views, self.grey_levels, self.keys

    def pick(self, positions: np.ndarray) -> Self:
        """The rows at these positions, in that order."""
        return type(self)(
            row_ids=self.row_ids[positions],
            keys=[self.keys[i] for i in positions],
            images=[self.images[i] for i in positions],
            digests=[self.digests[i] for i in positions],
            views=self.views[positions],
            token_ids=None if self.token_ids is None else self.token_ids[positions],
            grey_levels=self.grey_levels[positions],
            labels=None if self.labels is None else self.labels[positions],
        )

    def take(self, start: int, stop: int) -> Self:
        """Rows [start, stop), whose images this object then forgets."""
        rows = self.pick(np.arange(start, stop))
        self.images[start:stop] = [b""] * (stop - start)
        return rows

    @classmethod
    def join(cls, pieces: Sequence[Self]) -> Self:
        """All rows of all pieces, in order."""
        tokens = [piece.token_ids for piece in pieces if piece.token_ids is not None]
        labels = [piece.labels for piece in pieces if piece.labels is not None]
        return cls(
            row_ids=np.concatenate([piece.row_ids for piece in pieces]),
            keys=[key for piece in pieces for key in piece.keys],
            images=[image for piece in pieces for image in piece.images],
            digests=[digest for piece in pieces for digest in piece.digests],
            views=np.concatenate([piece.views for piece in pieces]),
            token_ids=np.concatenate(tokens) if tokens else None,
            grey_levels=np.concatenate([piece.grey_levels for piece in pieces]),
            labels=np.concatenate(labels) if labels else None,
        )


class TrainingTables:
    """An image table with the token tables that belong to it; safe to share by threads.

    Made by `open_training_tables`. ``views`` are all view indices that have tokens or stored
    pixels, ascending; empty without either, when every epoch draws a view of its own. With stored
    views no image is read, and ``images`` may be None.
    """

    def __init__(
        self,
        images: ImageTable | None,
        tokens: Sequence[TokenTable],
        policy: ViewPolicy,
        *,
        stored: Sequence[ViewTable] = (),
        labelled: bool = False,
    ) -> None:
        self._images = images
        self.labelled = labelled
        self.tokens = tuple(sorted(tokens, key=lambda table: table.views.start))
        self.stored = tuple(sorted(stored, key=lambda table: table.views.start))
        self.policy = policy
        sidecars = self.tokens or self.stored
        self.views = np.array([view for table in sidecars for view in table.views], np.int64)
        self._row_groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def images(self) -> ImageTable:
        """The image table, where it was opened."""
        assert self._images is not None, "only view tables were opened"
        return self._images

    @property
    def image_source(self) -> ImageTable | ImagesOfViews:
        """Address, fingerprint and number of rows of the images."""
        return self.stored[0].images if self._images is None else self._images

    @property
    def num_rows(self) -> int:
        """Rows of the image table."""
        return self.image_source.num_rows

    @property
    def row_group_sizes(self) -> np.ndarray:
        """int64: what `SampleOrder` starts from."""
        if self.stored:
            return self.stored[0].image_row_groups
        return self.images.row_groups.sizes

    @property
    def form(self) -> str | None:
        """How views are stored; None where images are decoded."""
        return self.stored[0].identity.form if self.stored else None

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """Grid of the tokens; None without token tables."""
        return self.tokens[0].grid_size if self.tokens else None

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary of the tokens; None without token tables."""
        return self.tokens[0].vocab_size if self.tokens else None

    def fingerprints(self) -> dict[str, str | list[str]]:
        """Identity of everything that is read, for checkpoints and lineage."""
        values: dict[str, str | list[str]] = {"images": self.image_source.fingerprint}
        if self.tokens:
            values["tokens"] = [table.fingerprint for table in self.tokens]
            values["tokenizer"] = self.tokens[0].tokenizer_fingerprint
        if self.stored:
            values["views"] = [table.fingerprint for table in self.stored]
        return values

    def read(self, start: int, stop: int, epoch: int) -> EncodedRows:
        """Rows [start, stop) of the table as they are used in this epoch.

        Raises:
            InputError: a token table holds other keys than the image table there.
        """
        table = self._read_images(start, stop, epoch)
        keys = table["key"].to_pylist()
        digests = table["digest"].to_pylist()
        views = np.array([view_of(digest, epoch, self.views) for digest in digests], np.int64)
        token_ids, grey_levels = self._read_tokens(start, stop, keys, views)
        return EncodedRows(
            row_ids=np.arange(start, stop),
            keys=keys,
            images=table["image"].to_pylist(),
            digests=digests,
            views=views,
            token_ids=token_ids,
            grey_levels=grey_levels,
            labels=table["label"].to_numpy().astype(np.int64) if self.labelled else None,
        )

    def _read_tokens(
        self, start: int, stop: int, keys: list[str], views: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Tokens (n, N) and grey levels (n,) of these views."""
        levels = np.full(stop - start, UNKNOWN_LEVEL)
        if not self.tokens:
            return None, levels
        height, width = self.tokens[0].grid_size
        picked = np.empty((stop - start, height * width), np.uint16)
        for table in self.tokens:
            wanted = (views >= table.views.start) & (views < table.views.stop)
            if not wanted.any():
                continue
            token_keys, token_ids, table_levels = table.read_with_levels(start, stop)
            if token_keys != keys:
                self._report_keys(table, start, keys, token_keys)
            chosen = views[wanted] - table.views.start
            picked[wanted], levels[wanted] = token_ids[wanted, chosen], table_levels[wanted, chosen]
        return picked, levels

    def _report_keys(
        self, table: TokenTable, start: int, keys: list[str], token_keys: list[str]
    ) -> None:
        pairs = zip(keys, token_keys, strict=True)
        row, (key, token_key) = next(
            (i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]
        )
        raise InputError(
            f"{table.uri}: key of row {start + row} is {token_key!r}, but {key!r} in the image "
            f"table {self.image_source.uri}: the tokens are of other images; run `beit audit`, "
            "then tokenize again"
        )

    def _read_images(self, start: int, stop: int, epoch: int) -> pa.Table:
        groups = self.stored[0].row_groups if self.stored else self.images.row_groups
        positions = groups.overlapping(start, stop)
        table = pa.concat_tables([self._row_group(position, epoch) for position in positions])
        return table.slice(start - int(groups.starts[positions[0]]), stop - start)

    def _row_group(self, position: int, epoch: int) -> pa.Table:
        shown = epoch % len(self.views) if self.stored else 0
        with self._lock:
            table = self._row_groups.get((position, shown))
            if table is not None:
                self._row_groups.move_to_end((position, shown))
                return table
        if self.stored:
            table = read_shown(self.stored, position, shown)
        else:
            columns = (*COLUMNS, "label") if self.labelled else COLUMNS
            table = self.images.read_row_group(position, columns)
        with self._lock:
            self._row_groups[position, shown] = table
            total = sum(kept.nbytes for kept in self._row_groups.values())
            while total > ROW_GROUP_CACHE_BYTES:
                total -= self._row_groups.popitem(last=False)[1].nbytes
        return table


def open_training_tables(
    images_uri: str,
    token_uris: Sequence[str] = (),
    *,
    view_uris: Sequence[str] = (),
    image_size: int = 0,
    policy: ViewPolicy | None = None,
    labelled: bool = False,
    grid_size: tuple[int, int] | None = None,
    vocab_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
) -> TrainingTables:
    """Open an image table with token tables of the same images, tokenizer and view policy.

    With ``view_uris`` pixels come from view tables of the same images, policy and views, of
    ``image_size``; then ``images_uri`` may be empty. ``policy``, ``grid_size``, ``vocab_size`` and
    ``tokenizer_fingerprint`` are what the caller relies on, where it does. Without token tables
    ``policy`` is needed: it draws the views. With ``labelled`` labels are read, too, which all
    rows must have.

    Raises:
        InputError: a table is missing, unfinished, altered, stale or of something else than the
            others; the message names the field and both values. Labels are asked for, and
            images have none.
    """
    stored = [ViewTable.open(uri) for uri in view_uris]
    images = ImageTable.open(images_uri) if images_uri or not stored else None
    source = images or stored[0].images
    if labelled and images is not None:
        check_labelled(images)
    tokens = [TokenTable.open(uri) for uri in token_uris]
    for table in tokens:
        table.check_compatible(
            source,
            grid_size=grid_size,
            vocab_size=vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint,
            policy=policy,
        )
    check_together(tokens)
    if tokens:
        policy = tokens[0].policy
    elif policy is None:
        raise InputError("tokens: none given, and no view policy to draw views from; give one")
    for views in stored:
        views.check_compatible(
            image_fingerprint=source.fingerprint, policy=policy, image_size=image_size
        )
    tables = TrainingTables(images, tokens, policy, stored=stored, labelled=labelled)
    if stored:
        check_windows(tables.stored, tables.views)
    return tables


def check_labelled(images: ImageTable) -> None:
    """Raises InputError unless every image has a label."""
    missing = int((images.labels() < 0).sum())
    if missing:
        raise InputError(
            f"images = {images.uri}: {missing} of {images.num_rows} images have no label; prepare "
            "a table in which all have one (docs/prepare.md says where labels come from)"
        )
