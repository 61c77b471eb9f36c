"""`beit evaluate`: what the frozen features of a run are worth."""

import sys
from collections.abc import Sequence

from jobs.command import stage_main
from pipelines.config.evaluate import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and returns its exit code."""
    return stage_main("evaluate", EvaluateConfig, "pipelines.evaluate", argv, needs_ray=False)


if __name__ == "__main__":
    sys.exit(main())
