"""Tar archives: what lies in them, and whether that is all of it."""

import io
import tarfile
from typing import Any, BinaryIO

# Beginnings of what gzip, bzip2, xz and zstd make of an archive, whatever its name says.
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
# Archives are filled up with zeros to a multiple of their record, which is 10 kB or seldom more.
MAX_PADDING = 2**20


def tar_members(file: BinaryIO) -> tuple[list[tarfile.TarInfo], int | None]:
    """Members that are no directories, and where the archive breaks off; None: it is whole.

    Python's tarfile takes a damaged header, and the end of the first of several archives in one
    file, for the end of everything, without a word; so it is made sure that only zeros follow.

    Raises:
        OSError: the file cannot be read.
    """
    members: list[tarfile.TarInfo] = []
    end = 0
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not 0 <= member.size < 2**63:
                    return members, end
                if not member.isdir():
                    members.append(member)
                if archive.offset > length:
                    return members, end
                end = archive.offset
    except OSError:
        raise
    except Exception:  # a header may hold anything, and tarfile trusts its numbers
        return members, end
    file.seek(end)
    rest = file.read(MAX_PADDING + 1)
    whole = len(rest) <= MAX_PADDING and rest.count(0) == len(rest)
    return members, None if whole else end


def member_bytes(file: BinaryIO, member: tarfile.TarInfo, *, at_most: int | None = None) -> bytes:
    """A member's content; short if the archive is.

    Raises:
        ValueError: its header claims more than `at_most` bytes.
    """
    if at_most is not None and member.size > at_most:
        raise ValueError(f"{member.name}: {member.size} bytes")
    if member.sparse is not None:
        return _sparse_bytes(file, member)
    file.seek(member.offset_data)
    return file.read(member.size)


def _sparse_bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """Of a file with holes (`tar -S`) the archive has the pieces between them."""
    data, at = bytearray(member.size), member.offset_data
    pieces: Any = member.sparse  # typeshed says bytes; they are pairs of place and size
    for begin, size in pieces:
        file.seek(at)
        piece = file.read(size) if 0 <= begin <= begin + size <= member.size else b""
        if len(piece) < size or size < 0:
            return b""
        data[begin : begin + size] = piece
        at += size
    return bytes(data)


def as_text(name: str) -> str:
    """A key that is valid UTF-8, whatever bytes the archive had for a name."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
