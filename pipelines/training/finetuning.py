"""Before and after a fine-tuning run: what it begins with, what it is refused for, its plan."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from beit.classifier import BeitClassifier, classifier_from_pretraining
from pipelines import storage
from pipelines.config.finetune import FinetuneConfig
from pipelines.errors import InputError
from pipelines.reading.encoded_rows import TrainingTables
from pipelines.tables.weights_store import Stored, open_network
from pipelines.tracking import Dataset
from pipelines.training.data import make_order
from pipelines.training.labelled import open_labelled
from pipelines.training.testing import TestImages, TestScore, open_test
from pipelines.training.weights_run import (
    TrainPlan,
    TrainResult,
    check_workers,
    schedule_lengths,
)


@dataclass(frozen=True, kw_only=True)
class FinetunePlan(TrainPlan):
    """The plan of a fine-tuning."""

    test_every_steps: int
    class_names: tuple[str, ...]
    """Of the training table: the head has one output for each."""
    trained: tuple[bool, ...]
    """Which of them have images."""
    why_fresh: str
    """Why the head begins anew; empty where that of the weights goes on."""
    image_size: int
    grid_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def keep_head(self) -> bool:
        """Whether the head of the weights goes on."""
        return not self.why_fresh

    @property
    def figures(self) -> dict[str, float]:
        return {**super().figures, "num_classes": len(self.class_names)}


def with_absolute_uris(config: FinetuneConfig) -> FinetuneConfig:
    """The same, for workers that may have another working directory than this process.

    Raises:
        InputError: a URI is missing.
    """
    for name in ("run", "images", "output"):
        if not getattr(config, name):
            raise InputError(f"{name} = '': give its directory or URI")
    return dataclasses.replace(
        config,
        run=storage.absolute(config.run),
        images=storage.absolute(config.images),
        test=storage.absolute(config.test) if config.test else "",
        output=storage.absolute(config.output),
    )


def plan_run(config: FinetuneConfig) -> tuple[TrainingTables, Stored, FinetunePlan]:
    """Opens the inputs and works the run out; writes nothing.

    Raises:
        InputError: a value, table, fingerprint or the weights do not fit; names it.
    """
    source = open_source(config)
    tables = open_labelled(config)
    plan = make_plan(config, tables, source)
    check_workers(config)
    return tables, source, plan


def open_source(config: FinetuneConfig) -> Stored:
    """What the run begins with, its positions resized.

    Raises:
        InputError: there are no weights, or none that we know.
    """
    stored = open_network(
        config.run, image_size=config.model.image_size, num_heads=config.model.num_heads
    )
    height, width = stored.network.image_size
    if height != width:
        raise InputError(
            f"run = {config.run}: its images are {height} x {width} pixels, fine-tuning shows "
            "squares; give --model.image_size"
        )
    return stored


def make_plan(config: FinetuneConfig, tables: TrainingTables, source: Stored) -> FinetunePlan:
    """Everything that follows from configuration, tables and weights.

    Raises:
        InputError: warm-up as long as the run, a batch larger than the table, fewer than two
            classes, a test table of others, or pixels that nobody says how to normalise.
    """
    order = make_order(config, tables.row_group_sizes)
    total, warmup = schedule_lengths(config.optim, order.steps_per_epoch)
    class_names = tuple(tables.images.class_names)
    counts = np.bincount(tables.images.labels(), minlength=len(class_names))
    if (counts > 0).sum() < 2:
        raise InputError(
            f"images = {config.images}: its images are of {int((counts > 0).sum())} class; "
            "a classifier needs two"
        )
    trained = tuple(bool(count) for count in counts)
    fingerprints = {**tables.fingerprints(), "order": storage.fingerprint(order.to_dict())}
    fingerprints["weights"] = source.fingerprint
    if config.test:
        test = open_test(config.test, class_names, trained)
        fingerprints["test"] = test.table.fingerprint
    mean, std = pixel_statistics(config, source)
    why_fresh = _why_fresh(config, source, class_names)
    network = built(config, source, num_classes=len(class_names), keep_head=not why_fresh)
    return FinetunePlan(
        total_steps=total,
        warmup_steps=warmup,
        steps_per_epoch=order.steps_per_epoch,
        test_every_steps=max(1, round(config.testing.every_epochs * order.steps_per_epoch)),
        class_names=class_names,
        trained=trained,
        why_fresh=why_fresh,
        image_size=network.image_size[0],
        grid_size=network.grid_size,
        mean=mean,
        std=std,
        flops_per_image=network.flops_per_image(),
        fingerprints=fingerprints,
    )


def _why_fresh(config: FinetuneConfig, source: Stored, class_names: tuple[str, ...]) -> str:
    """Why the head of the weights, if they have one, cannot go on; empty where it can."""
    network, model = source.network, config.model
    if not isinstance(network, BeitClassifier) or not network.num_classes:
        return "the weights have none"
    if model.head == "fresh" or model.encoder == "random":
        return f"model.head = {model.head}, model.encoder = {model.encoder}"
    if network.pooling != model.pooling:
        return f"the weights' own was trained on pooling {network.pooling}, not {model.pooling}"
    if not source.class_names:
        return "the weights do not name their classes"
    if tuple(source.class_names) != class_names or network.num_classes != len(class_names):
        return "the weights' own is of other classes than the images"
    return ""


def pixel_statistics(
    config: FinetuneConfig, source: Stored
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels: those given, or those that the weights tell.

    Raises:
        InputError: neither.
    """
    mean = config.data.mean or source.extra.get("pixel_mean")
    std = config.data.std or source.extra.get("pixel_std")
    if mean is None or std is None:
        raise InputError(
            f"data.mean, data.std = null: {source.uri} does not say how pixels were normalised in "
            "its pretraining; give both (official files of BEiT on ImageNet-22k: 0.5 each; of "
            "BEiT v2 and MAE: [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225])"
        )
    return tuple(mean), tuple(std)


def built(
    config: FinetuneConfig, source: Stored, *, num_classes: int, keep_head: bool
) -> BeitClassifier:
    """The network to train, on the CPU: its encoder of `source`, the rest from the seed
    alone; all of it from the seed for `model.encoder random`."""
    network = classifier_from_pretraining(
        source.network,
        num_classes=num_classes,
        drop_path=config.model.drop_path,
        pooling=config.model.pooling,
        keep_head=keep_head,
        generator=torch.Generator().manual_seed(config.seed),
    )
    if config.model.encoder == "random":
        network.init_weights(torch.Generator().manual_seed(config.seed))
    network.activation_checkpointing = config.scaling.activation_checkpointing
    return network


def build_classifier(config: FinetuneConfig, plan: FinetunePlan) -> BeitClassifier:
    """The network that a run begins with, as each worker builds it.

    Raises:
        InputError: the weights are not those that the driver saw.
    """
    source = open_source(config)
    if source.fingerprint != plan.fingerprints["weights"]:
        raise InputError(
            f"run = {config.run}: its fingerprint is {source.fingerprint} here, the driver found "
            f"{plan.fingerprints['weights']}; do not change weights while they are used"
        )
    return built(config, source, num_classes=len(plan.class_names), keep_head=plan.keep_head)


def test_images(config: FinetuneConfig, plan: FinetunePlan) -> TestImages | None:
    """The test table; None without one."""
    return open_test(config.test, plan.class_names, plan.trained) if config.test else None


def input_datasets(
    config: FinetuneConfig, plan: FinetunePlan, tables: TrainingTables, source: Stored
) -> list[Dataset]:
    """What the run reads, for MLflow."""
    inputs = [
        Dataset(name="weights", uri=source.uri, digest=source.fingerprint),
        Dataset.of_table("image_table", tables.images, "training"),
    ]
    test = test_images(config, plan)
    if test is not None:
        inputs.append(Dataset.of_table("image_table", test.table, "evaluation"))
    return inputs


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(TrainResult):
    """What a finished fine-tuning has to say."""

    @property
    def test(self) -> TestScore | None:
        """Of the finished weights; None without a test table."""
        events = self.run.events("test")
        if not events:
            return None
        names = [field.name for field in dataclasses.fields(TestScore)]
        return TestScore(**{name: events[-1][name] for name in names})

    def summary(self) -> str:
        tested = f"{self.test.describe()}, " if self.test else ""
        return "finetune: " + self.told(f"{tested}{self.figure('images_per_second'):.0f} images/s")
