"""The pictures of the evidence as folders, for `beit prepare`."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.preparation.sample_images import UNLABELLED, group_of, list_images, read_image
from pipelines.tables.image_table import split_position

HELD_OUT = 0.2
HALVES = ("half0", "half1")
"""Of the probe's images, by group: fine-tuned on one, tested on the other."""
FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_IMAGES = {"train": 4096, "probe": 4000}
# The base emoji of a file's name, and each Fashion-MNIST picture by itself.
GROUP_PATTERN = r"([^/]+?)(?:__[^/]*)?\.png$"


def write(data: str, work: Path, images: int = 0) -> dict[str, Path]:
    """Folders of a data set, CLASS/GROUP__NAME.png: `train`, `probe`, `held_out`, HALVES (emoji).

    Written once.

    Args:
        data: `emoji` or `fashion`.
        work: gets the folders.
        images: pretraining pictures; 0: all.

    Raises:
        SystemExit: the package with the pictures is not installed.
    """
    folders = {}
    for part, members in (_emoji() if data == "emoji" else _fashion()).items():
        chosen = members[:images] if images and part == "train" else members
        folders[part] = work / f"{part}{images if part == 'train' and images else ''}"
        done = folders[part].with_suffix(".written")
        if not done.exists():
            for name, content in chosen:
                path = folders[part] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            done.touch()
    return folders


def _emoji() -> dict[str, list[tuple[str, bytes]]]:
    train, held_out, probe, seen = [], [], [], set()
    for key, _ in list_images():
        category, _, file = key.partition("/")
        group = group_of(key)
        picture = (f"{category}/{group}__{file}", read_image(key))
        (held_out if split_position(group) < HELD_OUT else train).append(picture)
        if category != UNLABELLED and group not in seen:
            seen.add(group)
            probe.append(picture)
    # Any first n are spread over the categories.
    train.sort(key=lambda item: split_position(item[0]))
    dealt = sorted(probe, key=lambda item: split_position(item[0]))
    halves = {half: dealt[i :: len(HALVES)] for i, half in enumerate(HALVES)}
    return {"train": train, "probe": probe, "held_out": held_out, **halves}


def _fashion() -> dict[str, list[tuple[str, bytes]]]:
    if not FASHION.is_dir():
        raise SystemExit("install Fashion-MNIST: apt-get install dataset-fashion-mnist")
    found = {}
    for part, stem in (("train", "train"), ("probe", "t10k")):
        count = FASHION_IMAGES[part]
        pixels = _idx(FASHION / f"{stem}-images-idx3-ubyte.gz")[:count]
        labels = _idx(FASHION / f"{stem}-labels-idx1-ubyte.gz")[:count]
        found[part] = [
            (f"{label}/{part}{index:05d}.png", _png(image))
            for index, (image, label) in enumerate(zip(pixels, labels, strict=True))
        ]
    return {**found, "held_out": found["probe"]}


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: magic, shape, values."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
