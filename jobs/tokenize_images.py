"""`beit tokenize`: an image table and a tokenizer to a token table."""

import sys
from collections.abc import Sequence

from jobs.command import stage_main
from pipelines.config.tokenize_images import TokenizeConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and returns its exit code."""
    return stage_main("tokenize", TokenizeConfig, "pipelines.tokenize_images", argv)


if __name__ == "__main__":
    sys.exit(main())
