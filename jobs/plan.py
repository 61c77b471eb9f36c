"""`beit plan`: what a stage would cost; touches nothing."""

import sys
from collections.abc import Sequence

from jobs.command import stage_main
from pipelines.config.plan import PlanConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and returns its exit code."""
    return stage_main("plan", PlanConfig, "pipelines.plan", argv, needs_ray=False)


if __name__ == "__main__":
    sys.exit(main())
