"""Decoding in a process of its own, so that an image which kills its decoder kills nothing else.

Image libraries are large programs in C that meet bytes from strangers; a crash, an endless loop
or the kernel's memory killer must cost one image, not a job. The parent sends one image and waits
for one answer; a child that dies or does not answer is replaced, and the image that was in it
is tried again alone before it is given up. Sending costs under 1 % of decoding.
"""

import contextlib
import dataclasses
import importlib
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit.images import UnusableImage, decode_array, image_digest

DECODER = f"{decode_array.__module__}:{decode_array.__name__}"
# Machines run out of memory, and of time, for reasons of their own, so one failure proves nothing:
# an image is tried again after so many seconds, when its neighbours may be done.
PAUSES = (1.0, 5.0)
NUM_TRIES = 1 + len(PAUSES)
OUT_OF_MEMORY = "out_of_memory"
_LENGTH = struct.Struct("<q")
_FACTS = struct.Struct("<ii16s")
_ACCEPTED, _REENCODED, _REJECTED = b"A", b"R", b"X"


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

    def to_args(self) -> list[str]:
        sides = (self.max_pixels, self.min_side, self.max_side, self.quality)
        return [*map(str, sides), self.decoder]

    @classmethod
    def from_args(cls, args: list[str]) -> "Rules":
        pixels, least, most, quality = map(int, args[:4])
        return cls(
            max_pixels=pixels, min_side=least, max_side=most, quality=quality, decoder=args[4]
        )


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


def _stored_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    if not max_side or max(height, width) <= max_side:
        return height, width
    scale = max_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _shrink(pixels: Any, height: int, width: int, quality: int) -> bytes:
    import io

    from PIL import Image

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
        self.deaths = 0

    def examine(self, data: bytes) -> Decoded | Refused:
        """`examine` in the child.

        An image that ends its process `NUM_TRIES` times is refused as `decoder_crash`, as
        `decoder_timeout` if it was the clock; `out_of_memory` is final after as many tries.
        """
        verdict = Refused(reason="")
        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            try:
                found = self._ask(data)
            except TimeoutError:
                verdict = Refused(reason="decoder_timeout")
            except (EOFError, BrokenPipeError):
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
        child, self.child = self.child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                # Closing flushes; the reader is gone.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> "DecodeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, data: bytes) -> Decoded | Refused:
        child = self.child or self._start()
        self.child = child
        if child.stdin is None or child.stdout is None:
            raise EOFError
        child.stdin.write(_LENGTH.pack(len(data)))
        child.stdin.write(data)
        child.stdin.flush()
        answer = _Answer(child.stdout.fileno(), time.monotonic() + self.timeout)
        kind = answer.read(1)
        payload = answer.read(_LENGTH.unpack(answer.read(_LENGTH.size))[0])
        if kind == _REJECTED:
            reason, _, detail = payload.decode("utf-8", "replace").partition("\n")
            return Refused(reason=reason, detail=detail)
        height, width, digest = _FACTS.unpack(payload[: _FACTS.size])
        image = payload[_FACTS.size :] if kind == _REENCODED else data
        return Decoded(image=image, height=height, width=width, digest=digest)

    def _start(self) -> "subprocess.Popen[bytes]":
        # The child imports what this process can import, wherever that was found.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from {__name__} import serve; serve(sys.argv[1:])"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, *self.rules.to_args()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders in C write warnings there
            bufsize=2**16,
        )


class _Answer:
    """Reads a child's answer until a moment in time."""

    def __init__(self, pipe: int, deadline: float) -> None:
        self.pipe, self.deadline = pipe, deadline

    def read(self, size: int) -> bytes:
        pieces = bytearray()
        while len(pieces) < size:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.pipe], [], [], left)[0]:
                raise TimeoutError
            piece = os.read(self.pipe, min(size - len(pieces), 2**20))
            if not piece:
                raise EOFError
            pieces += piece
        return bytes(pieces)


def serve(args: list[str]) -> None:
    """The child: answers until its input ends (so it does not outlive its parent)."""
    rules = Rules.from_args(args)
    module, _, name = rules.decoder.partition(":")
    decode = getattr(importlib.import_module(module), name)
    source = sys.stdin.buffer
    # Libraries that print must not write between the answers.
    target = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(OSError):
        # If memory runs out, the kernel shall take this process and not its parent.
        Path("/proc/self/oom_score_adj").write_text("1000")
    while header := source.read(_LENGTH.size):
        if len(header) < _LENGTH.size:
            return
        data = source.read(_LENGTH.unpack(header)[0])
        verdict = examine(data, rules, decode)
        if isinstance(verdict, Refused):
            kind, payload = _REJECTED, f"{verdict.reason}\n{verdict.detail}".encode()
        else:
            facts = _FACTS.pack(verdict.height, verdict.width, verdict.digest)
            same = verdict.image is data
            kind, payload = (_ACCEPTED, facts) if same else (_REENCODED, facts + verdict.image)
        target.write(kind + _LENGTH.pack(len(payload)) + payload)
        target.flush()
