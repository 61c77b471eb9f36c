"""`beit import-tokenizer`: published weights to a tokenizer directory, without unpickling."""

import sys
from collections.abc import Sequence

from jobs.command import stage_main
from pipelines.config.import_tokenizer import ImportTokenizerConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and returns its exit code."""
    return stage_main(
        "import-tokenizer",
        ImportTokenizerConfig,
        "pipelines.import_tokenizer",
        argv,
        needs_ray=False,
    )


if __name__ == "__main__":
    sys.exit(main())
