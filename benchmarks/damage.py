"""What it costs to notice damage: checksums of pages, and of footers held to their schema.

    python benchmarks/damage.py [--rounds 9] [--output FILE.md]

Row groups of an image part and of a token part that lie in the page cache, read as training does,
with and without `page_checksum_verification`; and PNGs decoded as `prepare` does, with and without
a look at the checksums and the length of their pixel data. Variants run interleaved, figures are
medians.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from beit.images import decode_array
from beit.png_pixels import has_damaged_pixels, lacks_rows
from beit.views import ViewPolicy
from pipelines.tables.image_files import IMAGE_SCHEMA, ImageRow, PartWriter
from pipelines.tables.open_parts import as_written
from pipelines.tables.token_files import Identity, encode_file, schema


def image_part(rows: int = 800, size: int = 120_000) -> bytes:
    """96 MB of rows as ImageNet's are, in groups of 12 MB."""
    random = np.random.default_rng(0)
    writer = PartWriter()
    for row in range(rows):
        image, digest = random.bytes(size), random.bytes(16)
        key = f"n{row:08d}/{row:08d}.JPEG"
        writer.add(ImageRow(key=key, image=image, height=375, width=500, label=1, digest=digest))
    data: bytes = writer.finish("part")[0].to_pybytes()
    return data


def token_part(rows: int = 4096, views: int = 2) -> tuple[bytes, pa.Schema]:
    """A unit of 14 x 14 tokens."""
    identity = Identity(
        image_fingerprint="0" * 32, num_rows=rows, tokenizer_fingerprint="0" * 32,
        vocab_size=8192, grid_size=(14, 14), image_size=112, interpolation="lanczos",
        policy=ViewPolicy().to_dict(), views=(0, views), device="cpu", precision="float32",
        batch_size=64,
    )  # fmt: skip
    shape = (rows, views, 196)
    ids = np.random.default_rng(0).integers(0, 8192, shape).astype(np.uint16)
    return encode_file([f"{row:08d}" for row in range(rows)], ids, identity), schema(identity)


def read(path: Path, columns: pa.Schema, *, checked: bool) -> None:
    """All row groups one by one."""
    reader = pq.ParquetFile(path, pre_buffer=True, page_checksum_verification=checked)
    for group in range(reader.metadata.num_row_groups):
        table = reader.read_row_groups([group], columns=columns.names, use_threads=False)
        if checked:
            as_written(table, columns, reader.metadata.row_group(group).num_rows)


def pngs(count: int = 40) -> list[bytes]:
    """Pictures of 500 x 375 pixels with noise, as photographs have."""
    random, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 200, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        noise = random.integers(0, 16, smooth.shape, dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.minimum(smooth, 239) + noise).save(file, "PNG")
        found.append(file.getvalue())
    return found


def decode(images: list[bytes], *, checked: bool) -> None:
    """All images one by one."""
    for data in images:
        pixels = decode_array(data)
        assert not (checked and (has_damaged_pixels(data) or lacks_rows(data, pixels)))


def medians(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    tokens, token_schema = token_part()
    lines = [
        "# Damage",
        "",
        f"pyarrow {pa.__version__}, {os.cpu_count()} cores, {options.rounds} interleaved rounds, "
        "CPU seconds (medians) of one thread. Written by `benchmarks/damage.py`.",
        "",
        "| part | MB | unchecked s | checked s | cost | per row |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, data, columns, rows in (
        ("image part, 800 rows of 120 kB", image_part(), IMAGE_SCHEMA, 800),
        ("token part, 4,096 rows of 2 x 196", tokens, token_schema, 4096),
    ):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "part.parquet")
            path.write_bytes(data)
            found = medians(
                {
                    "unchecked": partial(read, path, columns, checked=False),
                    "checked": partial(read, path, columns, checked=True),
                },
                options.rounds,
            )
        plain, checked = found["unchecked"], found["checked"]
        lines.append(
            f"| {name} | {len(data) / 1e6:.1f} | {plain:.4f} | {checked:.4f} | "
            f"{checked / plain - 1:+.0%} | {1e6 * (checked - plain) / rows:.1f} us |"
        )
    images = pngs()
    found = medians(
        {str(on): partial(decode, images, checked=on) for on in (False, True)}, options.rounds
    )
    plain, checked = found["False"], found["True"]
    lines.append(
        f"| {len(images)} PNGs of 500 x 375 | {sum(map(len, images)) / 1e6:.1f} | {plain:.4f} | "
        f"{checked:.4f} | {checked / plain - 1:+.1%} | "
        f"{1e6 * (checked - plain) / len(images):.1f} us |"
    )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
