"""Before and after a pretraining run: what it is refused for, its plan, and what it has to say."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from pipelines import storage, view_evidence
from pipelines.config.pretrain import PretrainConfig
from pipelines.errors import InputError
from pipelines.reading.encoded_rows import TrainingTables
from pipelines.steps import say_step
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_table import TokenTable
from pipelines.tables.view_table import ViewTable
from pipelines.tracking import Dataset
from pipelines.training.data import make_order, open_tables
from pipelines.training.fixed_images import are_held_out, held_out_tables
from pipelines.training.objective import build_objective, flops_per_image, warm_start
from pipelines.training.probing import probe_images
from pipelines.training.weights_run import (
    TrainPlan,
    TrainResult,
    check_workers,
    schedule_lengths,
)

FLOOR_ROWS = 4096  # rows of the token table that the unigram floor is estimated from
FLOOR_SLICES = 16


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens that a run predicts."""

    size: int
    unigram_accuracy: float
    """Masked-token accuracy of always guessing the most frequent token."""
    unigram_entropy: float
    """Loss of a model that knows the tokens' frequencies and nothing else, in nats."""


@dataclass(frozen=True, kw_only=True)
class PretrainPlan(TrainPlan):
    """The plan of a pretraining."""

    vocabulary: Vocabulary | None
    """None without token tables."""

    @property
    def figures(self) -> dict[str, float]:
        figures = super().figures
        if self.vocabulary is not None:
            figures["unigram_accuracy"] = self.vocabulary.unigram_accuracy
            figures["unigram_entropy"] = self.vocabulary.unigram_entropy
        return figures


def with_absolute_uris(config: PretrainConfig) -> PretrainConfig:
    """The same, for workers that may have another working directory than this process."""

    def absolute(uri: str) -> str:
        return storage.absolute(uri) if uri else uri

    return dataclasses.replace(
        config,
        images=absolute(config.images),
        tokens=[absolute(uri) for uri in config.tokens],
        views=[absolute(uri) for uri in config.views],
        output=absolute(config.output),
        tokenizer=absolute(config.tokenizer),
        init=absolute(config.init),
        probe=dataclasses.replace(
            config.probe,
            images=absolute(config.probe.images),
            tokens=[absolute(uri) for uri in config.probe.tokens],
        ),
    )


def plan_run(config: PretrainConfig) -> tuple[TrainingTables, PretrainPlan]:
    """Opens the inputs and works the run out; writes nothing.

    Raises:
        InputError: a value, table or fingerprint does not fit; names it.
    """
    tables = open_tables(config)
    plan = make_plan(config, tables)
    check_workers(config)
    check_tokenizer(config, tables)
    check_probe(config, tables)
    if config.objective.kind == "mae" and config.model.layer_scale_init:
        say_step(
            f"model.layer_scale_init = {config.model.layer_scale_init}: MAE has no layer scale, so "
            "beit export will write this encoder without its decoder; null is MAE's own"
        )
    epochs, views = plan.total_steps / plan.steps_per_epoch, len(tables.views)
    if tables.tokens and view_evidence.is_uncertain(epochs, views):
        say_step(
            f"views: {views} for {epochs:.3g} epochs, {view_evidence.known_of(epochs, views)} "
            f"(docs/evidence.md). More: beit tokenize --first_view {tables.views.max() + 1}, then "
            "name all tables in --tokens"
            + (", and as many stored views of each in --views" if tables.stored else "")
        )
    return tables, plan


def make_plan(config: PretrainConfig, data: TrainingTables) -> PretrainPlan:
    """Everything that follows from configuration and tables.

    Raises:
        InputError: warm-up as long as the run, a batch larger than the table, or weights to begin
            with that do not fit.
    """
    order = make_order(config, data.row_group_sizes)
    total, warmup = schedule_lengths(config.optim, order.steps_per_epoch)
    fingerprints = {**data.fingerprints(), "order": storage.fingerprint(order.to_dict())}
    if config.init:
        with torch.device("meta"):
            network = build_objective(config, data.vocab_size).network
        fingerprints["init"] = warm_start(config, network)
    return PretrainPlan(
        total_steps=total,
        warmup_steps=warmup,
        steps_per_epoch=order.steps_per_epoch,
        vocabulary=vocabulary_of(data),
        flops_per_image=flops_per_image(config, data.vocab_size),
        fingerprints=fingerprints,
    )


def vocabulary_of(data: TrainingTables) -> Vocabulary | None:
    """What the token tables hold; None without any."""
    if data.vocab_size is None:
        return None
    accuracy, entropy = unigram_floor(data)
    return Vocabulary(size=data.vocab_size, unigram_accuracy=accuracy, unigram_entropy=entropy)


def unigram_floor(data: TrainingTables) -> tuple[float, float]:
    """Largest frequency and entropy (nats) of the tokens, from slices spread over the table."""
    table, counts = data.tokens[0], np.zeros(65536, np.int64)
    slice_rows = max(1, min(FLOOR_ROWS, table.num_rows) // FLOOR_SLICES)
    for start in np.linspace(0, table.num_rows - slice_rows, FLOOR_SLICES).astype(int).tolist():
        _, token_ids = table.read_rows(start, start + slice_rows)
        counts += np.bincount(token_ids.ravel(), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return float(share.max()), float(-(share * np.log(share)).sum())


def check_tokenizer(config: PretrainConfig, data: TrainingTables) -> None:
    """Pictures must be drawn by the tokenizer of the tokens.

    Raises:
        InputError: it is another one, or none, or there are no tokens.
    """
    if not config.tokenizer:
        return
    if not data.tokens:
        raise InputError(
            f"tokenizer = {config.tokenizer!r}: this run has no token tables whose tokens it "
            "could show; leave it empty"
        )
    manifest = tokenizer_store.read_manifest(config.tokenizer)
    found = (
        manifest["fingerprint"]
        if manifest is not None
        else tokenizer_store.load(config.tokenizer).fingerprint()
    )
    wanted = data.fingerprints()["tokenizer"]
    if found != wanted:
        raise InputError(
            f"tokenizer = {config.tokenizer!r}: its fingerprint is {found}, the token tables were "
            f"made by {wanted}; name that one, or leave it empty"
        )


def check_probe(config: PretrainConfig, data: TrainingTables) -> None:
    """The probe must not fail days later.

    Raises:
        InputError: no such table or block, no labels, or too few groups to hold some out.
    """
    if max(config.probe.layers, default=1) > config.model.depth:
        raise InputError(
            f"probe.layers = {config.probe.layers}: the network has {config.model.depth} blocks"
        )
    if config.probe.images and config.probe.every_steps:
        probe_images(config)
    if are_held_out(config):
        held_out_tables(config, data)


def input_datasets(config: PretrainConfig, data: TrainingTables) -> list[Dataset]:
    """What the run reads, for MLflow."""
    tables: list[tuple[str, ImageTable | TokenTable | ViewTable]]
    tables = [("image_table", data.images)] if config.images else []
    tables += [("token_table", table) for table in data.tokens]
    tables += [("view_table", table) for table in data.stored]
    inputs = [Dataset.of_table(name, table, "training") for name, table in tables]
    if data.tokens:
        digest = str(data.fingerprints()["tokenizer"])
        inputs.append(Dataset(name="tokenizer", uri=config.tokenizer, digest=digest))
    return inputs


@dataclass(frozen=True, kw_only=True)
class PretrainResult(TrainResult):
    """What a finished pretraining has to say; figures are those of the last logging period."""

    @property
    def unigram_accuracy(self) -> float | None:
        """The floor; None, as the next, where nothing predicts tokens."""
        floor: float | None = self.report.get("unigram_accuracy")
        return floor

    @property
    def mim_accuracy(self) -> float | None:
        """Masked-token accuracy."""
        return None if self.unigram_accuracy is None else self.figure("mim_accuracy")

    @property
    def data_wait_share(self) -> float:
        """Share of the steps' time that went into waiting for data."""
        return self.figure("data_wait_share")

    @property
    def mfu(self) -> float | None:
        """None where the peak of the device is not known."""
        mfu: float | None = self.report["last_period"].get("mfu")
        return mfu

    def summary(self) -> str:
        accuracy = ""
        if self.mim_accuracy is not None:
            floor = f"(floor {self.unigram_accuracy:.3f})"
            accuracy = f"masked-token accuracy {self.mim_accuracy:.3f} {floor}, "
        mfu = "" if self.mfu is None else f"; MFU {self.mfu:.1%}"
        return "pretrain: " + self.told(
            f"{accuracy}{self.figure('images_per_second'):.0f} images/s, "
            f"{self.data_wait_share:.0%} data wait{mfu}"
        )
