"""`beit export`: a run's weights in the layout of another library."""

import sys
from collections.abc import Sequence

from jobs.command import stage_main
from pipelines.config.export import ExportConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and returns its exit code."""
    return stage_main("export", ExportConfig, "pipelines.export", argv, needs_ray=False)


if __name__ == "__main__":
    sys.exit(main())
