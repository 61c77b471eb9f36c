"""Labelled batches for fine-tuning: normalised, erased and mixed on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit.augment import Erasure
from beit.mixing import mix_of, mixed
from pipelines.config.finetune import FinetuneConfig
from pipelines.reading.encoded_rows import TrainingTables, open_training_tables
from pipelines.reading.ingest import Batch
from pipelines.training.data import WorkerFeed
from pipelines.training.distributed import World


@dataclass(frozen=True, kw_only=True)
class LabelledPart:
    """What one forward and backward pass takes; tensors on the device."""

    pixels: Tensor
    """float32 (B, 3, H, W), normalised."""
    labels: Tensor
    """int64 (B, 2): the image's own, and that of what was mixed into it."""
    shares: Tensor
    """float32 (B, 2): how much each counts."""
    rows: slice
    """Its images within this worker's share of the global batch."""


@dataclass(frozen=True, kw_only=True)
class LabelledBatch:
    """This worker's share of one step."""

    parts: Sequence[LabelledPart]
    row_ids: NDArray[np.int64]
    """int64 (B,)."""


def open_labelled(config: FinetuneConfig) -> TrainingTables:
    """The images to train on.

    Raises:
        InputError: no such table, or an image without a label.
    """
    return open_training_tables(config.images, policy=config.policy, labelled=True)


class LabelledData(WorkerFeed[FinetuneConfig]):
    """The data of one worker in fine-tuning.

    Images are mixed within a canonical shard of a step, so that what a step sees does not depend
    on the number of workers.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        world: World,
        *,
        image_size: int,
        grid_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(
            config, world, open_labelled(config), image_size=image_size, mean=mean, std=std
        )
        self.grid_size = grid_size
        red, green, blue = (min(255, round(255 * value)) for value in mean)
        self.fill = red, green, blue

    def batches(self, segments: Sequence[tuple[int, int]]) -> Iterator[LabelledBatch]:
        """Batches of [(first position, count), ...] of the order, read ahead, on the device."""
        for first, count in segments:
            if self.idle:
                yield from (self._nothing() for _ in range(count))
                continue
            stream = self.start(
                start_step=first,
                stop_step=first + count,
                augment=self.config.augment,
                fill=self.fill,
                grid_size=self.grid_size,
            )
            for batch in stream:
                yield self._on_device(batch)

    def _nothing(self) -> LabelledBatch:
        """What an idle worker computes: one image whose label counts for nothing, so no loss."""
        device, side = self.world.device, self.image_size
        pixels = torch.zeros(1, 3, side, side, device=device)
        labels = torch.zeros(1, 2, dtype=torch.int64, device=device)
        return self._cut(pixels, labels, torch.zeros(1, 2, device=device), np.zeros(0, np.int64))

    def _on_device(self, batch: Batch) -> LabelledBatch:
        assert batch.labels is not None
        pixels = self.normalise(self.move(batch.pixels))
        self._erase(pixels, batch.erasures)
        labels = torch.stack((batch.labels, batch.labels), dim=1)
        shares = torch.tensor([1.0, 0.0]).repeat(len(labels), 1)
        self._mix(pixels, labels, shares, batch.step)
        return self._cut(pixels, self.move(labels), self.move(shares), batch.row_ids.numpy())

    def _erase(self, pixels: Tensor, erasures: Sequence[Erasure | None]) -> None:
        """Puts noise where an image is erased, in place; all of a batch's is copied at once."""
        chosen = [(row, erasure) for row, erasure in enumerate(erasures) if erasure is not None]
        if not chosen:
            return
        flat = np.concatenate([erasure.noise.ravel() for _, erasure in chosen])
        sizes = [erasure.noise.size for _, erasure in chosen]
        pieces = torch.split(self.move(torch.from_numpy(flat)), sizes)
        for (row, erasure), noise in zip(chosen, pieces, strict=True):
            _, height, width = erasure.noise.shape
            rows = slice(erasure.top, erasure.top + height)
            columns = slice(erasure.left, erasure.left + width)
            pixels[row, :, rows, columns] = noise.view(3, height, width)

    def _mix(self, pixels: Tensor, labels: Tensor, shares: Tensor, position: int) -> None:
        """Mixes the images of each shard, in place."""
        how, count = self.config.mixing, self.order.shard_batch_size
        for index, shard in enumerate(self.order.shards_of(self.world.rank, self.active)):
            mix = mix_of(
                seed=self.config.seed,
                step=position,
                shard=shard,
                size=(self.image_size, self.image_size),
                mixup=how.mixup,
                cutmix=how.cutmix,
                probability=how.probability,
                switch_probability=how.switch_probability,
            )
            if mix is None:
                continue
            rows = slice(index * count, (index + 1) * count)
            pixels[rows] = mixed(pixels[rows], mix)
            labels[rows, 1] = labels[rows, 0].flip(0)
            shares[rows] = torch.tensor([mix.share, 1 - mix.share])

    def _cut(
        self, pixels: Tensor, labels: Tensor, shares: Tensor, row_ids: NDArray[np.int64]
    ) -> LabelledBatch:
        parts = [
            LabelledPart(pixels=pixels[rows], labels=labels[rows], shares=shares[rows], rows=rows)
            for rows in self.pieces(len(pixels))
        ]
        return LabelledBatch(parts=parts, row_ids=row_ids)
