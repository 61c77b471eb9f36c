"""Small picture tables for the tests of tokenizers."""

import io

import numpy as np
from PIL import Image

from beit.images import image_digest
from pipelines.tables.image_files import ImageRow, write_part
from pipelines.tables.image_table import ImageTable, commit_manifest


def disc(seed: int, size: int = 24) -> Image.Image:
    """A disc in a random colour at a random place on white."""
    generator = np.random.default_rng(seed)
    ys, xs = np.mgrid[:size, :size]
    centre = generator.uniform(0.2 * size, 0.8 * size, 2)
    inside = np.hypot(ys - centre[0], xs - centre[1]) < generator.uniform(0.15, 0.4) * size
    pixels = np.full((size, size, 3), 255, np.uint8)
    pixels[inside] = generator.integers(0, 256, 3)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    """Encoded bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_table(uri: str, images: list[Image.Image], *, num_parts: int = 2) -> ImageTable:
    """A finished table of these images, in several parts and row groups."""
    rows = [
        ImageRow(
            key=f"{i:05d}.png",
            image=data,
            height=image.height,
            width=image.width,
            label=None,
            digest=image_digest(data),
        )
        for i, image in enumerate(images)
        for data in [png(image)]
    ]
    cut = -(-len(rows) // num_parts)
    parts = [
        write_part(
            uri, f"part-{p:05d}.parquet", rows[p * cut : (p + 1) * cut], row_group_bytes=1500
        )
        for p in range(num_parts)
    ]
    commit_manifest(
        uri,
        parts=parts,
        class_names=[],
        source={},
        options={},
        rejected={},
        num_items=len(rows),
    )
    return ImageTable.open(uri)
