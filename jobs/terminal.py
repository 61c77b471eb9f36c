"""What people read in a terminal or a log: names in it cannot steer what shows them."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from pipelines.errors import printable


class _Printable:
    """A stream that shows control characters as text, but for line ends and tabs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # Progress lines begin with a return; no name does that for them.
        start = "\r" if text.startswith("\r") else ""
        self._stream.write(start + printable(text[len(start) :], keep="\n\t"))
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
