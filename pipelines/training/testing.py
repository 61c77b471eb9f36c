"""Tests of a classifier in training: how many images of a table it knows, and how sure that is."""

import functools
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pipelines.config.finetune import FinetuneConfig
from pipelines.errors import InputError
from pipelines.evaluation.probes import wilson_interval
from pipelines.reading.pixels import central, read_pixels
from pipelines.tables.class_names import comparable
from pipelines.tables.image_table import ImageTable
from pipelines.training.distributed import World, autocast
from pipelines.training.labelled import LabelledData
from pipelines.training.log import TrainLog

LARGE = 384  # pixels from which the whole of a test image is shown


@dataclass(frozen=True, kw_only=True)
class TestScore:
    """What a test found."""

    __test__ = False  # no test of pytest's

    accuracy: float
    low: float
    high: float
    """95 % interval (Wilson), as if images were drawn independently."""
    loss: float
    """Mean cross-entropy, in nats."""
    images: int

    def describe(self) -> str:
        """For a person."""
        interval = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"test accuracy {100 * self.accuracy:.1f} % {interval} on {self.images} images"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for records."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class TestImages:
    """The rows of a test table, their labels as classes of the training table."""

    __test__ = False

    table: ImageTable
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]


@functools.lru_cache(maxsize=2)
def open_test(uri: str, class_names: tuple[str, ...], trained: tuple[bool, ...]) -> TestImages:
    """The labelled rows of a test table.

    `class_names` are those of the training table, `trained` says which of them have images there.

    Raises:
        InputError: no labels, or not the same classes.
    """
    table = ImageTable.open(uri)
    own = table.labels()
    rows = np.flatnonzero(own >= 0)
    if not len(rows):
        raise InputError(f"test = {uri}: none of its images has a label; prepare one with labels")
    numbers = {comparable(name): number for number, name in enumerate(class_names)}
    there = np.unique(own[rows])
    known = {int(c): numbers.get(comparable(table.class_names[c])) for c in there}
    strange = [
        table.class_names[c] for c, number in known.items() if number is None or not trained[number]
    ]
    absent = [name for i, name in enumerate(class_names) if trained[i] and i not in known.values()]
    for names, what in (
        (strange, "has images of {}, of which the training table has none"),
        (absent, "has no image of {}, which the training table has"),
    ):
        if names:
            listed = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
            raise InputError(
                f"test = {uri}: {what.format(listed)}; give a table of the same classes, by name"
            )
    renamed = np.full(len(table.class_names), -1, np.int64)
    for number, new in known.items():
        assert new is not None
        renamed[number] = new
    return TestImages(table=table, rows=rows, labels=renamed[own[rows]])


def crop_fraction(config: FinetuneConfig, image_size: int) -> float:
    """Side of the central square that tests show, as a share of an image's shorter side."""
    given = config.testing.crop_fraction
    return given if given is not None else (1.0 if image_size >= LARGE else 224 / 256)


def score(
    config: FinetuneConfig,
    images: TestImages,
    network: nn.Module,
    data: LabelledData,
    world: World,
    *,
    precision: str,
) -> TestScore:
    """Accuracy and loss on the test images: the same on all workers, who all take part.

    Each takes neighbouring rows, so that none reads the whole table. All make the same number of
    passes, for a sharded model waits for everyone: the last row fills up, and what it filled is
    not counted.
    """
    share = -(-len(images.rows) // world.size)
    mine = np.minimum(world.rank * share + np.arange(share), len(images.rows) - 1)
    batches = read_pixels(
        images.table,
        images.rows[mine],
        central(crop_fraction(config, data.image_size)),
        data.image_size,
        batch_size=config.testing.batch_size,
        num_threads=data.num_threads,
    )
    labels = torch.from_numpy(images.labels[mine]).to(world.device)
    outcomes, done = [], 0
    network.eval()
    with torch.no_grad():
        for batch in batches:
            pixels = data.normalise(torch.from_numpy(batch).to(world.device))
            with autocast(world, precision):
                logits = network(pixels).float()
            truth = labels[done : done + len(batch)]
            loss = F.cross_entropy(logits, truth, reduction="none")
            outcomes.append(torch.stack(((logits.argmax(dim=1) == truth).float(), loss)))
            done += len(batch)
    network.train()
    found = torch.cat(world.gather(torch.cat(outcomes, dim=1)), dim=1)[:, : len(images.rows)]
    hits, losses = found.double().cpu()
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return TestScore(
        accuracy=float(hits.mean()),
        low=low,
        high=high,
        loss=float(losses.mean()),
        images=len(hits),
    )


def run_test(
    config: FinetuneConfig,
    images: TestImages,
    network: nn.Module,
    data: LabelledData,
    world: World,
    log: TrainLog,
    step: int,
    *,
    precision: str,
) -> TestScore:
    """`score`, recorded as an event and in MLflow."""
    start = time.monotonic()
    with log.books.spend("evaluation"):
        found = score(config, images, network, data, world, precision=precision)
        log.tracked({"test/accuracy": found.accuracy, "test/loss": found.loss}, step)
        log.event(
            "test",
            step=step,
            **found.to_dict(),
            seconds=time.monotonic() - start,
            message=f"step {step}: {found.describe()}",
        )
        world.barrier()
    return found
