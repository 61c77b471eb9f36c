"""A few images with masks that never change: their loss, and pictures of what is predicted.

The same in every run on these tables, whatever its seed, so that losses and pictures compare.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from beit.objectives import Objective
from pipelines import pictures
from pipelines.config.pretrain import PretrainConfig, run_uri
from pipelines.evaluation.features import exact_products
from pipelines.painting import Painter, open_painter
from pipelines.reading.decoding import RenderSpec, render_rows
from pipelines.reading.encoded_rows import EncodedRows, TrainingTables, open_training_tables
from pipelines.tracking.datasets import short_name
from pipelines.training.data import WorkerData
from pipelines.training.distributed import World
from pipelines.training.log import TrainLog

FIXED = 64
PICTURES = 8
SEED = 0


class FixedImages:
    """Images spread evenly over a table, in their first view, with the masks of `SEED`.

    Of `probe.images`, where `probe.tokens` has their tokens or none are needed; else some of those
    that are trained on. They are read when they are first wanted.
    """

    def __init__(self, config: PretrainConfig, data: WorkerData, world: World) -> None:
        self.config, self.data, self.world = config, data, world

    @property
    def held_out(self) -> bool:
        """Whether they are not trained on, as far as the configuration says."""
        return are_held_out(self.config)

    @functools.cached_property
    def batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """uint8 (B, 3, H, W), bool (B, N), and token ids int64 (B, N) where there are any."""
        config = self.config
        tables = held_out_tables(config, self.data.tables) if self.held_out else self.data.tables
        count = min(FIXED, tables.num_rows)
        rows = np.linspace(0, tables.num_rows - 1, count).round().astype(int).tolist()
        read = EncodedRows.join([tables.read(row, row + 1, epoch=0) for row in rows])
        spec = RenderSpec(
            policy=tables.policy,
            image_size=config.model.image_size,
            masking=config.masking,
            grid_size=config.model.grid_size,
            seed=SEED,
            form=tables.form,
        )
        rendered = render_rows(*read.to_render, 0, spec)
        ids = None if read.token_ids is None else torch.from_numpy(read.token_ids.astype(np.int64))
        return torch.from_numpy(rendered.pixels), torch.from_numpy(rendered.masks), ids

    @functools.cached_property
    def _painter(self) -> Painter | None:
        return open_painter(self.config.tokenizer) if self.config.tokenizer else None

    @torch.no_grad()
    def loss(self, objective: Objective) -> dict[str, float]:
        """What the objective says of them, by metric: in evaluation mode, in float32."""
        pixels, mask, ids = self.batch
        device = self.world.device
        with exact_products():
            outcome = objective(
                self.data.normalise(pixels.to(device)),
                mask.to(device),
                None if ids is None else ids[mask].to(device),
                num_masked=int(mask.sum()),
                noise=None,
            )
        values = (outcome.sums / mask.sum().clamp(min=1)).tolist()
        prefix = "held_out" if self.held_out else "fixed"
        return {
            f"{prefix}/{name}": value for name, value in zip(objective.metrics, values, strict=True)
        }

    def log_pictures(self, objective: Objective, log: TrainLog, step: int) -> None:
        """What is predicted of some of them, beside what is true, to MLflow.

        Tokens are shown by the decoder of the tokenizer or the patches nearest to its codes;
        without either, as maps of colours. An objective that predicts no tokens paints pixels.
        """
        every = max(1, len(self.batch[0]) // PICTURES)
        pixels, mask, ids = (None if x is None else x[::every][:PICTURES] for x in self.batch)
        assert pixels is not None
        assert mask is not None
        device, patch_size = self.world.device, self.config.model.patch_size
        objective.eval()
        with torch.no_grad():
            guesses = objective.predict(self.data.normalise(pixels.to(device)), mask.to(device))
        objective.train()
        if not log.active:
            return
        where = f" · {short_name(run_uri(self.config))}, step {step:,}"
        if ids is None:
            painted = self.data.denormalise(guesses).cpu()
            title = f"Pixels: true and painted{where}"
            sheet = pictures.painted_grid(pixels, mask, painted, patch_size=patch_size, title=title)
            log.picture("painted", sheet, step)
            return
        guesses = guesses.cpu()
        predicted = torch.where(mask, guesses, ids)
        hits = ((guesses == ids) & mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        painter = self._painter
        if painter is None:
            title = f"What the encoder sees{where}"
            sheet = pictures.masked_input_grid(pixels, mask, patch_size=patch_size, title=title)
            log.picture("masked_input", sheet, step)
            for name, token_ids in (("true", ids), ("predicted", predicted)):
                sheet = pictures.token_map(
                    token_ids,
                    grid_size=self.config.model.grid_size,
                    images=pixels,
                    title=f"Tokens, {name}{where}",
                )
                log.picture(f"tokens_{name}", sheet, step)
            return
        log.picture(
            "reconstruction",
            pictures.reconstruction_grid(
                pixels,
                mask,
                painter.paint(ids),
                painter.paint(predicted),
                patch_size=patch_size,
                accuracy=hits.tolist(),
                title=f"Visual tokens: true and predicted{where}",
            ),
            step,
        )


def are_held_out(config: PretrainConfig) -> bool:
    """Whether the fixed images are those of `probe.images`."""
    probe = config.probe
    return bool(probe.tokens or (probe.images and config.objective.kind == "mae"))


def held_out_tables(config: PretrainConfig, trained: TrainingTables) -> TrainingTables:
    """`probe.images` with `probe.tokens`, which must be of the tokenizer that is trained with.

    Raises:
        InputError: a table is missing or does not fit; names it.
    """
    prints = trained.fingerprints()
    return open_training_tables(
        config.probe.images,
        config.probe.tokens,
        policy=None if config.probe.tokens else trained.policy,
        grid_size=config.model.grid_size if config.probe.tokens else None,
        vocab_size=trained.vocab_size,
        tokenizer_fingerprint=str(prints["tokenizer"]) if "tokenizer" in prints else None,
    )
