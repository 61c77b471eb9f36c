"""Pointers: what Git LFS leaves in the place of files that were not fetched."""

from pathlib import Path
from typing import Final

REMEDY: Final = "pointers of Git LFS, not the files: run `git lfs pull` where they were cloned"
MAX_POINTER_BYTES: Final = 1024


def is_pointer(data: bytes) -> bool:
    """Whether this is the whole content of such a pointer."""
    start = b"version https://git-lfs.github.com/spec/"
    return len(data) <= MAX_POINTER_BYTES and data.startswith(start)


def check_fetched(path: Path) -> None:
    """Raises ValueError if a file is a pointer."""
    with path.open("rb") as file:
        if is_pointer(file.read(MAX_POINTER_BYTES + 1)):
            raise ValueError(f"{path} and others may be {REMEDY}")
