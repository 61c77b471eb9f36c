"""Files at any URI: local paths and everything pyarrow.fs or fsspec can open (s3://, gs://, ...).

Artefacts are written so that a reader never sees half a file: locally by a temporary name, fsync
and rename; on object stores by one upload that becomes visible when it completes.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from pipelines.errors import InputError

T = TypeVar("T")

# Answers of S3 that stay the same however often it is asked; its other errors pass.
FINAL_S3_ERRORS = (
    "ACCESS_DENIED", "INVALID_", "MALFORMED_", "MISSING_", "NO_SUCH_", "RESOURCE_NOT_FOUND",
    "SIGNATURE_", "UNRECOGNIZED_CLIENT",
)  # fmt: skip
# What other stores answer when they want to be asked again later.
TRANSIENT_MARKS = re.compile(
    r"slow ?down|\b50[0234]\b|internal ?error|time-?out|timed out|reset|throttl|too many requests|"
    r"connect|curlcode|network|unavailable|incomplete|broken pipe|unexpected end|content-length",
    re.IGNORECASE,
)
NUM_TRIES = 6


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file below a listed directory."""

    path: str
    """Path relative to the listed URI, with forward slashes."""
    size: int
    """Bytes."""


def is_local(uri: str) -> bool:
    """Whether `uri` names this machine's file system."""
    return urlsplit(uri).scheme in ("", "file")


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`; the query of an S3 URI (endpoint, region) stays at the end.

    In a remote URI a part's `?` becomes `%3F` and its `%` becomes `%25`; `resolve` undoes it.
    """
    if is_local(uri):
        return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])
    base, question, query = uri.partition("?")
    names = (part.strip("/").replace("%", "%25").replace("?", "%3F") for part in parts)
    return "/".join([base.rstrip("/"), *names]) + question + query


def beside(uri: str, suffix: str) -> str:
    """The URI of a file beside a directory: its name with `suffix`."""
    base, question, query = (uri, "", "") if is_local(uri) else uri.partition("?")
    return base.rstrip("/") + suffix + question + query


def absolute(uri: str) -> str:
    """A local path made absolute, so that worker processes with another directory find it."""
    if not is_local(uri):
        return uri
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of `uri` and the path inside it.

    Raises:
        InputError: the scheme is unknown or the URI is malformed.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), absolute(uri)
    base, _, query = uri.partition("?")
    scheme, _, path = base.partition("://")
    return _filesystem(scheme, path.partition("/")[0], query), unescaped(path.rstrip("/"))


def unescaped(path: str) -> str:
    """The name in the store of what a remote URI says; other uses of `%` stand for themselves."""
    return re.sub("%3F|%25", lambda found: "?" if found[0] == "%3F" else "%", path)


@lru_cache(maxsize=32)
def _filesystem(scheme: str, bucket: str, query: str) -> pafs.FileSystem:
    if scheme in ("s3", "s3a"):
        # Without delayed opening, empty and small multipart uploads fail on several stores.
        options = "&".join(filter(None, [query, "allow_delayed_open=true"]))
        return pafs.FileSystem.from_uri(f"s3://{bucket}?{options}")[0]
    try:
        return pafs.FileSystem.from_uri(f"{scheme}://{bucket}?{query}".rstrip("?"))[0]
    except (pa.ArrowInvalid, ValueError):
        import fsspec

        try:
            return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
        except (ValueError, ImportError) as error:
            raise InputError(
                f"{scheme}://{bucket}: cannot open this kind of URI ({error}); "
                "use a local path, s3://..., or install the fsspec driver of the scheme"
            ) from error


def retry(action: Callable[[], T]) -> T:
    """Runs `action`, again with growing random pauses while a store throttles or drops us.

    A missing file and a refused permission are final at once.
    """
    for attempt in range(NUM_TRIES):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            if not is_transient(error) or attempt == NUM_TRIES - 1:
                raise _explained(error) from error
            time.sleep(pause(attempt))
    raise AssertionError("unreachable")


def is_transient(error: OSError) -> bool:
    """Whether it is worth asking the store again."""
    s3_error = re.search(r"AWS Error (\w+)", str(error))
    if s3_error and s3_error[1] != "UNKNOWN":
        return not s3_error[1].startswith(FINAL_S3_ERRORS)
    return bool(TRANSIENT_MARKS.search(str(error)))


def pause(attempt: int) -> float:
    """Seconds to wait before the next try.

    Jitter keeps a thousand workers from coming back at the same moment; it is no part of any
    result, hence the one use of an unseeded generator.
    """
    return min(20.0, 0.3 * 2.0**attempt) * (0.5 + random.random())


def _explained(error: OSError) -> OSError:
    if "MissingContentLength" in str(error) or "411" in str(error):
        return OSError(
            f"{error}\nThis store wants uploads with a plain Content-Length: set "
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
            "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required, for the Ray workers too."
        )
    return error


def open_input(uri: str) -> pa.NativeFile:
    """A random-access file. Raises FileNotFoundError naming the URI."""
    filesystem, path = resolve(uri)
    return retry(lambda: filesystem.open_input_file(path))


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises FileNotFoundError naming the URI."""
    filesystem, path = resolve(uri)

    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            data: bytes = file.read()
            return data

    return retry(read)


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Writes the file atomically: readers see the old content or all of the new one."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        with _temporary_file(Path(path)) as temporary:
            with temporary.open("wb") as file:
                file.write(memoryview(data))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        return

    def upload() -> None:
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    retry(upload)


@contextlib.contextmanager
def _temporary_file(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def exists(uri: str) -> bool:
    """Whether a file (or, on local disk, a directory) is there."""
    filesystem, path = resolve(uri)
    return bool(retry(lambda: filesystem.get_file_info(path)).type != pafs.FileType.NotFound)


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    filesystem, path = resolve(uri)
    info = retry(lambda: filesystem.get_file_info(path))
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(uri)
    return int(info.size)


def list_files(uri: str, suffix: str = "", *, recursive: bool = True) -> list[FileInfo]:
    """Files below `uri`, sorted by relative path; empty where there is no such directory.

    Temporary files and the directory markers that object stores keep are left out.
    """
    filesystem, path = resolve(uri)
    selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
    infos = retry(lambda: filesystem.get_file_info(selector))
    files = (
        FileInfo(path=info.path[len(path) :].lstrip("/"), size=int(info.size or 0))
        for info in infos
        if info.type == pafs.FileType.File
    )
    return sorted(
        (
            file
            for file in files
            if file.path.endswith(suffix) and file.path and not file.path.endswith(".tmp")
        ),
        key=lambda file: file.path,
    )


def delete(uri: str) -> None:
    """Removes a file; one that is not there is no error."""
    filesystem, path = resolve(uri)
    with contextlib.suppress(FileNotFoundError):
        retry(lambda: filesystem.delete_file(path))


def delete_prefix(uri: str) -> None:
    """Removes a directory and everything below it; a missing one is no error."""
    filesystem, path = resolve(uri)
    with contextlib.suppress(FileNotFoundError):
        retry(lambda: filesystem.delete_dir(path))


def fetch_dir(uri: str, local_dir: str | Path, *, num_threads: int = 8) -> None:
    """Copies all files below `uri` into a local directory.

    Raises:
        FileNotFoundError: nothing is there.
    """
    files = list_files(uri)
    if not files:
        raise FileNotFoundError(uri)

    def fetch(file: FileInfo) -> None:
        target = Path(local_dir, file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(join(uri, file.path)))

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(fetch, files))


def store_dir(local_dir: str | Path, uri: str, *, last: str | None = None) -> None:
    """Copies a local directory to `uri`; the file named `last` goes up after all others."""
    root = Path(local_dir)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name == last):
        write_bytes(join(uri, name), (root / name).read_bytes())


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and a final newline: equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(uri: str) -> Any:
    """Parsed JSON. Raises FileNotFoundError, or InputError naming the file if it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise InputError(f"{uri}: not valid JSON ({error}); write the artefact again") from error


def write_json(uri: str, value: Any) -> None:
    """Writes canonical JSON atomically."""
    write_bytes(uri, canonical_json(value))


def digest(data: bytes | memoryview | pa.Buffer) -> str:
    """Content hash: BLAKE2b, 128 bits, as hexadecimal text."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def fingerprint(value: Any) -> str:
    """Identity of a JSON value: the hash of its canonical form."""
    return digest(canonical_json(value))
