"""A small image table in several parts, and token tables whose tokens tell their row and view."""

import io

import numpy as np
from PIL import Image

from beit.images import decode_array, image_digest
from beit.views import ViewPolicy, render_all, sample_view
from pipelines import storage
from pipelines.tables import token_table
from pipelines.tables.image_files import ImageRow, write_part
from pipelines.tables.image_table import ImageTable, commit_manifest
from pipelines.tables.token_files import Identity, encode_file
from pipelines.tables.unit_files import UnitFile, file_name

PART_ROWS = [37, 60, 23]
NUM_ROWS = sum(PART_ROWS)
GRID = (4, 4)
POLICY = ViewPolicy(seed=11)


def encoded(row):
    rng = np.random.default_rng(row)
    small = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((40 + row % 17, 30 + row % 13))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if row % 5 == 0 else "JPEG")
    return buffer.getvalue()


def key_of(row):
    return f"folder/{row:05d}.jpg"


def tokens_of(rows, views):
    """(rows, views, N): every token tells its row and view."""
    rows, views = np.asarray(rows)[:, None, None], np.asarray(views)[None, :, None]
    return (rows * 100 + views * 16 + np.arange(16)).astype(np.uint16)


def write_images(uri, change=None):
    parts, row = [], 0
    for number, count in enumerate(PART_ROWS):
        rows = []
        for _ in range(count):
            data = encoded(row)
            if row == change:
                data = data[: len(data) // 2]
            rows.append(
                ImageRow(
                    key=key_of(row), image=data, height=1, width=1, label=None,
                    digest=image_digest(data),
                )
            )  # fmt: skip
            row += 1
        parts.append(write_part(uri, f"part-{number:05d}.parquet", rows, row_group_bytes=9000))
    commit_manifest(
        uri, parts=parts, class_names=[], source={}, options={}, rejected={}, num_items=row
    )
    return ImageTable.open(uri)


def levels_of(rows, views):
    """(rows, views): grey levels, each with the jitters before contrast done to the full image."""
    levels = []
    for row in rows:
        pixels, digest = decode_array(encoded(row)), image_digest(encoded(row))
        drawn = [sample_view(POLICY, digest, view, *pixels.shape[:2]) for view in views]
        levels.append([render_all(pixels, view, [])[1] for view in drawn])
    return np.array(levels, np.uint8)


def write_tokens(uri, images, views, rename=None, *, levels=False, **changes):
    identity = Identity(
        **{
            "image_fingerprint": images.fingerprint,
            "num_rows": NUM_ROWS,
            "tokenizer_fingerprint": "a" * 32,
            "vocab_size": 20000,
            "grid_size": GRID,
            "image_size": 16,
            "interpolation": "lanczos",
            "policy": POLICY.to_dict(),
            "views": (views.start, views.stop),
            "device": "cpu",
            "precision": "float32",
            "batch_size": 16,
        }
        | changes
    )
    files, base = [], 0
    for part, count in enumerate(PART_ROWS):
        for start in range(0, count, 25):
            stop = min(start + 25, count)
            rows = range(base + start, base + stop)
            keys = ["intruder" if row == rename else key_of(row) for row in rows]
            grey_levels = levels_of(rows, views) if levels else None
            data = encode_file(keys, tokens_of(rows, views), identity, grey_levels)
            name = file_name(f"part-{part:05d}.parquet", start, stop)
            storage.write_bytes(storage.join(uri, name), data)
            files.append(
                UnitFile(
                    part=part, start=start, stop=stop, size=len(data), hash=storage.digest(data)
                )
            )
        base += count
    manifest = token_table.build_manifest(
        identity=identity,
        part_names=[part.name for part in images.parts],
        part_rows=PART_ROWS,
        files=files,
        rejected=[],
        rows_per_unit=25,
        libraries={},
    )
    storage.write_json(storage.join(uri, "manifest.json"), manifest)
    return str(uri)
