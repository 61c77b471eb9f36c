"""Token views of an image table in the sample order: what a tokenizer is trained on.

View index = epoch, so an image is never seen twice through the same crop. Threads read a window's
encoded images once, decode and render them batch by batch and keep a few batches ahead.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from beit.images import decode_image
from beit.views import Interpolation, ViewPolicy, render, sample_view
from pipelines.image_table import ImageTable
from pipelines.sample_order import SampleOrder

Encoded = tuple[bytes, bytes]
"""Encoded image and its digest."""


@dataclass(frozen=True, kw_only=True)
class TokenViewReader:
    """Renders the views that one rank trains on."""

    images: ImageTable
    order: SampleOrder
    policy: ViewPolicy
    size: int
    """Side of the view in pixels."""
    interpolation: Interpolation
    rank: int = 0
    num_ranks: int = 1
    num_threads: int = 1
    prefetch_batches: int = 2

    def batches(self, start_step: int, stop_step: int) -> Iterator[Tensor]:
        """uint8 (global_batch_size / num_ranks, 3, size, size) for each step of the run.

        A pure function of the step: starting in the middle continues identically.
        """
        reader = ThreadPoolExecutor(1, thread_name_prefix="token-views-read")
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="token-views")
        windows = _Windows(self.images, self.order)
        pending: deque[Future[list[Future[list[np.ndarray]]]]] = deque()
        try:
            for step in range(start_step, stop_step):
                pending.append(reader.submit(self._submit, pool, windows, step))
                if len(pending) > self.prefetch_batches:
                    yield _joined(pending.popleft().result())
            while pending:
                yield _joined(pending.popleft().result())
        finally:
            reader.shutdown(cancel_futures=True)
            pool.shutdown(cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, windows: "_Windows", step: int
    ) -> list[Future[list[np.ndarray]]]:
        epoch, step_in_epoch = self.order.locate(step)
        encoded: list[Encoded] = []
        for shard in self.order.shards_of(self.rank, self.num_ranks):
            for window, start, stop in self.order.windows_of(step_in_epoch):
                encoded += windows.rows(epoch, shard, window)[start:stop]
        size = -(-len(encoded) // self.num_threads)
        return [
            pool.submit(self._render, encoded[start : start + size], epoch)
            for start in range(0, len(encoded), size)
        ]

    def _render(self, encoded: Sequence[Encoded], index: int) -> list[np.ndarray]:
        views = []
        for data, digest in encoded:
            image = decode_image(data)
            view = sample_view(self.policy, digest, index, image.height, image.width)
            views.append(render(image, view, self.size, self.interpolation).transpose(2, 0, 1))
        return views


class _Windows:
    """Encoded rows of the windows in use: at most two for each shard."""

    def __init__(self, images: ImageTable, order: SampleOrder) -> None:
        self.images, self.order = images, order
        self.held: dict[int, dict[tuple[int, int], list[Encoded]]] = {}

    def rows(self, epoch: int, shard: int, window: int) -> list[Encoded]:
        held = self.held.setdefault(shard, {})
        if (epoch, window) not in held:
            while len(held) > 1:
                del held[min(held)]
            held[epoch, window] = self._read(epoch, shard, window)
        return held[epoch, window]

    def _read(self, epoch: int, shard: int, window: int) -> list[Encoded]:
        read = self.order.read_of(epoch, shard, window)
        rows: list[Encoded] = []
        for start, stop in read.runs:
            table = self.images.read_rows(start, stop, ["image", "digest"])
            rows += zip(table["image"].to_pylist(), table["digest"].to_pylist(), strict=True)
        return [rows[i] for i in read.permutation]


def _joined(futures: Sequence[Future[list[np.ndarray]]]) -> Tensor:
    return torch.from_numpy(np.stack([view for future in futures for view in future.result()]))
