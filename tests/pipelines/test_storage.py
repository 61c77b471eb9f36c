"""Names of files below URIs. Reading, writing and retries are tested where they are used."""

from pathlib import Path

import pytest

from pipelines import storage


@pytest.mark.parametrize("name", ["a b.jpg", "what?.jpg", "img.jpg?w=300", "100%.jpg"])
def test_any_file_name_is_found_again(tmp_path, name):
    uri = storage.join(str(tmp_path / "wh?y"), "part", name)
    storage.write_bytes(uri, b"1")
    assert Path(uri).read_bytes() == b"1"
    assert storage.read_bytes(uri) == b"1"
    assert [file.path for file in storage.list_files(str(tmp_path / "wh?y"))] == [f"part/{name}"]


def test_a_question_mark_in_an_object_name_is_not_a_query():
    uri = storage.join("s3://bucket/images?region=mars", "img.jpg?w=300")
    assert uri == "s3://bucket/images/img.jpg%3Fw=300?region=mars"
    assert storage.resolve(uri)[1] == "bucket/images/img.jpg?w=300"
