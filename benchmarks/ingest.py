"""What a core makes of encoded images: our data path beside the upstream transform and DataLoader.

    OMP_NUM_THREADS=1 python -m benchmarks.ingest [--images 192] [--rounds 7] [--output FILE.md]

Variants run interleaved, round by round; figures are medians over rounds of CPU time (of all
threads and child processes), so that other work on the machine disturbs them less than it
would disturb wall time. The pictures are cut out of photographs that scikit-learn and matplotlib
bring along: 500x375 JPEGs, quality 90, 4:2:0.

WebDataset, litdata and mosaicml-streaming are measured where installed, with upstream's transform.
The last imports torchvision, which needs an environment with its own build of torch (see
`benchmarks/upstream.py`): there all loaders are measured in one run.
"""

import argparse
import io
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import PIL
import sklearn.datasets
import torch
from PIL import Image

from beit import jitter
from beit.images import decode_array, decode_image, image_digest
from beit.views import ViewPolicy, render, render_fast, render_sizes, sample_view
from benchmarks.upstream import Upstream, UpstreamFolder
from pipelines import storage
from pipelines.config.pretrain import MaskingConfig
from pipelines.reading import decoding
from pipelines.reading.encoded_rows import TrainingTables, open_training_tables
from pipelines.reading.ingest import train_batches
from pipelines.reading.pixels import drawn, render_with_levels
from pipelines.sample_order import SampleOrder
from pipelines.tables import token_table
from pipelines.tables.image_files import ImageRow, write_part
from pipelines.tables.image_table import ImageTable, commit_manifest
from pipelines.tables.token_files import Identity, encode_file
from pipelines.tables.unit_files import UnitFile, file_name
from pipelines.tables.view_files import CODECS

# Peers that are left out where they are not installed.
try:
    import webdataset
except ImportError:
    webdataset = None
try:
    import litdata
    from litdata.streaming import Cache
except ImportError:
    litdata = None
try:
    import streaming
except ImportError:
    streaming = None

POLICY = ViewPolicy(seed=0)
MASKING = MaskingConfig()
BATCH = 32


def make_jpegs(count: int) -> list[bytes]:
    """500x375 cuts at random places and scales of three photographs."""
    rng = random.Random(0)
    photographs = [
        *Path(sklearn.datasets.__file__).parent.glob("images/*.jpg"),
        Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg",
    ]
    sources = [Image.open(path).convert("RGB") for path in sorted(photographs)]
    files = []
    for number in range(count):
        source = sources[number % len(sources)]
        scale = rng.uniform(0.6, 1.0) * min(source.width / 500, source.height / 375)
        width, height = int(500 * scale), int(375 * scale)
        left, top = rng.randint(0, source.width - width), rng.randint(0, source.height - height)
        cut = source.resize((500, 375), box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        cut.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def grey_levels(data: bytes) -> list[int]:
    """Of the two views of an encoded image."""
    views = [drawn(POLICY, index) for index in range(2)]
    return render_with_levels(data, image_digest(data), views, [], key="")[1]


def write_tables(root: Path, files: list[bytes]) -> tuple[str, str]:
    """An image table of the files, and a token table of random tokens with its grey levels."""
    images_uri, tokens_uri = str(root / "images"), str(root / "tokens")
    rows = [
        ImageRow(
            key=f"{i:06d}", image=data, height=375, width=500, label=None, digest=image_digest(data)
        )
        for i, data in enumerate(files)
    ]
    part = write_part(images_uri, "part-00000.parquet", rows, row_group_bytes=2**20)
    commit_manifest(
        images_uri, parts=[part], class_names=[], source={}, options={}, rejected={},
        num_items=len(rows),
    )  # fmt: skip
    identity = Identity(
        image_fingerprint=ImageTable.open(images_uri).fingerprint,
        num_rows=len(files),
        tokenizer_fingerprint="0" * 32,
        vocab_size=8192,
        grid_size=(14, 14),
        image_size=112,
        interpolation="lanczos",
        policy=POLICY.to_dict(),
        views=(0, 2),
        device="cpu",
        precision="float32",
        batch_size=8,
    )
    tokens = np.random.default_rng(0).integers(0, 8192, (len(files), 2, 196)).astype(np.uint16)
    levels = np.array([grey_levels(data) for data in files], np.uint8)
    data = encode_file([row.key for row in rows], tokens, identity, levels)
    name = file_name(part.name, 0, len(files))
    storage.write_bytes(storage.join(tokens_uri, name), data)
    record = UnitFile(part=0, start=0, stop=len(files), size=len(data), hash=storage.digest(data))
    manifest = token_table.build_manifest(
        identity=identity, part_names=[part.name], part_rows=[len(files)], files=[record],
        rejected=[], rows_per_unit=len(files), libraries={},
    )  # fmt: skip
    storage.write_json(storage.join(tokens_uri, "manifest.json"), manifest)
    return images_uri, tokens_uri


def write_tars(root: Path, files: list[bytes]) -> list[str]:
    """The files in two WebDataset shards, one for each worker."""
    shards = [str(root / f"{number}.tar") for number in range(2)]
    for number, shard in enumerate(shards):
        if not Path(shard).exists():
            with webdataset.TarWriter(shard) as writer:
                for i, data in enumerate(files[number::2]):
                    writer.write({"__key__": f"{i:06d}", "jpg": data})
    return shards


def lit_loader(folder: Path, files: list[bytes]) -> Callable[[], None]:
    """litdata's loader of the files, in chunks of 8 MB."""
    cache = Cache(str(folder), chunk_bytes="8MB")
    for i, data in enumerate(files):
        cache[i] = {"jpg": data}
    cache.done()
    cache.merge()
    transform = Upstream()

    def run() -> None:
        dataset = litdata.StreamingDataset(
            str(folder), shuffle=True, transform=lambda sample: transform(sample["jpg"])
        )
        for _ in litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=2):
            pass

    return run


def mosaic_loader(folder: Path, files: list[bytes]) -> Callable[[], None]:
    """mosaicml-streaming's loader of the files, from one shard on the disk."""
    with streaming.MDSWriter(out=str(folder), columns={"jpg": "bytes"}) as writer:
        for data in files:
            writer.write({"jpg": data})
    transform = Upstream()

    class Views(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
            return transform(super().__getitem__(at)["jpg"])

    dataset = Views(local=str(folder), shuffle=True, batch_size=BATCH)

    def run() -> None:
        for _ in streaming.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=2):
            pass

    return run


def transforms(files: list[bytes]) -> dict[str, Callable[[], None]]:
    """One pass over all files each, in this thread."""
    upstream, plain = Upstream(), Upstream(jitter=False)
    digests = [image_digest(data) for data in files]
    epoch = iter(range(10**9))

    def upstream_all() -> None:
        for data in files:
            upstream(data)

    def upstream_without_jitter() -> None:
        for data in files:
            plain(data)

    def exact_both() -> None:
        index = next(epoch)
        for data, digest in zip(files, digests, strict=True):
            image = decode_image(data)
            view = sample_view(POLICY, digest, index, image.height, image.width)
            render_sizes(image, view, [(224, "bicubic"), (112, "lanczos")])

    def exact_patches() -> None:
        index = next(epoch)
        for data, digest in zip(files, digests, strict=True):
            image = decode_image(data)
            view = sample_view(POLICY, digest, index, image.height, image.width)
            render(image, view, 224, "bicubic")

    def exact_tokens() -> None:
        index = next(epoch)
        for data, digest in zip(files, digests, strict=True):
            image = decode_image(data)
            view = sample_view(POLICY, digest, index, image.height, image.width)
            render(image, view, 112, "lanczos")

    def fast_patches() -> None:
        index = next(epoch)
        for data, digest in zip(files, digests, strict=True):
            pixels = decode_array(data)
            view = sample_view(POLICY, digest, index, *pixels.shape[:2])
            render_fast(pixels, view, 224)

    return {
        "upstream: both views": upstream_all,
        "upstream without jitter": upstream_without_jitter,
        "ours exact: both views": exact_both,
        "ours exact: tokenizer's view": exact_tokens,
        "ours exact: patch view": exact_patches,
        "ours fast: patch view": fast_patches,
        "decoding alone": lambda: [decode_array(data) for data in files] and None,
    }


def loaders(root: Path, files: list[bytes]) -> dict[str, Callable[[], None]]:
    """One pass over the same files from disk, in batches, with two decoding workers or threads."""
    folder = root / "folder"
    folder.mkdir()
    paths = [folder / f"{i:06d}.jpg" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    images_uri, tokens_uri = write_tables(root, files)
    data = open_training_tables(images_uri, [tokens_uri])
    from tests.pipelines.view_fixtures import write_views  # needs Ray, which `train` does not

    stored = {}
    for form in CODECS:
        views = write_views(data.images, root / form, image_size=224, policy=POLICY, form=form)
        stored[form] = open_training_tables("", [tokens_uri], view_uris=[views], image_size=224)
    order = SampleOrder(data.row_group_sizes, seed=0, global_batch_size=BATCH, window=64)

    def torch_loader() -> None:
        loader = torch.utils.data.DataLoader(
            UpstreamFolder(paths), BATCH, shuffle=True, num_workers=2, drop_last=True
        )
        for _ in loader:
            pass

    def tar_loader() -> None:
        shards = write_tars(root, files)
        dataset = webdataset.WebDataset(shards, shardshuffle=2).shuffle(100)
        transform = Upstream()
        views = dataset.map(lambda sample: transform(sample["jpg"]))
        for _ in torch.utils.data.DataLoader(views, BATCH, num_workers=2):
            pass

    peers = {"WebDataset, upstream transform": tar_loader} if webdataset else {}
    if litdata:
        peers["litdata, upstream transform"] = lit_loader(root / "litdata", files)
    if streaming:
        peers["mosaicml-streaming, upstream transform"] = mosaic_loader(root / "mosaic", files)

    def ours(data: TrainingTables, fast: bool = True) -> Callable[[], None]:
        def run() -> None:
            with train_batches(
                data, order, image_size=224, seed=0, masking=MASKING, start_step=0,
                stop_step=order.steps_per_epoch, num_threads=2, fast=fast,
            ) as batches:  # fmt: skip
                for _ in batches:
                    pass

        return run

    grey = [np.full((224, 224, 3), 128, np.uint8)]

    uncompiled = mock.patch.object(jitter, "_compiled", lambda: None)
    undecoded = mock.patch.object(decoding, "render_encoded", lambda *_, **__: grey)
    variants = {
        "torch DataLoader, upstream transform": torch_loader,
        "train_batches, exact": ours(data, False),
        "train_batches, fast": ours(data),
    }
    if jitter._compiled():
        variants["train_batches, fast without numba"] = uncompiled(ours(data))
    variants["train_batches, nothing decoded"] = undecoded(ours(data))
    variants |= {f"train_batches, {form} views": ours(stored[form]) for form in CODECS}
    return variants | peers


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    variants: dict[str, Callable[[], None]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of each round of each variant; one round to warm up is left out."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            run()
            if number:
                seconds[name].append((cpu_seconds() - cpu, time.perf_counter() - wall))
    return seconds


def table(seconds: dict[str, list[tuple[float, float]]], count: int) -> list[str]:
    """Markdown; ratios are medians of the ratios within each round."""
    base = [cpu for cpu, _ in next(iter(seconds.values()))]
    lines = [
        "| variant | CPU ms/image, median (min) | images/s per core | x first row | wall ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, rounds in seconds.items():
        cpu = [value / count * 1e3 for value, _ in rounds]
        median = statistics.median(cpu)
        ratio = statistics.median(b / c for b, (c, _) in zip(base, rounds, strict=True))
        wall = statistics.median(value for _, value in rounds) / count * 1e3
        lines.append(
            f"| {name} | {median:.2f} ({min(cpu):.2f}) | {1e3 / median:.0f} | {ratio:.2f} "
            f"| {wall:.2f} |"
        )
    return lines


def deviation(files: list[bytes]) -> tuple[float, float]:
    """Mean and largest per-image mean absolute difference of the fast patch view."""
    values = []
    for data in files:
        pixels = decode_array(data)
        view = sample_view(POLICY, image_digest(data), 0, *pixels.shape[:2])
        exact = render(pixels, view, 224, "bicubic").astype(int)
        values.append(float(np.abs(render_fast(pixels, view, 224) - exact).mean()))
    return statistics.fmean(values), max(values)


def main() -> None:
    """Measures, prints, and writes the table where asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = make_jpegs(arguments.images // BATCH * BATCH)  # Not all loaders drop a last batch.
    kilobytes = statistics.fmean(map(len, files)) / 1e3
    single = measure(transforms(files), arguments.rounds)
    with tempfile.TemporaryDirectory() as root:
        loading = measure(loaders(Path(root), files), arguments.rounds)
    mean, largest = deviation(files)
    lines = [
        "# Ingest",
        "",
        f"{len(files)} JPEGs of 500x375, quality 90, {kilobytes:.0f} kB on average; "
        f"{arguments.rounds} interleaved rounds. Python {platform.python_version()}, "
        f"Pillow {PIL.__version__}, torch {torch.__version__}, {platform.machine()}, "
        f"{'with' if jitter._compiled() else 'without'} numba. "
        "Written by `benchmarks/ingest.py`; CPU time counts all threads and processes.",
        "",
        "## One core: decode and transform, from memory",
        *table(single, len(files)),
        "",
        "## Loaders: the same files, or stored views of them, from disk; two workers or threads",
        *table(loading, len(files)),
        "",
        f"Fast patch view against the exact one, mean absolute difference in grey levels: "
        f"{mean:.3f} on average over the images, {largest:.3f} for the worst image.",
        "",
    ]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
