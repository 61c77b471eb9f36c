"""Small sources for tests: images of every kind, folders, tars and Parquet files of them."""

import io
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from beit.images import decode_array

CRASH_MARK = b"this image ends its decoder"
HANG_MARK = b"this image hangs its decoder"
MEMORY_MARK = b"this image needs memory; the tries are counted in: "


def pixels(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """uint8 (height, width, 3), smooth enough for JPEG to be small."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(
    seed: int, kind: str = "JPEG", *, height: int = 24, width: int = 32, **options
) -> bytes:
    """An encoded image."""
    return saved(Image.fromarray(pixels(seed, height, width)), kind, **options)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(
    root: Path, *, classes=("ant", "bee", "cat"), per_class: int = 5
) -> dict[str, bytes]:
    """A tree of class folders; returns bytes by key."""
    files = {
        f"{name}/{number:03d}.jpg": encoded(100 * index + number)
        for index, name in enumerate(classes)
        for number in range(per_class)
    }
    for key, data in files.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """A tar with these members, in this order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_tars(root: Path, *, num_tars: int = 3, per_tar: int = 6) -> dict[str, tuple[bytes, int]]:
    """WebDataset shards with class numbers; (bytes, label) by key."""
    root.mkdir(parents=True, exist_ok=True)
    rows = {}
    for shard in range(num_tars):
        members = []
        # Deliberately not in order of names.
        for number in reversed(range(per_tar)):
            seed = shard * per_tar + number
            data, label = encoded(seed), seed % 4
            members += [
                (f"{number:04d}.jpg", data),
                (f"{number:04d}.cls", str(label).encode()),
                (f"{number:04d}.json", b'{"caption": "a picture", "kind": %d}' % (label + 1)),
            ]
            rows[f"shard-{shard:03d}.tar/{number:04d}.jpg"] = (data, label)
        (root / f"shard-{shard:03d}.tar").write_bytes(tar_bytes(members))
    return rows


def hf_table(images: list[bytes | None], labels: list[int | None], names: list[str]) -> pa.Table:
    """A table as the `datasets` library writes it: image struct, class names in the metadata."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    table = pa.table({"image": pa.array(rows, struct), "label": pa.array(labels, pa.int64())})
    quoted = ", ".join(f'"{name}"' for name in names)
    described = (
        '{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ['
        f'{quoted}], "_type": "ClassLabel"}}}}}}}}'
    )
    return table.replace_schema_metadata({b"huggingface": described.encode()})


def write_parquet(path: Path, table: pa.Table, *, rows_per_group: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)


def fragile_decode(data: bytes, *, max_pixels: int) -> np.ndarray:
    """A decoder that dies, hangs or lacks memory on marked images, as libraries do."""
    if data.endswith(CRASH_MARK):
        os._exit(139)
    while data.endswith(HANG_MARK):
        pass
    _, mark, counter = data.partition(MEMORY_MARK)
    if mark:
        tries = Path(counter.decode())
        tries.write_bytes(tries.read_bytes() + b"1")
        if tries.stat().st_size < 3:
            raise MemoryError
    return decode_array(data, max_pixels=max_pixels)


def slow_decode(data: bytes, *, max_pixels: int) -> np.ndarray:
    """A decoder that takes its time, so that it can be met at work."""
    time.sleep(0.01)
    return decode_array(data, max_pixels=max_pixels)


def slowest_decode(data: bytes, *, max_pixels: int) -> np.ndarray:
    """A decoder that needs seconds for an image."""
    time.sleep(2)
    return decode_array(data, max_pixels=max_pixels)


def fragile_rehearsal(text: str) -> None:
    """A reader that dies of one particular file."""
    if "shard-001" in text:
        os._exit(139)


def fragile_footers(text: str) -> None:
    """Arrow's reader of footers, which ends its process at one particular file."""
    from pipelines.preparation import parquet_footers

    read = parquet_footers._read

    def dying(uri: str, texts_of: str) -> dict:
        if "deadly" in uri:
            os.abort()
        return read(uri, texts_of)

    parquet_footers._read = dying
    parquet_footers.answer(text)
