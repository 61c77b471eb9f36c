"""Which library reads, lists and writes S3 fastest: pyarrow's own client or s3fs (fsspec).

    python benchmarks/storage.py [--rounds 5] [--output FILE.md]

Against a real S3 server on loopback (Ceph's radosgw, see `tests/s3_server.py`), so that what is
measured is the client: requests made, bytes copied, locks held. Variants run interleaved, round by
round, in one process; figures are medians over rounds. CPU time is that of this process alone,
which is what a training worker has to share with decoding.
"""

import argparse
import contextlib
import io
import itertools
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
from pyarrow import fs as pafs

from pipelines import storage
from pipelines.tables.image_files import ImageRow, PartWriter
from tests.s3_server import REGION, start_s3

COLUMNS = ["key", "image", "label", "digest"]
NUM_GROUPS = 16
# Row groups that a window of the sample order touches and reads in one go.
WINDOW = 4
NUM_KEYS, NUM_SMALL, SMALL_BYTES = 10_000, 200, 4096
THREADS = 16
PART_BYTES = 128 * 2**20


def make_part() -> pa.Buffer:
    """A part of an image table: `NUM_GROUPS` row groups of 12 MB, images of 110 kB."""
    writer = PartWriter()
    rng = random.Random(0)
    for number in range(NUM_GROUPS * 115):
        digest = number.to_bytes(16, "big")
        image = rng.randbytes(110_000)
        writer.add(
            ImageRow(
                key=f"{number:09d}", image=image, height=375, width=500, label=1, digest=digest
            )
        )
    return writer.finish("part-00000.parquet")[0]


class Parts:
    """The ways to read row groups of a part whose size and footer are known."""

    def __init__(self, arrow: pafs.FileSystem, s3: s3fs.S3FileSystem, store, bucket: str) -> None:
        self.s3, self.path = s3, f"{bucket}/part-00000.parquet"
        self.uri = store.uri(self.path)
        self.by_arrow = arrow.open_input_file(self.path)
        self.metadata = pq.read_metadata(self.by_arrow)
        self.size = self.by_arrow.size()

    def _read(self, file: object, groups: list[int], *, pre_buffer: bool = True) -> pa.Table:
        reader = pq.ParquetFile(
            file, metadata=self.metadata, pre_buffer=pre_buffer, page_checksum_verification=True
        )
        return reader.read_row_groups(groups, columns=COLUMNS, use_threads=False)

    def arrow(self, groups: list[int]) -> pa.Table:
        return self._read(self.by_arrow, groups)

    def ranges(self, groups: list[int]) -> pa.Table:
        return self._read(storage.open_input(self.uri, size=self.size), groups)

    def fsspec_file(self, groups: list[int]) -> pa.Table:
        with self.s3.open(self.path, "rb", cache_type="none", size=self.size) as file:
            return self._read(file, groups)

    def fsspec_readahead(self, groups: list[int]) -> pa.Table:
        with self.s3.open(self.path, "rb", size=self.size) as file:
            return self._read(file, groups, pre_buffer=False)

    def cat_ranges(self, groups: list[int]) -> pa.Table:
        """All row groups at the same time, one request each, handed to Parquet in memory."""
        starts, stops = [], []
        for group in groups:
            meta = self.metadata.row_group(group)
            chunks = [meta.column(i) for i in range(meta.num_columns)]
            starts.append(min(chunk.data_page_offset for chunk in chunks))
            stops.append(
                max(chunk.data_page_offset + chunk.total_compressed_size for chunk in chunks)
            )
        found = self.s3.cat_ranges([self.path] * len(groups), starts, stops)
        file = Ranges(dict(zip(starts, found, strict=True)), self.size)
        return self._read(pa.PythonFile(file, mode="r"), groups, pre_buffer=False)


class Ranges(io.RawIOBase):
    """A file of which only some ranges are there."""

    def __init__(self, ranges: dict[int, bytes], size: int) -> None:
        self.ranges, self.size, self.position = ranges, size, 0

    def readable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        self.position = position if whence == 0 else self.size + position
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, length: int = -1) -> memoryview:
        start = max(start for start in self.ranges if start <= self.position)
        first = self.position - start
        self.position += length
        return memoryview(self.ranges[start])[first : first + length]


@contextlib.contextmanager
def busy(threads: int) -> Iterator[None]:
    """Python that holds the interpreter lock all the time, as a training loop may."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    spinning = [threading.Thread(target=spin) for _ in range(threads)]
    for thread in spinning:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in spinning:
            thread.join()


def measure(
    variants: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Median and least seconds, and median CPU seconds, of every variant; interleaved."""
    for run in variants.values():
        run()
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        names = list(variants)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            before, cpu_before = time.perf_counter(), time.process_time()
            variants[name]()
            wall[name].append(time.perf_counter() - before)
            cpu[name].append(time.process_time() - cpu_before)
    return {
        name: (statistics.median(wall[name]), min(wall[name]), statistics.median(cpu[name]))
        for name in variants
    }


def table(title: str, unit: str, scale: float, results: dict) -> str:
    """Markdown; `scale` turns seconds into something else by division."""
    rows = [
        f"| {name} | {wall:.3f} ({least:.3f}) | {cpu:.3f} | {scale / wall:,.0f} |"
        for name, (wall, least, cpu) in results.items()
    ]
    head = f"| variant | s, median (least) | CPU s | {unit} |\n| --- | --- | --- | --- |"
    return "\n".join(["", f"## {title}", head, *rows])


def each(threads: int, action: Callable, values: Iterable) -> None:
    """`action` of every value, in threads."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(action, values))


def row_groups(arrow, s3, store, bucket: str, rounds: int) -> list[str]:
    data = make_part()
    with arrow.open_output_stream(f"{bucket}/part-00000.parquet") as stream:
        stream.write(data)
    parts = Parts(arrow, s3, store, bucket)
    rng = random.Random(1)
    windows = [sorted(rng.sample(range(NUM_GROUPS), WINDOW)) for _ in range(4)]
    single = [[group] for group in rng.sample(range(NUM_GROUPS), 8)]
    names = {
        "pyarrow S3, pre_buffer": parts.arrow,
        "s3fs ranges, pre_buffer (storage.open_input)": parts.ranges,
        "s3fs file without cache, pre_buffer": parts.fsspec_file,
        "s3fs file, read-ahead cache": parts.fsspec_readahead,
        "s3fs cat_ranges": parts.cat_ranges,
    }
    expected = parts.arrow(windows[0])
    assert all(read(windows[0]).equals(expected) for read in names.values())
    texts = []
    for title, requests, threads, spinning in (
        ("Row groups one by one, one thread", single, 1, 0),
        ("Row groups one by one, 4 threads", single, 4, 0),
        ("Row groups one by one, 4 threads, beside a busy thread of Python", single, 4, 1),
        (f"Windows of {WINDOW} row groups, one thread", windows, 1, 0),
        (f"Windows of {WINDOW} row groups, 4 threads", windows, 4, 0),
    ):
        variants = {name: partial(each, threads, read, requests) for name, read in names.items()}
        with busy(spinning):
            results = measure(variants, rounds)
        megabytes = sum(len(groups) for groups in requests) * len(data) / NUM_GROUPS / 1e6
        texts.append(table(f"{title}: {megabytes:.0f} MB", "MB/s", megabytes, results))
    return texts


def listing(arrow, s3, store, bucket: str, rounds: int) -> list[str]:
    base = f"{bucket}/keys"
    names = [f"{base}/{i % 100:03d}/{i:06d}.jpg" for i in range(NUM_KEYS)]
    each(THREADS, lambda name: s3.pipe_file(name, b"x"), names)
    selector = pafs.FileSelector(base, recursive=True)
    uri = store.uri(base)
    assert len(storage.list_files(uri)) == len(s3.find(base)) == NUM_KEYS
    variants = {
        "pyarrow FileSelector": lambda: arrow.get_file_info(selector),
        "s3fs find": lambda: s3.find(base, detail=True),
        "s3fs pages, times unread (storage.list_files)": lambda: storage.list_files(uri),
    }
    results = measure(variants, rounds)
    return [table(f"Listing {NUM_KEYS:,} keys in 100 prefixes", "keys/s", NUM_KEYS, results)]


def small(arrow, s3, store, bucket: str, rounds: int) -> list[str]:
    data = os.urandom(SMALL_BYTES)
    counter = itertools.count()

    def arrow_write(path: str) -> None:
        with arrow.open_output_stream(path) as stream:
            stream.write(data)

    def arrow_read(path: str) -> bytes:
        with arrow.open_input_file(path) as file:
            return file.read()

    def fresh() -> list[str]:
        turn = next(counter)
        return [f"{bucket}/small/{turn}/{i}" for i in range(NUM_SMALL)]

    there = fresh()
    s3.pipe(dict.fromkeys(there, data))
    texts = []
    for threads in (1, THREADS):
        run = partial(each, threads)
        write: dict[str, Callable[[], object]] = {
            "pyarrow": partial(lambda run: run(arrow_write, fresh()), run),
            "s3fs pipe_file (storage.write_bytes)": partial(
                lambda run: run(lambda path: storage.write_bytes(store.uri(path), data), fresh()),
                run,
            ),
        }
        read: dict[str, Callable[[], object]] = {
            "pyarrow": partial(run, arrow_read, there),
            "s3fs cat_file": partial(run, s3.cat_file, there),
            "s3fs cat_file without HEAD (storage.read_bytes)": partial(
                run, lambda path: storage.read_bytes(store.uri(path)), there
            ),
        }
        name = f"{NUM_SMALL} objects of {SMALL_BYTES} bytes, {threads} threads"
        texts += [
            table(f"Write {name}", "objects/s", NUM_SMALL, measure(write, rounds)),
            table(f"Read {name}", "objects/s", NUM_SMALL, measure(read, rounds)),
        ]
    return texts


def large(arrow, s3, store, bucket: str, rounds: int) -> list[str]:
    data = os.urandom(PART_BYTES)
    path = f"{bucket}/large"
    uri = store.uri(path)

    def arrow_write() -> None:
        with arrow.open_output_stream(path) as stream:
            stream.write(data)

    def arrow_read() -> bytes:
        with arrow.open_input_file(path) as file:
            return file.read()

    megabytes = PART_BYTES / 1e6
    write = {
        "pyarrow": arrow_write,
        "s3fs pipe_file, parts of 50 MB": lambda: s3.pipe_file(path, data),
        "s3fs pipe_file, parts of 16 MB (storage.write_bytes)": lambda: storage.write_bytes(
            uri, data
        ),
    }
    read = {
        "pyarrow": arrow_read,
        "s3fs cat_file, ranges of 50 MB": lambda: s3.cat_file(path),
        "s3fs cat_file, one stream (storage.read_bytes)": lambda: storage.read_bytes(uri),
    }
    return [
        table(f"Write {megabytes:.0f} MB", "MB/s", megabytes, measure(write, rounds)),
        table(f"Read {megabytes:.0f} MB", "MB/s", megabytes, measure(read, rounds)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="row_groups,listing,small,large")
    parser.add_argument("--output")
    options = parser.parse_args()
    store = start_s3()
    bucket = store.new_bucket()
    arrow = pafs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{store.port}", scheme="http", region=REGION
    )
    s3 = fsspec.filesystem(
        "s3",
        endpoint_url=store.endpoint,
        use_listings_cache=False,
        config_kwargs={"max_pool_connections": 64},
    )
    kinds = {"row_groups": row_groups, "listing": listing, "small": small, "large": large}
    text = "\n".join(
        [
            "# Storage",
            "",
            f"pyarrow {pa.__version__}, s3fs {s3fs.__version__}, Python "
            f"{platform.python_version()}; {store.kind} on loopback, {os.cpu_count()} cores shared "
            f"by client and server; {options.rounds} interleaved rounds. Written by "
            "`benchmarks/storage.py`; CPU time is the client's.",
            *(
                line
                for name in options.only.split(",")
                for line in kinds[name](arrow, s3, store, bucket, options.rounds)
            ),
        ]
    )
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
