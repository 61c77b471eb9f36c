"""Before and after a pretraining run: what it is refused for, its plan, and what it has to say."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines import storage
from pipelines.config.finetune import FinetuneConfig
from pipelines.config.pretrain import OptimConfig, PretrainConfig
from pipelines.errors import InputError
from pipelines.reading.ingest import TrainingTables
from pipelines.tables import tokenizer_store
from pipelines.tracking import Dataset
from pipelines.training.data import largest_divisor, make_order, open_tables
from pipelines.training.objective import build_objective, flops_per_image, warm_start
from pipelines.training.probing import probe_rows
from pipelines.training.run_dir import RunDir

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
class PretrainPlan:
    """What the driver works out once for all workers and restarts."""

    total_steps: int
    warmup_steps: int
    steps_per_epoch: int
    vocabulary: Vocabulary | None
    """None without token tables."""
    flops_per_image: float
    fingerprints: Mapping[str, Any]

    @property
    def figures(self) -> dict[str, float]:
        """What report.json repeats."""
        figures = {"flops_per_image": self.flops_per_image}
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
        output=absolute(config.output),
        tokenizer=absolute(config.tokenizer),
        init=absolute(config.init),
        probe=dataclasses.replace(config.probe, images=absolute(config.probe.images)),
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
    check_probe(config)
    return tables, plan


def make_plan(config: PretrainConfig, data: TrainingTables) -> PretrainPlan:
    """Everything that follows from configuration and tables.

    Raises:
        InputError: warm-up as long as the run, a batch larger than the table, or weights to begin
            with that do not fit.
    """
    order = make_order(config, data)
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


def schedule_lengths(optim: OptimConfig, steps_per_epoch: int) -> tuple[int, int]:
    """Steps of the whole run, and of its warm-up.

    Raises:
        InputError: the warm-up is as long as the run.
    """
    total = optim.total_steps(steps_per_epoch)
    warmup = optim.total_warmup_steps(steps_per_epoch)
    if warmup >= total:
        raise InputError(
            f"optim.warmup_steps / warmup_epochs = {warmup} steps, but the run has {total}: "
            "shorten the warm-up (--optim.warmup_steps) or lengthen the run"
        )
    return total, warmup


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


def check_workers(config: PretrainConfig | FinetuneConfig) -> None:
    """A fixed number of workers must divide the canonical shards.

    Raises:
        InputError: it does not.
    """
    low, high = config.scaling.worker_range
    if low == high > 0 and config.data.num_shards % high:
        raise InputError(
            f"scaling.num_workers = {high} does not divide data.num_shards = "
            f"{config.data.num_shards}: choose "
            f"{largest_divisor(config.data.num_shards, high)} workers, or start a new "
            "run with another data.num_shards"
        )


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


def check_probe(config: PretrainConfig) -> None:
    """The probe must not fail days later.

    Raises:
        InputError: no such table or block, no labels, or too few groups to hold some out.
    """
    if not config.probe.images:
        return
    if config.probe.layer is not None and config.probe.layer > config.model.depth:
        raise InputError(
            f"probe.layer = {config.probe.layer}: the network has {config.model.depth} blocks"
        )
    _, rows, _, held_out = probe_rows(config.probe.images, config.probe.max_images)
    if not len(rows) or held_out.all() or not held_out.any():
        raise InputError(
            f"probe.images = {config.probe.images!r}: {len(rows)} labelled images, "
            f"{int(held_out.sum())} of them held out; give a labelled table with more groups, or "
            "leave it empty"
        )


def input_datasets(config: PretrainConfig, data: TrainingTables) -> list[Dataset]:
    """What the run reads, for MLflow."""
    prints = data.fingerprints()
    inputs = [
        Dataset(
            name="image_table",
            uri=data.images.uri,
            digest=data.images.fingerprint,
            context="training",
            rows=data.images.num_rows,
        )
    ]
    inputs += [
        Dataset(
            name="token_table",
            uri=table.uri,
            digest=table.fingerprint,
            context="training",
            rows=table.num_rows,
        )
        for table in data.tokens
    ]
    if data.tokens:
        digest = str(prints["tokenizer"])
        inputs.append(Dataset(name="tokenizer", uri=config.tokenizer, digest=digest))
    return inputs


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """What a finished run has to say."""

    run_uri: str
    weights_uri: str
    mlflow_run_id: str
    steps: int
    resumed_from: int
    """Steps that were done before this call; equal to `steps` if there was nothing left to do."""
    loss: float
    """Of the last logging period, as all figures here."""
    mim_accuracy: float | None
    """None, as the next, where nothing predicts tokens."""
    unigram_accuracy: float | None
    images_per_second: float
    data_wait_share: float
    mfu: float | None
    """None where the peak of the device is not known."""
    report: Mapping[str, Any]
    """report.json."""

    def summary(self) -> str:
        """One line for a person."""
        books = self.report["goodput"]
        done = "were done already" if self.resumed_from == self.steps else "done"
        accuracy = ""
        if self.mim_accuracy is not None and self.unigram_accuracy is not None:
            accuracy = (
                f"masked-token accuracy {self.mim_accuracy:.3f} "
                f"(floor {self.unigram_accuracy:.3f}), "
            )
        mfu = "" if self.mfu is None else f"MFU {self.mfu:.1%}; "
        return (
            f"pretrain: {self.steps} steps {done}; loss {self.loss:.3f}, {accuracy}"
            f"{self.images_per_second:.0f} images/s, {self.data_wait_share:.0%} data wait; "
            f"{mfu}look first at {books['bottleneck']}; run: {self.run_uri}"
        )


def result_of(
    run: RunDir, plan: PretrainPlan, report: Mapping[str, Any], *, resumed_from: int
) -> PretrainResult:
    """The result of a finished run, from its report."""
    period = report["last_period"]

    def figure(name: str) -> float:
        value = period.get(name)
        return math.nan if value is None else float(value)

    return PretrainResult(
        run_uri=run.uri,
        weights_uri=run.weights,
        mlflow_run_id=run.record()["mlflow_run_id"],
        steps=report["steps"],
        resumed_from=resumed_from,
        loss=figure("loss"),
        mim_accuracy=figure("mim_accuracy") if plan.vocabulary else None,
        unigram_accuracy=plan.vocabulary.unigram_accuracy if plan.vocabulary else None,
        images_per_second=figure("images_per_second"),
        data_wait_share=figure("data_wait_share"),
        mfu=period.get("mfu"),
        report=report,
    )
