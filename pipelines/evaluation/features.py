"""Frozen features of images, block by block, and what they are computed from."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import TypedDict

from beit.classifier import BeitClassifier
from beit.convert import Network
from beit.teachers import Teacher
from beit.vit import BeitEncoder
from beit.weights import CONFIG_FILE, WEIGHTS_FILE, load_weights, read_weights_config
from pipelines import storage
from pipelines.errors import InputError
from pipelines.evaluation.labelled_images import LabelledImages
from pipelines.progress import Progress
from pipelines.records import check_values, read_values
from pipelines.tables.class_names import comparable
from pipelines.tables.weights_store import weights_fingerprint

Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
CGROUP = Path("/sys/fs/cgroup")
MAX_PIXEL_SIDE = 64
MANY_IMAGES = 20_000
GRID_REGIONS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A pretrained network and where it comes from."""

    model: Network
    uri: str
    """The weights directory itself."""
    fingerprint: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of pixels in [0, 1], as in training."""
    run_id: str
    """MLflow run that made them; "" where unknown."""
    tokenizer: str
    """Fingerprint of the tokenizer whose tokens they learned to predict; "" where unknown."""
    class_names: tuple[str, ...]
    """Of a classifier."""
    steps: int
    """Of the training that made them; 0 where unknown."""


class Tracked(TypedDict):
    """What is needed of run.json."""

    mlflow_run_id: str


class Normalisation(TypedDict):
    """Of pixels in [0, 1]."""

    pixel_mean: Channels
    pixel_std: Channels


class Extra(TypedDict):
    """What must stand in the configuration of weights."""

    extra: Normalisation


def open_weights(uri: str, *, field: str = "run") -> Weights:
    """The weights of a run directory, or of a weights directory. Errors name `field`.

    Raises:
        InputError: there are none, or they are damaged.
    """
    run_uri = storage.absolute(uri)
    nested = storage.join(run_uri, "weights")
    weights_uri = nested if storage.exists(storage.join(nested, "config.json")) else run_uri
    with tempfile.TemporaryDirectory() as directory:
        try:
            storage.fetch_dir(weights_uri, directory, suffixes=(WEIGHTS_FILE, CONFIG_FILE))
            extra: dict[str, Any] = read_weights_config(directory).get("extra") or {}
            model = load_weights(directory)
        except FileNotFoundError as error:
            raise InputError(
                f"{field}: nothing at {weights_uri}; finish `beit pretrain` first"
            ) from error
        except NotADirectoryError as error:
            raise InputError(
                f"{field}: {weights_uri} is a file; give the directory of a run, or of its weights"
            ) from error
        except ValueError as error:
            message = str(error).replace(directory, weights_uri)
            raise InputError(
                f"{field}: {message}; give a finished run or a weights directory"
            ) from error
    record: dict[str, Any] = {}
    if weights_uri == nested and storage.exists(storage.join(run_uri, "run.json")):
        record = read_values(storage.join(run_uri, "run.json"), Tracked, "restore it")
    path = storage.join(weights_uri, CONFIG_FILE)
    check_values({"extra": extra}, Extra, path, "without it pixels are not those of training")
    return Weights(
        model=model.eval(),
        uri=weights_uri,
        fingerprint=weights_fingerprint(weights_uri),
        mean=tuple(extra["pixel_mean"]),
        std=tuple(extra["pixel_std"]),
        run_id=str(record.get("mlflow_run_id") or ""),
        tokenizer=str(extra.get("fingerprints", {}).get("tokenizer") or ""),
        class_names=tuple(extra.get("class_names") or ()),
        steps=int(extra.get("steps") or 0),
    )


Reader = Callable[[Tensor], Sequence[Tensor]]
"""uint8 pixels (B, 3, H, W) on the device to one or several features (B, ...) of each image."""


def block_reader(
    network: BeitEncoder,
    *,
    layers: Sequence[int],
    pooling: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Reader:
    """Pooled tokens after each of `layers` (from 1) of a network in evaluation mode, see `pooled`.

    `mean` and `std` are of pixels in [0, 1]. One forward pass serves all layers.
    """

    def pool(tokens: Tensor) -> Tensor:
        return pooled(tokens, pooling, network.grid_size).float()

    return lambda pixels: network.pooled_blocks(normalised(pixels, mean, std), layers, pool)


def patch_reader(
    network: BeitEncoder, *, layers: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> Reader:
    """Patches (B, N, dim) after each of `layers`, in float16, for the attentive probe."""
    most = torch.finfo(torch.float16).max

    def patches(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].clamp(-most, most).half()

    return lambda pixels: network.pooled_blocks(normalised(pixels, mean, std), layers, patches)


def patches_size(network: BeitEncoder, num_images: int, num_layers: int) -> int:
    """Bytes of what `patch_reader` reads."""
    return 2 * num_layers * num_images * network.num_patches * network.dim


def head_reader(weights: Weights) -> Reader:
    """Logits of a classifier's own head."""
    return lambda pixels: [weights.model(normalised(pixels, weights.mean, weights.std))]


def teacher_reader(teacher: Teacher, pooling: str) -> Reader:
    """Pooled features of a teacher's patches; "cls" is their mean: not all have a class token."""
    how = "mean" if pooling == "cls" else pooling

    def read(pixels: Tensor) -> list[Tensor]:
        tokens = F.pad(teacher.features(pixels), (0, 0, 1, 0))
        return [pooled(tokens, how, teacher.grid_size)]

    return read


def pixel_reader(num_images: int) -> Reader:
    """Raw pixels in [0, 1]; larger images are averaged to 64 pixels a side, many to 16.

    The latter are as many numbers as a network's features: of a million images no more would fit.
    """
    most = pixel_side(num_images)

    def read(pixels: Tensor) -> list[Tensor]:
        images = pixels.float() / 255
        if images.shape[-1] > most:
            images = F.adaptive_avg_pool2d(images, most)
        return [images.flatten(1)]

    return read


def pixel_side(num_images: int) -> int:
    """Most pixels a side that `pixel_reader` keeps of each of so many images."""
    return MAX_PIXEL_SIDE if num_images <= MANY_IMAGES else MAX_PIXEL_SIDE // 4


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, H, W) as a network wants them."""
    center, scale = (torch.tensor(values, device=pixels.device) for values in (mean, std))
    return (pixels.float() / 255 - center.view(3, 1, 1)) / scale.view(3, 1, 1)


@torch.no_grad()
def features_of(
    readers: Mapping[str, Reader], batch: np.ndarray, device: str | torch.device
) -> dict[str, list[np.ndarray]]:
    """What each reader makes of a batch uint8 (B, 3, H, W): one or several arrays (B, ...)."""
    pixels = torch.from_numpy(batch).to(device)
    return {
        name: [each.cpu().numpy() for each in reader(pixels)] for name, reader in readers.items()
    }


def read_features(
    readers: Mapping[str, Reader],
    batches: Iterable[np.ndarray],
    count: int,
    *,
    device: str | torch.device = "cpu",
    label: str = "",
    into: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """What each reader makes of `count` images, from one pass over them; see `kept_features`."""

    def pieces() -> Iterator[Piece]:
        done = 0
        for batch in batches:
            yield done, features_of(readers, batch, device)
            done += len(batch)

    with exact_products():
        return kept_features(pieces(), count, label=label, into=into)


Piece = tuple[int, Mapping[str, Sequence[np.ndarray]]]
"""Position of the first of some images, and their features (n, ...), by reader and layer."""


def kept_features(
    pieces: Iterable[Piece],
    count: int,
    *,
    label: str,
    into: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Features of `count` images by reader, (L, count, ...), from pieces in any order.

    The arrays lie in temporary files (below TMPDIR), without names, that go when they do: memory
    holds a piece, and what of the arrays the system has room for. `into`: those that were made
    before, by reader.

    Raises:
        InputError: there is no room for them.
    """
    found = dict(into or {})
    progress, done = Progress(count, label, "images") if label else None, 0
    for start, piece in pieces:
        rows = 0
        for name, features in piece.items():
            rows = len(features[0])
            if name not in found:
                shape = (len(features), count, *features[0].shape[1:])
                found[name] = on_disk(shape, features[0].dtype)
            for layer, each in enumerate(features):
                found[name][layer, start : start + rows] = each
        done += rows
        if progress:
            progress.update(done)
    if progress:
        progress.close()
    return found


def on_disk(shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """An array in a file without a name, which goes when the array does.

    Its room is taken at once: a file with holes that finds none later ends the process (SIGBUS).

    Raises:
        InputError: there is no room for it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    check_disk(size)
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(_no_room(size, error.strerror or "")) from error
        return np.memmap(file, dtype, "w+", shape=shape)


def check_disk(size: int) -> None:
    """Raises InputError where TMPDIR has no room for `size` bytes."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size > free:
        raise InputError(_no_room(size, f"{free / 1e9:.1f} GB are free"))


def check_memory(num_images: int, width: int, device: str, *, at_once: int = 1) -> None:
    """Raises InputError where there is no room to fit probes on `width` features of each image,
    `at_once` of them at the same time."""
    block = 4 * num_images * width
    # Beside the features of a block their copy on the device, and that normalised, for k-NN.
    rooms = {"memory": (1 + 2 * at_once, free_memory())}
    if device.startswith("cuda"):
        rooms = {"memory": (1, free_memory()), device: (3, torch.cuda.mem_get_info(device)[0])}
    for place, (copies, free) in rooms.items():
        if copies * block > free:
            raise InputError(
                f"max_images: probes on {width:,} features of {num_images:,} images need "
                f"{copies * block / 1e9:.1f} GB of {place}, {free / 1e9:.1f} GB are free; lower "
                "max_images, or have fewer features (pooling: mean; baselines: false; no teacher)"
            )


def free_memory() -> int:
    """Bytes that this process may still take, of the machine or of its container (cgroup v2)."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", without a limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        lines = map(str.split, (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(dict(lines)["inactive_file"]))  # cache gives way
    return free


def _no_room(size: int, why: str) -> str:
    return (
        f"{size / 1e9:.1f} GB are needed on disk, in {tempfile.gettempdir()}: {why}; set TMPDIR to "
        "a larger disk, or take less (max_images, layers; attentive: false)"
    )


def feature_width(network: Network, pooling: str, num_images: int, *, pixels: bool) -> int:
    """Features of an image: those of the network or, with `pixels`, of `pixel_reader` if more."""
    side = min(network.image_size[0], pixel_side(num_images))
    own = num_features(network.dim, pooling, network.grid_size)
    return max(own, 3 * side * side) if pixels else own


def num_features(dim: int, pooling: str, grid_size: tuple[int, int]) -> int:
    """How many features `pooled` makes of an image."""
    return dim * math.prod(min(side, GRID_REGIONS) for side in grid_size if pooling == "grid")


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of matrices in whole float32, whatever a training has chosen for itself."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def head_hits(weights: Weights, data: LabelledImages, logits: np.ndarray) -> np.ndarray:
    """Which images the network's own head classifies right, by its logits (n, C): bool (n,)."""
    classes = np.asarray(head_classes(weights, data))
    hits: np.ndarray = logits.argmax(axis=1) == classes[data.labels]
    return hits


def head_classes(weights: Weights, data: LabelledImages) -> list[int] | None:
    """The classes of `data` as its head numbers them; None without a head that knows them all."""
    numbers = {comparable(name): number for number, name in enumerate(weights.class_names)}
    classes = [numbers.get(comparable(name), -1) for name in data.class_names]
    return classes if isinstance(weights.model, BeitClassifier) and -1 not in classes else None


def pooled(tokens: Tensor, pooling: str, grid_size: tuple[int, int]) -> Tensor:
    """Features (B, d) of tokens (B, 1+N, dim), cls first.

    "mean" of the patches, "cls", or "grid": the means of 4x4 regions (fewer where the grid of
    patches has fewer), side by side.
    """
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "mean":
        return tokens[:, 1:].mean(1)
    if pooling != "grid":
        raise ValueError(f"pooling {pooling!r}: use mean, cls or grid")
    height, width = grid_size
    maps = tokens[:, 1:].reshape(len(tokens), height, width, -1).movedim(-1, 1)
    regions = (min(height, GRID_REGIONS), min(width, GRID_REGIONS))
    return F.adaptive_avg_pool2d(maps.float(), regions).flatten(1)
