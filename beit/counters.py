"""Random numbers by counting: every draw is a pure function of a seed, a stream and a position.

Philox4x64-10 (Salmon et al. 2011) maps (key, counter) to random words and has no state. The key is
(seed, domain): each stream has a domain of its own, so that uses of one seed never share a word.
The counter is (0, position): which image in which epoch, which window of which shard. Words do
not depend on the version of numpy.
"""

import hashlib
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

VIEWS: Final = int.from_bytes(b"beitview", "big")
MASKS: Final = int.from_bytes(b"beitmask", "big")
# The order of samples: of row groups, the rotation of their rows, the rows inside a window.
ORDER_GROUPS: Final = int.from_bytes(b"ordgroup", "big")
ORDER_ROTATION: Final = int.from_bytes(b"ordrotat", "big")
ORDER_WINDOWS: Final = int.from_bytes(b"ordwindo", "big")
# Fine-tuning: operations on a view, what is erased of it, the noise there, mixtures of views.
AUGMENTATIONS: Final = int.from_bytes(b"augments", "big")
ERASURES: Final = int.from_bytes(b"erasures", "big")
ERASED_PIXELS: Final = int.from_bytes(b"erasedpx", "big")
MIXES: Final = int.from_bytes(b"mixtures", "big")
# Which states of a batch codes of VQ-KD that died start again from.
RESTARTS: Final = int.from_bytes(b"restarts", "big")

Position = tuple[int, int, int]


def of_digest(digest: bytes) -> tuple[int, int]:
    """The 16 bytes of an image's digest as the last two numbers of a position."""
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def words(seed: int, domain: int, position: Position, count: int) -> NDArray[np.uint64]:
    """The first raw words of a stream: uint64 (count,)."""
    raw: NDArray[np.uint64] = _philox(seed, domain, position).random_raw(count)
    return raw


def uniforms(seed: int, domain: int, position: Position, count: int) -> list[float]:
    """The first words as numbers in [0, 1), by their upper 53 bits."""
    numbers: list[float] = (
        (words(seed, domain, position, count) >> np.uint64(11)) * 2.0**-53
    ).tolist()
    return numbers


def generator(seed: int, domain: int, position: Position) -> np.random.Generator:
    """A stream as a generator of numpy, whose methods say how many words they take."""
    return np.random.Generator(_philox(seed, domain, position))


def step_generator(seed: int, step: int) -> np.random.Generator:
    """The stream of a training step (drop-path).

    Its domain is the step itself: far below those above, which are eight letters.
    """
    return np.random.Generator(_philox(seed, step, (0, 0, 0)))


def device_seed(seed: int, step: int, shard: int) -> int:
    """Seed of torch's generator on a device for one step and shard, where draws are too many to
    be made on the host (the noise of a tokenizer in training)."""
    packed = struct.pack("<QQQ", seed, step, shard)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=7).digest(), "little")


def _philox(seed: int, domain: int, position: Position) -> np.random.Philox:
    return np.random.Philox(
        key=np.array([seed, domain], np.uint64), counter=np.array([0, *position], np.uint64)
    )
