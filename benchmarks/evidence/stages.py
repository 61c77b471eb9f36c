"""The commands that make one cell: every one of them a stage that a user runs alike."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from benchmarks.evidence import data
from benchmarks.evidence.cells import TUNED_BATCH, VIEW_EDGES, Cell, of_baselines

HERE = Path(__file__).parent
POLICY = [
    "--policy.min_area=0.3", "--policy.brightness=0", "--policy.contrast=0",
    "--policy.saturation=0",
]  # fmt: skip
SIDE = {"emoji": 64, "fashion": 32}  # 8 x 8 patches of either


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What is trained on a device."""

    told: str
    recipe: str
    late_layer: int
    """Three quarters of its depth: what BEiT v2 aggregates after, and a teacher is read from."""
    decoder: tuple[int, int, int]
    """MAE's: width, blocks, heads."""


NETWORKS = {
    "cpu": Network(
        told="four blocks of width 128, 0.8 million parameters",
        recipe="pretrain.yaml", late_layer=3, decoder=(64, 1, 4),
    ),
    "cuda": Network(
        told="ViT-S, twelve blocks of width 384, 21 million parameters",
        recipe="pretrain-cuda.yaml", late_layer=9, decoder=(192, 4, 6),
    ),
}  # fmt: skip
EFFICIENTNET = "efficientnet-lite0"
TOKENIZERS = {
    "dvae": [f"--config={HERE / 'dvae.yaml'}"],
    "kmeans": ["--model.kind=kmeans", "--model.image_size=32", "--model.patch_size=4"],
    "projection": ["--model.kind=projection", "--model.image_size=32", "--model.patch_size=4"],
    # With the decay of vqkd-own, 0.99, its codes collapse before any starts again.
    "vqkd-efficientnet": [
        f"--config={HERE / 'vqkd.yaml'}",
        f"--teacher={EFFICIENTNET}",
        "--vqkd.decay=0.9",
    ],
    "vqkd-own": [f"--config={HERE / 'vqkd.yaml'}"],
}


def suffix(device: str) -> str:
    """Of what is named by device: nothing for CPUs."""
    return "" if device == "cpu" else f"-{device}"


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the artefacts of a cell lie; cells that share one share its place."""

    work: Path
    cell: Cell
    network: Network = NETWORKS["cpu"]

    @property
    def pictures(self) -> Path:
        return self.work / self.cell.data / "pictures"

    @property
    def images(self) -> Path:
        return self.work / self.cell.data / f"images{self.cell.images or ''}"

    def table(self, name: str) -> Path:
        """`probe`, `held_out`, or one of HALVES."""
        return self.work / self.cell.data / name

    @property
    def tokenizer(self) -> Path:
        return self.images / "tokenizers" / self.cell.tokenizer

    def tokens(self, first: int, end: int) -> Path:
        return self.images / "tokens" / f"{self.cell.tokenizer}-{first}-{end}"

    @property
    def held_out_tokens(self) -> Path:
        return self.images / "tokens" / f"{self.cell.tokenizer}-held-out"

    @property
    def stored_views(self) -> Path:
        return self.images / "views" / f"{self.cell.form}-{self.cell.views}"

    @property
    def run(self) -> Path:
        return self.work / "runs" / self.cell.name

    def tuned(self, half: str) -> Path:
        return self.work / "tuned" / f"{self.cell.name}-{half}"


def commands(cell: Cell, work: Path, device: str = "cpu") -> Iterator[tuple[str, list[str]]]:
    """(stage, flags) in the order they run; stages that are done say so and end."""
    at = Places(work, cell, NETWORKS[device])
    if cell.tuned:
        yield from commands(cell.pretraining, work, device)
        yield from _tuning(at)
        return
    folders = data.write(cell.data, at.pictures, cell.images)
    yield "prepare", _prepare(folders["train"], at.images)
    for name in ("probe", "held_out"):
        yield "prepare", _prepare(folders[name], at.table(name))
    tables = []
    if cell.tokenizer:
        if cell.tokenizer == "vqkd-own":  # its teacher is the reference cell
            teacher = dataclasses.replace(cell, tokenizer="dvae", objective="beit", seed=0)
            yield from commands(teacher, work, device)
        yield "train-tokenizer", _tokenizer(at)
        for first, end in itertools.pairwise(VIEW_EDGES):
            if first < cell.views:
                tables.append(str(at.tokens(first, end)))
                yield "tokenize", _tokens(at, at.images, at.tokens(first, end), first, end)
        yield "tokenize", _tokens(at, at.table("held_out"), at.held_out_tokens, 0, 1)
    if cell.form != "exact":
        yield "render", [
            f"--images={at.images}", f"--output={at.stored_views}", f"--form={cell.form}",
            f"--num_views={cell.views}", f"--image_size={SIDE[cell.data]}", *POLICY,
        ]  # fmt: skip
    yield "pretrain", _pretrain(at, tables)
    # The teacher of vqkd-own is a cell, and probed as one.
    foreign = cell.tokenizer == "vqkd-efficientnet"
    yield "evaluate", [
        f"--run={at.run}", f"--images={at.table('probe')}", "--pooling=grid", "--attentive=false",
        f"--baselines={str(cell == of_baselines(cell.data, cell.seed)).lower()}",
        *([f"--teacher={EFFICIENTNET}"] if foreign else []),
    ]  # fmt: skip


def _tuning(at: Places) -> Iterator[tuple[str, list[str]]]:
    """Fine-tuned on each half of the probe's images, and tested on the other."""
    folders = data.write(at.cell.data, at.pictures)
    for half in data.HALVES:
        yield "prepare", _prepare(folders[half], at.table(half))
    for half, other in itertools.permutations(data.HALVES):
        yield "finetune", [
            f"--config={HERE / 'finetune.yaml'}",
            f"--run={Places(at.work, at.cell.pretraining).run}",
            f"--images={at.table(half)}", f"--output={at.tuned(half)}", f"--seed={at.cell.seed}",
            f"--model.encoder={at.cell.start}", f"--optim.epochs={at.cell.tuned}",
            f"--data.global_batch_size={TUNED_BATCH}",
            # Lower layers of an untrained network have as much to learn.
            f"--optim.layer_decay={1 if at.cell.start == 'random' else 0.75}",
        ]  # fmt: skip
        yield "evaluate", [
            f"--run={at.tuned(half)}", f"--images={at.table(other)}",
            "--attentive=false", "--baselines=false",
        ]  # fmt: skip


def _prepare(folder: Path, images: Path) -> list[str]:
    return [
        f"--source={folder}", f"--output={images}", f"--group_pattern={data.GROUP_PATTERN}",
        "--part_mb=2", "--row_group_mb=0.25",
    ]  # fmt: skip


def _tokenizer(at: Places) -> list[str]:
    kind = at.cell.tokenizer
    flags = [*TOKENIZERS[kind], f"--images={at.images}", f"--output={at.tokenizer}"]
    if kind in ("kmeans", "projection"):
        flags += ["--model.vocab_size=512", "--scaling.num_workers=0"]
    if kind == "vqkd-own":
        teacher = dataclasses.replace(at.cell, tokenizer="dvae", objective="beit", seed=0)
        flags += [f"--teacher={Places(at.work, teacher).run}", f"--layer={at.network.late_layer}"]
    return flags


def _tokens(at: Places, images: Path, output: Path, first: int, end: int) -> list[str]:
    return [
        f"--images={images}", f"--tokenizer={at.tokenizer}", f"--output={output}",
        f"--first_view={first}", f"--num_views={end - first}", *POLICY,
    ]  # fmt: skip


def _pretrain(at: Places, tables: list[str]) -> list[str]:
    cell, side, (width, depth, heads) = at.cell, SIDE[at.cell.data], at.network.decoder
    of_objective = {
        "beit": [],
        "beitv2": [f"--objective.early_layer={at.network.late_layer}", "--masking.exact=true"],
        "mae": [
            "--model.relative_positions=none", f"--objective.decoder_dim={width}",
            f"--objective.decoder_depth={depth}", f"--objective.decoder_heads={heads}", *POLICY,
        ],
    }  # fmt: skip
    views = [] if cell.form == "exact" else [f"--views=[{at.stored_views}]"]
    return [
        f"--config={HERE / at.network.recipe}",
        f"--images={at.images}", f"--output={at.run}", f"--seed={cell.seed}",
        f"--tokens=[{', '.join(tables)}]", f"--probe.images={at.table('held_out')}",
        f"--probe.tokens=[{at.held_out_tokens if tables else ''}]",
        f"--model.image_size={side}", f"--model.patch_size={side // 8}",
        f"--objective.kind={cell.objective}",
        f"--scaling.precision={cell.precision}",
        f"--masking.kind={cell.mask}", f"--masking.num_masked={cell.masked}",
        f"--optim.steps={cell.steps}", f"--optim.warmup_steps={cell.steps // 10}",
        *of_objective[cell.objective], *views,
    ]  # fmt: skip
