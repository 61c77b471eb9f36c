"""Uploads, creations and deletions in object stores; see `storage` for what they promise."""

import contextlib
import random
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fsspec.spec import AbstractFileSystem

from pipelines.stores import Listed, code_of, is_s3, listed_s3, locate, told

# Bytes of one request of an upload, of which four are under way at a time; S3 takes 10,000.
UPLOAD_BYTES, UPLOADS = 16 * 2**20, 4
UPLOAD_TRIES = CREATE_TRIES = 8
DELETE_THREADS = 16
# How stores, and drivers of stores, say that they cannot create only if absent.
NO_CREATION = (
    "NotImplemented",
    "MethodNotAllowed",
    "InvalidArgument",
    "InvalidRequest",
    "NotImplementedError",
    "ValueError",
    "TypeError",
)
_PROBED: dict[tuple[str, str], bool] = {}
_PROBING = threading.Lock()


def upload(uri: str, data: bytes) -> None:
    """Writes a remote file; it is seen when all of it is there."""
    filesystem, path = locate(uri)
    options: dict[str, int] = {}
    if is_s3(uri):
        parts = max(UPLOAD_BYTES, len(data) // 5000)
        options = {"chunksize": parts, "max_concurrency": UPLOADS}
    for attempt in range(UPLOAD_TRIES):
        try:
            with told(uri):
                _put(filesystem, path, data, options)
        except FileNotFoundError as error:
            # The answer to the last request was lost, and its second try found the upload ended.
            if code_of(error) != "NoSuchUpload" or attempt == UPLOAD_TRIES - 1:
                raise
        else:
            return


def _put(filesystem: Any, path: str, data: bytes, options: dict[str, int]) -> None:
    """One write. A store that shows a file while it grows, as remote disks do, gets it under
    another name first, if it can rename."""
    moves = type(filesystem).mv is not AbstractFileSystem.mv
    if not (_is_generic(filesystem) and moves):
        filesystem.pipe_file(path, data, **options)
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    filesystem.pipe_file(temporary, data)
    try:
        filesystem.mv(temporary, path)
    except FileExistsError:  # it does not rename over what is there
        filesystem.rm_file(path)
        filesystem.mv(temporary, path)


def _is_generic(filesystem: Any) -> bool:
    """Whether it writes a file by opening it, having no request that writes the whole."""
    # What drivers with requests of their own call so is made for each instance.
    method = getattr(filesystem.pipe_file, "__func__", None)
    return method is AbstractFileSystem.pipe_file


def delete_below(uri: str) -> None:
    """Removes everything below a remote directory, and its markers."""
    filesystem, path = locate(uri)
    if not is_s3(uri):
        with contextlib.suppress(FileNotFoundError), told(uri):
            filesystem.rm(path, recursive=True)
        return
    bucket, key, _ = filesystem.split_path(path)
    prefix = f"{bucket}/{key}/" if key else f"{bucket}/"

    def delete(one: Listed) -> None:
        with told(uri):
            filesystem.rm_file(prefix + one.name)

    with ThreadPoolExecutor(DELETE_THREADS) as pool:
        # One by one: some stores know no deletion of many, and s3fs is silent on its failures.
        list(pool.map(delete, listed_s3(uri, filesystem, path, "", recursive=True, markers=True)))


def create(uri: str, data: bytes) -> bool:
    """Writes an object only if nothing is there; whether it did."""
    filesystem, path = locate(uri)
    writer = {"writer": uuid.uuid4().hex}
    for attempt in range(CREATE_TRIES):
        try:
            with told(uri):
                _create(filesystem, path, data, writer)
        except OSError as error:
            if code_of(error) == "ConditionalRequestConflict" and attempt < CREATE_TRIES - 1:
                # Another writer is at it; no part of any result, hence the unseeded generator.
                time.sleep(0.1 * 2**attempt * (0.5 + random.random()))
                continue
            if not isinstance(error, FileExistsError) and code_of(error) != "PreconditionFailed":
                raise
            # If an answer was lost, the driver asked again and found what is there: our own.
            return is_s3(uri) and _metadata(uri, filesystem, path) == writer
        else:
            return True
    raise AssertionError("unreachable")


def _create(filesystem: Any, path: str, data: bytes, writer: dict[str, str]) -> None:
    if "s3" in filesystem.protocol:
        # Never in parts: the end of an upload that is asked for again finds no upload.
        filesystem.pipe_file(path, data, mode="create", chunksize=2**32, Metadata=writer)
    elif _is_generic(filesystem):
        with filesystem.open(path, "xb") as file:
            file.write(data)
    else:
        filesystem.pipe_file(path, data, mode="create")


def _metadata(uri: str, filesystem: Any, path: str) -> Any:
    bucket, key, _ = filesystem.split_path(path)
    with contextlib.suppress(FileNotFoundError), told(uri):
        return filesystem.call_s3("head_object", Bucket=bucket, Key=key).get("Metadata")
    return None


def keeps_creations(uri: str) -> bool:
    """Whether the store of `uri` really creates only if absent; it is tried once a process.

    A store that does not is named in a warning.
    """
    base, _, query = uri.partition("?")
    return _keeps_creations("/".join(base.split("/")[:3]), query, base)


def _keeps_creations(store: str, query: str, base: str) -> bool:
    with _PROBING:
        if (store, query) not in _PROBED:
            _PROBED[store, query] = _probe(f"{base}.{uuid.uuid4().hex[:8]}.tmp?{query}".rstrip("?"))
            if not _PROBED[store, query]:
                warn_of(store)
        return _PROBED[store, query]


def warn_of(place: str) -> None:
    """Names a store, or a directory, that breaks the promise of `storage.create`."""
    warnings.warn(
        f"{place} cannot create a file only if it is absent: run one writer at a time on an output "
        "there",
        stacklevel=4,
    )


def _probe(uri: str) -> bool:
    """Raises OSError where the store gives no answer: that is none to this question."""
    try:
        return create(uri, b"1") and not create(uri, b"2")
    except OSError as error:
        if code_of(error) in NO_CREATION:
            return False
        raise
    finally:
        filesystem, path = locate(uri)
        for _ in range(3):
            # What is left of it in an outage is no artefact, and no stage lists it.
            with contextlib.suppress(OSError), told(uri):
                filesystem.rm_file(path)
                break
