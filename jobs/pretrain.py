"""`beit pretrain`: an image table and token tables to a pretrained BEiT."""

import sys
from collections.abc import Sequence

from jobs.command import stage_main
from pipelines.config.pretrain import PretrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and returns its exit code."""
    return stage_main("pretrain", PretrainConfig, "pipelines.pretrain", argv, needs_ray=_needs_ray)


def _needs_ray(config: PretrainConfig) -> bool:
    return config.scaling.num_workers != 0 or config.data.executor == "ray_tasks"


if __name__ == "__main__":
    sys.exit(main())
