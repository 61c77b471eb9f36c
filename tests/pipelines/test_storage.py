"""Names of files below URIs, creation, and what failures say, without a server."""

import errno
import io
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from botocore.exceptions import ClientError, NoCredentialsError
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from pipelines import storage, store_writes, stores
from pipelines.errors import InputError, LeaseLost, StoreError
from pipelines.preparation.sources import open_source

NAMES = ["a b.jpg", "what?.jpg", "img.jpg?w=300", "100%.jpg", "50%25.jpg", "a#b.jpg", "ü.jpg"]


class Careless(MemoryFileSystem):
    """Overwrites whatever it is told, as several stores do."""

    protocol = "careless"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value)


fsspec.register_implementation("careless", Careless, clobber=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("root", ["local", "memory://names/wh%3Fy"])
def test_any_file_name_is_found_again(tmp_path, name, root):
    root = str(tmp_path / "wh?y") if root == "local" else f"{root}/{tmp_path.name}"
    uri = storage.join(root, "part", name)
    storage.write_bytes(uri, b"12")
    assert storage.read_bytes(uri) == b"12" and storage.exists(uri)
    assert [(file.path, file.size) for file in storage.list_files(root)] == [(f"part/{name}", 2)]
    with storage.open_input(uri) as file:
        assert (file.size(), file.read()) == (2, b"12")
    assert [entry.path for entry in open_source(root).entries()] == [f"part/{name}"]
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri) and storage.list_files(root) == []


def test_a_local_name_is_the_name_on_disk(tmp_path):
    storage.write_bytes(storage.join(str(tmp_path), "wh?y", "50%25"), b"1")
    assert (tmp_path / "wh?y" / "50%25").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("img.jpg?w=300", "img.jpg%3Fw=300"),
        ("img.jpg%3Fw=300", "img.jpg%253Fw=300"),
        ("100%.jpg", "100%25.jpg"),
        ("a%25b%20c", "a%2525b%2520c"),
        ("a//2.png", "a/%2F2.png"),
        ("/4.png", "%2F4.png"),
        ("///", "%2F%2F%2F"),
    ],
)
def test_no_character_of_an_object_name_is_taken_for_syntax(name, escaped):
    uri = storage.join("s3://bucket/images?region=mars", name)
    assert uri == f"s3://bucket/images/{escaped}?region=mars"
    assert stores.locate(uri)[1] == f"bucket/images/{name}"


def test_what_is_typed_is_read_with_mercy():
    assert stores.locate("s3://bucket/50% of %20?region=mars")[1] == "bucket/50% of %20"
    assert stores.locate("s3://bucket//data//train//")[1] == "bucket/data/train"


def test_file_uris_are_uris(tmp_path):
    folder = tmp_path / "my 100% pictures?"
    storage.write_bytes(storage.join(folder.as_uri(), "a#b.png"), b"1")
    assert (folder / "a#b.png").read_bytes() == b"1"
    for uri in (folder.as_uri(), f"file:{folder.as_uri().removeprefix('file://')}", str(folder)):
        assert storage.absolute(uri) == str(folder)
        assert [file.path for file in storage.list_files(uri)] == ["a#b.png"]
    assert storage.absolute("file://localhost/a%20b") == "/a b"
    with pytest.raises(InputError, match=r"a\\x00b.*no path holds"):
        storage.absolute("a\0b")
    assert storage.absolute("a:b") == str(Path("a:b").absolute())


def test_a_name_that_climbs_is_not_fetched(tmp_path):
    storage.write_bytes("memory://climbing/x/good", b"1")
    MemoryFileSystem.store["/climbing/x/../../evil"] = MemoryFileSystem.store["/climbing/x/good"]
    try:
        with pytest.raises(InputError, match="evil"):
            storage.fetch_dir("memory://climbing/x", tmp_path / "target")
    finally:
        del MemoryFileSystem.store["/climbing/x/../../evil"]
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("root", ["local", "memory://claims"])
def test_one_of_many_creates(tmp_path, root):
    root = str(tmp_path) if root == "local" else f"{root}/{tmp_path.name}"
    uri = storage.join(root, "claim")
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("error")
        if root.startswith("memory"):  # it looks, then writes: only one at a time is safe
            won = [storage.create(uri, b"%d" % number) for number in range(8)]
        else:
            won = list(pool.map(lambda number: storage.create(uri, b"%d" % number), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)
    assert [file.path for file in storage.list_files(root)] == ["claim"]


def test_what_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("manifest.json", "null"):
        for read in (storage.read_bytes, storage.open_input, storage.open_shared):
            with pytest.raises(InputError, match=f"{name}: is no file, but a pipe"):
                read(str(tmp_path / name))


def test_of_a_folder_that_may_be_the_wrong_one_only_what_is_meant_is_copied(tmp_path):
    for name in ("config.json", "part-00000.parquet", "deep/weights.safetensors"):
        storage.write_bytes(str(tmp_path / "in" / name), b"1")
    storage.fetch_dir(str(tmp_path / "in"), tmp_path / "out", suffixes=(".json", ".safetensors"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    with pytest.raises(FileNotFoundError):
        storage.fetch_dir(str(tmp_path / "in"), tmp_path / "none", suffixes=(".pth",))


def test_a_store_that_overwrites_is_named_once():
    with pytest.warns(UserWarning, match=r"careless://store cannot create .* only if") as seen:
        assert storage.create("careless://store/a", b"1")
        assert not storage.create("careless://store/a", b"2")
        assert storage.create("careless://store/b", b"1")
    assert len(seen) == 1
    assert storage.read_bytes("careless://store/a") == b"1"
    assert {file.path for file in storage.list_files("careless://store")} == {"a", "b"}


def test_an_outage_is_no_missing_promise(monkeypatch):
    """Asked in an outage, a store says nothing of itself; asked again, it answers."""
    monkeypatch.setattr(store_writes, "_PROBED", {})
    uri = "memory://outage/a"
    with monkeypatch.context() as patch:

        def away(*args, **options):
            raise TimeoutError("no answer")

        patch.setattr(MemoryFileSystem, "pipe_file", away)
        with warnings.catch_warnings(), pytest.raises(OSError, match="no answer"):
            warnings.simplefilter("error")
            storage.create(uri, b"1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert storage.create(uri, b"1")
    assert [name for name in MemoryFileSystem.store if name.startswith("/outage")] == ["/outage/a"]


def test_a_remote_disk_never_shows_half_a_file(monkeypatch):
    """A driver that writes by opening shows what it has so far; it renames what is whole."""
    seen = []

    class RemoteDisk(AbstractFileSystem):
        protocol = "remotedisk"
        files: ClassVar[dict[str, bytes]] = {}

        def makedirs(self, path, exist_ok=False):
            pass

        def _open(self, path, mode="rb", **options):
            files = self.files

            class Growing(io.BytesIO):
                def write(self, data):
                    super().write(data[: len(data) // 2])
                    files[path] = self.getvalue()
                    seen.append(dict(files))
                    super().write(data[len(data) // 2 :])
                    files[path] = self.getvalue()

            return Growing()

        def mv(self, path1, path2, **options):
            self.files[path2] = self.files.pop(path1)

    fsspec.register_implementation("remotedisk", RemoteDisk, clobber=True)
    storage.write_bytes("remotedisk://host/dir/file", b"12345678")
    assert [list(files.values()) for files in seen] == [[b"1234"]]
    assert all(name.endswith(".tmp") for files in seen for name in files)
    assert list(RemoteDisk.files.values()) == [b"12345678"]
    assert next(iter(RemoteDisk.files)).endswith("dir/file")


@pytest.mark.parametrize("put", [storage.write_bytes, storage.create])
def test_what_stood_still_before_its_rename_does_not_arrive(tmp_path, monkeypatch, put):
    """Another driver began meanwhile; who was not taken over from tries again."""
    target, begun = tmp_path / "metrics.jsonl", []

    def begins(_):
        if not begun:
            begun.append(True)
            storage.remove_half_written(str(tmp_path), below="_lease")

    def overtaken():
        if begun:
            raise LeaseLost

    for name in ("replace", "link"):
        owner = Path if name == "replace" else os
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *two, real=real: (begins(two), real(*two))[1])
    with pytest.raises(LeaseLost):
        put(str(target), b"old", check=overtaken)
    assert not list(tmp_path.iterdir())
    begun.clear()
    put(str(target), b"ours")
    assert begun
    assert target.read_bytes() == b"ours"


def test_half_written_files_of_others_stay(tmp_path):
    names = (".a.json.0a1b2c3d.tmp", "in/.b.0a1b2c3d.tmp", "_lease/.c.0a1b2c3d.tmp", "in/d.tmp")
    names += ("other/_lease/e.json", "other/.f.0a1b2c3d.tmp")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    storage.remove_half_written(str(tmp_path), below="_lease")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(names[2:])


def test_a_disk_without_links_is_named(tmp_path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    uri = str(tmp_path / "a")
    with pytest.warns(UserWarning, match="cannot create a file only if it is absent"):
        assert storage.create(uri, b"1")
    assert not storage.create(uri, b"2")


def client_error(code: str, status: int = 400) -> ClientError:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "GetObject")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (client_error("NoSuchBucket", 404), StoreError, r"^s3://b: there is no such bucket: creat"),
        (NoCredentialsError(), StoreError, r"^s3://b: no credentials .* set AWS_PROFILE"),
        (client_error("ExpiredToken"), StoreError, "log in again"),
        (FileNotFoundError("The specified key does not exist."), FileNotFoundError, "s3://b/k'"),
        (PermissionError("Access Denied"), PermissionError, r"Access Denied.*s3://b/k'"),
        (client_error("SlowDown", 503), OSError, "SlowDown"),
        (RuntimeError("of a driver"), OSError, "of a driver"),
    ],
)
def test_failures_are_os_errors_with_a_number(error, kind, message):
    with pytest.raises(kind, match=message) as raised, stores.told("s3://b/k?region=mars"):
        raise error
    assert isinstance(raised.value, OSError)
    assert isinstance(raised.value, InputError) or raised.value.errno in (
        errno.ENOENT, errno.EACCES, errno.EIO,
    )  # fmt: skip


def test_a_failure_while_parquet_reads_stays_what_it_is(monkeypatch):
    import pyarrow.parquet as pq

    storage.write_bytes("memory://parquet/x", b"PAR1" * 100)

    def fail(*args, **kwargs):
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(OSError, match="no answer") as raised:
        pq.ParquetFile(storage.open_input("memory://parquet/x"))
    assert raised.value.errno == errno.EIO


def test_a_store_that_sends_a_byte_a_second_is_told(monkeypatch, capsys):
    storage.write_bytes("memory://slow/x", b"x")
    read = MemoryFileSystem.cat_file

    def slowly(*args, **options):
        time.sleep(0.25)
        return read(*args, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", slowly)
    monkeypatch.setattr(stores, "SLOW_SECONDS", 0.1)
    assert storage.read_bytes("memory://slow/x") == b"x"
    time.sleep(0.2)
    told = [line for line in capsys.readouterr().err.splitlines() if "still waiting" in line]
    assert len(told) == 2
    assert "still waiting for memory://slow/x after" in told[0]


def test_options_of_uris_and_of_fsspec_meet(monkeypatch):
    configured = {"config_kwargs": {"read_timeout": 7}, "client_kwargs": {"verify": False}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {**configured, "key": "k", "secret": "s"})
    stores._s3_options.cache_clear()
    uri = "s3://b/k?endpoint_override=127.0.0.1:9&scheme=http&region=mars"
    filesystem, path = stores.locate(uri)
    assert path == "b/k"
    assert filesystem.endpoint_url == "http://127.0.0.1:9"
    assert filesystem.client_kwargs == {"verify": False, "region_name": "mars"}
    assert filesystem.config_kwargs["read_timeout"] == 7
    assert filesystem.config_kwargs["retries"]["mode"] == "standard"
    assert (filesystem.key, filesystem.secret) == ("k", "s")
    assert not filesystem.dircache.use_listings_cache
    stores._s3_options.cache_clear()
    for wrong in ("s3://b/k?endpont=x", "nothing://b/k"):
        with pytest.raises(InputError, match=r"endpont|nothing"):
            stores.locate(wrong)
