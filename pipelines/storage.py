"""Files at any URI: local paths, and everything that fsspec has a driver for (s3://, gs://, ...).

Artefacts are written so that a reader never sees half a file: locally by a temporary name, fsync
and rename; on object stores by one upload that becomes visible when it completes.
"""

import contextlib
import hashlib
import json
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from pipelines import disk_writes, store_writes, stores
from pipelines.errors import DamagedFileError, InputError

LOCAL = pafs.LocalFileSystem()
FETCH_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file below a listed directory."""

    path: str
    """Path relative to the listed URI, with forward slashes."""
    size: int
    """Bytes."""


def is_local(uri: str) -> bool:
    """Whether `uri` names this machine's file system."""
    return uri.startswith("file:") or not re.match(r"[A-Za-z][\w+.-]*://", uri)


def local_path(uri: str) -> str:
    """The path of a local URI; `file:` URIs are unescaped."""
    if not uri.startswith("file:"):
        return uri
    return unquote(re.sub("^file:(//(localhost)?(?=/))?", "", uri))


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`; the query of a remote URI (endpoint, region) stays at the end.

    In a remote URI `?`, `%` and slashes that part nothing become `%3F`, `%25` and `%2F` in parts.
    """
    if is_local(uri):
        base = local_path(uri)
        return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])
    base, question, query = uri.partition("?")
    return "/".join([base.rstrip("/"), *map(_escaped, parts)]) + question + query


def _escaped(name: str) -> str:
    name = name.replace("%", "%25").replace("?", "%3F")
    return re.sub("^/|(?<=/)/|/$", "%2F", name)


def beside(uri: str, suffix: str) -> str:
    """The URI of a file beside a directory: its name with `suffix`."""
    base, question, query = (uri, "", "") if is_local(uri) else uri.partition("?")
    return base.rstrip("/") + suffix + question + query


def absolute(uri: str) -> str:
    """A local path made absolute, so that worker processes with another directory find it.

    Raises:
        InputError: it looks like a URI that lost a slash, or holds what no name may.
    """
    if "\0" in uri:
        raise InputError(f"{uri!r}: no path holds the character \\0; give one without")
    if re.match(r"(s3a?|gs|gcs|az|abfss?|hf|https?):/?[^/]", uri):
        raise InputError(f"{uri!r}: a URI has two slashes after its scheme, as in s3://bucket/name")
    return str(Path(local_path(uri)).expanduser().absolute()) if is_local(uri) else uri


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of `uri` for libraries that want one of pyarrow's, and the path inside it.

    Raises:
        InputError: the scheme is unknown or the URI is malformed.
    """
    if is_local(uri):
        return LOCAL, absolute(uri)
    filesystem, path = stores.locate(uri)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _checked(uri: str) -> str:
    """The path of a local file that is to be read. Raises InputError for one that never ends."""
    path = absolute(uri)
    with contextlib.suppress(OSError):  # which opening tells
        mode = Path(path).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{path}: is no file, but a pipe, socket or device; give a file")
    return path


def open_input(uri: str, *, size: int | None = None) -> pa.NativeFile:
    """A random-access file. Raises FileNotFoundError naming the URI.

    Args:
        size: Bytes, where they are known: then opening a remote file asks for nothing.
    """
    if is_local(uri):
        return LOCAL.open_input_file(_checked(uri))
    return pa.PythonFile(stores.RemoteFile(uri, size), mode="r")


def open_shared(uri: str) -> pa.NativeFile | None:
    """A random-access file that many threads may read at once, faster than that of `open_input`.

    On S3 it is pyarrow's own, which holds no lock of the interpreter while it reads: 1.1 to 2.5
    times as fast beside busy threads of Python (benchmarks/results/storage.md). It gives up sooner
    than `open_input` does, so be ready to turn to that. None where there is no such file.
    """
    if is_local(uri):
        return LOCAL.open_input_file(_checked(uri))
    if not stores.is_s3(uri):
        return None
    try:
        return stores.arrow_s3(uri).open_input_file(stores.locate(uri)[1])
    except (OSError, pa.ArrowInvalid):
        return None


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError naming the URI."""
    if is_local(uri):
        return Path(_checked(uri)).read_bytes()
    filesystem, path = stores.locate(uri)
    # One request; s3fs would ask for the size first.
    options = {"max_concurrency": 1} if stores.is_s3(uri) else {}
    with stores.told(uri):
        data: bytes = filesystem.cat_file(path, **options)
        return data


def unchecked() -> None:
    """The check of who writes alone."""


def write_bytes(
    uri: str, data: bytes | pa.Buffer, *, check: Callable[[], None] = unchecked
) -> None:
    """Writes the file atomically: readers see the old content or all of the new one.

    `check` is asked before anything is written, and on a disk once more before it is seen; it
    raises where another driver has taken over.
    """
    check()
    if not is_local(uri):
        store_writes.upload(uri, bytes(data))
        return
    disk_writes.write(Path(absolute(uri)), data, check)


def remove_half_written(uri: str, *, below: str = "") -> None:
    """See `disk_writes.remove_half_written`; object stores show nothing before it is whole."""
    if is_local(uri):
        disk_writes.remove_half_written(Path(absolute(uri)), below=below)


def create(uri: str, data: bytes, *, check: Callable[[], None] = unchecked) -> bool:
    """Writes the file only if nothing is there; of several writers exactly one is told True.

    A store that does not keep this promise is named once, in a warning; there the file is written
    if none is seen. `check` as in `write_bytes`.
    """
    check()
    if is_local(uri):
        return disk_writes.create(Path(absolute(uri)), data, check)
    if store_writes.keeps_creations(uri):
        return store_writes.create(uri, data)
    if exists(uri):
        return False
    write_bytes(uri, data)
    return True


def created_or_equal(uri: str, data: bytes, *, check: Callable[[], None] = unchecked) -> bool:
    """Creates the file; False if one is there that holds something else.

    So two writers of one artefact do no harm, and none takes the place of another artefact.
    """
    return create(uri, data, check=check) or read_bytes(uri) == data


def exists(uri: str) -> bool:
    """Whether a file or a directory is there. Raises StoreError if the bucket is not."""
    if is_local(uri):
        return Path(absolute(uri)).exists()
    try:
        stores.info(uri)
    except FileNotFoundError:
        return False
    return True


def is_file(uri: str) -> bool:
    """Whether a file is there."""
    if is_local(uri):
        return Path(absolute(uri)).is_file()
    try:
        return bool(stores.info(uri)["type"] == "file")
    except FileNotFoundError:
        return False


def list_files(uri: str, suffix: str = "", *, recursive: bool = True) -> list[FileInfo]:
    """Files below `uri`, sorted by relative path; empty where there is no such directory.

    Temporary files and the directory markers that object stores keep are left out.
    """
    if is_local(uri):
        path = absolute(uri)
        selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
        files = [
            FileInfo(path=info.path[len(path) :].lstrip("/"), size=int(info.size or 0))
            for info in LOCAL.get_file_info(selector)
            if info.type == pafs.FileType.File
        ]
    else:
        found = stores.listed(uri, recursive=recursive)
        files = [FileInfo(path=one.name, size=one.size) for one in found if not one.is_dir]
    return sorted(
        (file for file in files if file.path.endswith(suffix) and not file.path.endswith(".tmp")),
        key=lambda file: file.path,
    )


def delete(uri: str) -> None:
    """Removes a file; one that is not there is no error."""
    if is_local(uri):
        Path(absolute(uri)).unlink(missing_ok=True)
        return
    filesystem, path = stores.locate(uri)
    with contextlib.suppress(FileNotFoundError), stores.told(uri):
        filesystem.rm_file(path)


def delete_prefix(uri: str) -> None:
    """Removes a directory and everything below it; a missing one is no error."""
    if is_local(uri):
        with contextlib.suppress(FileNotFoundError):
            LOCAL.delete_dir(absolute(uri))
        return
    store_writes.delete_below(uri)


def fetch_dir(uri: str, local_dir: str | Path, *, suffixes: tuple[str, ...] = ()) -> None:
    """Copies all files below `uri` into a local directory.

    Args:
        suffixes: If given, only files of `uri` itself with one of these are meant: whoever names a
            wrong folder, perhaps one of many images, shall not wait until all of it is here.

    Raises:
        FileNotFoundError: nothing is there.
        InputError: a name would lie outside of `local_dir`, or is no name on a disk.
    """
    files = list_files(uri, recursive=not suffixes)
    files = [file for file in files if not suffixes or file.path.endswith(suffixes)]
    if not files:
        raise FileNotFoundError(uri)
    for file in files:
        if not set(file.path.split("/")).isdisjoint(("", ".", "..")) or "\0" in file.path:
            raise InputError(f"{uri}: {file.path!r} is no name for a file on disk; rename it")

    def fetch(file: FileInfo) -> None:
        target = Path(local_dir, file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(join(uri, file.path)))

    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        list(pool.map(fetch, files))


def store_dir(
    local_dir: str | Path,
    uri: str,
    *,
    last: str | None = None,
    check: Callable[[], None] = unchecked,
) -> None:
    """Copies a local directory to `uri`; the file named `last` goes up after all others.

    `check` as in `write_bytes`.
    """
    root = Path(local_dir)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name == last):
        write_bytes(join(uri, name), (root / name).read_bytes(), check=check)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and a final newline: equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(uri: str) -> Any:
    """Parsed JSON. Raises FileNotFoundError, or InputError naming the file if it is not JSON."""
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{uri}: not valid JSON ({error}); write the artefact again"
        ) from error


def write_json(uri: str, value: Any, *, check: Callable[[], None] = unchecked) -> None:
    """Writes canonical JSON atomically; `check` as in `write_bytes`."""
    write_bytes(uri, canonical_json(value), check=check)


def digest(data: bytes | memoryview | pa.Buffer) -> str:
    """Content hash: BLAKE2b, 128 bits, as hexadecimal text."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def fingerprint(value: Any) -> str:
    """Identity of a JSON value: the hash of its canonical form."""
    return digest(canonical_json(value))
