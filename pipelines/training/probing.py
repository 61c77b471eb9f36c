"""Probes of a model in training, by the protocol of `evaluate`, in a bounded share of the time.

All workers take part, since the model may be sharded. Nothing here touches the order of samples,
the weights, or any generator that training draws from.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit.objectives import Objective
from pipelines import pictures
from pipelines.config.pretrain import PretrainConfig, run_uri
from pipelines.errors import InputError
from pipelines.evaluation.features import block_reader, num_features, on_disk, read_features
from pipelines.evaluation.labelled_images import LabelledImages, read_labelled, unlabelled
from pipelines.evaluation.probes import (
    rankme,
    seconds_of_chosen_linear,
    seconds_of_knn,
    seconds_of_rankme,
)
from pipelines.evaluation.protocol import PROBES, candidate_layers, probe, score, splits_of
from pipelines.evaluation.result import Score
from pipelines.tables.image_table import ImageTable
from pipelines.tracking.datasets import short_name
from pipelines.training.data import WorkerData
from pipelines.training.distributed import World
from pipelines.training.fixed_images import FixedImages
from pipelines.training.log import TrainLog, tolerated

BATCH = 64


class Prober:
    """Probes of one start of a run: the same on all workers, who all call its methods.

    `first_step`: steps that were done before.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: WorkerData,
        world: World,
        fixed: FixedImages,
        *,
        first_step: int,
    ) -> None:
        self.first_step = first_step
        self.config, self.data, self.world, self.fixed = config, data, world, fixed
        self.began = monotonic()
        self.spent = 0.0
        self.cost: float | None = None  # of the last probe, in seconds
        self.fitting: float | None = None  # of pixels, fits and RankMe, reckoned once
        self.left_out = ""  # why the last that was due was
        self.images: LabelledImages | None = None
        self.pixels: np.ndarray | None = None

    def affordable(self, step: int) -> bool:
        """Whether one more keeps probes within their share of the time since the start."""
        why = ""
        share = self.config.probe.max_share
        if self.world.rank == 0 and share < 1:
            elapsed, cost = monotonic() - self.began, self.cost
            try:
                if cost is None:
                    cost = self._first_cost((step - self.first_step) / elapsed)
            except InputError as error:  # the other workers wait for the answer
                why = str(error)
            else:
                if self.spent + cost > share * elapsed:
                    digits = 1 if cost < 10 else 0
                    why = f"it would take about {cost:.{digits}f} s of {elapsed:.0f}"
                    why += "; see --probe.max_share"
        self.left_out = str(self.world.broadcast(why))
        return not self.left_out

    def told(self, log: TrainLog, step: int) -> bool:
        """Whether a probe of this step, or that it was left out, is among the events of the run."""
        found = False
        if log.active:
            with tolerated():
                events = [*log.run.events("probe"), *log.run.events("probe_left_out")]
                found = any(event["step"] == step for event in events)
        return bool(self.world.broadcast(found))

    def tell_left_out(self, log: TrainLog, step: int) -> None:
        """An event, at the end of a training of which no probe was made since its start."""
        if self.cost is None and self.left_out:
            log.event(
                "probe_left_out",
                step=step,
                message=f"no probe: {self.left_out}",
            )

    def _first_cost(self, steps_per_second: float) -> float:
        """Seconds that nobody has measured: features by the rate of the training, which goes
        through the network three times, everything else from pieces of it that are measured."""
        protocol, rows = self.config.probe, self._num_rows
        # MAE trains on a quarter of the patches of an image.
        passes = 1.0 if self.config.objective.kind == "mae" else 1 / 3
        rate = steps_per_second * self.config.data.global_batch_size / passes
        most = protocol.max_share * (monotonic() - self.began)
        cost = min(protocol.max_images or rows, rows) / rate if rate > 0 else math.inf
        if self.images is None and cost > most:
            return cost  # too much already: labels need not be read
        images = self._images()
        cost = len(images) / rate
        if cost < most and self.fitting is None:
            start = monotonic()
            self.fitting = self._seconds_of_pixels(images) + self._seconds_of_fits(images)
            self.spent += monotonic() - start
        return cost + (self.fitting or 0.0)

    def _seconds_of_pixels(self, images: LabelledImages) -> float:
        """Reading and decoding of a worker's share, reckoned from a batch."""
        share = -(-len(images) // self.world.size)
        some = np.arange(min(BATCH, share))
        start = monotonic()
        self._read(images, some)
        return (monotonic() - start) * share / len(some)

    def _seconds_of_fits(self, images: LabelledImages) -> float:
        """k-NN and linear probes of all folds, and RankMe."""
        protocol, model, device = self.config.probe, self.config.model, self.world.device
        count, classes = len(images), len(images.class_names)
        width = num_features(model.dim, protocol.pooling, model.grid_size)
        layers = len(candidate_layers(protocol, model.depth))
        tested, one_fold = -(-count // protocol.num_folds), 0.0
        if classes:
            known = count - tested
            sizes = {"num_layers": layers, "num_classes": classes}
            one_fold = seconds_of_knn(known, tested, width, **sizes, device=device)
            one_fold += seconds_of_chosen_linear(known, width, **sizes, device=device)
        return protocol.num_folds * one_fold + seconds_of_rankme(count, width, device=device)

    @functools.cached_property
    def _num_rows(self) -> int:
        """Of the table that is probed."""
        probed = self.config.probe.images
        return ImageTable.open(probed).num_rows if probed else self.data.tables.num_rows

    def run(self, objective: Objective, log: TrainLog, step: int) -> None:
        """A probe: its figures as an event. One without room is left out."""
        images, start = self._images(), monotonic()
        layers = candidate_layers(self.config.probe, self.config.model.depth)
        room = self._room(images, len(layers), log, step)
        if room is None:
            self.spent += monotonic() - start
            return
        objective.eval()
        figures: dict[str, float] = self.fixed.loss(objective)
        features = self._features(objective, images, layers, room)
        objective.train()
        scores = self.world.on_first(lambda: self._scores(features, images, layers)) or {}
        if log.active:
            figures["probe/rankme"] = rankme(features[-1], device=self.world.device)
            for kind, found in scores.items():
                name = f"probe/{kind}_accuracy"
                figures |= {
                    name: found.accuracy,
                    f"{name}_low": found.low,
                    f"{name}_high": found.high,
                }
        self.world.barrier()
        self.cost = monotonic() - start
        self.spent += self.cost
        log.event(
            "probe",
            step=step,
            figures=figures,
            images=len(images),
            seconds=self.cost,
            share_of_time=self.spent / (monotonic() - self.began),
            message=self._message(step, figures, scores, len(images)),
            **{f"{kind}_accuracy": found.accuracy for kind, found in scores.items()},
        )

    def log_curve(self, log: TrainLog, step: int) -> None:
        """The probes of the whole run, over all its starts, as a picture."""
        if not log.active:
            return
        told: list[dict[str, Any]] = []
        with tolerated():
            told = log.run.events("probe")
        where = f"{short_name(run_uri(self.config))}, step {step:,}"
        drawn = probe_curve(told, title=f"Probes over training · {where}")
        if drawn is not None:
            log.picture("probes", drawn, step)

    def _images(self) -> LabelledImages:
        if self.images is None:
            start = monotonic()
            self.images = probe_images(self.config)
            self.spent += monotonic() - start
        return self.images

    def _room(
        self, images: LabelledImages, num_layers: int, log: TrainLog, step: int
    ) -> np.ndarray | None:
        """Reads this worker's pixels, and takes the room (L, n, d) for their features.

        None, told as an event, where a worker has no room: all must know it before they wait for
        each other.

        Each worker takes neighbouring rows, so that none reads the whole table. All take as many:
        the last row fills up, and what it filled is cut off after gathering.
        """
        model, protocol, why = self.config.model, self.config.probe, ""
        share = -(-len(images) // self.world.size)
        mine = np.minimum(self.world.rank * share + np.arange(share), len(images) - 1)
        width = num_features(model.dim, protocol.pooling, model.grid_size)
        room: np.ndarray | None = None
        try:
            if self.pixels is None:
                self.pixels = self._read(images, mine)
            room = on_disk((num_layers, share, width), np.float32)
        except InputError as error:
            why = str(error)
        if self.world.largest(float(room is None)) == 0:
            return room
        why = why or "another worker lacks what this one has"
        log.event("probe_left_out", step=step, message=f"step {step}: no probe: {why}")
        return None

    def _features(
        self, objective: Objective, images: LabelledImages, layers: list[int], room: np.ndarray
    ) -> np.ndarray:
        """Features (L, n, d) of all images on worker 0; of nobody's use on the others."""
        assert self.pixels is not None
        share, data = len(self.pixels), self.config.data
        reader = block_reader(
            objective.network,
            layers=layers,
            pooling=self.config.probe.pooling,
            mean=data.mean,
            std=data.std,
        )
        batches = (self.pixels[at : at + BATCH] for at in range(0, share, BATCH))
        device = self.world.device
        into = {"own": room}
        own = read_features({"own": reader}, batches, share, device=device, into=into)["own"]
        gathered = [
            torch.cat(self.world.gather(torch.from_numpy(block).to(device)))[: len(images)].cpu()
            for block in own
        ]
        return torch.stack(gathered).numpy() if self.world.rank == 0 else own

    def _read(self, images: LabelledImages, mine: np.ndarray) -> np.ndarray:
        """Their pixels, kept in a file without a name: a table is read once a run."""
        size, done = self.config.model.image_size, 0
        pixels = on_disk((len(mine), 3, size, size), np.uint8)
        for batch in images.pixels(
            size,
            positions=mine,
            crop_fraction=self.config.probe.crop_fraction,
            batch_size=BATCH,
            num_threads=self.data.num_threads,
        ):
            pixels[done : done + len(batch)] = batch
            done += len(batch)
        return pixels

    def _scores(
        self, features: np.ndarray, images: LabelledImages, layers: list[int]
    ) -> dict[str, Score]:
        if not images.class_names:
            return {}
        protocol = self.config.probe
        found: dict[str, Score] = {}
        splits = splits_of(protocol, images.groups)
        for kind in PROBES:
            predicted = probe(
                kind, protocol, features, images.labels, splits, device=self.world.device
            )
            found[kind], _ = score(
                predicted, images.labels, images.groups, splits, layers=layers, seed=protocol.seed
            )
        return found

    def _message(
        self, step: int, figures: Mapping[str, float], scores: Mapping[str, Any], images: int
    ) -> str:
        said = [
            f"{kind} {100 * s.accuracy:.1f} % [{100 * s.low:.1f}, {100 * s.high:.1f}]"
            for kind, s in scores.items()
        ]
        said += [f"{name} {value:.3f}" for name, value in figures.items() if "accuracy" not in name]
        return f"step {step}: {', '.join(said)} on {images} images ({self.cost:.0f} s)"


def probe_images(config: PretrainConfig) -> LabelledImages:
    """The images to probe with.

    Raises:
        InputError: those that are named have no labels, or too few.
    """
    if config.probe.images:
        return read_labelled(config.probe.images, config.probe, field="probe.images")
    try:
        if ImageTable.open(config.images).class_names:
            return read_labelled(config.images, config.probe)
    except InputError:
        pass  # labels that do not do, of a table that was not named for them
    return unlabelled(config.images, config.probe)


def probe_curve(events: Sequence[Mapping[str, Any]], *, title: str) -> Image.Image | None:
    """Accuracies over steps with their intervals; None where there are fewer than two points.

    `events`: oldest first. Of a step that was done again the last one counts; one of a version
    that told no intervals is passed over.
    """
    series: dict[str, tuple[list[int], list[float]]] = {}
    bands: dict[str, tuple[list[float], list[float]]] = {}
    for kind in PROBES:
        name = f"probe/{kind}_accuracy"
        at = {e["step"]: e["figures"] for e in events if f"{name}_low" in e["figures"]}
        if len(at) < 2:
            continue
        steps = sorted(at)
        values = {end: [at[step][name + end] for step in steps] for end in ("", "_low", "_high")}
        series[kind] = steps, values[""]
        bands[kind] = values["_low"], values["_high"]
    if not series:
        return None
    return pictures.curve(
        series,
        title=title,
        y_label="accuracy",
        bands=bands,
        least_span=0.1,
        note=f"{events[-1]['images']} images; bands: 95 % over groups of images",
    )
