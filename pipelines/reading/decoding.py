"""Encoded rows to pixels and masks: a pure function, and who runs it - threads or Ray tasks."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from beit.augment import Erasure, apply_operations, augmentation_of, erasure_of
from beit.masking import mask_of
from beit.views import Interpolation, ViewPolicy
from pipelines.config.finetune import AugmentConfig
from pipelines.config.pretrain import MaskingConfig
from pipelines.errors import InputError
from pipelines.reading.encoded_rows import EncodedRows
from pipelines.reading.pixels import Output, drawn, render_encoded
from pipelines.tables.token_files import UNKNOWN_LEVEL
from pipelines.tables.view_files import decode_view

log = logging.getLogger(__name__)

Executor = Literal["threads", "ray_tasks"]

# Images in one piece of work: small for threads, whose pieces cost nothing, so that the last of a
# batch does not keep the others waiting; enough of them in a Ray task to be worth its millisecond.
THREAD_SLICE = 8
RAY_SLICE = 64
# A Ray task that has not come back for so long means that no CPU is free for it.
STALL_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class RenderSpec:
    """What is made of an encoded row."""

    policy: ViewPolicy
    image_size: int
    """Side of the patch view in pixels."""
    interpolation: Interpolation = "bicubic"
    """Filter of the patch view where it is exact."""
    fast: bool = True
    """Patch view by `beit.views.render_fast` (bicubic) instead of the exact `render`."""
    token_view: tuple[int, Interpolation] | None = None
    """Size and filter of the tokenizer's view, where tokens are computed online. Always exact."""
    masking: MaskingConfig | None = None
    augment: AugmentConfig | None = None
    """What else happens to the patch view, for fine-tuning."""
    fill: tuple[int, int, int] = (128, 128, 128)
    """Colour of what an augmentation brings in from outside of the view."""
    grid_size: tuple[int, int]
    seed: int
    """Of masks and augmentations."""
    form: str | None = None
    """How the rows' views are stored; None where they are whole images."""


@dataclass(frozen=True, kw_only=True)
class RenderedRows:
    """`RenderSpec` done to n rows."""

    pixels: np.ndarray
    """uint8 (n, 3, image_size, image_size)."""
    token_pixels: np.ndarray | None
    """uint8 (n, 3, side, side) of the tokenizer's view, if asked for."""
    masks: np.ndarray
    """bool (n, N), True = masked; all False without masking."""
    erasures: list[Erasure | None]
    """What is to be erased of each row's pixels, once they are normalised."""
    seconds: float
    """Spent here by one thread."""


def render_rows(
    images: Sequence[bytes],
    digests: Sequence[bytes],
    views: np.ndarray,
    grey_levels: np.ndarray,
    keys: Sequence[str],
    epoch: int,
    spec: RenderSpec,
) -> RenderedRows:
    """Decode and render rows. The same bits wherever and in whatever company it runs.

    Raises:
        InputError: an image or a stored view does not decode: the table is damaged.
    """
    started = time.perf_counter()
    count, size = len(images), spec.image_size
    pixels = np.empty((count, 3, size, size), np.uint8)
    outputs: list[Output] = [(size, "fast" if spec.fast else spec.interpolation)]
    token_pixels = None
    if spec.token_view is not None:
        outputs.append(spec.token_view)
        token_pixels = np.empty((count, 3, spec.token_view[0], spec.token_view[0]), np.uint8)
    masks = np.zeros((count, spec.grid_size[0] * spec.grid_size[1]), np.bool_)
    erasures: list[Erasure | None] = [None] * count
    for i, (data, digest, key) in enumerate(zip(images, digests, keys, strict=True)):
        if spec.form is not None:
            pixels[i] = decode_view(data, spec.form, size, key=key)
        else:
            level = None if grey_levels[i] == UNKNOWN_LEVEL else int(grey_levels[i])
            view = drawn(spec.policy, int(views[i]), level)
            rendered = render_encoded(data, digest, [view], outputs, key=key)
            patch_view = rendered[0]
            if spec.augment is not None:
                patch_view, erasures[i] = augmented(patch_view, digest, epoch, spec)
            pixels[i] = patch_view.transpose(2, 0, 1)
            if token_pixels is not None:
                token_pixels[i] = rendered[1].transpose(2, 0, 1)
        if spec.masking is not None:
            masks[i] = mask_of(
                digest,
                epoch,
                seed=spec.seed,
                grid_size=spec.grid_size,
                kind=spec.masking.kind,
                num_masked=spec.masking.num_masked,
                min_block=spec.masking.min_block,
                max_block=spec.masking.max_block,
                exact=spec.masking.exact,
            )
    seconds = time.perf_counter() - started
    return RenderedRows(
        pixels=pixels, token_pixels=token_pixels, masks=masks, erasures=erasures, seconds=seconds
    )


def augmented(
    pixels: np.ndarray, digest: bytes, epoch: int, spec: RenderSpec
) -> tuple[np.ndarray, Erasure | None]:
    """A patch view uint8 (size, size, 3) after its augmentation, and what is still to be erased."""
    assert spec.augment is not None
    how = spec.augment
    augmentation = augmentation_of(
        digest,
        epoch,
        seed=spec.seed,
        size=spec.image_size,
        num_operations=how.num_operations,
        magnitude=how.magnitude,
        magnitude_std=how.magnitude_std,
        erase_probability=how.erase_probability,
    )
    pixels = apply_operations(pixels, augmentation.operations, spec.fill)
    if augmentation.erased is None:
        return pixels, None
    return pixels, erasure_of(digest, epoch, augmentation.erased, seed=spec.seed)


class Decoder(Protocol):
    """Runs `render_rows` elsewhere. ``submit`` never blocks; ``result`` waits."""

    slice_rows: int

    def submit(self, rows: EncodedRows, epoch: int) -> Any:
        """Start work on some rows."""

    def result(self, handle: Any) -> RenderedRows:
        """What came of it; raises what it raised."""

    def close(self) -> None:
        """Give up whatever is under way."""


def make_decoder(executor: Executor, spec: RenderSpec, num_threads: int) -> Decoder:
    """The decoder of this name. Raises `InputError` for another name, or without Ray."""
    if executor == "threads":
        return ThreadDecoder(spec, num_threads)
    if executor == "ray_tasks":
        return RayDecoder(spec)
    raise InputError(f"data.executor = {executor!r}: choose threads or ray_tasks")


class ThreadDecoder:
    """Threads of this process: decoders release the interpreter's lock."""

    slice_rows = THREAD_SLICE

    def __init__(self, spec: RenderSpec, num_threads: int) -> None:
        if num_threads < 1:
            raise InputError(f"data.num_threads = {num_threads}: give at least 1")
        self._spec = spec
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def submit(self, rows: EncodedRows, epoch: int) -> "Future[RenderedRows]":
        """See `Decoder`."""
        return self._pool.submit(render_rows, *rows.to_render, epoch, self._spec)

    def result(self, handle: "Future[RenderedRows]") -> RenderedRows:
        """See `Decoder`."""
        return handle.result()

    def close(self) -> None:
        """See `Decoder`; pieces that have begun are finished."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class RayDecoder:
    """Ray tasks on whichever nodes have CPUs to spare; encoded bytes travel there, pixels back.

    Results are asked for in the order of submission. A task whose worker or node dies is run
    again by Ray, with the same outcome.
    """

    slice_rows = RAY_SLICE

    def __init__(self, spec: RenderSpec) -> None:
        import ray

        if not ray.is_initialized():
            raise InputError(
                "data.executor = 'ray_tasks' needs a running Ray: choose threads, or "
                "scaling.num_workers >= 1"
            )
        self._ray = ray
        # Outside of the trainers' placement group, which holds no CPUs for decoding.
        options = {"num_cpus": 1, "max_retries": 5, "scheduling_strategy": "SPREAD"}
        self._task = ray.remote(render_rows).options(**options)
        self._spec = ray.put(spec)
        self._pending: dict[Any, None] = {}

    def submit(self, rows: EncodedRows, epoch: int) -> Any:
        """See `Decoder`."""
        handle = self._task.remote(*rows.to_render, epoch, self._spec)
        self._pending[handle] = None
        return handle

    def result(self, handle: Any) -> RenderedRows:
        """See `Decoder`."""
        while not self._ray.wait([handle], timeout=STALL_SECONDS)[0]:
            log.warning(
                "no decoded images for %.0f s: Ray has no CPU free for decoding; add CPU nodes, "
                "or choose data.executor=threads",
                STALL_SECONDS,
            )
        rendered: RenderedRows = self._ray.get(handle)
        self._pending.pop(handle, None)
        return rendered

    def close(self) -> None:
        """See `Decoder`."""
        for handle in list(self._pending):
            self._ray.cancel(handle, force=False)
        self._pending.clear()
