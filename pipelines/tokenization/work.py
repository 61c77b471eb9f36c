"""What the workers of the tokenize stage do with one unit: read, render, encode, write.

Nothing here knows of Ray: the same functions make tokens online, for audits and tests.
"""

import contextlib
import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit.tokenizers import ImageTokenizer
from beit.views import Interpolation, ViewPolicy
from pipelines import storage
from pipelines.reading.pixels import DamagedImageError, ViewOf, drawn, render_with_levels
from pipelines.rendering.files import RenderTask, ViewFiles
from pipelines.tables.image_files import Part, read_part
from pipelines.tables.token_files import UNKNOWN_LEVEL, Identity, encode_file
from pipelines.tables.token_table import MISSING
from pipelines.tables.unit_files import file_name
from pipelines.tokenization.reuse import Older, copied_tokens


class UnitRejected(Exception):  # noqa: N818 - a verdict on the data, not a programming error
    """A unit cannot have tokens; the message says why. Trying again would not help."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit as it travels to a worker: with all that is needed of the image table's manifest."""

    index: int
    part: dict[str, Any]
    """Record of the image part."""
    start: int
    stop: int
    reused: Sequence[Sequence[int]] = ()
    """Rows whose tokens are copied, as `Origins.runs` has them."""
    views: Sequence[tuple[int, int, int]] = ()
    """Files of a view table that are made in the same pass, as `Alongside.of` has them."""

    @property
    def name(self) -> str:
        return file_name(self.part["name"], self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class RenderedUnit:
    """A unit's views, ready to be encoded."""

    keys: list[str]
    token_ids: NDArray[np.uint16]
    """(rows, V, N): those that are copied, `MISSING` in rows that are to be encoded."""
    pixels: NDArray[np.uint8]
    """(rows to be encoded, V, size, size, 3)"""
    grey_levels: NDArray[np.uint8] | None
    """(rows, V); None where an older table lacks those of copied rows."""
    read_seconds: float
    render_seconds: float
    views: Sequence[tuple[int, int, str]] = ()
    """Index, size and hash of the files of a view table that were written in the same pass."""


def tokenizer_views(
    data: bytes, digest: bytes, identity: Identity, *, key: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The tokenizer's views of one encoded image, (V, size, size, 3), and their grey levels, (V,).

    It is decoded once. Raises DamagedImageError if it does not decode.
    """
    pixels, levels = render_with_levels(
        data, digest, _drawn(identity), [_output(identity)], key=key
    )
    return np.stack(pixels), np.array(levels, np.uint8)


def _drawn(identity: Identity) -> list[ViewOf]:
    policy = ViewPolicy.from_dict(identity.policy)
    return [drawn(policy, index) for index in range(*identity.views)]


def _output(identity: Identity) -> tuple[int, Interpolation]:
    return identity.image_size, cast(Interpolation, identity.interpolation)


def render_unit(
    images_uri: str,
    unit: Unit,
    identity: Identity,
    older: Sequence[Older] = (),
    views: RenderTask | None = None,
) -> RenderedUnit:
    """Reads a unit's images, copies the tokens that `older` has, and renders the other views.

    With `views`, the unit's files of that view table are written, too: each image is read and
    decoded once for both. What is wrong with a row that only they need is no concern of the tokens.

    Raises:
        UnitRejected: an image does not decode.
        InputError: the part or an older table is missing or damaged.
    """
    begin = time.monotonic()
    part = Part.from_dict(unit.part)
    files = ViewFiles(views, part, unit.views)
    start, stop = files.span(unit.start, unit.stop)
    table = read_part(images_uri, part, start, stop, ["key", "image", "digest"])
    keys: list[str] = table.column("key").to_pylist()
    digests: list[bytes] = table.column("digest").to_pylist()
    own = slice(unit.start - start, unit.stop - start)
    token_ids, levels = copied_tokens(older, unit.reused, digests[own], identity)
    read = time.monotonic()
    missing = np.zeros(len(keys), bool)
    missing[own] = token_ids[:, 0, 0] == MISSING
    size = identity.image_size
    pixels = np.empty((int(missing.sum()), identity.num_views, size, size, 3), np.uint8)
    encoded, shown = 0, _drawn(identity)
    for place, (key, digest) in enumerate(zip(keys, digests, strict=True)):
        outputs = [_output(identity)] if missing[place] else []
        if stored := files.want(start + place):
            outputs.append(files.output)
        if not outputs:
            continue
        data = table.column("image")[place].as_buffer().to_pybytes()
        try:
            rendered, grey = render_with_levels(data, digest, shown, outputs, key=key)
        except DamagedImageError as error:
            if missing[place]:
                raise UnitRejected(str(error)) from error
            files.drop()
            continue
        if missing[place]:
            pixels[encoded], levels[place - own.start] = rendered[:: len(outputs)], grey
            encoded += 1
        if stored:
            files.add(start + place, key, digest, rendered[len(outputs) - 1 :: len(outputs)])
    return RenderedUnit(
        keys=keys[own],
        token_ids=token_ids,
        pixels=pixels,
        # Tables of early releases have tokens without levels.
        grey_levels=None if (levels == UNKNOWN_LEVEL).any() else levels.astype(np.uint8),
        read_seconds=read - begin,
        render_seconds=time.monotonic() - read,
        views=files.receipts,
    )


def set_reference_arithmetic() -> None:
    """Makes CUDA compute what the manifest says: no TF32 in place of float32, no choice of
    algorithms by timing."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def keep_freed_memory() -> None:
    """Has the C library keep what this process frees, for good (glibc; nothing happens elsewhere).

    It would give the output of every large convolution back to the kernel and ask for it again at
    the next call, page by page: a quarter of an encoder's time on a CPU.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_arena_max, 1)  # others cannot hold such large blocks


@torch.inference_mode()
def encode_views(
    tokenizer: ImageTokenizer, pixels: NDArray[np.uint8], *, batch_size: int, device: str = "cpu"
) -> NDArray[np.uint16]:
    """Token ids (n, N) of views (n, size, size, 3), in calls of exactly `batch_size` views.

    The last call is filled up with black: on every device the arithmetic of one view may depend
    on the shape of the batch, never on what else is in it. The host waits for the device once.
    """
    count, size = pixels.shape[0], pixels.shape[1]
    chunks: list[Tensor] = []
    for start in range(0, count, batch_size):
        batch = np.zeros((batch_size, size, size, 3), np.uint8)
        some = pixels[start : start + batch_size]
        batch[: len(some)] = some
        # (B, H, W, 3) -> (B, 3, H, W); the memory stays channels-last.
        images = torch.from_numpy(batch).to(device, non_blocking=True).permute(0, 3, 1, 2)
        chunks.append(tokenizer.encode(images)[: len(some)])
    ids = torch.cat(chunks).to("cpu").numpy()
    return ids.astype(np.uint16)


def fill_tokens(
    token_ids: NDArray[np.uint16],
    tokenizer: ImageTokenizer,
    pixels: NDArray[np.uint8],
    identity: Identity,
    *,
    device: str = "cpu",
) -> NDArray[np.uint16]:
    """`token_ids` (rows, V, N) with rows that are `MISSING` encoded from their views, in order."""
    if len(pixels):
        missing = token_ids[:, 0, 0] == MISSING
        token_ids = token_ids.copy()
        token_ids[missing] = encode_rendered(tokenizer, pixels, identity, device=device)
    return token_ids


def encode_rendered(
    tokenizer: ImageTokenizer, pixels: NDArray[np.uint8], identity: Identity, *, device: str = "cpu"
) -> NDArray[np.uint16]:
    """Token ids (rows, V, N) of a unit's views (rows, V, size, size, 3)."""
    rows = pixels.shape[0]
    flat = pixels.reshape(rows * identity.num_views, *pixels.shape[2:])
    ids = encode_views(tokenizer, flat, batch_size=identity.batch_size, device=device)
    return ids.reshape(rows, identity.num_views, identity.num_patches)


def write_unit(
    output: str,
    name: str,
    keys: list[str] | pa.Array,
    token_ids: NDArray[np.uint16],
    grey_levels: NDArray[np.uint8] | None,
    identity: Identity,
) -> tuple[int, str]:
    """Writes a unit's file atomically; returns its size and hash."""
    data = encode_file(keys, token_ids, identity, grey_levels)
    storage.write_bytes(storage.join(output, name), data)
    return len(data), storage.digest(data)
