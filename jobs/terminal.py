"""What people read in a terminal or a log: names in it cannot steer what shows them.

Nor has it the secrets of URIs, for logs of jobs are read by many.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from pipelines.errors import printable
from pipelines.redaction import redacted

# What Ray's driver prints of a node that is lost: one line tells it, and a stack trace of Ray's own
# follows, which the logs of the node have, too.
OF_A_NODE, TRACE = "(raylet) ", " Last 20 lines of the Raylet logs:"


class _Printable:
    """A stream without secrets of URIs, that shows control characters as text, but for line ends
    and tabs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # Progress lines begin with a return; no name does that for them.
        start = "\r" if text.startswith("\r") else ""
        shown = text[len(start) :]
        if text.startswith(OF_A_NODE):
            shown = text.partition("\n")[0].partition(TRACE)[0].rstrip()
        self._stream.write(start + redacted(printable(shown, keep="\n\t")))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Inside, whatever is printed or logged is printable text."""
    out: Any = _Printable(sys.stdout)
    errors: Any = _Printable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        yield
