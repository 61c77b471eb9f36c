"""Names of files below URIs. Reading, writing and retries are tested where they are used."""

import re
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


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("img.jpg?w=300", "img.jpg%3Fw=300"),
        ("img.jpg%3Fw=300", "img.jpg%253Fw=300"),
        ("100%.jpg", "100%25.jpg"),
        ("a%25b%20c", "a%2525b%2520c"),
    ],
)
def test_no_character_of_an_object_name_is_taken_for_syntax(name, escaped):
    uri = storage.join("s3://bucket/images?region=mars", name)
    assert uri == f"s3://bucket/images/{escaped}?region=mars"
    assert storage.resolve(uri)[1] == f"bucket/images/{name}"


def test_a_percent_sign_that_escapes_nothing_stands_for_itself():
    assert storage.resolve("s3://bucket/50% of %20?region=mars")[1] == "bucket/50% of %20"


@pytest.mark.parametrize(
    "message",
    [
        # An answer that broke off in its middle, as pyarrow words it.
        "AWS Error INTERNAL_FAILURE during GetObject operation: Failed to flush response stream",
        "When reading part-0: AWS Error SLOW_DOWN during GetObject operation: Please reduce",
        "AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 56, Failure when",
        "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
        "google::cloud::Status(UNAVAILABLE: try again)",
        "500, message='Internal Server Error'",
        "Connection reset by peer",
    ],
)
def test_what_passes_is_asked_again(message):
    assert storage.is_transient(OSError(message))


@pytest.mark.parametrize(
    "message",
    [
        "AWS Error ACCESS_DENIED during GetObject operation: connection refused to this user",
        "AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: The bucket does not exist",
        "AWS Error SIGNATURE_DOES_NOT_MATCH during GetObject operation",
        "AWS Error UNKNOWN (HTTP status 411) during PutObject operation: MissingContentLength",
        "part-00500.parquet: Couldn't deserialize thrift",
    ],
)
def test_what_stays_is_final(message):
    tries = []

    def action():
        tries.append(1)
        raise OSError(message)

    with pytest.raises(OSError, match=re.escape(message[:20])):
        storage.retry(action)
    assert len(tries) == 1
