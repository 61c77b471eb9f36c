"""`beit train-tokenizer`: an image table to a trained discrete VAE."""

import sys
from collections.abc import Sequence

from jobs.command import stage_main
from pipelines.config.train_tokenizer import TrainTokenizerConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and returns its exit code."""
    return stage_main(
        "train-tokenizer",
        TrainTokenizerConfig,
        "pipelines.train_tokenizer",
        argv,
        needs_ray=_needs_ray,
    )


def _needs_ray(config: TrainTokenizerConfig) -> bool:
    return config.scaling.num_workers != 0


if __name__ == "__main__":
    sys.exit(main())
