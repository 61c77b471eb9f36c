"""`python -m jobs STAGE ...` and `python -m jobs.STAGE ...`: `beit`, where nothing is installed."""

import contextlib
import os
import sys

from jobs.cli import command_of, main
from jobs.environment import take_secrets
from jobs.submission.access import JOB

if __name__ == "__main__":
    assert __spec__ is not None, "this is no script"
    if JOB in os.environ:
        with contextlib.suppress(FileNotFoundError):  # most jobs have none
            take_secrets()
    named = command_of(__spec__.name.rpartition(".")[2])  # "" for `jobs` itself
    sys.exit(main([named, *sys.argv[1:]] if named else None))
