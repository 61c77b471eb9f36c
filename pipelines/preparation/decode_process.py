"""Decoding in a process of its own, so that an image which kills its decoder kills nothing else.

Image libraries are large programs in C that meet bytes from strangers; a crash, an endless loop
or the kernel's memory killer must cost one image, not a job. The parent sends one image and waits
for one answer; a child that dies or does not answer is replaced, and the image that was in it
is tried again alone before it is given up. Sending costs under 1 % of decoding.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import select
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

from beit.images import UnusableImage, decode_array, image_digest
from beit.png_pixels import has_damaged_pixels, lacks_rows
from pipelines.preparation.child import start_child

DECODER = f"{decode_array.__module__}:{decode_array.__name__}"
# Machines run out of memory, and of time, for reasons of their own, so one failure proves nothing:
# an image is tried again after so many seconds, when its neighbours may be done.
PAUSES = (1.0, 5.0)
NUM_TRIES = 1 + len(PAUSES)
OUT_OF_MEMORY = "out_of_memory"
HEADER = struct.Struct("<cII16s")  # of an answer: I, height, width, digest


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What makes an image usable, and what is done to it."""

    max_pixels: int
    min_side: int = 1
    max_side: int = 0
    """Longer images are shrunk and stored as JPEG; 0: never."""
    quality: int = 95
    decoder: str = DECODER
    """`module:function`: (bytes, max_pixels=...) -> uint8 (height, width, 3)."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A usable image."""

    image: bytes
    """Encoded: as given, or shrunk."""
    height: int
    width: int
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What is no usable image."""

    reason: str
    detail: str = ""


def examine(
    data: bytes, rules: Rules, decode: Callable[..., Any] = decode_array
) -> Decoded | Refused:
    """Decodes an image fully and applies the rules; never raises."""
    try:
        pixels = decode(data, max_pixels=rules.max_pixels)
        _check_png(data, pixels)
        height, width = int(pixels.shape[0]), int(pixels.shape[1])
        stored = _stored_size(height, width, rules.max_side)
        if min(stored) < rules.min_side:
            return Refused(reason="too_small", detail=f"{width}x{height}")
        if stored != (height, width):
            data = _shrink(pixels, *stored, rules.quality)
        return Decoded(image=data, height=stored[0], width=stored[1], digest=image_digest(data))
    except UnusableImage as error:
        return Refused(reason=error.reason, detail=error.detail)
    except MemoryError as error:
        return Refused(reason=OUT_OF_MEMORY, detail=str(error))
    except Exception as error:  # whatever is wrong with one image, the job goes on
        return Refused(reason="corrupt", detail=f"{type(error).__name__}: {error}")


def _check_png(data: bytes, pixels: Any) -> None:
    """Raises UnusableImage where Pillow makes pixels of a PNG that are not in it."""
    if has_damaged_pixels(data):
        raise UnusableImage("corrupt", "the checksum of its pixels is another")
    if lacks_rows(data, pixels):
        raise UnusableImage("truncated", "its pixels end before the last row")


def _stored_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    if not max_side or max(height, width) <= max_side:
        return height, width
    scale = max_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _shrink(pixels: Any, height: int, width: int, quality: int) -> bytes:
    small = Image.fromarray(pixels).resize(
        (width, height), Image.Resampling.LANCZOS, reducing_gap=3.0
    )
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, subsampling=0, optimize=False)
    return file.getvalue()


class DecodeProcess:
    """A child process that examines images; a new one takes over when it dies."""

    def __init__(self, rules: Rules, *, timeout: float) -> None:
        """`timeout`: seconds after which an image's decoding is given up."""
        self.rules = rules
        self.timeout = timeout
        self.child: subprocess.Popen[bytes] | None = None
        self.connection: Connection[Any, Any] | None = None
        self.deaths = 0

    def examine(self, data: bytes) -> Decoded | Refused:
        """`examine` in the child.

        An image that ends its process `NUM_TRIES` times is refused as `decoder_crash`, as
        `decoder_timeout` if it was the clock; `out_of_memory` is final after as many tries.
        """
        verdict = Refused(reason="")
        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            connection = self.connection or self._start()
            try:
                found = self._ask(connection, data)
            except TimeoutError:
                verdict = Refused(reason="decoder_timeout")
            except (EOFError, OSError):
                verdict = Refused(reason="decoder_crash")
            except BaseException:  # interrupted: its answer must not be taken for the next one
                self.close()
                raise
            else:
                if isinstance(found, Decoded) or found.reason != OUT_OF_MEMORY:
                    return found
                verdict = found
            # The next try begins with a fresh process.
            self.deaths += 1
            self.close()
        return dataclasses.replace(verdict, detail=f"{NUM_TRIES} processes ended with it")

    def close(self) -> None:
        """Ends the child."""
        if self.child is not None and self.connection is not None:
            self.child.kill()
            self.child.wait()
            self.connection.close()
        self.child = self.connection = None

    def __enter__(self) -> "DecodeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> "Connection[Any, Any]":
        self.child, self.connection = start_child(f"{__name__}:{serve.__name__}")
        # If the child is dead already, the first image meets that.
        with contextlib.suppress(ConnectionError):
            self.connection.send_bytes(json.dumps(dataclasses.asdict(self.rules)).encode())
        return self.connection

    def _ask(self, connection: "Connection[Any, Any]", data: bytes) -> Decoded | Refused:
        connection.send_bytes(data)
        if not select.select([connection], [], [], self.timeout)[0]:
            raise TimeoutError
        return _unpacked(connection.recv_bytes(), data)


def _packed(found: Decoded | Refused, data: bytes) -> bytes:
    """The child's answer: JSON of a refusal; else a header and the image, if it did not stay."""
    if isinstance(found, Refused):
        return json.dumps(dataclasses.asdict(found)).encode()
    image = b"" if found.image is data else found.image
    return HEADER.pack(b"I", found.height, found.width, found.digest) + image


def _unpacked(answer: bytes, data: bytes) -> Decoded | Refused:
    if answer.startswith(b"{"):
        return Refused(**json.loads(answer))
    _, height, width, digest = HEADER.unpack_from(answer)
    image = answer[HEADER.size :] or data
    return Decoded(image=image, height=height, width=width, digest=digest)


def serve() -> None:
    """The child: answers until its input ends."""
    with contextlib.suppress(OSError):
        # If memory runs out, the kernel shall take this process and not its parent.
        Path("/proc/self/oom_score_adj").write_text("1000")
    connection: Connection[Any, Any] = Connection(0)
    rules = Rules(**json.loads(connection.recv_bytes()))
    module, _, name = rules.decoder.partition(":")
    decode = getattr(importlib.import_module(module), name)
    # The input ends with the parent, however that ended.
    with contextlib.suppress(EOFError):
        while True:
            data = connection.recv_bytes()
            # `Connection.send` and `poll` would add 100 us to an image: half of a tiny one.
            connection.send_bytes(_packed(examine(data, rules, decode), data))
