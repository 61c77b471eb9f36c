"""Configuration of the `evaluate` stage."""

from dataclasses import dataclass, field
from typing import Annotated

from pipelines.config.checks import Ge, check, require
from pipelines.config.lease import LeaseConfig
from pipelines.config.protocol import ProtocolConfig
from pipelines.config.tracking import TrackingConfig

# What makes no other evaluation of it: where things are, and how it is computed. `max_rejected` is
# a limit: a report that keeps to it is of the same images, whatever the limit was.
MAY_CHANGE = (
    "run", "baseline", "teacher", "teacher_layer", "images", "output", "force", "lease", "tracking",
    "batch_size", "device", "num_threads", "scaling", "max_rejected",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """On how much features are computed."""

    num_workers: Annotated[int, Ge(0)] = 0
    """Actors that read images and compute features, with a GPU each where Ray has some (`device`);
    0: this process alone, without Ray."""
    cpus_per_worker: Annotated[int, Ge(1)] = 1
    """CPUs reserved per actor, for decoding and, without GPU, for the network."""

    def __post_init__(self) -> None:
        check(self, "scaling.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ProtocolConfig):
    """Frozen features against labels: nearest neighbours and a linear probe."""

    run: str
    """Run directory of `pretrain` (not finished: its newest checkpoint) or `finetune`, or a weights
    directory."""
    images: str
    """Labelled image table."""
    test_images: str = ""
    """Another labelled table to test on; empty: parts of `images` are held out in turn."""
    output: str = ""
    """Directory for evaluation.json and pictures; empty: evaluation/ in the run directory."""
    baseline: str = ""
    """Other weights to compare with image by image: a run or a weights directory of the same image
    size."""
    teacher: str = ""
    """Also evaluate a teacher of VQ-KD, named as for `train-tokenizer`, as a reference."""
    teacher_layer: Annotated[int | None, Ge(1), "null for the features after the last layer"] = None
    """Block of the teacher after which its features are taken, from 1; null: its output."""
    baselines: bool = True
    """Also evaluate the same network at random initialisation, and raw pixels."""
    attentive: bool = True
    """Also fit attentive probes, on all patches: they take 2 bytes a number on disk (TMPDIR)."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Images per forward pass."""
    device: str = "auto"
    """cpu, or cuda, mps and the like; auto: CUDA if it is here, else the CPU. With actors cpu, cuda
    (a GPU each) or auto: GPUs if a node that is there now has some."""
    num_threads: Annotated[int, Ge(0)] = 0
    """Threads that decode images in this process; 0: as many as the machine has cores."""
    scaling: PoolConfig = field(default_factory=PoolConfig)
    max_rejected: Annotated[int, Ge(0)] = 0
    """Images that may be left out because they do not decode. More of them fail the stage."""
    force: bool = False
    """Evaluate again although the same evaluation is there."""
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check(self)
        require(min(self.layers, default=1) >= 1, "layers", self.layers, "blocks count from 1")
        require(
            not (self.teacher and self.scaling.num_workers),
            "teacher",
            self.teacher,
            "actors have no teacher; give --scaling.num_workers 0",
        )
        require(
            bool(self.teacher) or self.teacher_layer is None,
            "teacher_layer",
            self.teacher_layer,
            "is a layer of teacher; give that too",
        )
