"""Labelled images as a probe needs them: which rows, what they show, who is near to whom."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.config.protocol import ProtocolConfig
from pipelines.errors import InputError
from pipelines.reading.pixels import central, read_pixels
from pipelines.tables.class_names import comparable
from pipelines.tables.image_table import ImageTable

BATCH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages:
    """Labelled images of a table, or of two; their pixels are read when they are wanted."""

    sources: tuple[tuple[ImageTable, np.ndarray], ...]
    """Tables, each with the rows that are used of it (ascending)."""
    labels: np.ndarray
    """int64 (n,), positions in class_names."""
    groups: list[str]
    class_names: list[str]
    known: list[str]
    """Classes of the table, also of images that were not chosen."""
    fingerprint: str
    """Of the image table."""
    uri: str

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(
        self,
        size: int,
        *,
        positions: np.ndarray | None = None,
        crop_fraction: float,
        batch_size: int = BATCH,
        num_threads: int = 1,
        damaged: dict[int, str] | None = None,
    ) -> Iterator[np.ndarray]:
        """Batches uint8 (B, 3, size, size) of the images at `positions` (ascending), or of all.

        `damaged` as in `read_pixels`, by positions here.
        """
        start = 0
        for table, rows in self.sources:
            chosen = np.arange(start, start + len(rows))
            if positions is not None:
                chosen = positions[(positions >= start) & (positions < start + len(rows))]
            found: dict[int, str] | None = None if damaged is None else {}
            for batch in read_pixels(
                table, rows[chosen - start], central(crop_fraction), size,
                batch_size=batch_size, num_threads=num_threads, damaged=found,
            ):  # fmt: skip
                if damaged is not None and found:
                    damaged.update({int(chosen[at]): why for at, why in found.items()})
                yield batch
            start += len(rows)


def read_labelled(
    uri: str, protocol: ProtocolConfig, *, field: str = "images", test: bool = False
) -> LabelledImages:
    """The labelled images of a table that the protocol takes, or those of a table to test on.

    Of a table with more than `max_images` rows these are spread evenly over it. Classes without an
    image are left out. Errors name `field`.

    Raises:
        InputError: labelled images of fewer than two classes, or of fewer groups than folds.
    """
    table = ImageTable.open(uri)
    rows = spread_rows(table, protocol)
    labels = np.full(len(rows), -1, np.int64)
    groups = np.empty(len(rows), dtype=object)
    for chosen, piece in table.read_scattered(rows, ("label", *table.group_columns)):
        labels[chosen] = piece["label"].fill_null(-1).to_numpy()
        groups[chosen] = table.group_names(piece)
    kept = np.flatnonzero(labels >= 0)
    if protocol.one_per_group and not test:
        _, first = np.unique(groups[kept].astype(str), return_index=True)
        kept = kept[np.sort(first)]
    classes, least = np.unique(labels[kept]), 1 if test else 2
    counts = table.manifest.get("class_counts") or [1] * len(table.class_names)
    if len(classes) < least:
        raise InputError(
            f"{field}: {uri} has labelled images of {len(classes)} classes; probes need "
            f"{least}. Prepare a table with labels"
        )
    # Beside each fold there are groups to fit on, and others to choose by.
    folds, num_groups = protocol.num_folds, len(set(groups[kept]))
    if not test and num_groups < (needed := 4 if folds == 2 else folds):
        raise InputError(
            f"{field}: {uri} has labelled images of {num_groups} groups; num_folds = {folds} needs "
            f"{needed}. Give a table with more groups, or another number of folds"
        )
    return LabelledImages(
        sources=((table, rows[kept]),),
        labels=np.searchsorted(classes, labels[kept]),
        groups=[str(group) for group in groups[kept]],
        class_names=[table.class_names[index] for index in classes],
        known=[name for name, count in zip(table.class_names, counts, strict=True) if count],
        fingerprint=table.fingerprint,
        uri=table.uri,
    )


def unlabelled(uri: str, protocol: ProtocolConfig) -> LabelledImages:
    """The same images whatever is known of them, without labels and groups."""
    table = ImageTable.open(uri)
    rows = spread_rows(table, protocol)
    return LabelledImages(
        sources=((table, rows),),
        labels=np.full(len(rows), -1),
        groups=[],
        class_names=[],
        known=[],
        fingerprint=table.fingerprint,
        uri=table.uri,
    )


def spread_rows(table: ImageTable, protocol: ProtocolConfig) -> np.ndarray:
    """At most `max_images` rows of a table, spread evenly over it."""
    most = protocol.max_images or table.num_rows
    if table.num_rows <= most:
        return np.arange(table.num_rows)
    return np.linspace(0, table.num_rows - 1, most).round().astype(np.int64)


def joined(train: LabelledImages, test: LabelledImages) -> LabelledImages:
    """Rows of both, classes brought together by name.

    Either may lack some: a test of a few classes, a sample that lost one. Test images of a class
    that the sample of `train` lost stay, and can only be missed.

    Raises:
        InputError: the table of `train` does not know a class of `test`.
    """
    numbers = {comparable(name): number for number, name in enumerate(train.known)}
    strange = [name for name in test.class_names if comparable(name) not in numbers]
    if strange:
        raise InputError(
            f"test_images: {train.uri} has no image of {', '.join(map(repr, strange[:5]))}"
            f"{', ...' if len(strange) > 5 else ''}, but of "
            f"{', '.join(map(repr, train.known[:5]))}{', ...' if len(train.known) > 5 else ''}; "
            "give tables whose classes have the same names"
        )
    own, others = (
        np.asarray([numbers[comparable(name)] for name in names])
        for names in (train.class_names, test.class_names)
    )
    used = np.union1d(own, others)
    return dataclasses.replace(
        train,
        sources=(*train.sources, *test.sources),
        labels=np.searchsorted(used, np.concatenate([own[train.labels], others[test.labels]])),
        groups=[*train.groups, *test.groups],
        class_names=[train.known[number] for number in used],
    )
