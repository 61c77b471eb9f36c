"""Sections that training stages share. A stage gives other defaults, and adds what it alone has."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.config.checks import Ge, Gt, Lt, check, require

Action = Literal["off", "warn", "stop", "rollback"]

# What a resumed run may change wherever weights are trained: how it is computed, watched and told.
HOW = (
    "output",
    "log_every",
    "data.executor",
    "data.num_threads",
    "data.prefetch_batches",
    "scaling.num_workers",
    "scaling.use_gpu",
    "scaling.cpus_per_worker",
    "scaling.strategy",
    "scaling.compile",
    "scaling.accumulate_steps",
    "scaling.activation_checkpointing",
    "scaling.stall_factor",
    "scaling.stall_seconds",
    "scaling.max_failures",
    "scaling.max_preemptions",
    "scaling.peak_tflops",
    "checkpoint",
    "health",
    "lease",
    "tracking",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The order of samples, which no number of workers changes."""

    global_batch_size: Annotated[int, Ge(1)] = 2048
    """Images per step over all workers and accumulation; a multiple of num_shards."""
    num_shards: Annotated[int, Ge(1)] = 8
    """Canonical shards of the order: the largest number of workers; divides global_batch_size."""
    window: Annotated[int, Ge(1)] = 1024
    """Rows of a shard that are shuffled together and held as encoded bytes."""
    num_threads: Annotated[int, Ge(0)] = 0
    """Decoding threads per worker; 0: scaling.cpus_per_worker."""
    prefetch_batches: Annotated[int, Ge(1)] = 2
    """Batches decoded ahead per worker."""

    def __post_init__(self) -> None:
        check(self, "data.")
        require(
            self.global_batch_size % self.num_shards == 0,
            "data.global_batch_size",
            self.global_batch_size,
            f"must be a positive multiple of data.num_shards = {self.num_shards}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on a cosine."""

    lr: Annotated[float, Gt(0)] = 1.5e-3
    """Peak learning rate."""
    min_lr: Annotated[float, Ge(0)] = 1e-5
    """Learning rate at the end of the cosine."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Decoupled weight decay."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """Decay of the second moment."""
    clip_grad_norm: Annotated[float | None, Gt(0), "null for no clipping"] = 3.0
    """Largest gradient norm; null: no clipping."""

    def __post_init__(self) -> None:
        check(self, "optim.")
        require(
            self.min_lr <= self.lr,
            "optim.min_lr",
            self.min_lr,
            f"must be at most optim.lr = {self.lr}",
        )


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """On how much a step is computed."""

    num_workers: int | tuple[int, int] = 1
    """Training workers; [min, max]: elastic; 0: this process alone, without Ray."""
    use_gpu: bool = False
    """One CUDA device per worker."""
    cpus_per_worker: Annotated[int, Ge(1)] = 1
    """CPUs reserved per worker, for decoding and, without GPU, for the step itself."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """bf16, fp16: autocast with float32 weights, for fp16 with a loss scale; auto: bf16 on CUDA,
    fp16 on GPUs that have none (V100, T4), float32 on CPU."""
    compile: bool = False
    """torch.compile the step."""
    stall_factor: Annotated[float, Gt(1)] = 20.0
    """A worker that stands still for so many times its usual step is named (20 s at least)."""
    stall_seconds: Annotated[float, Ge(10)] = 300.0
    """Seconds that a worker may stand still, or wait for one that does, before the group is
    restarted."""
    max_failures: Annotated[int, Ge(0)] = 8
    """Restarts of the worker group before the run fails."""
    max_preemptions: Annotated[int, Ge(0)] = 100
    """Restarts because nodes were taken away after a notice (spot); counted apart."""

    def __post_init__(self) -> None:
        check(self, "scaling.")
        low, high = self.worker_range
        require(
            0 <= low <= high and (low > 0 or high == 0),
            "scaling.num_workers",
            self.num_workers,
            "must be 0, a positive number or [min, max] with 1 <= min <= max",
        )

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        if isinstance(self.num_workers, int):
            return self.num_workers, self.num_workers
        low, high = self.num_workers
        return low, high


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a killed run continues from."""

    every_steps: Annotated[int, Ge(1)] = 1000
    """Steps between checkpoints; one is also made at the end."""
    keep: Annotated[int, Ge(1)] = 3
    """Complete checkpoints kept."""

    def __post_init__(self) -> None:
        check(self, "checkpoint.")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What is watched, and what happens: off, warn, stop, or rollback to the last checkpoint.

    A rollback skips the data between that checkpoint and the offence.
    """

    non_finite: Action = "rollback"
    """NaN or infinite loss or gradient. Such an update is never applied, whatever the action."""
    exploding_gradient: Action = "warn"
    """Gradient norm above gradient_ratio times its recent median."""
    gradient_ratio: Annotated[float, Gt(1)] = 50.0
    """See exploding_gradient."""
    data_starvation: Action = "warn"
    """Waiting for data takes more than max_data_wait of a logging period; names the cause."""
    max_data_wait: Annotated[float, Ge(0)] = 0.3
    """Share of wall-clock."""
    max_rollbacks: Annotated[int, Ge(0)] = 3
    """Rollbacks before the run stops."""

    def __post_init__(self) -> None:
        check(self, "health.")
        require(
            self.data_starvation != "rollback",
            "health.data_starvation",
            self.data_starvation,
            "choose off, warn, stop; going back does not bring data",
        )


def check_shards(data: DataConfig, scaling: ScalingConfig) -> None:
    """Raises InputError where there may be more workers than canonical shards."""
    most = scaling.worker_range[1]
    require(
        most <= data.num_shards,
        "data.num_shards",
        data.num_shards,
        f"must be at least the largest number of workers, {most}",
    )
