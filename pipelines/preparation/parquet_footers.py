"""What the footers of Parquet files say, read in child processes.

A damaged footer may do more than fail: Arrow ends the process for some, and the driver must
survive every file of a source.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.preparation.ahead import mapped_ahead
from pipelines.preparation.child import run_child
from pipelines.preparation.failures import file_failure
from pipelines.preparation.labels import MAX_CLASSES, kind_of, stored_type
from pipelines.preparation.parquet_rows import image_bytes, stored
from pipelines.preparation.walking import Entry
from pipelines.tables.class_names import comparable

FILES_PER_CHILD = 256
CHILDREN = 2
THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What is needed of a file's footer."""

    schema: pa.Schema
    rows: tuple[int, ...]
    """Of each row group."""
    image_bytes: dict[str, list[int]]
    """By column that may hold images: its bytes in each row group."""
    texts: tuple[str, ...]
    """The different texts of the column that was asked for, if it holds texts."""


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type can be one of encoded images."""
    kind = stored_type(kind)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_images(field.type) for field in kind)
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def read_footers(
    root: str, entries: Iterable[Entry], *, texts_of: str = "", reader: str = ""
) -> Iterator[tuple[Entry, Footer | str]]:
    """Every file in order, with its footer, or with the reason to ignore or reject it.

    Args:
        texts_of: A column of texts, to be read as well.
        reader: `module:function` that does `answer`'s work in the child.

    Raises:
        OSError: the store does not answer, in spite of retries.
    """
    rest = iter(entries)

    def read(some: list[Entry]) -> list[tuple[Entry, Footer | str]]:
        paths = [entry.path for entry in some if not (entry.ignored or entry.reason)]
        answers = _answers(root, paths, texts_of, reader or f"{__name__}:{answer.__name__}")
        return [(entry, entry.ignored or entry.reason or next(answers)) for entry in some]

    chunks = iter(lambda: list(islice(rest, FILES_PER_CHILD)), [])
    for chunk in mapped_ahead(read, chunks, num_threads=CHILDREN):
        yield from chunk


def _answers(root: str, paths: Sequence[str], texts_of: str, reader: str) -> Iterator[Footer | str]:
    """Answers of a child, and of further ones for what a file that killed it left unanswered."""
    if not paths:
        return
    child = run_child(reader, json.dumps([root, list(paths), texts_of]))
    if child.error:
        raise RuntimeError(f"{paths[0]} to {paths[-1]}: {child.error}")
    lines = child.output.splitlines(keepends=True)
    given = [json.loads(line) for line in lines if line.endswith(b"\n")]
    yield from map(_parsed, given)
    left = paths[len(given) :]
    if len(paths) == 1 and left:
        yield "bad_parquet"
        return
    middle = (len(left) + 1) // 2
    yield from _answers(root, left[:middle], texts_of, reader)
    yield from _answers(root, left[middle:], texts_of, reader)


def _parsed(record: dict[str, Any]) -> Footer | str:
    if "error" in record:
        raise OSError(record["error"])
    if "reason" in record:
        return str(record["reason"])
    return Footer(
        schema=pa.ipc.read_schema(pa.BufferReader(base64.b64decode(record["schema"]))),
        rows=tuple(record["rows"]),
        image_bytes=record["image_bytes"],
        texts=tuple(record["texts"]),
    )


# In the child


def answer(text: str) -> None:
    """Prints a line of JSON for each file; `text` is the JSON of [root, paths, texts_of]."""
    root, paths, texts_of = json.loads(text)

    def read(path: str) -> dict[str, Any]:
        uri = storage.join(root, path)
        try:
            return _read(uri, texts_of)
        except Exception as error:  # whatever is wrong with one file, the others are read
            return _failed(error, uri, root)

    for record in mapped_ahead(read, paths, num_threads=THREADS):
        print(json.dumps(record), flush=True)


def _failed(error: Exception, uri: str, root: str) -> dict[str, Any]:
    try:
        return {"reason": file_failure(error, uri, root, damaged="bad_parquet")}
    except Exception as passing:
        return {"error": f"{uri}: {type(passing).__name__}: {passing}"}


def _read(uri: str, texts_of: str) -> dict[str, Any]:
    with storage.open_input(uri) as source:
        file = pq.ParquetFile(source)
        schema = file.schema_arrow
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        images = [field.name for field in schema if holds_images(field.type)]
        return {
            "schema": base64.b64encode(schema.serialize()).decode(),
            "rows": [group.num_rows for group in groups],
            "image_bytes": {name: [image_bytes(one, name) for one in groups] for name in images},
            "texts": sorted(_texts(file, texts_of)) if _holds_text(schema, texts_of) else [],
        }


def _holds_text(schema: pa.Schema, column: str) -> bool:
    # Of two columns of one name neither is meant; the plan refuses them.
    return schema.names.count(column) == 1 and kind_of(schema.field(column).type) == "text"


def _texts(file: pq.ParquetFile, column: str) -> set[str]:
    """The different names of a column; no more than it takes to see that they are too many."""
    texts: set[str] = set()
    for batch in file.iter_batches(columns=[column]):
        for scalar in stored(batch.column(column)).unique():
            try:
                texts.add(comparable(scalar.as_py() or ""))
            except UnicodeDecodeError:  # its rows are rejected when their turn comes
                continue
        if len(texts) > MAX_CLASSES:
            break
    return texts - {""}
