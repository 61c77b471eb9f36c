"""Looks at a model in training: probes of its features, and pictures of its predictions.

All workers take part, since the model may be sharded. Nothing here touches the order of samples,
the weights, or any generator that training draws from.
"""

import functools
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit.objectives import Objective
from pipelines import pictures
from pipelines.config.pretrain import PretrainConfig
from pipelines.evaluation import probes
from pipelines.painting import Painter, open_painter
from pipelines.reading.pixels import central, read_pixels
from pipelines.tables.image_table import ImageTable
from pipelines.training.data import StepBatch, WorkerData
from pipelines.training.distributed import World
from pipelines.training.log import TrainLog

HELD_OUT = 0.2
PROBE_BATCH = 64
PICTURES = 8


def run_probe(
    config: PretrainConfig,
    objective: Objective,
    data: WorkerData,
    world: World,
    log: TrainLog,
    step: int,
) -> None:
    """kNN and linear accuracy of mean patch features on a labelled table, recorded as an event.

    A fifth of the table's leak groups, always the same, is held out.
    """
    start = time.monotonic()
    table, rows, labels, held_out = probe_rows(config.probe.images, config.probe.max_images)
    # Each worker takes neighbouring rows, so that none reads the whole table. All make the same
    # number of passes, for a sharded model waits for everyone: the last row fills up, and what it
    # filled is cut off after gathering.
    share = -(-len(rows) // world.size)
    mine = rows[np.minimum(world.rank * share + np.arange(share), len(rows) - 1)]
    layer = config.probe.layer or max(1, round(config.model.depth * 0.75))
    batches = read_pixels(
        table,
        mine,
        central(),
        config.model.image_size,
        batch_size=PROBE_BATCH,
        num_threads=data.num_threads,
    )
    chunks = []
    objective.eval()
    with torch.no_grad():
        for batch in batches:
            pixels = torch.from_numpy(batch).to(world.device, memory_format=torch.channels_last)
            tokens = objective.features(data.normalise(pixels), layer=layer)
            chunks.append(tokens[:, 1:].float().mean(dim=1))
    objective.train()
    gathered = torch.cat(world.gather(torch.cat(chunks)))[: len(rows)]
    if log.active:
        x = gathered.cpu().numpy()
        train, test = ~held_out, held_out
        knn = probes.knn_accuracy(x[train], labels[train], x[test], labels[test])
        linear = probes.linear_accuracy(x[train], labels[train], x[test], labels[test])
        seconds = time.monotonic() - start
        log.event(
            "probe",
            step=step,
            figures={"probe/knn_accuracy": knn, "probe/linear_accuracy": linear},
            knn_accuracy=knn,
            linear_accuracy=linear,
            layer=layer,
            images=len(rows),
            seconds=seconds,
            message=f"step {step}: kNN {knn:.3f}, linear {linear:.3f} on {int(test.sum())} "
            f"held-out images, from {int(train.sum())} others (block {layer}, {seconds:.0f} s)",
        )
    world.barrier()


@functools.lru_cache(maxsize=2)
def probe_rows(
    uri: str, max_images: int
) -> tuple[ImageTable, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Table, row numbers, labels, and which rows are held out."""
    table = ImageTable.open(uri)
    labels = table.labels()
    rows = np.flatnonzero(labels >= 0)
    if len(rows) > max_images:
        rows = rows[np.linspace(0, len(rows) - 1, max_images).astype(np.int64)]
    return table, rows, labels[rows].astype(np.int64), table.held_out(HELD_OUT)[rows]


def log_pictures(
    config: PretrainConfig,
    objective: Objective,
    data: WorkerData,
    batch: StepBatch,
    world: World,
    log: TrainLog,
    step: int,
) -> None:
    """What is predicted of a few images of the current batch, beside what is true, to MLflow.

    Tokens are shown by the decoder of the tokenizer or the patches nearest to its codes; without
    either, as maps of colours. An objective that predicts no tokens paints pixels.
    """
    host = batch.host
    pixels, mask = host.pixels[:PICTURES], host.mask[:PICTURES]
    objective.eval()
    with torch.no_grad():
        normalised = data.normalise(pixels.to(world.device))
        guesses = objective.predict(normalised, mask.to(world.device))
    objective.train()
    if not log.active:
        return
    if host.token_ids is None:
        painted = data.denormalise(guesses).cpu()
        sheet = pictures.painted_grid(pixels, mask, painted, patch_size=config.model.patch_size)
        log.picture("painted", sheet, step)
        return
    guesses, true = guesses.cpu(), host.token_ids[:PICTURES]
    predicted = torch.where(mask, guesses, true)
    hits = ((guesses == true) & mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    painter = _painter(config.tokenizer) if config.tokenizer else None
    if painter is None:
        log.picture(
            "masked_input",
            pictures.masked_input_grid(pixels, mask, patch_size=config.model.patch_size),
            step,
        )
        for name, token_ids in (("true", true), ("predicted", predicted)):
            sheet = pictures.token_map(
                token_ids, grid_size=config.model.grid_size, images=pixels, title=f"Tokens, {name}"
            )
            log.picture(f"tokens_{name}", sheet, step)
        return
    log.picture(
        "reconstruction",
        pictures.reconstruction_grid(
            pixels,
            mask,
            painter.paint(true),
            painter.paint(predicted),
            patch_size=config.model.patch_size,
            accuracy=_floats(hits),
        ),
        step,
    )


@functools.lru_cache(maxsize=1)
def _painter(uri: str) -> Painter | None:
    return open_painter(uri)


def _floats(values: Tensor) -> Sequence[float]:
    return [float(value) for value in values]
