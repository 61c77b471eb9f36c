"""Small real tables to train on: drawn images, and tokens that follow from their colours."""

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beit.images import decode_image, image_digest
from beit.views import ViewPolicy, render, sample_view
from pipelines import storage
from pipelines.config.pretrain import (
    CheckpointConfig,
    DataConfig,
    HealthConfig,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    ProbeConfig,
    ScalingConfig,
)
from pipelines.config.tracking import TrackingConfig
from pipelines.reading import ingest
from pipelines.tables import token_table
from pipelines.tables.image_files import ImageRow, write_part
from pipelines.tables.image_table import ImageTable, commit_manifest
from pipelines.tables.token_files import Identity, encode_file
from pipelines.tables.unit_files import UnitFile, file_name
from pipelines.training.data import WorkerData

GRID = (8, 8)
SIDE = 32
VOCAB = 64
POLICY = ViewPolicy(seed=7)


def draw_image(index: int) -> Image.Image:
    """A rectangle and a disc on a ground, in colours of the index's class."""
    generator = np.random.default_rng([5, index])
    label = index % 3
    ground = np.full((48, 56, 3), generator.integers(40, 90), np.uint8)
    ground[..., label] += 100
    y, x = np.mgrid[:48, :56]
    cy, cx, radius = generator.integers(12, 36), generator.integers(12, 44), 6 + 4 * label
    ground[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = generator.integers(0, 255, 3)
    top, left = generator.integers(0, 30, 2)
    ground[top : top + 10, left : left + 14] = generator.integers(0, 255, 3)
    return Image.fromarray(ground)


def write_images(
    uri: str,
    num_images: int = 96,
    *,
    parts: int = 2,
    labelled: bool = True,
    class_names: Sequence[str] = ("a", "b", "c"),
) -> ImageTable:
    """An image table of PNGs with 3 classes, several row groups a part."""
    rows = []
    for index in range(num_images):
        buffer = io.BytesIO()
        image = draw_image(index)
        image.save(buffer, "PNG")
        data = buffer.getvalue()
        rows.append(
            ImageRow(
                key=f"img{index:05d}",
                image=data,
                height=image.height,
                width=image.width,
                label=index % 3 if labelled else None,
                digest=image_digest(data),
            )
        )
    share = -(-num_images // parts)
    records = [
        write_part(
            uri,
            f"part-{i:05d}.parquet",
            rows[i * share : (i + 1) * share],
            row_group_bytes=4000,
        )
        for i in range(parts)
    ]
    commit_manifest(
        uri,
        parts=records,
        class_names=class_names,
        source={},
        options={},
        rejected={},
        num_items=num_images,
    )
    return ImageTable.open(uri)


def tokens_of(image: Image.Image, digest: bytes, view: int) -> np.ndarray:
    """uint16 (64,): mean colour of each cell of the token view, two bits a channel."""
    drawn = sample_view(POLICY, digest, view, image.height, image.width)
    pixels = render(image, drawn, SIDE, "lanczos").astype(np.float64)
    cells = pixels.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).astype(np.int64) // 64
    return (cells @ np.array([16, 4, 1])).reshape(-1).astype(np.uint16)


def write_tokens(uri: str, images: ImageTable, *, views: tuple[int, int] = (0, 2)) -> None:
    """A token table of these images."""
    identity = Identity(
        image_fingerprint=images.fingerprint,
        num_rows=images.num_rows,
        tokenizer_fingerprint="c" * 32,
        vocab_size=VOCAB,
        grid_size=GRID,
        image_size=SIDE,
        interpolation="lanczos",
        policy=POLICY.to_dict(),
        views=views,
        device="cpu",
        precision="float32",
        batch_size=16,
    )
    files, base = [], 0
    for position, part in enumerate(images.parts):
        rows = images.read_rows(base, base + part.rows, ["key", "image", "digest"]).to_pylist()
        ids = np.stack(
            [
                np.stack(
                    [
                        tokens_of(decode_image(row["image"]), row["digest"], view)
                        for view in range(*views)
                    ]
                )
                for row in rows
            ]
        )
        data = encode_file([row["key"] for row in rows], ids, identity)
        storage.write_bytes(storage.join(uri, file_name(part.name, 0, part.rows)), data)
        files.append(
            UnitFile(
                part=position, start=0, stop=part.rows, size=len(data), hash=storage.digest(data)
            )
        )
        base += part.rows
    manifest = token_table.build_manifest(
        identity=identity,
        part_names=[part.name for part in images.parts],
        part_rows=[part.rows for part in images.parts],
        files=files,
        rejected=[],
        rows_per_unit=1000,
        libraries={},
    )
    storage.write_json(storage.join(uri, "manifest.json"), manifest)


def make_tables(root: Path, num_images: int = 96) -> tuple[str, str]:
    """(images, tokens) below `root`."""
    images = write_images(str(root / "images"), num_images)
    write_tokens(str(root / "tokens"), images)
    return str(root / "images"), str(root / "tokens")


def small_config(tables: tuple[str, str], output: Path | str, **sections: dict) -> PretrainConfig:
    """A run of seconds; `sections` override fields: optim={"steps": 5}, seed=1, ..."""
    plain = {k: v for k, v in sections.items() if not isinstance(v, dict)}

    def build(cls: type, name: str, **defaults: object) -> object:
        return cls(**{**defaults, **sections.get(name, {})})

    return PretrainConfig(
        **{
            "images": tables[0],
            "tokens": [tables[1]],
            "output": str(output),
            "log_every": 4,
            **plain,
        },
        model=build(
            ModelConfig,
            "model",
            image_size=SIDE,
            patch_size=4,
            dim=32,
            depth=2,
            num_heads=2,
            drop_path=0.1,
        ),
        objective=build(ObjectiveConfig, "objective"),
        masking=build(MaskingConfig, "masking", num_masked=24, min_block=4),
        data=build(
            DataConfig, "data", global_batch_size=16, num_shards=4, window=8, prefetch_batches=2
        ),
        optim=build(OptimConfig, "optim", steps=12, warmup_steps=2, lr=3e-3),
        scaling=build(ScalingConfig, "scaling", num_workers=0, peak_tflops=0.05),
        checkpoint=build(CheckpointConfig, "checkpoint", every_steps=4),
        health=build(HealthConfig, "health", data_starvation="off", accuracy_floor="off"),
        probe=build(ProbeConfig, "probe", every_steps=0),
        tracking=build(TrackingConfig, "tracking", enabled=False),
    )


def metrics_of(run_uri: str) -> list[dict]:
    """Lines of metrics.jsonl."""
    text = storage.read_bytes(storage.join(run_uri, "metrics.jsonl")).decode()
    return [json.loads(line) for line in text.splitlines()]


def per_step(run_uri: str) -> dict[int, tuple[float, str]]:
    """Loss and sample hash of every step."""
    steps = {}
    for line in metrics_of(run_uri):
        for offset, values in enumerate(zip(line["losses"], line["samples"], strict=True)):
            steps[line["first_step"] + offset] = values
    return steps


def weight_bytes(run_uri: str) -> bytes:
    """The final weights."""
    return storage.read_bytes(storage.join(run_uri, "weights", "weights.safetensors"))


def events_of(run_uri: str) -> list[dict]:
    """All events of a run."""
    uri = storage.join(run_uri, "events")
    return [
        storage.read_json(storage.join(uri, file.path)) for file in storage.list_files(uri, ".json")
    ]


def replaced(config: PretrainConfig, section: str, **fields: object) -> PretrainConfig:
    """The configuration with some fields of one section changed."""
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **fields)}
    )


class Killed(BaseException):
    """Stands for a process that is gone: nothing of the loop may handle it."""


def dies_after(count):
    """A stream of batches that ends the process after `count` of them."""
    real = ingest.train_batches

    class Stream:
        def __init__(self, stream):
            self.stream, self.left = stream, count
            self.close = stream.close

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def __iter__(self):
            return self

        def __next__(self):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return next(self.stream)

    return lambda *args, **options: Stream(real(*args, **options))


def poison(monkeypatch, positions):
    """Makes the patch-view pixels of these batches NaN after normalisation."""
    real = WorkerData.batches

    def batches(self, segments):
        for batch in real(self, segments):
            self.poisoned = batch.host.step in positions
            yield batch

    normalise = WorkerData.normalise
    monkeypatch.setattr(WorkerData, "batches", batches)
    monkeypatch.setattr(
        WorkerData,
        "normalise",
        lambda self, pixels: normalise(self, pixels) * (torch.nan if self.poisoned else 1.0),
    )
