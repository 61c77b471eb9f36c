"""`beit prepare`: images of any source to an image table."""

import sys
from collections.abc import Sequence

from jobs.command import stage_main
from pipelines.config.prepare import PrepareConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and returns its exit code."""
    return stage_main("prepare", PrepareConfig, "pipelines.prepare", argv)


if __name__ == "__main__":
    sys.exit(main())
