"""Images in Parquet, in every form in which writers leave bytes."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.config.prepare import PrepareConfig
from pipelines.preparation.parquet_source import ParquetPlan
from pipelines.preparation.readers import Reader
from pipelines.preparation.sources import open_source
from tests.pipelines.image_sources import encoded, write_parquet

IMAGES = [encoded(1), None, encoded(2), encoded(1), encoded(3)]
ROWS = [None if data is None else {"bytes": data, "path": "a.jpg"} for data in IMAGES]


def struct(kind: pa.DataType) -> pa.DataType:
    return pa.struct([("bytes", kind), ("path", pa.string())])


class _Own(pa.ExtensionType):
    """A type of a writer's own."""

    def __init__(self, storage_type: pa.DataType) -> None:
        super().__init__(storage_type, "tests.image")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls(storage_type)


def own(array: pa.Array) -> pa.Array:
    return pa.ExtensionArray.from_storage(_Own(array.type), array)


def read(root: Path, **options) -> list[bytes | None]:
    source = open_source(str(root))
    plan = ParquetPlan(PrepareConfig(source=source.uri, output="unused", **options), source)
    entries = list(plan.entries())
    assert all(entry.size > 0 for entry in entries)
    plain = Reader(root=source.root, format="parquet", labels="none", max_image_bytes=10**6)
    items = list(plan.with_columns(plain).items(entries))
    assert {item.reason for item in items if not item.data} <= {"no_image"}
    return [item.data or None for item in items]


FORMS = {
    "binary": pa.array(IMAGES, pa.binary()),
    "large_binary": pa.array(IMAGES, pa.large_binary()),
    "binary_view": pa.array(IMAGES, pa.binary_view()),
    "dictionary": pa.array(IMAGES).dictionary_encode(),
    "struct": pa.array(ROWS, struct(pa.binary())),
    "struct of large": pa.array(ROWS, struct(pa.large_binary())),
    "struct of views": pa.array(ROWS, struct(pa.binary_view())),
    "extension": own(pa.array(IMAGES)),
    "extension of a struct": own(pa.array(ROWS, struct(pa.binary()))),
}


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_images_in_every_form_that_writers_leave(tmp_path: Path, form, registered) -> None:
    write_parquet(tmp_path / "a.parquet", pa.table({"image": FORMS[form]}), rows_per_group=5)
    if registered:
        pa.register_extension_type(_Own(pa.binary()))
    try:
        assert read(tmp_path) == IMAGES
        assert read(tmp_path, image_field="image") == IMAGES
    finally:
        if registered:
            pa.unregister_extension_type("tests.image")
