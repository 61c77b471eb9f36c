"""`beit audit`: re-reads and re-hashes a table."""

import sys
from collections.abc import Sequence

from jobs.command import stage_main
from pipelines.config.audit import AuditConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stage and returns its exit code. The table may be given without its flag."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--table")
    return stage_main("audit", AuditConfig, "pipelines.audit", arguments, needs_ray=False)


if __name__ == "__main__":
    sys.exit(main())
