"""Features from several actors: each reads, decodes and computes units of images.

An actor decodes for its own network, in threads, unlike those of `tokenize`: a vision transformer
in float32 takes so long for an image that a few cores keep up with it. Features come back as
blocks of Ray Data and are written down by the driver, in whatever order; memory holds some units
of `UNIT_BYTES`, or of one batch where that is more, for each actor, whatever the number of images.
A process that dies with a unit in its hands is seen by `units.Attempts`, and it is done again.
"""

import json
import os
import platform
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import safetensors.numpy
import torch
from ray.actor import ActorHandle

from beit.convert import Network
from pipelines import unit_pools
from pipelines.config.evaluate import EvaluateConfig
from pipelines.errors import InputError, StageFailed
from pipelines.evaluation.features import Piece, Reader, features_of
from pipelines.evaluation.labelled_images import LabelledImages
from pipelines.reading.pixels import central, read_pixels
from pipelines.steps import say_step
from pipelines.tables.image_table import ImageTable
from pipelines.unit_pools import in_actors, outcomes_of, tried_in_pool
from pipelines.units import Outcome, outcome_table, outcomes, rounds

UNIT_BYTES = 2**26
UNIT_IMAGES = 512
AGAIN = "When this is mended, the same command begins again: features are not kept."


@dataclass(frozen=True, kw_only=True)
class FeatureUnit:
    """Some images of a table, as they travel to an actor."""

    index: int
    table: int
    """Which of the tables."""
    rows: list[int]
    """Of the table."""
    start: int
    """Position of the first among all images."""

    @property
    def name(self) -> str:
        return f"of images {self.start} to {self.start + len(self.rows) - 1}"


@dataclass(frozen=True, kw_only=True)
class FeatureTask:
    """What every actor is told."""

    tables: tuple[tuple[str, str], ...]
    """URI and fingerprint of each."""
    networks: "ray.ObjectRef[tuple[Sequence[Network], Mapping[str, Reader]]]"
    """Networks, and the readers that look through them."""
    image_size: int
    crop_fraction: float
    batch_size: int
    num_gpus: int
    num_cpus: int


def pieces(
    config: EvaluateConfig,
    data: LabelledImages,
    readers: Mapping[str, Reader],
    networks: Sequence[Network],
    damaged: dict[int, str],
) -> Iterator[Piece]:
    """Features of all images, as units end. What does not decode is told in `damaged`, see
    `Extraction`.

    Raises:
        InputError: a part is missing or damaged, or a promised GPU is none.
        StageFailed: a unit killed its process again and again, or so many units in a row failed
            that the trouble is not theirs.
    """
    scaling = config.scaling
    task = FeatureTask(
        tables=tuple((table.uri, table.fingerprint) for table, _ in data.sources),
        networks=ray.put((networks, readers)),
        image_size=networks[0].image_size[0],
        crop_fraction=config.crop_fraction,
        batch_size=config.batch_size,
        num_gpus=_gpus_of_actor(config.device),
        num_cpus=scaling.cpus_per_worker,
    )
    units = plan_units(data, task.batch_size, _bytes_of_image(readers, task.image_size))
    most = min(scaling.num_workers, len(units))
    on = "a GPU each" if task.num_gpus else "CPUs"
    if config.device == "auto" and not task.num_gpus:
        on += " (no node has a GPU now; --device cuda would wait for one)"
    say_step(f"waiting for the first unit: {most} actors start, on {on}")
    resources = {"num_gpus": task.num_gpus, "num_cpus": task.num_cpus}

    def in_pool(given: Iterable[FeatureUnit], attempts: ActorHandle) -> Iterator[Outcome]:
        arguments = {"task": task, "attempts": attempts}
        for dataset in rounds(asdict(unit) for unit in given):
            size = min(most, dataset.num_blocks())
            computed = in_actors(
                dataset, ComputeFeatures, arguments, least=size, most=size, **resources
            )
            yield from outcomes(computed, AGAIN)

    def alone(aside: Sequence[FeatureUnit]) -> Iterator[Outcome]:
        return unit_pools.run_alone(aside, compute_alone, task, advice=AGAIN, **resources)

    todo = np.arange(len(units))
    for outcome in outcomes_of(todo, units.__getitem__, in_pool, alone, workers=most, advice=AGAIN):
        if outcome.suspect:
            continue
        unit = units[outcome.unit]
        if outcome.rejected:  # that of images which do not decode is among the facts
            raise StageFailed(f"unit {unit.name}: {outcome.rejected}\n{AGAIN}")
        damaged |= {unit.start + at: why for at, why in outcome.facts["damaged"]}
        features = safetensors.numpy.load(outcome.made) if outcome.made is not None else {}
        yield unit.start, features


def plan_units(data: LabelledImages, batch_size: int, image_bytes: int) -> list[FeatureUnit]:
    """All images in whole batches, which are then those of one process.

    So a row group may lie in two units, and both read it: of JPEGs of 110 kB that takes 1 % of the
    time that decoding does, with 192 images in a unit, and cannot be seen with 512.
    """
    size = min(UNIT_IMAGES, UNIT_BYTES // image_bytes) // batch_size * batch_size or batch_size
    units: list[FeatureUnit] = []
    first = 0
    for table, (_, rows) in enumerate(data.sources):
        for start in range(0, len(rows), size):
            some = rows[start : start + size].tolist()
            units.append(FeatureUnit(index=len(units), table=table, rows=some, start=first + start))
        first += len(rows)
    return units


def _gpus_of_actor(device: str) -> int:
    if device == "auto":
        return int(ray.cluster_resources().get("GPU", 0) >= 1)
    return int(device == "cuda")


def _bytes_of_image(readers: Mapping[str, Reader], size: int) -> int:
    found = features_of(readers, np.zeros((1, 3, size, size), np.uint8), "cpu")
    return sum(each.nbytes for features in found.values() for each in features)


class ComputeFeatures:
    """Actor: holds the networks. It is at two units: one is decoded while the other is computed."""

    def __init__(self, task: FeatureTask, attempts: ActorHandle | None) -> None:
        self.task, self.attempts = task, attempts
        self.lock = threading.Lock()
        self.device = "cuda" if task.num_gpus else "cpu"
        self.refusal: InputError | None = None
        try:
            self._open()
        except InputError as error:  # told by the first unit: Ray would show its own frames
            self.refusal = error

    def _open(self) -> None:
        task = self.task
        if task.num_gpus and not torch.cuda.is_available():
            raise InputError(
                f"device: torch {torch.__version__} on node {platform.node()} finds no CUDA "
                "device, although Ray counts GPUs there; give --device cpu"
            )
        torch.set_float32_matmul_precision("highest")
        if not task.num_gpus:
            torch.set_num_threads(task.num_cpus)
        networks, self.readers = ray.get(task.networks)
        for network in networks:
            network.to(self.device)
        self.tables = [open_table(*table) for table in task.tables]

    def __call__(self, batch: pa.Table) -> pa.Table:
        units = (FeatureUnit(**json.loads(text)) for text in batch.column("unit").to_pylist())
        return outcome_table(tried_in_pool(unit, self.compute, self.attempts) for unit in units)

    def compute(self, unit: FeatureUnit) -> Outcome:
        """Features of a unit as a file of safetensors, each (L, n, ...)."""
        if self.refusal is not None:
            return Outcome.of_error(unit.index, unit.name, self.refusal)
        damaged: dict[int, str] = {}
        made: dict[str, list[np.ndarray]] = {name: [] for name in self.readers}
        try:
            for batch in read_pixels(
                self.tables[unit.table],
                np.array(unit.rows),
                central(self.task.crop_fraction),
                self.task.image_size,
                batch_size=self.task.batch_size,
                num_threads=self.task.num_cpus,
                damaged=damaged,
            ):
                with self.lock:
                    computed = features_of(self.readers, batch, self.device)
                for name, features in computed.items():
                    made[name].append(np.stack(features))
        except torch.AcceleratorError:
            # After a fault of the device nothing works in this process; Ray starts another one.
            os._exit(1)
        except Exception as error:
            return Outcome.of_error(unit.index, unit.name, error)
        whole = {name: np.concatenate(each, axis=1) for name, each in made.items()}
        facts: dict[str, Any] = {"damaged": sorted(damaged.items())}
        return Outcome(unit=unit.index, facts=facts, made=safetensors.numpy.save(whole))


def compute_alone(unit: FeatureUnit, task: FeatureTask) -> Outcome:
    """A unit in a process of its own."""
    return ComputeFeatures(task, None).compute(unit)


def open_table(uri: str, fingerprint: str) -> ImageTable:
    """Raises InputError where it is not the table that the driver saw."""
    table = ImageTable.open(uri)
    if table.fingerprint != fingerprint:
        raise InputError(
            f"{uri}: fingerprint {table.fingerprint!r} != {fingerprint!r}; the table was replaced "
            "while its features were being computed"
        )
    return table
