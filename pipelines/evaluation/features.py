"""Frozen features of images, block by block, and what they are computed from."""

import dataclasses
import tempfile
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import TypedDict

from beit.classifier import BeitClassifier
from beit.convert import Network
from beit.weights import CONFIG_FILE, load_weights, read_weights_config
from pipelines import storage
from pipelines.errors import InputError
from pipelines.progress import Progress
from pipelines.reading.pixels import central, read_pixels
from pipelines.records import check_values, read_values
from pipelines.tables.image_table import ImageTable
from pipelines.tables.weights_store import weights_fingerprint

Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
MAX_PIXEL_SIDE = 64
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
            storage.fetch_dir(weights_uri, directory)
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
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages:
    """Labelled images at the size of a network."""

    pixels: np.ndarray
    """uint8 (n, 3, size, size)."""
    labels: np.ndarray
    """int64 (n,), positions in class_names."""
    groups: list[str]
    class_names: list[str]
    known: list[str]
    """Classes of all labelled images of the table, also of those that were not chosen."""
    fingerprint: str
    """Of the image table."""
    uri: str


def read_labelled(
    uri: str,
    *,
    size: int,
    one_per_group: bool,
    max_images: int,
    crop_fraction: float,
    least_classes: int = 2,
) -> LabelledImages:
    """Decodes the labelled images of a table, or a part spread evenly over it.

    Classes without an image are left out.

    Raises:
        InputError: the table has labelled images of fewer than `least_classes` classes.
    """
    table = ImageTable.open(uri)
    labels, groups = table.labels(), np.asarray(table.groups(), dtype=object)
    rows = np.flatnonzero(labels >= 0)
    known = [table.class_names[index] for index in np.unique(labels[rows])]
    if one_per_group:
        _, first = np.unique(groups[rows].astype(str), return_index=True)
        rows = rows[np.sort(first)]
    if max_images and len(rows) > max_images:
        rows = rows[np.linspace(0, len(rows) - 1, max_images).round().astype(np.int64)]
    classes = np.unique(labels[rows])
    if len(classes) < least_classes:
        raise InputError(
            f"images: {uri} has labelled images of {len(classes)} classes; evaluation needs "
            f"{least_classes}. Prepare a table with labels"
        )
    pixels = np.empty((len(rows), 3, size, size), np.uint8)
    progress = Progress(len(rows), "reading images", "images")
    done = 0
    for batch in read_pixels(table, rows, central(crop_fraction), size):
        pixels[done : done + len(batch)] = batch
        done += len(batch)
        progress.update(done)
    progress.close()
    return LabelledImages(
        pixels=pixels,
        labels=np.searchsorted(classes, labels[rows]),
        groups=[str(group) for group in groups[rows]],
        class_names=[table.class_names[index] for index in classes],
        known=known,
        fingerprint=table.fingerprint,
        uri=table.uri,
    )


def joined(train: LabelledImages, test: LabelledImages) -> LabelledImages:
    """Rows of both, classes brought together by name.

    Either may lack some: a test of a few classes, a sample that lost one. Test images of a class
    that the sample of `train` lost stay, and can only be missed.

    Raises:
        InputError: the table of `train` has no image of a class of `test`.
    """
    numbers = {comparable(name): number for number, name in enumerate(train.known)}
    strange = [name for name in test.class_names if comparable(name) not in numbers]
    if strange:
        raise InputError(
            f"test_images: {train.uri} has no image of {', '.join(map(repr, strange[:5]))}"
            f"{', ...' if len(strange) > 5 else ''}, but of "
            f"{', '.join(map(repr, train.known[:5]))}{', ...' if len(train.known) > 5 else ''}; "
            "give tables whose classes have the same names"
        )
    own, others = (
        np.asarray([numbers[comparable(name)] for name in names])
        for names in (train.class_names, test.class_names)
    )
    used = np.union1d(own, others)
    return dataclasses.replace(
        train,
        pixels=np.concatenate([train.pixels, test.pixels]),
        labels=np.searchsorted(used, np.concatenate([own[train.labels], others[test.labels]])),
        groups=[*train.groups, *test.groups],
        class_names=[train.known[number] for number in used],
    )


def comparable(name: str) -> str:
    """A class's name as names are compared: Macs and others write the same accent in two ways."""
    return unicodedata.normalize("NFC", name)


@torch.no_grad()
def block_features(
    model: Network,
    pixels: np.ndarray,
    *,
    layers: list[int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pooling: str = "mean",
    batch_size: int = 64,
    device: str = "cpu",
    label: str = "features",
) -> list[np.ndarray]:
    """Features float32 (n, dim) after each of `layers` (1-based), of uint8 pixels (n, 3, H, W).

    One forward pass serves all layers. For `pooling` see `pooled`.
    """
    model = model.to(device).eval()
    center = torch.tensor(mean, device=device).view(3, 1, 1)
    scale = torch.tensor(std, device=device).view(3, 1, 1)
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int, output: Tensor) -> None:
        kept[layer].append(pooled(output, pooling, model.grid_size).float().cpu())

    hooks = [
        model.blocks[layer - 1].register_forward_hook(
            lambda _module, _inputs, output, layer=layer: keep(layer, output)
        )
        for layer in layers
    ]
    progress = Progress(len(pixels), label, "images")
    try:
        for start in range(0, len(pixels), batch_size):
            batch = torch.from_numpy(pixels[start : start + batch_size]).to(device)
            model.features((batch.float() / 255 - center) / scale, layer=max(layers))
            progress.update(min(start + batch_size, len(pixels)))
    finally:
        for hook in hooks:
            hook.remove()
    progress.close()
    return [torch.cat(kept[layer]).numpy() for layer in layers]


@torch.no_grad()
def head_hits(
    weights: Weights, data: LabelledImages, rows: np.ndarray, *, batch_size: int, device: str
) -> np.ndarray | None:
    """Which of these rows the network's own head classifies right: bool (len(rows),).

    None where it has no head, or one that lacks a class of `data`.
    """
    numbers = {comparable(name): number for number, name in enumerate(weights.class_names)}
    classes = [numbers.get(comparable(name), -1) for name in data.class_names]
    if not isinstance(weights.model, BeitClassifier) or -1 in classes:
        return None
    model = weights.model.to(device).eval()
    center = torch.tensor(weights.mean, device=device).view(3, 1, 1)
    scale = torch.tensor(weights.std, device=device).view(3, 1, 1)
    found = []
    for start in range(0, len(rows), batch_size):
        batch = torch.from_numpy(data.pixels[rows[start : start + batch_size]]).to(device)
        found.append(model((batch.float() / 255 - center) / scale).argmax(dim=1).cpu())
    hits: np.ndarray = torch.cat(found).numpy() == np.asarray(classes)[data.labels[rows]]
    return hits


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


def pixel_features(pixels: np.ndarray) -> np.ndarray:
    """Raw pixels float32 (n, d) in [0, 1]; larger images are averaged to 64 pixels a side."""
    images = torch.from_numpy(pixels).float() / 255
    if pixels.shape[-1] > MAX_PIXEL_SIDE:
        images = F.adaptive_avg_pool2d(images, MAX_PIXEL_SIDE)
    features: np.ndarray = images.flatten(1).numpy()
    return features
