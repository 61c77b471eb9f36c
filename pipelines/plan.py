"""`plan`: time, GPU-hours and storage before anything is started, and what caching saves.

The arithmetic is simple on purpose and every number that was not read or measured is listed as an
assumption.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines import view_evidence
from pipelines.config.plan import PlanConfig
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.tokenization import work as token_work

# Parquet keeps 2 bytes a token before compression; less after it (docs/tokenize.md).
BYTES_PER_TOKEN = 2
NUM_PATCHES = 196
# CPU time of a 500 x 375 JPEG, once and for each view: the figures of docs/tokenize.md, about.
DECODE_MILLISECONDS, RENDER_MILLISECONDS = 2.0, 4.0
# CPU time from a table to a batch, of an image of that size or of a stored view of 224 pixels, on
# the same cores and without numba, and kilobytes of such a view (docs/views.md).
LOADER_MILLISECONDS = {"images": 2.45, "lossless": 0.56, "jpeg95": 0.78, "jpeg90": 0.56}
VIEW_KILOBYTES = {"lossless": 98, "jpeg95": 24, "jpeg90": 13}
# What rendering them takes in the pass of `tokenize`, as a share of what it takes apart: the image
# is read, decoded and jittered already (docs/tokenize.md).
ONE_PASS_SHARE = 0.6
MEASURE_SECONDS = 5.0
MEASURE_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class PixelPlan:
    """One of the ways in which training comes to its pixels."""

    source: str
    """images, or views by their form."""
    images_per_second: float
    """Of one core."""
    cores: int
    """That keep all devices of the pretraining busy."""
    num_bytes: int
    """Of the table that is read."""

    def line(self) -> str:
        what = self.source if self.source == "images" else f"{self.source} views"
        return (
            f"{what}: {self.images_per_second:,.0f} images/s a core, {self.cores:,} cores feed "
            f"all, {_bytes(self.num_bytes)}"
        )


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """What another number of views would take, and what is known of it."""

    num_views: int
    tokenize_hours: float
    token_bytes: int
    known: str
    """What the evidence says of this number (`view_evidence`)."""

    def line(self) -> str:
        return (
            f"{self.num_views:,}: {_hours(self.tokenize_hours)}, {_bytes(self.token_bytes)}, "
            f"{self.known}"
        )


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """Costs; times are wall-clock hours with all GPUs and CPUs busy."""

    num_images: int
    num_units: int
    device: str
    """What tokenizes and trains: "GPU", or "machine" where the rate is that of a CPU."""
    encode_rate: float
    """Views a second of one device, stated or measured."""
    tokenize_hours: float
    tokenize_gpu_hours: float
    limited_by: str
    """"encoding" or "decoding"."""
    image_bytes: int
    token_bytes: int
    """Of all views, at most."""
    pretrain_hours: float
    """With cached tokens."""
    pretrain_gpu_hours: float
    online_gpu_hours: float
    """GPU-hours that the tokenizer would take if tokens were computed during training."""
    break_even_epochs: int
    """From so many epochs on, caching takes fewer GPU-hours than computing online."""
    views: tuple[ViewPlan, ...]
    """What was asked for beside other numbers of views, up to a new one each epoch."""
    pixels: tuple[PixelPlan, ...]
    render_hours: float
    """To store all views once (`beit render`), on all cores."""
    render_break_even_epochs: int
    """From so many epochs on, lossless views take fewer core-hours than decoding at each step."""
    assumptions: tuple[str, ...]

    def summary(self) -> str:
        """The plan as text."""
        cached = self.tokenize_gpu_hours + self.pretrain_gpu_hours
        online = self.online_gpu_hours + self.pretrain_gpu_hours
        unit = f"{self.device}-hours"
        lines = [
            f"{self.num_images:,} images, {_bytes(self.image_bytes)}",
            f"tokenize   {_hours(self.tokenize_hours)}, {self.tokenize_gpu_hours:,.1f} {unit}, "
            f"limited by {self.limited_by}; {self.num_units:,} units",
            f"storage    {_bytes(self.token_bytes)} of tokens at most",
            f"pretrain   {_hours(self.pretrain_hours)}, {self.pretrain_gpu_hours:,.1f} {unit}",
            f"together   {cached:,.1f} {unit}; computing tokens online instead {online:,.1f}",
            f"caching pays from {self.break_even_epochs} epochs on",
            "views, at choice (docs/evidence.md: a small network, 40 and 120 epochs of drawings):",
            *(f"  {plan.line()}" for plan in self.views),
            "pixels in pretraining, at choice:",
            *(f"  {plan.line()}" for plan in self.pixels),
            f"views are rendered once, in {_hours(self.render_hours)} on all cores, or in "
            f"{_hours(self.render_hours * ONE_PASS_SHARE)} by tokenize in its pass; that saves "
            f"cores from {self.render_break_even_epochs} epochs on",
            "assumed:",
            *(f"  {line}" for line in self.assumptions),
        ]
        return "\n".join(lines)


def run(config: PlanConfig) -> PlanResult:
    """Computes the plan.

    Raises:
        InputError: the image table or tokenizer that is named does not exist.
    """
    assumptions: list[str] = []
    if config.images:
        table = ImageTable.open(config.images)
        num_images, image_bytes = table.num_rows, sum(part.bytes for part in table.parts)
        # Units do not reach over the end of a part.
        num_units = sum(-(-part.rows // config.rows_per_unit) for part in table.parts)
    else:
        num_images = config.num_images
        image_bytes = int(num_images * config.image_kilobytes * 1000)
        num_units = -(-num_images // config.rows_per_unit)
        assumptions.append(f"{num_images:,} images of {config.image_kilobytes:g} kB, as stated")
    encode_rate, device, num_patches = config.encode_rate, "GPU", config.num_patches
    if config.tokenizer:
        encode_rate, name = measure_rate(config.tokenizer)
        assumptions.append(f"{encode_rate:,.0f} views/s a {name}: measured here, on random pixels")
        device = "machine" if name.startswith("CPU") else "GPU"
        height, width = tokenizer_store.describe(config.tokenizer).config["grid_size"]
        num_patches = num_patches or height * width
    else:
        assumptions.append(f"{encode_rate:,.0f} views/s a GPU: stated, not measured")
        num_patches = num_patches or NUM_PATCHES
    decode_rate = config.decode_rate or 1000 / _milliseconds(config.num_views)
    assumptions += [
        f"{decode_rate:,.0f} images/s a core for decoding and rendering all "
        f"{config.num_views} views: stated, not measured here",
        f"{config.train_rate:,.0f} images/s a {device} in pretraining: stated, not measured",
        f"{config.num_gpus} {device}s and {config.num_cpus} cores, all busy all the time; no "
        "start-up, no interruption",
        f"{BYTES_PER_TOKEN} bytes a token, {num_patches} tokens a view; zstd saves 18 % of "
        "that for a vocabulary of 8192 used evenly, more for a smaller one",
        f"other numbers of views: decoding as {DECODE_MILLISECONDS:g} ms an image and "
        f"{RENDER_MILLISECONDS:g} ms a view",
        "pixels: JPEGs of 500 x 375 and views of 224 pixels, as measured on the cores of "
        "docs/tokenize.md, not here; of a faster core: benchmarks/results/ingest.md",
    ]
    encode_seconds = num_images * config.num_views / (encode_rate * config.num_gpus)
    decode_seconds = num_images / (decode_rate * config.num_cpus)
    tokenize_hours = max(encode_seconds, decode_seconds) / 3600
    view_bytes = num_images * num_patches * BYTES_PER_TOKEN

    def other(num_views: int) -> ViewPlan:
        encoding = encode_seconds * num_views / config.num_views
        decoding = decode_seconds * _milliseconds(num_views) / _milliseconds(config.num_views)
        return ViewPlan(
            num_views=num_views,
            tokenize_hours=max(encoding, decoding) / 3600,
            token_bytes=view_bytes * num_views,
            known=view_evidence.known_of(config.epochs, num_views),
        )

    counts = {1, config.num_views, math.ceil(config.epochs / 10), config.epochs}
    gpu_hours_of_view = 1 / (3600 * encode_rate)
    pretrain_gpu_hours = num_images * config.epochs / config.train_rate / 3600
    return PlanResult(
        num_images=num_images,
        num_units=num_units,
        device=device,
        encode_rate=encode_rate,
        tokenize_hours=tokenize_hours,
        # GPUs are held while they wait for decoding.
        tokenize_gpu_hours=tokenize_hours * config.num_gpus,
        limited_by="encoding" if encode_seconds >= decode_seconds else "decoding",
        image_bytes=image_bytes,
        token_bytes=view_bytes * config.num_views,
        pretrain_hours=pretrain_gpu_hours / config.num_gpus,
        pretrain_gpu_hours=pretrain_gpu_hours,
        online_gpu_hours=num_images * config.epochs * gpu_hours_of_view,
        break_even_epochs=break_even(
            tokenize_hours * config.num_gpus,
            online_gpu_hours_per_epoch=num_images * gpu_hours_of_view,
        ),
        views=tuple(other(count) for count in sorted(counts)),
        pixels=tuple(_pixels(config, num_images, image_bytes)),
        render_hours=decode_seconds / 3600,
        render_break_even_epochs=1
        + int(
            1000 / decode_rate / (LOADER_MILLISECONDS["images"] - LOADER_MILLISECONDS["lossless"])
        ),
        assumptions=tuple(assumptions),
    )


def _milliseconds(num_views: int) -> float:
    """CPU time of an image, of which so many views are rendered."""
    return DECODE_MILLISECONDS + RENDER_MILLISECONDS * num_views


def _pixels(config: PlanConfig, num_images: int, image_bytes: int) -> Iterator[PixelPlan]:
    """Decoding images at each step, and each form of stored views."""
    for source, milliseconds in LOADER_MILLISECONDS.items():
        stored = num_images * config.num_views * VIEW_KILOBYTES.get(source, 0) * 1000
        yield PixelPlan(
            source=source,
            images_per_second=1000 / milliseconds,
            cores=math.ceil(config.train_rate * config.num_gpus * milliseconds / 1000),
            num_bytes=stored or image_bytes,
        )


def break_even(cached_gpu_hours: float, *, online_gpu_hours_per_epoch: float) -> int:
    """Epochs from which caching is cheaper: one more than views, if decoding is no bottleneck."""
    return int(cached_gpu_hours / online_gpu_hours_per_epoch * (1 + 1e-9)) + 1


def measure_rate(tokenizer_uri: str) -> tuple[float, str]:
    """Views a second that this machine tokenizes, and on what."""
    import torch

    token_work.set_reference_arithmetic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        token_work.keep_freed_memory()
    tokenizer = tokenizer_store.load(tokenizer_uri, device=device)
    if device == "cuda":
        tokenizer.set_precision(tokenizer.precisions[-1])
    size = tokenizer.image_size
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (MEASURE_BATCH, size, size, 3), dtype=np.uint8)

    def seconds(count: int) -> float:
        begin = time.monotonic()
        token_work.encode_views(tokenizer, pixels[:count], batch_size=count, device=device)
        return time.monotonic() - begin

    seconds(1)
    # A slow tokenizer on a CPU gets small batches, so that planning takes seconds.
    batch = int(min(MEASURE_BATCH, max(1, MEASURE_SECONDS / 4 / seconds(1))))
    seconds(batch)
    begin, views = time.monotonic(), 0
    while time.monotonic() - begin < MEASURE_SECONDS / 2:
        seconds(batch)
        views += batch
    rate = views / (time.monotonic() - begin)
    if device == "cuda":
        return rate, torch.cuda.get_device_name()
    return rate, f"CPU with {torch.get_num_threads()} threads"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:,.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"
