"""Which failures belong to a file, so that it is rejected, and which to the moment.

A rejection is for good: what another try, another day or a login could mend is raised instead.
"""

import errno

import pyarrow as pa

from pipelines import storage
from pipelines.errors import InputError

PASSING = {
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR,
}  # fmt: skip


def file_failure(error: Exception, uri: str, root: str, *, damaged: str = "unreadable") -> str:
    """The reason to reject the file at `uri`, which could not be read.

    Args:
        root: Where the source begins; must answer for a refusal to be the file's own.
        damaged: The reason if it is what the file holds.

    Raises:
        Exception: `error` itself, where the file may be all right.
    """
    if isinstance(error, MemoryError | InputError | pa.ArrowCancelled):
        raise error
    if not isinstance(error, OSError):
        return damaged
    if isinstance(error, FileNotFoundError | PermissionError):
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
    elif error.errno is None:
        # Errors of Parquet are of this type too, but have no number.
        return damaged
    elif error.errno in PASSING or not storage.is_local(uri):
        # A store has been asked often enough.
        raise error
    else:
        return "unreadable"
    # A disk that is not mounted or a login that ran out refuses everything.
    if not storage.exists(root):
        raise error
    return reason
