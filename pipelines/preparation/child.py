"""A function run in a process of its own, because a library in C may end that process."""

import subprocess
import sys
from typing import NamedTuple


class Outcome(NamedTuple):
    """How a child ended."""

    survived: bool
    """It was not killed; it may still have raised."""
    output: bytes
    """What it printed."""
    error: str
    """The end of its traceback, if it raised."""


def run_child(function: str, text: str) -> Outcome:
    """Calls `function` (`module:function`) with `text` in a child process."""
    module, _, name = function.partition(":")
    # The child imports what this process can import, wherever that was found.
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from {module} import {name}; "
        f"{name}(sys.stdin.read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=text.encode(), capture_output=True, check=False
    )
    raised = done.returncode == 1
    error = done.stderr.decode("utf-8", "replace")[-1000:] or "exit code 1"
    return Outcome(raised or not done.returncode, done.stdout, error if raised else "")
