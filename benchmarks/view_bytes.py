"""What a sample of training reads from an S3 server, and what of it is used.

    python -m benchmarks.view_bytes [--images 1024] [--output FILE.md]

One epoch of `train_batches` from the image table and from view tables, with the product's row
groups and windows in the proportion that they have on ImageNet, through a proxy that counts the
bytes of all answers: footers, keys and what two windows share are counted, too.
"""

import argparse
import io
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

from beit.images import decode_array, image_digest
from beit.views import ViewPolicy, render, sample_view
from benchmarks.ingest import MASKING, make_jpegs
from pipelines.reading.encoded_rows import TrainingTables, open_training_tables
from pipelines.reading.ingest import train_batches
from pipelines.sample_order import SampleOrder
from pipelines.tables.image_files import ImageRow, write_part
from pipelines.tables.image_table import ImageTable, commit_manifest
from pipelines.tables.view_files import CODECS, decode_view, encode_view
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.pipelines.view_fixtures import write_views
from tests.s3_server import S3Store, start_s3

POLICY = ViewPolicy(seed=0)
NUM_VIEWS = 4
BATCH, WINDOW = 64, 128


def write_images(uri: str, count: int) -> ImageTable:
    """An image table of so many different JPEGs, in row groups of 4 MB (some 90 images)."""
    files = make_jpegs(min(count, 96))
    rows = []
    for number in range(count):
        data = files[number % len(files)]
        if number >= len(files):  # another image of the same size
            image = Image.open(io.BytesIO(data))
            shifted = Image.fromarray(np.roll(np.asarray(image), number, axis=(0, 1)))
            buffer = io.BytesIO()
            shifted.save(buffer, "JPEG", quality=90)
            data = buffer.getvalue()
        rows.append(
            ImageRow(
                key=f"{number:06d}", image=data, height=375, width=500, label=None,
                digest=image_digest(data),
            )
        )  # fmt: skip
    part = write_part(uri, "part-00000.parquet", rows, row_group_bytes=4 * 2**20)
    commit_manifest(
        uri, parts=[part], class_names=[], source={}, options={}, rejected={}, num_items=count
    )
    return ImageTable.open(uri)


def epoch(data: TrainingTables, proxy: FaultyProxy) -> tuple[float, float, float]:
    """Bytes received, bytes used, and requests, of each sample of one epoch."""
    order = SampleOrder(
        data.row_group_sizes, seed=0, global_batch_size=BATCH, num_shards=2, window=WINDOW
    )
    before, requests = proxy.sent, proxy.counts["ok"]
    with train_batches(
        data, order, image_size=224, seed=0, masking=MASKING, grid_size=(14, 14), start_step=0,
        stop_step=order.steps_per_epoch, num_threads=2,
    ) as batches:  # fmt: skip
        samples = sum(len(batch.row_ids) for batch in batches)
        used = batches.counters.bytes_read
    received = proxy.sent - before
    return received / samples, used / samples, (proxy.counts["ok"] - requests) / samples


def measure(s3: S3Store, bucket: str, count: int, proxy: FaultyProxy) -> list[str]:
    """Rows of the table of results."""
    images = write_images(s3.uri(bucket, "images"), count)
    by_proxy = s3.uri(bucket, "images", port=proxy.port)
    tables = {"images": open_training_tables(by_proxy, policy=POLICY)}
    for form in CODECS:
        write_views(
            images, s3.uri(bucket, form), num_views=NUM_VIEWS, image_size=224, policy=POLICY,
            form=form, rows_per_unit=256,
        )  # fmt: skip
        views = [s3.uri(bucket, form, port=proxy.port)]
        tables[f"{form} views"] = open_training_tables(
            "", view_uris=views, image_size=224, policy=POLICY
        )
    rows = []
    for name, data in tables.items():
        received, used, requests = epoch(data, proxy)
        rows.append(
            f"| {name} | {received / 1e3:.1f} | {used / 1e3:.1f} | {received / used:.2f} "
            f"| {requests:.3f} |"
        )
    return rows


def stored_forms() -> list[str]:
    """Of each form of a stored view: its size, and its difference from the exact view."""
    files = make_jpegs(96)
    lines = ["| form | kB a view | mean absolute difference, grey levels |", "| --- | --- | --- |"]
    for form in CODECS:
        sizes, errors = [], []
        for data in files:
            pixels = decode_array(data)
            view = sample_view(POLICY, image_digest(data), 0, *pixels.shape[:2])
            exact = render(pixels, view, 224)
            sizes.append(len(stored := encode_view(exact, form)))
            found = decode_view(stored, form, 224, key="").transpose(1, 2, 0)
            errors.append(float(np.abs(found.astype(int) - exact).mean()))
        lines.append(
            f"| {form} | {statistics.fmean(sizes) / 1e3:.1f} | {statistics.fmean(errors):.2f} |"
        )
    return lines


def main() -> None:
    """Measures, prints, and writes the table where asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    s3 = start_s3()
    with faulty_proxy(s3.port, rate=0.0) as proxy:
        rows = measure(s3, s3.new_bucket(), arguments.images, proxy)
    lines = [
        "# Bytes of a sample",
        "",
        f"One epoch of {arguments.images} images (500x375 JPEGs) or of {NUM_VIEWS} stored views of "
        f"each, from an S3 server ({s3.kind}); 2 shards, windows of {WINDOW}. All bytes of all "
        "answers are counted. Written by `benchmarks/view_bytes.py`.",
        "",
        "| read from | kB received a sample | kB used | received / used | requests a sample |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        *stored_forms(),
        "",
    ]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
