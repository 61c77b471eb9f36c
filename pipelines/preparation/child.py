"""Work in a process of its own, because a library in C may end that process.

A child imports what this process can import, wherever that was found; but neither this process's
main module nor Ray, as a child of `multiprocessing.Process` would. Parent and child speak over a
`multiprocessing` connection, which is the child's standard input.
"""

import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple


class Exit(NamedTuple):
    """How a child ended."""

    survived: bool
    """It was not killed; it may still have raised."""
    output: bytes
    """What it printed."""
    error: str
    """The end of its traceback, if it raised."""


def run_child(function: str, text: str) -> Exit:
    """Calls `function` (`module:function`) with `text` in a child process."""
    done = subprocess.run(
        _command(function, "sys.stdin.read()"),
        input=text.encode(),
        capture_output=True,
        check=False,
    )
    raised = done.returncode == 1
    error = done.stderr.decode("utf-8", "replace")[-1000:] or "exit code 1"
    return Exit(raised or not done.returncode, done.stdout, error if raised else "")


def start_child(function: str) -> "tuple[subprocess.Popen[bytes], Connection[Any, Any]]":
    """Starts a child that calls `function()`, and returns the other end of its `Connection(0)`.

    The child sees the end of its input when this process goes, however it goes.
    """
    ours, theirs = Pipe()
    with theirs:
        child = subprocess.Popen(
            _command(function),
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # decoders in C write warnings there
        )
    return child, ours


def _command(function: str, arguments: str = "") -> list[str]:
    module, _, name = function.partition(":")
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {name}; "
    return [sys.executable, "-c", f"{code}{name}({arguments})"]
