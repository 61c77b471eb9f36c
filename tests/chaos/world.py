"""A small image table and tokenizer to tokenize, and workers that die on command."""

import dataclasses
import io
import itertools
import os
import signal
import threading
import time

import numpy as np
import torch
from PIL import Image

from beit.images import image_digest
from beit.tokenizers import DvaeTokenizer
from beit.views import ViewPolicy
from pipelines import storage
from pipelines.config.tokenize_images import ActorsConfig, TokenizeConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.tables import image_files, image_table, tokenizer_store
from pipelines.tables.token_files import Identity
from pipelines.tables.token_table import build_manifest
from pipelines.tables.unit_files import UnitFile
from pipelines.tokenization import pool as token_pool
from pipelines.tokenization import work as token_work


def make_images(uri, *, count=240, parts=3, side=48, keep=None, prefix="", class_names="abc"):
    """An image table of smooth random JPEGs of different shapes: numbers below `count`, or some."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        height, width = (int(side * factor) for factor in generator.uniform(0.6, 1.4, 2))
        coarse = Image.fromarray(generator.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        encoded = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(encoded, "JPEG")
        data = encoded.getvalue()
        if keep is not None and index not in keep:
            continue
        rows.append(
            image_files.ImageRow(
                key=f"{prefix}{index:06d}.jpg",
                image=data,
                height=height,
                width=width,
                label=index % len(class_names) if class_names else None,
                digest=image_digest(data),
            )
        )
    bounds = np.linspace(0, len(rows), parts + 1).astype(int)
    written = [
        image_files.write_part(
            uri, f"part-{part:05d}.parquet", rows[first:last], row_group_bytes=20_000
        )
        for part, (first, last) in enumerate(itertools.pairwise(bounds))
    ]
    image_table.commit_manifest(
        uri,
        parts=written,
        class_names=list(class_names),
        source={},
        options={},
        rejected={},
        num_items=len(rows),
    )
    return uri


def make_tokenizer(uri, *, seed=0, dim=16, vocab_size=64, blocks=1):
    """A dVAE of random weights: 32 px, 4 x 4 tokens."""
    torch.manual_seed(seed)
    tokenizer = DvaeTokenizer(
        image_size=32,
        patch_size=8,
        dim=dim,
        vocab_size=vocab_size,
        encoder_blocks=blocks,
        decoder_blocks=1,
    )
    tokenizer_store.save(tokenizer, uri, source={"stage": "test"})
    return uri


def make_config(images, tokenizer, output, **changes):
    values = {
        "images": str(images),
        "tokenizer": str(tokenizer),
        "output": str(output),
        "num_views": 2,
        "rows_per_unit": 20,
        "batch_size": 16,
        "encoders": ActorsConfig(min_actors=1, max_actors=1),
        "tracking": TrackingConfig(enabled=False),
    }
    return TokenizeConfig(**values | changes)


def write_tokens(images, tokenizer_uri, output, **changes):
    """The token table of an open image table, made without Ray, a file for each part."""
    tokenizer = tokenizer_store.load(tokenizer_uri)
    identity = Identity(
        image_fingerprint=images.fingerprint,
        num_rows=images.num_rows,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        grid_size=tokenizer.grid_size,
        image_size=tokenizer.image_size,
        interpolation=tokenizer.interpolation,
        policy=ViewPolicy().to_dict(),
        views=(0, 2),
        device="cpu",
        precision="float32",
        batch_size=16,
    )
    identity = dataclasses.replace(identity, **changes)
    files = []
    for index, part in enumerate(images.parts):
        unit = token_work.Unit(index=index, part=part.to_dict(), start=0, stop=part.rows)
        rendered = token_work.render_unit(images.uri, unit, identity)
        ids = token_work.encode_rendered(tokenizer, rendered.pixels, identity)
        size, digest = token_work.write_unit(
            output, unit.name, rendered.keys, ids, rendered.grey_levels, identity
        )
        files.append(UnitFile(part=index, start=0, stop=part.rows, size=size, hash=digest))
    manifest = build_manifest(
        identity=identity,
        part_names=[part.name for part in images.parts],
        part_rows=[part.rows for part in images.parts],
        files=files,
        rejected=[],
        rows_per_unit=40,
        libraries={},
    )
    storage.write_json(storage.join(output, "manifest.json"), manifest)


def deadly(unit):
    """Rows 40 to 59 of the second part: the unit that no process survives."""
    return unit.start == 40 and unit.part["name"] == "part-00001.parquet"


def render_but(deed, batch, task, attempts):
    """`render_blocks` with a deed in the place of the deadly unit."""
    real = token_work.render_unit

    def render_unit(images_uri, unit, *rest):
        if deadly(unit):
            deed()
        return real(images_uri, unit, *rest)

    token_work.render_unit = render_unit
    try:
        yield from token_pool.render_blocks(batch, task, attempts)
    finally:
        token_work.render_unit = real


def render_and_die(batch, task, attempts):
    """`render_blocks` that does not survive the deadly unit."""
    yield from render_but(lambda: os.kill(os.getpid(), signal.SIGKILL), batch, task, attempts)


def render_and_fail(batch, task, attempts):
    """`render_blocks` of a node that cannot read the deadly unit."""

    def fail():
        raise OSError(5, "Input/output error")

    yield from render_but(fail, batch, task, attempts)


class Deadly:
    """A tokenizer that kills its process."""

    def encode(self, images):
        os.kill(os.getpid(), signal.SIGKILL)


class EncodeAndDie(token_pool.EncodeUnits):
    """`EncodeUnits` that does not survive the deadly unit."""

    def _encode(self, unit, *rendered):
        if deadly(unit):
            self.tokenizer = Deadly()
        return super()._encode(unit, *rendered)


class Failing:
    """A tokenizer that fails in threads that say so: an actor encodes in one, writes in another."""

    def __init__(self, whole, error):
        self.whole, self.error, self.here = whole, error, threading.local()

    def __getattr__(self, name):
        return getattr(self.whole, name)

    def encode(self, images):
        if self.here.fails:
            raise self.error
        return self.whole.encode(images)


class EncodeAndFail(token_pool.EncodeUnits):
    """`EncodeUnits` on a device that has no memory for the deadly unit."""

    error = torch.OutOfMemoryError("out of memory")

    def __init__(self, task, attempts):
        super().__init__(task, attempts)
        self.tokenizer = Failing(self.tokenizer, self.error)

    def fails(self, unit):
        return deadly(unit)

    def _encode(self, unit, *rendered):
        self.tokenizer.here.fails = self.fails(unit)
        return super()._encode(unit, *rendered)


class EncodeAndFault(EncodeAndFail):
    """`EncodeUnits` on a device that is lost with the deadly unit."""

    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class EncodeNothing(EncodeAndFail):
    """`EncodeUnits` where no unit can be encoded."""

    def fails(self, unit):
        return True


class EncodeSlowly(token_pool.EncodeUnits):
    """`EncodeUnits` that takes its time, and says who it is."""

    def _encode(self, unit, *rendered):
        time.sleep(2)
        outcome = super()._encode(unit, *rendered)
        outcome.facts["seconds"]["pid"] = os.getpid()
        return outcome


def alone_and_die(unit, task):
    """`tokenize_alone` that does not survive the deadly unit."""
    if deadly(unit):
        os.kill(os.getpid(), signal.SIGSEGV)
    return token_pool.tokenize_alone(unit, task)
