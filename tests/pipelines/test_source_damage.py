"""Files that are damaged, gone or refused: rejected with a reason, and never the end of a job."""

import bz2
import errno
import gzip
import io
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError, StoreError
from pipelines.preparation import readers
from pipelines.preparation.failures import file_failure
from pipelines.preparation.parquet_footers import Footer, read_footers
from pipelines.preparation.parquet_source import ParquetPlan
from pipelines.preparation.readers import Item, Reader
from pipelines.preparation.report import remedy
from pipelines.preparation.sources import open_source
from pipelines.preparation.tars import MAX_PADDING, tar_members
from pipelines.preparation.walking import Entry
from tests.pipelines.image_sources import encoded, hf_table, tar_bytes, write_parquet

FRAGILE = "tests.pipelines.image_sources:fragile_footers"
DENIED = PermissionError(errno.EACCES, "Access Denied", "s3://x/y/b.jpg")


def planned(root: Path, **options) -> tuple[Reader, list[Entry]]:
    source = open_source(str(root))
    plan = ParquetPlan(PrepareConfig(source=source.uri, output="unused", **options), source)
    reader = Reader(root=source.root, format="parquet", labels="none", max_image_bytes=10**6)
    entries = list(plan.entries())
    return plan.with_columns(reader), entries


def outcomes(items: list[Item]) -> dict[str, str]:
    return {item.key: item.reason for item in items}


# Tars


def damaged_tar(damage: str) -> tuple[bytes, int]:
    """A tar, and how many of its members can be had."""
    data = bytearray(tar_bytes([(f"{i:02d}.jpg", encoded(i)) for i in range(50)]))
    headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
    tenth = headers[10]
    if damage == "zeros for a header":
        data[tenth : tenth + 512] = bytes(512)
    elif damage == "a second archive":
        return bytes(data) + tar_bytes([("x.jpg", encoded(1))]), 50
    elif damage == "zeros without end":
        return bytes(data) + bytes(MAX_PADDING), 50
    else:
        size = {"a huge size": b"\x80" + b"\x7f" * 11, "a negative size": b"\xff" * 12}[damage]
        data[tenth + 124 : tenth + 136] = size
        header = data[tenth : tenth + 512]
        header[148:156] = b" " * 8
        data[tenth + 148 : tenth + 156] = b"%06o\0 " % sum(header)
        return bytes(data), 10
    return bytes(data), 10


@pytest.mark.parametrize(
    "damage",
    [
        "zeros for a header",
        "a second archive",
        "zeros without end",
        "a huge size",
        "a negative size",
    ],
)
def test_the_lost_rest_of_a_tar_is_told(tmp_path: Path, damage: str) -> None:
    data, whole = damaged_tar(damage)
    (tmp_path / "bad.tar").write_bytes(data)
    source = open_source(str(tmp_path))
    reader = Reader(root=source.root, format="webdataset", labels="none", max_image_bytes=10**6)
    items = list(reader.items(list(source.entries())))
    assert sum(not item.reason for item in items) == whole
    lost = [item for item in items if item.reason == "bad_tar"]
    assert [item.key for item in lost] == ["bad.tar"]
    assert 0 < lost[0].size < len(data)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_that_is_compressed_in_spite_of_its_name_is_told(tmp_path: Path, pack) -> None:
    (tmp_path / "a.tar").write_bytes(pack(tar_bytes([("a.jpg", encoded(1))])))
    reader = Reader(root=str(tmp_path), format="webdataset", labels="none", max_image_bytes=10**6)
    items = list(reader.items(list(open_source(str(tmp_path)).entries())))
    assert outcomes(items) == {"a.tar": "compressed_tar"}
    assert "unpack it to .tar" in remedy({"compressed_tar": 1})


def test_padding_is_no_damage() -> None:
    data = tar_bytes([("a.jpg", encoded(1))])
    assert tar_members(io.BytesIO(data + bytes(100_000)))[1] is None


@pytest.mark.parametrize(("number", "reason"), [(errno.EIO, "unreadable"), (errno.EMFILE, "")])
def test_a_refused_tar_is_one_item(tmp_path: Path, monkeypatch, number: int, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([("a.jpg", encoded(1))]))
    reader = Reader(root=str(tmp_path), format="webdataset", labels="none", max_image_bytes=10**6)

    def refused(*_):
        raise OSError(number, "no")

    for name, key in [("tar_members", "a.tar"), ("member_bytes", "a.tar/a.jpg")]:
        with monkeypatch.context() as patched:
            patched.setattr(readers, name, refused)
            if reason:
                items = list(reader.items([Entry(path="a.tar", size=5)]))
                assert outcomes(items) == {key: reason}
            else:
                with pytest.raises(OSError, match="no"):
                    list(reader.items([Entry(path="a.tar", size=5)]))


def test_a_member_without_a_name_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([(".jpg", encoded(1))]))
    reader = Reader(root=str(tmp_path), format="webdataset", labels="none", max_image_bytes=10**6)
    [item] = reader.items([Entry(path="a.tar", size=5)])
    assert (item.key, item.reason, item.ignored) == ("a.tar/.jpg", "hidden", True)


# What is the file's fault


@pytest.mark.parametrize(
    ("uri", "error", "reason"),
    [
        ("/d/a", FileNotFoundError(2, "no"), "missing"),
        ("/d/a", PermissionError(13, "no"), "unreadable"),
        ("/d/a", OSError(errno.EIO, "no"), "unreadable"),
        ("/d/a", OSError("Couldn't deserialize thrift"), "damaged"),
        ("/d/a", pa.ArrowInvalid("no"), "damaged"),
        ("/d/a", OverflowError("no"), "damaged"),
        ("s3://b/a", OSError("Unexpected end of stream: Page was smaller"), "damaged"),
        ("s3://b/a", DENIED, "unreadable"),
        ("s3://b/a", FileNotFoundError("b/a"), "missing"),
        ("/d/a", OSError(errno.EMFILE, "no"), None),
        ("/d/a", InputError("no"), None),
        ("/d/a", MemoryError("no"), None),
        ("s3://b/a", OSError(errno.EIO, "Please reduce your request rate"), None),
        ("s3://b/a", OSError(errno.EIO, "Unexpected end of stream"), None),
        ("s3://b/a", StoreError("s3://b: no credentials were found"), None),
    ],
)
def test_a_failure_is_the_files_or_the_moments(monkeypatch, uri, error, reason) -> None:
    monkeypatch.setattr(storage, "exists", lambda _: True)
    if reason:
        assert file_failure(error, uri, "root", damaged="damaged") == reason
    else:
        with pytest.raises(type(error)):
            file_failure(error, uri, "root", damaged="damaged")


def test_a_source_that_is_gone_as_a_whole_rejects_nothing(tmp_path: Path) -> None:
    reader = Reader(root=str(tmp_path / "x"), format="folder", labels="none", max_image_bytes=9)
    with pytest.raises(FileNotFoundError):
        list(reader.items([Entry(path="a.jpg", size=1)]))


def test_an_object_that_is_refused_is_one_item(monkeypatch) -> None:
    def read(uri: str) -> bytes:
        if uri.endswith("b.jpg"):
            raise DENIED
        return b"1"

    monkeypatch.setattr(storage, "read_bytes", read)
    monkeypatch.setattr(storage, "exists", lambda _: True)
    reader = Reader(root="s3://x/y", format="folder", labels="none", max_image_bytes=9)
    items = list(reader.items([Entry(path=name, size=1) for name in ("a.jpg", "b.jpg", "c.jpg")]))
    assert outcomes(items) == {"a.jpg": "", "b.jpg": "unreadable", "c.jpg": ""}


# Parquet


def test_a_footer_that_kills_its_reader_costs_its_file(tmp_path: Path) -> None:
    names = [f"{i}.parquet" for i in range(6)]
    for name in [*names, "3-deadly.parquet", "5-deadly.parquet"]:
        write_parquet(tmp_path / name, hf_table([encoded(1)], [0], ["x"]))
    entries = [Entry(path=path.name, size=1) for path in sorted(tmp_path.iterdir())]
    found = {
        entry.path: footer if isinstance(footer, str) else footer.rows
        for entry, footer in read_footers(str(tmp_path), entries, reader=FRAGILE)
    }
    dead = {"3-deadly.parquet": "bad_parquet", "5-deadly.parquet": "bad_parquet"}
    assert found == dict.fromkeys(names, (1,)) | dead


def test_files_that_are_no_parquet_cost_themselves_only(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", hf_table([encoded(1)], [0], ["x"]))
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data.replace(b"label", b"\xffabel"))
    (tmp_path / "c.parquet").write_bytes(b"text")
    (tmp_path / "d.parquet").symlink_to("nowhere")
    reader, entries = planned(tmp_path)
    assert outcomes(list(reader.items(entries))) == {
        "a.parquet/0000000000": "",
        "b.parquet": "bad_parquet",
        "c.parquet": "bad_parquet",
        "d.parquet": "missing",
    }


def test_a_parquet_file_that_goes_away_or_changes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", hf_table([encoded(1)] * 3, [0] * 3, ["x"]))
    for options in ({}, {"key_field": "label"}):
        reader, entries = planned(tmp_path, **options)
        kept = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").unlink()
        items = list(reader.items(entries))
        assert [item.reason for item in items] == ["missing"] * 3 + [""] * 3
        for other in (
            hf_table([encoded(1)] * 2, [0] * 2, ["x"]),
            hf_table([encoded(2, height=50)] * 3, [0] * 3, ["x"]),
            hf_table([encoded(1)] * 3, [0] * 3, ["x"]).drop_columns("label"),
        ):
            write_parquet(tmp_path / "a.parquet", other)
            with pytest.raises(InputError, match=r"a\.parquet changed since it was listed; remove"):
                list(reader.items(entries))
        (tmp_path / "a.parquet").write_bytes(kept)


def test_text_that_is_no_utf8_costs_its_row(tmp_path: Path) -> None:
    names = ["aaaa", "bXXb", "cccc"]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([{"bytes": encoded(i), "path": "pXXp"} for i in range(3)], struct),
        "key": pa.array(names),
        "label": pa.array(["x", "y", "lXXl"]),
        "who": pa.array(names),
    }
    write_parquet(tmp_path / "a.parquet", pa.table(columns))
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"XX", b"\xff\xff"))
    reader, entries = planned(tmp_path, label_field="label", key_field="key", group_field="who")
    items = list(reader.items(entries))
    assert {item.key: (item.label, item.reason) for item in items} == {
        "a.parquet/0000000001": (None, "bad_name"),
        "a.parquet/aaaa": (0, ""),
        "a.parquet/cccc": (None, "bad_label"),
    }


def test_a_column_may_be_named_like_a_file(tmp_path: Path) -> None:
    images = pa.array([encoded(i) for i in range(3)])
    write_parquet(tmp_path / "a.parquet", pa.table({"image.jpg": images}))
    reader, entries = planned(tmp_path)
    assert entries[0].size > 0
    assert [item.data for item in reader.items(entries)] == images.to_pylist()


def test_footers_tell_rows_and_bytes(tmp_path: Path) -> None:
    table = hf_table([encoded(i) for i in range(6)], [0] * 6, ["x"])
    write_parquet(tmp_path / "a.parquet", table)
    [(_, footer)] = read_footers(str(tmp_path), [Entry(path="a.parquet", size=1)])
    assert isinstance(footer, Footer)
    assert footer.rows == (4, 2) and footer.schema.equals(table.schema, check_metadata=True)
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(0)
    struct = [group.column(position).total_compressed_size for position in (0, 1)]
    assert footer.image_bytes["image"][0] == sum(struct)
