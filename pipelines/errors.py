"""The failures that a stage reports without a traceback, and how names are shown."""

import contextlib
import errno
import os
from collections.abc import Iterator


class InputError(ValueError):
    """What the user gave cannot be used; the message names field or file, value and remedy.

    Commands exit with 2.
    """


class DamagedFileError(InputError):
    """A file's bytes are not what was written; names the file, and says in what."""


class StageFailed(RuntimeError):  # noqa: N818 - the stage's verdict, not a programming error
    """A stage ran and its result must not be used (collapsed tokenizer, failed audit, lost run).

    Commands exit with 1.
    """


class LeaseLost(StageFailed):
    """Another driver has taken this output over; this one must write nothing more there."""


def printable(text: str, *, keep: str = "") -> str:
    """Text for people: control characters and the like, which would steer a terminal, as `\\x1b`.

    Names of files and classes may hold anything. `keep`: characters that stay.
    """
    return "".join(
        char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text
    )


class StoreError(InputError, OSError):
    """An object store refuses us as a whole: its bucket or our credentials are wrong."""


# What an operating system refuses because of what was given, and what is given instead.
_BAD_PLACE = dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "give a place that you may use, or change its rights"
) | dict.fromkeys(
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
    "check the path",
)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def of_system(error: OSError) -> InputError | StageFailed:
    """What the operating system or a store refused, as one of ours: bad input or a fault."""
    said = error.strerror or str(error)
    named = isinstance(error.filename, str | bytes)
    place = f"{printable(os.fsdecode(error.filename))}: " if named else ""
    if error.errno in _BAD_PLACE:
        return InputError(f"{place}{said}; {_BAD_PLACE[error.errno]}")
    mend = "free some there" if error.errno in _FULL else "when this is mended"
    return StageFailed(f"{place}{said}; {mend}, and the same command goes on from what is done")


@contextlib.contextmanager
def parsing(uri: str, remedy: str) -> Iterator[None]:
    """Around what a library makes of the bytes of a file: the one place that judges its errors.

    Raises:
        DamagedFileError: in place of whatever the library raised; ends with `remedy`.
        OSError: one with a number is about reaching the file, not about its bytes, and passes.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Parquet's own errors are OSErrors without number, and damaged sizes ask for any memory.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DamagedFileError(f"{uri}: damaged ({printable(said)}); {remedy}") from error
