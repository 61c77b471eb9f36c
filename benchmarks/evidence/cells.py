"""The grid of the evidence: which settings are trained, in the order of protocol.md."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

BATCH = 128
PATCHES = 64
SEEDS = (0, 1, 2)
TUNED_BATCH, TUNED_EPOCHS = 64, 40
# Token tables hold the views between two of these, so that V views are the tables below V.
VIEW_EDGES = (0, 1, 4, 12, 13, 40, 120, 256)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run, and the probe of its features."""

    data: str = "emoji"
    images: int = 0
    """Pretraining images; 0: all of them."""
    objective: str = "beit"
    tokenizer: str = "dvae"
    """Empty for mae, which predicts pixels."""
    views: int = 4
    """Stored views of an image; mae draws a new one each epoch."""
    mask: str = "blockwise"
    masked: int = 26
    """Patches hidden, of 64."""
    steps: int = 1000
    seed: int = 0
    form: str = "exact"
    """Of the pixels: `exact` ones are rendered at each step, others are stored views."""
    precision: str = "bf16"
    """Of the products in a training step."""
    tuned: int = 0
    """Epochs of fine-tuning, whose test is what is measured; 0: features are probed."""
    start: str = "pretrained"
    """What fine-tuning begins with; `random`: an untrained network of the same sizes."""

    @property
    def pretraining(self) -> "Cell":
        """The cell whose network is fine-tuned."""
        return dataclasses.replace(self, tuned=0, start="pretrained")

    @property
    def name(self) -> str:
        """What the cell is called in results, directories and MLflow."""
        tokens = f"{self.tokenizer}-v{self.views}" if self.tokenizer else "pixels"
        data = self.data + (str(self.images) if self.images else "")
        form = "" if self.form == "exact" else f"-{self.form}"
        tuned = f"-tuned{self.tuned}-{self.start}" if self.tuned else ""
        precision = "" if self.precision == "bf16" else f"-{self.precision}"
        return (
            f"{data}-{self.objective}-{tokens}{form}-{self.mask}{self.masked}-{self.steps}"
            f"{precision}{tuned}-s{self.seed}"
        )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Settings that are compared, each over all seeds; the first is the reference."""

    name: str
    title: str
    axis: tuple[str, ...]
    """Fields in which its settings differ: the columns of its table."""
    settings: tuple[Cell, ...]

    def cells(self) -> Iterator[Cell]:
        """Every setting with every seed, all settings of a seed before the next seed."""
        for seed in SEEDS:
            for setting in self.settings:
                yield dataclasses.replace(setting, seed=seed)


def of_baselines(data: str, seed: int) -> Cell:
    """The cell that is probed beside random initialisation and raw pixels, for all of its data."""
    return Cell(data=data, seed=seed)


MAE = Cell(objective="mae", tokenizer="", views=0, mask="random", masked=48)


def experiments() -> list[Experiment]:
    """All of them, in the order in which they are run."""
    beit = Cell()

    def of_views(name: str, title: str, counts: tuple[int, ...], setting: Cell) -> Experiment:
        settings = tuple(dataclasses.replace(setting, views=count) for count in counts)
        return Experiment(name=name, title=title, axis=("views",), settings=settings)

    targets = (
        beit,
        *(
            dataclasses.replace(beit, tokenizer=kind)
            for kind in ("kmeans", "projection", "vqkd-efficientnet", "vqkd-own")
        ),
        MAE,
    )
    random75 = dataclasses.replace(beit, mask="random", masked=48)
    float32 = dataclasses.replace(beit, precision="float32")
    return [
        of_views("views", "Stored views, 1,000 steps (E = 40)", (40, 4, 1, 13), beit),
        of_views(
            "views-long",
            "Stored views, 3,000 steps (E = 120)",
            (120, 12, 1, 4, 40),
            dataclasses.replace(beit, steps=3000),
        ),
        of_views(
            "views-few-images",
            "Stored views, 512 images, 1,000 steps (E = 250)",
            (256, 12, 1),
            dataclasses.replace(beit, images=512),
        ),
        Experiment(
            name="noise",
            title="Stored pixels with and without the noise of JPEG (float32)",
            axis=("form",),
            settings=tuple(
                dataclasses.replace(float32, form=f) for f in ("exact", "jpeg95", "jpeg90")
            ),
        ),
        Experiment(
            name="precision",
            title="Products of a training step in bf16 and in float32",
            axis=("precision",),
            settings=tuple(dataclasses.replace(setting, views=1) for setting in (beit, float32)),
        ),
        of_views("views-random-75", "Stored views, random masks of 75 %", (40, 4, 1), random75),
        of_views(
            "views-fashion",
            "Stored views, Fashion-MNIST (E = 31)",
            (40, 4, 1),
            dataclasses.replace(beit, data="fashion"),
        ),
        Experiment(
            name="targets",
            title="What is predicted",
            axis=("objective", "tokenizer"),
            settings=targets,
        ),
        Experiment(
            name="finetune",
            title="What is predicted, then fine-tuned",
            axis=("start", "objective", "tokenizer"),
            settings=tuple(
                dataclasses.replace(setting, tuned=TUNED_EPOCHS, start=start)
                for start, settings in (("random", (beit, MAE)), ("pretrained", targets))
                for setting in settings
            ),
        ),
        Experiment(
            name="masks",
            title="How much is hidden, and how",
            axis=("mask", "masked"),
            settings=(
                beit,
                *(
                    dataclasses.replace(beit, mask=mask, masked=masked)
                    for mask in ("blockwise", "random")
                    for masked in (16, 26, 38, 48)
                    if (mask, masked) != (beit.mask, beit.masked)
                ),
            ),
        ),
        Experiment(
            name="length",
            title="Length of training",
            axis=("objective", "steps"),
            settings=tuple(
                dataclasses.replace(setting, steps=steps)
                for steps in (1000, 250, 500, 2000, 4000)
                for setting in (beit, dataclasses.replace(beit, objective="beitv2"), MAE)
            ),
        ),
        of_views(
            "views-check",
            "The rule, checked: Fashion-MNIST, 2,000 steps (E = 63)",
            (120, 4, 1),
            dataclasses.replace(beit, data="fashion", steps=2000),
        ),
    ]
