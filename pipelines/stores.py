"""Object stores through fsspec: which one a URI means, what it lists, what its failures mean.

Options, profiles and credentials are those that everybody sets for fsspec and its drivers:
AWS_PROFILE, AWS_ENDPOINT_URL, ~/.aws, FSSPEC_S3_..., ~/.config/fsspec. The query of a URI adds
options of its own; `endpoint_override`, `scheme` and `region` of S3 are pyarrow's words.

Nothing is cached: other processes change a store while we look.
"""

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import fsspec
from fsspec.asyn import sync
from pyarrow import fs as pafs

from pipelines.errors import InputError, StoreError, printable
from pipelines.steps import said_if_slow

# With the tries of s3fs around them a store may be away for about a minute. One that takes
# connections and says nothing is waited for much longer.
S3_CONFIG = {
    "retries": {"mode": "standard", "max_attempts": 5},
    "max_pool_connections": 64,
    "connect_timeout": 10,
    "read_timeout": 60,
}
# Tries of s3fs around those of botocore: of answers that break off, and of storms of 503.
S3_TRIES = 10
SLOW_SECONDS = 30.0
REMEDIES = {
    "NoSuchBucket": "there is no such bucket: create it, or check its name and the endpoint",
    "InvalidBucketName": "this is no name of a bucket: correct it",
    "InvalidAccessKeyId": "the store does not know this access key: check AWS_PROFILE or "
    "AWS_ACCESS_KEY_ID, and the endpoint",
    "SignatureDoesNotMatch": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the login has expired: log in again",
    "NoCredentialsError": "no credentials were found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, for the Ray workers too",
    "ProfileNotFound": "AWS_PROFILE names no profile of ~/.aws: correct it",
    "TokenRetrievalError": "the login has expired: run `aws sso login`",
}
# A forked process that let go of what it has inherited would close the connections of its parent,
# whose next request would then wait for ever.
_KEPT: list[Any] = []
_MAKING = threading.Lock()


class Listed(NamedTuple):
    """An object or directory below a listed place."""

    name: str
    """What follows the place and its slash, exactly as the store has it."""
    size: int
    """Bytes."""
    is_dir: bool


def is_s3(uri: str) -> bool:
    """Whether `uri` names an object on S3."""
    return uri.startswith(("s3://", "s3a://"))


def plain(uri: str) -> str:
    """An S3 URI with single slashes: two come from variables that end with one.

    Names that have them are escaped, see `storage.join`.
    """
    if not is_s3(uri):
        return uri
    base, question, query = uri.partition("?")
    scheme, mark, path = base.partition("://")
    return scheme + mark + re.sub("/+", "/", path.strip("/")) + question + query


def unescaped(path: str) -> str:
    """The name in the store of what a remote URI says; other uses of `%` stand for themselves."""
    return re.sub("%(3F|25|2F)", lambda found: {"3F": "?", "25": "%", "2F": "/"}[found[1]], path)


def locate(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a remote URI and the path inside it.

    Raises:
        InputError: the scheme has no driver here, or an option is unknown.
    """
    base, _, query = plain(uri).partition("?")
    scheme, _, path = base.partition("://")
    if is_s3(uri):
        path = unescaped(path)
        if "?versionId=" in path:
            raise OSError(errno.EINVAL, f"{uri}: s3fs takes ?versionId= in names for a version")
        return _s3(query), path
    url, options = f"{scheme}://{unescaped(path)}".rstrip("/"), dict(parse_qsl(query))
    if scheme in ("http", "https"):
        url, options = uri, {}
    try:
        filesystem, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    except (ValueError, ImportError, TypeError) as error:
        raise InputError(
            f"{base}: cannot open this kind of URI ({error}); use a local path, s3://..., or "
            "install the fsspec driver of the scheme"
        ) from error
    return filesystem, path


def _s3(query: str) -> Any:
    filesystem = fsspec.filesystem("s3", **_s3_options(query))
    with _MAKING:  # threads share the instance
        if filesystem.session is None:
            from aiobotocore.session import AioSession

            # Four fifths of the time of a listing went into times that nobody looks at.
            session = AioSession(**filesystem.kwargs)
            parsers = session.get_component("response_parser_factory")
            parsers.set_parser_defaults(timestamp_parser=str)
            filesystem.retries = S3_TRIES
            filesystem.session = session
            _KEPT.append(filesystem)
    return filesystem


@lru_cache(maxsize=32)
def _s3_options(query: str) -> dict[str, Any]:
    import s3fs.core

    # The answer to a HEAD has no body that could say more than its status.
    s3fs.core.set_custom_error_handler(lambda error: _status(error) in (500, 502, 503, 504))
    given = dict(parse_qsl(query))
    configured = fsspec.config.conf.get("s3", {})
    options: dict[str, Any] = {
        "use_listings_cache": False,
        "config_kwargs": {**S3_CONFIG, **configured.get("config_kwargs", {})},
    }
    scheme, region = given.pop("scheme", "https"), given.pop("region", None)
    if endpoint := given.pop("endpoint_override", None) or given.pop("endpoint_url", None):
        options["endpoint_url"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
    if region:
        options["client_kwargs"] = {**configured.get("client_kwargs", {}), "region_name": region}
    if profile := given.pop("profile", None):
        options["profile"] = profile
    # pyarrow's tuning of what it does itself.
    unknown = [name for name in given if not name.startswith(("allow_", "background_writes"))]
    if unknown:
        raise InputError(
            f"s3://...?{query}: {unknown[0]!r} is no option; there are endpoint_override, scheme, "
            "region and profile"
        )
    return options


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None) or {}
    code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(code) if code else None


def arrow_s3(uri: str) -> pafs.FileSystem:
    """pyarrow's own client for the store of `uri`, with the settings that s3fs has found."""
    from aiobotocore.credentials import AioCredentials

    filesystem, _ = locate(uri)
    with told(uri):
        client = filesystem.s3
        credentials = sync(filesystem.loop, filesystem.session.get_credentials)
    endpoint = client.meta.endpoint_url
    options: dict[str, Any] = {"anonymous": True} if filesystem.anon else {}
    if filesystem.key:
        options = {"access_key": filesystem.key, "secret_key": filesystem.secret}
        options["session_token"] = filesystem.token
    elif type(credentials) is AioCredentials:
        options = {"access_key": credentials.access_key, "secret_key": credentials.secret_key}
        options["session_token"] = credentials.token
    # Those that expire pyarrow finds and renews by itself, from the same places.
    if "amazonaws.com" not in endpoint:
        options["scheme"], _, options["endpoint_override"] = endpoint.partition("://")
    return _arrow_s3(os.getpid(), client.meta.region_name, tuple(sorted(options.items())))


@lru_cache(maxsize=32)
def _arrow_s3(pid: int, region: str, options: tuple[tuple[str, Any], ...]) -> pafs.FileSystem:
    del pid  # a forked process has its own
    return pafs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **dict(options))


def code_of(error: BaseException | None) -> str:
    """What S3 calls a failure (`NoSuchBucket`), or else the name of the exception."""
    while error is not None:
        if code := (getattr(error, "response", None) or {}).get("Error", {}).get("Code"):
            return str(code)
        if error.__cause__ is None:
            return type(error).__name__
        error = error.__cause__
    return ""


@contextlib.contextmanager
def told(uri: str) -> Iterator[None]:
    """Failures of a store as OSErrors that name the URI and have a number.

    Raises:
        FileNotFoundError: the object is not there.
        PermissionError: it may not be touched.
        StoreError: bucket or credentials are wrong; nothing there can be touched.
        OSError: anything else, which the driver tried again in vain.
    """
    place = uri.partition("?")[0]
    try:
        # Drivers give up on a store that says nothing, and never on one that sends a byte a second.
        with said_if_slow(printable(place), SLOW_SECONDS):
            yield
    except (InputError, FileExistsError):
        raise
    except Exception as error:
        code = code_of(error)
        if code in REMEDIES:
            bucket = "/".join(place.split("/")[:3])
            raise StoreError(f"{bucket}: {REMEDIES[code]}") from error
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "there is no such object", place) from error
        if isinstance(error, PermissionError):
            raise PermissionError(errno.EACCES, said, place) from error
        if isinstance(error, OSError) and error.errno == errno.EINVAL:
            raise OSError(errno.EINVAL, said, place) from error
        raise OSError(errno.EIO, said, place) from error


def info(uri: str) -> dict[str, Any]:
    """What fsspec says of a remote file or directory: its `type`, and a file's `size` in bytes."""
    filesystem, path = locate(uri)
    try:
        with told(uri):
            found: dict[str, Any] = filesystem.info(path)
            return found
    except PermissionError as error:
        if code_of(error) == "403":
            # The answer to a HEAD says no more; that to a GET has the reason.
            with told(uri):
                filesystem.cat_file(path, start=0, end=1)
        raise


def listed(uri: str, above: str = "", *, recursive: bool = False) -> Iterator[Listed]:
    """What lies below a remote directory; nothing where there is none. In no order.

    Directory markers of object stores are left out, unless they have bytes.

    Args:
        above: Directories below `uri` with their slashes, exactly as the store has them.
    """
    filesystem, path = locate(uri)
    if is_s3(uri):
        yield from listed_s3(uri, filesystem, path, above, recursive)
        return
    place = f"{path.rstrip('/')}/{above}".rstrip("/")
    with told(uri):
        try:
            if recursive:
                found = list(filesystem.find(place, detail=True).values())
            else:
                found = filesystem.ls(place, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return
    for record in found:
        name = record["name"].rstrip("/")
        if name.startswith(place + "/"):
            is_dir = record["type"] == "directory"
            yield Listed(name[len(place) + 1 :], int(record.get("size") or 0), is_dir)


def listed_s3(
    uri: str, filesystem: Any, path: str, above: str, recursive: bool, *, markers: bool = False
) -> Iterator[Listed]:
    bucket, key, _ = filesystem.split_path(path)
    prefix = (key + "/" if key else "") + above
    request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "" if recursive else "/"}
    while True:
        with told(uri):
            page = filesystem.call_s3("list_objects_v2", **request)
        for record in page.get("Contents", []):
            name, size = record["Key"][len(prefix) :], int(record["Size"])
            if markers or size or (name and not name.endswith("/")):
                yield Listed(name, size, is_dir=False)
        for record in page.get("CommonPrefixes", []):
            yield Listed(record["Prefix"][len(prefix) : -1], 0, is_dir=True)
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


class RemoteFile:
    """A remote file for reading: every `read` is one ranged request, nothing is read ahead."""

    def __init__(self, uri: str, size: int | None = None) -> None:
        """`size` in bytes saves asking for it. Raises as `told` does."""
        self.uri, self.position, self.closed = uri, 0, False
        self.filesystem, self.path = locate(uri)
        if size is None:
            found = info(uri)
            if found["type"] != "file":
                raise FileNotFoundError(errno.ENOENT, "there is no such object", uri)
            size = int(found["size"])
        self.size = size

    def seek(self, position: int, whence: int = 0) -> int:
        """As files do."""
        self.position = position + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        """Bytes before the next read."""
        return self.position

    def read(self, length: int | None = None) -> bytes:
        """The next bytes; fewer at the end only."""
        left = max(0, self.size - self.position)
        length = left if length is None or length < 0 else min(length, left)
        if not length:
            return b""
        first, self.position = self.position, self.position + length
        with told(self.uri):
            data: bytes = self.filesystem.cat_file(self.path, start=first, end=first + length)
            if len(data) != length:
                raise OSError(errno.EIO, f"{len(data)} bytes at {first} instead of {length}")
        return data

    def flush(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """There is nothing to give back."""
        self.closed = True
