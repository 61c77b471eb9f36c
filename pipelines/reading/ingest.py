"""From tables to training batches: the executor of the sample order.

    read windows (IO threads) -> take the rows of a step -> decode, render and mask (decoder)
    -> batch, in order, a few ahead of the consumer

Which rows, views, tokens and masks a step has is fixed by pure functions; only *when* and *where*
the work happens is decided here. So batches are the same bit for bit with threads and with Ray
tasks, at any number of either, and after any restart. Windows are held as encoded bytes, and
given up row by row as they are used: about window * shards rows at a time, plus a window.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from beit.augment import Erasure
from beit.views import Interpolation
from pipelines.config.finetune import AugmentConfig
from pipelines.config.pretrain import MaskingConfig
from pipelines.errors import InputError
from pipelines.reading.decoding import (
    Decoder,
    Executor,
    RenderedRows,
    RenderSpec,
    make_decoder,
)
from pipelines.reading.encoded_rows import EncodedRows, TrainingTables
from pipelines.sample_order import SampleOrder

_IO_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of one step, in the order of the sample order. Tensors are on the CPU."""

    step: int
    """Counted from the start of the run."""
    epoch: int
    row_ids: torch.Tensor
    """int64 (B,): rows of the image table."""
    views: torch.Tensor
    """int64 (B,): view index of each row."""
    pixels: torch.Tensor
    """uint8 (B, 3, H, W); normalising is left to the device."""
    mask: torch.Tensor
    """bool (B, N), row-major, True = masked; all False without masking."""
    token_ids: torch.Tensor | None
    """int64 (B, N), row-major; None without token tables."""
    token_pixels: torch.Tensor | None = None
    """uint8 (B, 3, h, w) for tokenizing online, if asked for."""
    labels: torch.Tensor | None = None
    """int64 (B,): classes; None without labels."""
    erasures: Sequence[Erasure | None] = ()
    """What is to be erased of each image, once it is normalised; empty: nothing."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What a stream has done so far; seconds are summed over threads or tasks."""

    rows_read: int = 0
    bytes_read: int = 0
    """Encoded images, or stored views, only."""
    read_seconds: float = 0.0
    rows_decoded: int = 0
    decode_seconds: float = 0.0


@dataclass(kw_only=True)
class _Window:
    """A window of a shard: being read, then held until its last row is used."""

    pieces: list["Future[EncodedRows]"]
    permutation: np.ndarray
    rows_left: int
    rows: EncodedRows | None = None

    def take(self, start: int, stop: int) -> EncodedRows:
        if self.rows is None:
            joined = EncodedRows.join([piece.result() for piece in self.pieces])
            self.rows, self.pieces = joined.pick(self.permutation), []
        self.rows_left = len(self.permutation) - stop
        return self.rows.take(start, stop)


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A batch whose slices are being decoded."""

    step: int
    epoch: int
    rows: EncodedRows
    handles: list[Any]


def train_batches(
    data: TrainingTables,
    order: SampleOrder,
    *,
    image_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    masking: MaskingConfig | None = None,
    augment: AugmentConfig | None = None,
    fill: tuple[int, int, int] = (128, 128, 128),
    grid_size: tuple[int, int] | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    executor: Executor = "threads",
    num_threads: int = 2,
    prefetch_batches: int = 2,
    fast: bool = True,
    interpolation: Interpolation = "bicubic",
    token_view: tuple[int, Interpolation] | None = None,
    pin_memory: bool = False,
) -> "BatchStream":
    """The batches of steps [start_step, stop_step) for one rank, in order; closes at the end.

    Args:
        seed: Of masks and augmentations.
        augment: What else happens to views, for fine-tuning; `fill` is the colour outside of them.
        grid_size: Patches per column and row; needed only without token tables.
        num_threads: Decoding threads (threads executor only).
        prefetch_batches: Batches decoded ahead of the consumer.
        fast: Patch view within 0.05 grey levels (mean) of the exact one, in half of the time;
            says nothing where views are stored.
        interpolation: Filter of the exact patch view, where it is not `fast`.
        token_view: Size and filter of the tokenizer's view, to tokenize online.
        pin_memory: Pixels in page-locked memory, for asynchronous copies to CUDA.

    Raises:
        InputError: sizes that do not fit together, here; damaged or foreign data, while iterating.
    """
    if data.grid_size is None and grid_size is None:
        raise InputError("grid_size: needed without token tables, to make masks")
    if None not in (data.grid_size, grid_size) and data.grid_size != grid_size:
        raise InputError(f"grid_size = {grid_size}, but the tokens have {data.grid_size}")
    grid_size = data.grid_size or grid_size
    assert grid_size is not None
    if masking is not None and masking.num_masked > grid_size[0] * grid_size[1]:
        raise InputError(
            f"masking.num_masked = {masking.num_masked} exceeds the {grid_size[0]} x "
            f"{grid_size[1]} patches of an image: choose fewer"
        )
    if prefetch_batches < 1:
        raise InputError(f"data.prefetch_batches = {prefetch_batches}: give at least 1")
    if order.num_rows != data.num_rows:
        raise InputError(f"the order is of {order.num_rows} rows, the table has {data.num_rows}")
    if data.form is not None and (token_view is not None or augment is not None):
        raise InputError("stored views: tokens and augmentations are made from images alone")
    shards = order.shards_of(rank, num_ranks)
    spec = RenderSpec(
        policy=data.policy,
        image_size=image_size,
        fast=fast,
        interpolation=interpolation,
        token_view=token_view,
        masking=masking,
        augment=augment,
        fill=fill,
        grid_size=grid_size,
        seed=seed,
        form=data.form,
    )
    return BatchStream(
        data,
        order,
        shards=shards,
        steps=range(start_step, stop_step),
        decoder=make_decoder(executor, spec, num_threads),
        prefetch_batches=prefetch_batches,
        pin_memory=pin_memory,
    )


class BatchStream(Iterator[Batch]):
    """Iterator of batches with a read-ahead behind it. Close it, or use it in a ``with`` block.

    One feeder thread takes the rows of each step out of its windows and hands them to the
    decoder; it runs ``prefetch_batches`` ahead and no further.
    """

    def __init__(
        self,
        data: TrainingTables,
        order: SampleOrder,
        *,
        shards: range,
        steps: range,
        decoder: Decoder,
        prefetch_batches: int,
        pin_memory: bool = False,
    ) -> None:
        """Starts reading at once. See `train_batches` for the arguments."""
        self._data = data
        self._order = order
        self._shards = shards
        self._steps = steps
        self._decoder = decoder
        self._pin_memory = pin_memory
        self._io = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="read")
        self._counters = Counters()
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(prefetch_batches)
        self._ready: queue.SimpleQueue[_Pending | BaseException | None] = queue.SimpleQueue()
        self._closing = False
        self._ended = False
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._feeder.start()

    @property
    def counters(self) -> Counters:
        """A snapshot."""
        with self._lock:
            return self._counters

    def __next__(self) -> Batch:
        """The next batch; waits for it. Raises what reading or decoding raised."""
        pending = None if self._ended else self._ready.get()
        if pending is None:
            self.close()
            raise StopIteration
        if isinstance(pending, BaseException):
            self.close()
            raise pending
        try:
            batch = self._assemble(pending)
        except BaseException:
            self.close()
            raise
        self._slots.release()
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop all threads and forget what was read ahead. Idempotent."""
        self._closing = self._ended = True
        self._slots.release()
        self._io.shutdown(wait=True, cancel_futures=True)
        if self._feeder is not threading.current_thread():
            self._feeder.join()
        self._decoder.close()

    def _feed(self) -> None:
        """The feeder thread: everything up to handing rows to the decoder."""
        try:
            for pending in self._scheduled():
                self._ready.put(pending)
            self._ready.put(None)
        except BaseException as error:
            if not self._closing:
                self._ready.put(error)

    def _scheduled(self) -> Iterator[_Pending]:
        upcoming = self._windows()
        held: dict[tuple[int, int, int], _Window] = {}
        limit = (len(self._shards) + 1) * self._order.window
        for step in self._steps:
            self._slots.acquire()
            if self._closing:
                return
            epoch, epoch_step = self._order.locate(step)
            wanted = [
                ((epoch, shard, window), start, stop)
                for shard in self._shards
                for window, start, stop in self._order.windows_of(epoch_step)
            ]
            # What this step needs, then what memory has room for.
            missing = {key for key, _, _ in wanted} - held.keys()
            while missing or sum(window.rows_left for window in held.values()) < limit:
                key = next(upcoming, None)
                if key is None:
                    break
                held[key] = self._start_reading(*key)
                missing.discard(key)
            taken = []
            for key, start, stop in wanted:
                taken.append(held[key].take(start, stop))
                if not held[key].rows_left:
                    del held[key]
            yield self._submit(step, epoch, EncodedRows.join(taken))

    def _windows(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, shard, window) of all steps, in the order of first use."""
        last = None
        for step in self._steps:
            epoch, epoch_step = self._order.locate(step)
            for window, _, _ in self._order.windows_of(epoch_step):
                if (epoch, window) != last:
                    yield from ((epoch, shard, window) for shard in self._shards)
                last = (epoch, window)

    def _start_reading(self, epoch: int, shard: int, window: int) -> _Window:
        read = self._order.read_of(epoch, shard, window)
        pieces = [self._io.submit(self._read, start, stop, epoch) for start, stop in read.runs]
        return _Window(pieces=pieces, permutation=read.permutation, rows_left=read.num_rows)

    def _read(self, start: int, stop: int, epoch: int) -> EncodedRows:
        started = time.perf_counter()
        rows = self._data.read(start, stop, epoch)
        seconds = time.perf_counter() - started
        self._count(rows_read=len(rows), bytes_read=rows.num_bytes, read_seconds=seconds)
        return rows

    def _submit(self, step: int, epoch: int, rows: EncodedRows) -> _Pending:
        size = self._decoder.slice_rows
        handles = [
            self._decoder.submit(rows.take(start, min(start + size, len(rows))), epoch)
            for start in range(0, len(rows), size)
        ]
        return _Pending(step=step, epoch=epoch, rows=rows, handles=handles)

    def _assemble(self, pending: _Pending) -> Batch:
        rows = pending.rows
        slices = [self._decoder.result(handle) for handle in pending.handles]
        seconds = sum(part.seconds for part in slices)
        self._count(rows_decoded=len(rows), decode_seconds=seconds)
        token_ids = None
        if rows.token_ids is not None:
            token_ids = torch.from_numpy(rows.token_ids.astype("int64"))
        return Batch(
            step=pending.step,
            epoch=pending.epoch,
            row_ids=torch.from_numpy(rows.row_ids),
            views=torch.from_numpy(rows.views),
            pixels=self._gather(slices, "pixels"),
            mask=self._gather(slices, "masks"),
            token_ids=token_ids,
            token_pixels=(
                None if slices[0].token_pixels is None else self._gather(slices, "token_pixels")
            ),
            labels=None if rows.labels is None else torch.from_numpy(rows.labels),
            erasures=[erasure for part in slices for erasure in part.erasures],
        )

    def _gather(self, slices: list[RenderedRows], name: str) -> torch.Tensor:
        """One tensor of all slices; numpy copies, so no thread pool of torch is woken."""
        parts = [getattr(part, name) for part in slices]
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        dtype = torch.bool if name == "masks" else torch.uint8
        gathered = torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)
        target, start = gathered.numpy(), 0
        for part in parts:
            target[start : start + len(part)] = part
            start += len(part)
        return gathered

    def _count(self, **more: float) -> None:
        with self._lock:
            now = self._counters
            self._counters = replace(
                now, **{name: getattr(now, name) + value for name, value in more.items()}
            )
