"""What a stage does where another driver is writing the same output."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.config.checks import Ge, check


@dataclass(frozen=True, kw_only=True)
class LeaseConfig:
    """One driver at a time writes an output; see docs/operating.md."""

    when_held: Literal["wait", "stop"] = "wait"
    """Where another driver is at work on this output: wait until it ends and go on from there, or
    stop with a sentence that names it, once it has shown a sign of life."""
    expires_seconds: Annotated[float, Ge(1)] = 60.0
    """Seconds without a sign of life after which another machine may take over from this one. A
    process that has died on the same machine is taken over from at once."""
    job: str = ""
    """Name of the job that others are told; empty: that of the submission, or Slurm's."""

    def __post_init__(self) -> None:
        check(self, "lease.")
