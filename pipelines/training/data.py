"""Batches as a training loop wants them: on the device, in micro-batches, for any worker count.

The order of samples is `pipelines.sample_order`, reading ahead is `pipelines.reading.ingest`; here
they meet the workers, the steps that a rollback skipped, and the device.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config.finetune import FinetuneConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.train_tokenizer import TrainTokenizerConfig
from pipelines.errors import InputError
from pipelines.reading import ingest
from pipelines.reading.encoded_rows import TrainingTables, open_training_tables
from pipelines.reading.ingest import Batch, BatchStream, Counters
from pipelines.sample_order import SampleOrder
from pipelines.training.distributed import World
from pipelines.training.health import Finding

AnyConfig = TypeVar("AnyConfig", PretrainConfig, FinetuneConfig)

# Above this share of their time at work, the decoding threads are what training waits for.
DECODERS_BUSY = 0.6


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass takes; tensors on the device."""

    pixels: Tensor
    """uint8 (B, 3, H, W)."""
    mask: Tensor
    """bool (B, N)."""
    targets: Tensor | None
    """int64 (num_masked,): tokens of the masked patches, row-major; None without token tables."""
    num_masked: int
    """Known on the host, so that nobody waits for the device to count."""
    rows: slice
    """Its images within this worker's share of the global batch."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """This worker's share of one step."""

    parts: Sequence[MicroBatch]
    host: Batch
    """As it came from the tables."""

    @property
    def num_masked(self) -> int:
        """Masked patches in all micro-batches."""
        return sum(part.num_masked for part in self.parts)

    @property
    def row_ids(self) -> NDArray[np.int64]:
        """int64 (B,)."""
        ids: NDArray[np.int64] = self.host.row_ids.numpy()
        return ids


def make_order(
    config: PretrainConfig | FinetuneConfig | TrainTokenizerConfig, row_group_sizes: np.ndarray
) -> SampleOrder:
    """The order of samples of a run. Raises InputError for what does not fit together, by name."""
    return SampleOrder(
        row_group_sizes,
        seed=config.seed,
        global_batch_size=config.data.global_batch_size,
        num_shards=config.data.num_shards,
        window=config.data.window,
    )


def open_tables(config: PretrainConfig) -> TrainingTables:
    """The tables of a run, checked against each other and against the model.

    Raises:
        InputError: naming field and values.
    """
    if not config.images and not config.views:
        raise InputError("images is empty: give a URI with --images, or view tables with --views")
    open_with = partial(
        open_training_tables,
        config.images,
        view_uris=config.views,
        image_size=config.model.image_size,
    )
    if config.objective.kind == "mae":
        if config.tokens:
            raise InputError(
                f"tokens = {config.tokens}: objective.kind = mae predicts pixels and reads none"
            )
        return open_with(policy=config.policy)
    if not config.tokens:
        raise InputError(
            "tokens = []: name at least one token table, or train without (--objective.kind mae)"
        )
    data = open_with(config.tokens)
    if data.grid_size != config.model.grid_size:
        raise InputError(
            f"model.image_size / model.patch_size = {config.model.grid_size} patches, but the "
            f"token tables have grid_size {data.grid_size}; change model.image_size or "
            "model.patch_size, or tokenize for this grid"
        )
    return data


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(value for value in range(1, limit + 1) if number % value == 0)


def _normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (pixels.float() - mean) / std


class WorkerFeed(Generic[AnyConfig]):
    """What the data of one worker is in every training on images.

    An elastic run may get a number of workers that does not divide the canonical shards. Then the
    largest number that does takes part, and the other workers contribute nothing.
    """

    def __init__(
        self,
        config: AnyConfig,
        world: World,
        tables: TrainingTables,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.config: AnyConfig = config
        self.world, self.tables = world, tables
        self.image_size = image_size
        self.order = make_order(config, tables.row_group_sizes)
        self.active = largest_divisor(config.data.num_shards, world.size)
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(mean, device=world.device).view(shape) * 255
        self._std = torch.tensor(std, device=world.device).view(shape) * 255
        compiled = config.scaling.compile
        self._normalised = torch.compile(_normalised) if compiled else _normalised
        self._stream: BatchStream | None = None
        self._counters = Counters()

    def close(self) -> None:
        """Stops reading ahead."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to float32, by the configured mean and standard deviation."""
        return self._normalised(pixels, self._mean, self._std)

    def denormalise(self, pixels: Tensor) -> Tensor:
        """The inverse, rounded and cut to uint8."""
        return (pixels * self._std + self._mean).round().clamp(0, 255).to(torch.uint8)

    def my_rows(self, values: Tensor) -> Tensor:
        """This worker's rows of something drawn for the whole global batch, on the device."""
        share = len(values) // self.active
        if self.idle:
            return self.move(values[:1])  # of the image that stands in, see `_nothing`
        return self.move(values[self.world.rank * share : (self.world.rank + 1) * share])

    def explain(self, finding: Finding, elapsed: float) -> Finding:
        """Says of starvation what this worker's read-ahead was busy with for `elapsed` seconds.

        Other findings stay as they are.
        """
        if finding.kind != "data_starvation":
            return finding
        before, now = self._counters, self._stream.counters if self._stream else Counters()
        self._counters = now
        read = now.read_seconds - before.read_seconds
        decode = now.decode_seconds - before.decode_seconds
        rows, num_bytes = now.rows_decoded - before.rows_decoded, now.bytes_read - before.bytes_read
        busy = decode / (self.num_threads * elapsed) if elapsed > 0 else 0.0
        rate = f"{num_bytes / 2**20 / read:.1f} MB/s" if read > 0 else "nothing read"
        if self.config.data.executor == "threads" and busy >= DECODERS_BUSY:
            cause = (
                f"Cause: decoding. {self.num_threads} decoding threads were busy {busy:.0%} of "
                f"the time at {decode / max(rows, 1) * 1e3:.1f} ms an image. Raise "
                f"data.num_threads and scaling.cpus_per_worker, {self._instead_of_decoding}."
            )
        else:
            cause = (
                f"Cause: reading. Storage gave {rate} to each of its readers while decoding was "
                f"busy {busy:.0%} of the time. Put the image table on faster storage, or raise "
                "data.window (longer reads) and data.prefetch_batches."
            )
        return dataclasses.replace(finding, message=f"{finding.message} {cause}")

    @property
    def _instead_of_decoding(self) -> str:
        elsewhere = "decode on other nodes (data.executor=ray_tasks)"
        if self.tables.stored:
            return f"or {elsewhere}"
        return (
            "store the views once (`beit render`, then --views: a fifth of this work, "
            f"docs/views.md), {elsewhere}, or shrink the images (`beit prepare --max_side`)"
        )

    def start_period(self) -> None:
        """Begins the period that `explain` speaks of."""
        self._counters = self._stream.counters if self._stream else Counters()

    @property
    def num_threads(self) -> int:
        """Decoding threads."""
        return self.config.data.num_threads or self.config.scaling.cpus_per_worker

    @property
    def idle(self) -> bool:
        """Whether this worker contributes nothing."""
        return self.world.rank >= self.active

    def start(self, **options: Any) -> BatchStream:
        """This worker's read-ahead, in place of any before; see `ingest.train_batches`."""
        self.close()
        data = self.config.data
        self._stream = ingest.train_batches(
            self.tables,
            self.order,
            image_size=self.image_size,
            seed=self.config.seed,
            rank=self.world.rank,
            num_ranks=self.active,
            executor=data.executor,
            num_threads=self.num_threads,
            prefetch_batches=data.prefetch_batches,
            pin_memory=self.world.device.type == "cuda",
            **options,
        )
        self._counters = Counters()
        return self._stream

    def pieces(self, count: int) -> list[slice]:
        """Micro-batches of `count` rows: as many for workers that are idle as for those at work,
        for in a sharded model all take part in each."""
        passes = self.config.scaling.accumulate_steps
        if self.idle:
            share = self.config.data.global_batch_size // self.active
            return [slice(0, count)] * min(passes, share)
        edges = [count * i // min(passes, count) for i in range(min(passes, count) + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def move(self, tensor: Tensor) -> Tensor:
        """A tensor on the device; from page-locked memory, so that the host waits for nothing."""
        if self.world.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.world.device, non_blocking=True)


class WorkerData(WorkerFeed[PretrainConfig]):
    """The data of one worker in pretraining."""

    def __init__(self, config: PretrainConfig, world: World) -> None:
        super().__init__(
            config,
            world,
            open_tables(config),
            image_size=config.model.image_size,
            mean=config.data.mean,
            std=config.data.std,
        )

    def batches(self, segments: Sequence[tuple[int, int]]) -> Iterator[StepBatch]:
        """Batches of [(first position, count), ...] of the order, read ahead, on the device."""
        for first, count in segments:
            for batch in self._host_batches(first, count):
                yield self._on_device(batch)

    def _host_batches(self, first: int, count: int) -> Iterator[Batch]:
        if self.idle:
            for position in range(first, first + count):
                yield self._nothing(position)
            return
        yield from self.start(
            start_step=first,
            stop_step=first + count,
            masking=self.config.masking,
            grid_size=self.config.model.grid_size,
        )

    def _nothing(self, position: int) -> Batch:
        """What an idle worker computes: one black image without a masked patch, so no loss."""
        side, patches = self.config.model.image_size, self.config.model.num_patches
        return Batch(
            step=position,
            epoch=self.order.locate(position)[0],
            row_ids=torch.zeros(0, dtype=torch.int64),
            views=torch.zeros(0, dtype=torch.int64),
            pixels=torch.zeros(1, 3, side, side, dtype=torch.uint8),
            mask=torch.zeros(1, patches, dtype=torch.bool),
            token_ids=torch.zeros(1, patches, dtype=torch.int64) if self.tables.tokens else None,
        )

    def _on_device(self, batch: Batch) -> StepBatch:
        parts = []
        for rows in self.pieces(len(batch.pixels)):
            mask = batch.mask[rows]
            targets = None if batch.token_ids is None else batch.token_ids[rows][mask]
            parts.append(
                MicroBatch(
                    pixels=self.move(batch.pixels[rows]),
                    mask=self.move(mask),
                    targets=None if targets is None else self.move(targets),
                    num_masked=int(mask.sum()),
                    rows=rows,
                )
            )
        return StepBatch(parts=parts, host=batch)
