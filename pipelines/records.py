"""Records: the JSON files that stages leave for each other, checked before anything is taken out.

What a record must look like is a TypedDict or a dataclass beside its use. Disks flip bits and
people edit files, so whatever stands in one may be anything; it is either as stated or an
`InputError` that names file and field.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pipelines import storage
from pipelines.errors import DamagedFileError, InputError, parsing, printable

Form = TypeVar("Form")

Count = NonNegativeInt
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]
FileName = Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]
"""A name inside the directory of its record, and nowhere else."""
Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
"""As `storage.digest` writes it."""
MAX_SHOWN = 100


SEAL = "seal"
"""The field of a record that holds the hash of the others."""
SEALED = "_sealed"
"""Says at the other end of the file that there is a seal, for damage that takes one of them."""


class FileRecord(TypedDict):
    """What a manifest or marker says of a file."""

    bytes: Count
    hash: Hash


def write_record(
    uri: str, values: Mapping[str, Any], *, check: Callable[[], None] = storage.unchecked
) -> None:
    """Writes a record atomically, sealed by the hash of what it says.

    `check` as in `storage.write_bytes`.
    """
    storage.write_bytes(uri, encode_record(values), check=check)


def encode_record(values: Mapping[str, Any]) -> bytes:
    """The bytes of a sealed record."""
    return storage.canonical_json({SEALED: True, **values, SEAL: storage.fingerprint(values)})


def read_record(uri: str, form: type[Form], remedy: str) -> Form:
    """The record at `uri`, as an instance of the dataclass `form`.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is not JSON, not of this form, or was changed after it was written; names
            file and field, ends with `remedy`.
    """
    values = _unsealed(uri, remedy)
    adapter: TypeAdapter[Form] = _adapter(form)  # type: ignore[arg-type]
    with _told(uri, remedy):
        return adapter.validate_json(storage.canonical_json(values), strict=True)


def read_values(uri: str, form: Any, remedy: str) -> dict[str, Any]:
    """The record at `uri` as plain values, of the TypedDict `form`. Raises as `read_record`."""
    values: dict[str, Any] = check_values(_unsealed(uri, remedy), form, uri, remedy)
    return values


def _unsealed(uri: str, remedy: str) -> Any:
    values = storage.read_json(uri)
    # Earlier releases wrote no seals.
    if isinstance(values, dict) and (SEAL in values or SEALED in values):
        values.pop(SEALED, None)
        seal = values.pop(SEAL, "none")
        with parsing(uri, remedy):
            found = storage.fingerprint(values)
        if found != seal:
            raise DamagedFileError(f"{uri}: it was changed after it was written; {remedy}")
    return values


def check_values(values: Any, form: Any, uri: str, remedy: str) -> Any:
    """`values` themselves, if they are of the TypedDict `form`. Raises as `read_record`."""
    with _told(uri, remedy):
        _adapter(form).validate_python(values, strict=True)
    return values


def refuse_other_kinds(values: Any, uri: str, *, kind: str, versions: Sequence[int]) -> None:
    """Raises InputError for a manifest of another kind or version."""
    found = values.get("kind") if isinstance(values, dict) else None
    if found != kind:
        article = "an" if kind[0] in "aeiou" else "a"
        raise InputError(
            f"{uri}: kind is {found!r}, not {kind!r}; give {article} {kind.replace('_', ' ')}"
        )
    if values.get("schema_version") not in versions:
        raise InputError(
            f"{uri}: schema_version {values.get('schema_version')!r}, this program reads "
            f"{' and '.join(map(str, versions))}; make it again with this release"
        )


@lru_cache(maxsize=64)
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


@contextlib.contextmanager
def _told(uri: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        found = repr(first["input"])
        if len(found) > MAX_SHOWN:
            found = found[:MAX_SHOWN] + "..."
        raise DamagedFileError(
            printable(f"{uri}: {field}: {first['msg']}, not {found}; {remedy}")
        ) from error
