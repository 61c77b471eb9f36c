"""Features of an evaluation's images: computed in this process or by actors, the same either way.

To the bit on one kind of device with as many threads: batches are the same, whoever computes them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from beit.convert import Network
from pipelines.config.evaluate import EvaluateConfig
from pipelines.errors import InputError
from pipelines.evaluation.features import Piece, Reader, kept_features, read_features
from pipelines.evaluation.labelled_images import LabelledImages

Some = TypeVar("Some", Piece, np.ndarray)


@dataclass(frozen=True, kw_only=True, eq=False)
class Extraction:
    """Labelled images, and how features of them are computed."""

    config: EvaluateConfig
    data: LabelledImages
    device: str
    """Of this process."""
    num_threads: int
    """That decode in this process."""
    damaged: dict[int, str] = field(default_factory=dict)
    """Images that did not decode, by position, with the reason; their features are 0."""

    def read(
        self, readers: Mapping[str, Reader], networks: Sequence[Network], *, label: str
    ) -> dict[str, np.ndarray]:
        """What each reader, which looks through some of `networks`, makes of all images, see
        `kept_features`.

        Raises:
            InputError: there is no room, a part is damaged, or more than `max_rejected` images are.
            StageFailed: actors fail again and again.
        """
        config, size = self.config, networks[0].image_size[0]
        if config.scaling.num_workers:
            from pipelines.evaluation import pool  # imports Ray

            pieces = pool.pieces(config, self.data, readers, networks, self.damaged)
            found = kept_features(self._bounded(pieces), len(self.data), label=label)
        else:
            for network in networks:
                network.to(self.device)
            batches = self.data.pixels(
                size,
                crop_fraction=config.crop_fraction,
                batch_size=config.batch_size,
                num_threads=self.num_threads,
                damaged=self.damaged,
            )
            found = read_features(
                readers, self._bounded(batches), len(self.data), device=self.device, label=label
            )
        for features in found.values():
            features[:, sorted(self.damaged)] = 0
        return found

    def _bounded(self, some: Iterable[Some]) -> Iterator[Some]:
        most = self.config.max_rejected
        for each in some:
            if len(self.damaged) > most:
                first = self.damaged[min(self.damaged)]
                raise InputError(
                    f"max_rejected = {most}: {len(self.damaged)} images do not decode, such as "
                    f"{first}; or raise --max_rejected to leave them out"
                )
            yield each


def own_device(config: EvaluateConfig) -> str:
    """Where this process computes: on `device`; of `auto` on a CUDA device, if there is one.

    With actors `device` is theirs: this process, perhaps on a head node, takes what it has.

    Raises:
        InputError: there is no such device, or actors do not compute on it.
    """
    device, workers = config.device, config.scaling.num_workers
    if workers and device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"device = {device!r}: with scaling.num_workers = {workers} give auto, cpu or cuda; "
            "Ray gives each actor a GPU of its own"
        )
    if device == "auto" or (workers and device == "cuda"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"device = {device!r}: torch {torch.__version__} cannot compute on it here ({reason}); "
            "give --device auto or cpu"
        ) from error
    return device
