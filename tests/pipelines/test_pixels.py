"""Pixels of images of a table: those of the view functions, and each row group is read once."""

import numpy as np
import pytest

from beit.images import decode_array, decode_image, image_digest
from beit.views import center_view, render, render_fast, sample_view
from pipelines.errors import InputError
from pipelines.reading.pixels import central, drawn, read_pixels, render_encoded
from pipelines.tables import image_table
from tests.pipelines.ingest_fixtures import NUM_ROWS, POLICY, encoded, key_of, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    table = write_images(str(tmp_path_factory.mktemp("images")))
    assert len(table.row_groups) > 10
    return table


@pytest.fixture
def reads(monkeypatch):
    """Row groups that are read, as (part, position in it)."""
    seen, real = [], image_table.read_row_groups

    def read(uri, part, indices, columns=None):
        seen.extend((part.name, index) for index in indices)
        return real(uri, part, indices, columns)

    monkeypatch.setattr(image_table, "read_row_groups", read)
    return seen


def test_every_output_of_every_view():
    data = encoded(3)
    digest, source, exact = image_digest(data), decode_array(data), decode_image(data)
    outputs = [(24, "bicubic"), (32, "fast"), (16, "lanczos")]
    found = render_encoded(data, digest, [drawn(POLICY, 0), drawn(POLICY, 5)], outputs, key="a")
    expected = []
    for index in (0, 5):
        view = sample_view(POLICY, digest, index, *source.shape[:2])
        expected += [
            render(exact, view, 24),
            render_fast(source, view, 32),
            render(exact, view, 16, "lanczos"),
        ]
    assert len(found) == 6
    for pixels, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(pixels, wanted)


@pytest.mark.parametrize(("batch_size", "num_threads"), [(1, 1), (7, 3), (1000, 2)])
def test_scattered_rows_row_group_by_row_group(images, reads, batch_size, num_threads):
    rows = np.sort(np.random.default_rng(0).choice(NUM_ROWS, 50))
    assert len(set(rows.tolist())) < 50  # some repeat
    options = {"batch_size": batch_size, "num_threads": num_threads}
    batches = list(read_pixels(images, rows, drawn(POLICY, 9), 16, "lanczos", **options))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert all(batch.flags.c_contiguous for batch in batches)
    for row, pixels in zip(rows.tolist(), np.concatenate(batches), strict=True):
        image = decode_image(encoded(row))
        view = sample_view(POLICY, image_digest(encoded(row)), 9, image.height, image.width)
        np.testing.assert_array_equal(pixels, render(image, view, 16, "lanczos").transpose(2, 0, 1))
    touched = {images.row_groups.overlapping(row, row + 1)[0] for row in rows.tolist()}
    assert len(reads) == len(set(reads)) == len(touched)


def test_central_views(images):
    (batch,) = read_pixels(images, np.array([2, 77]), central(0.5), 8)
    for row, pixels in zip((2, 77), batch, strict=True):
        image = decode_image(encoded(row))
        expected = render(image, center_view(image.height, image.width, 0.5), 8)
        np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))
    assert list(read_pixels(images, np.array([], int), central(), 8)) == []
    with pytest.raises(ValueError, match="ascending"):
        next(read_pixels(images, np.array([3, 2]), central(), 8))


def test_an_image_that_does_not_decode_is_named(tmp_path):
    images = write_images(str(tmp_path), change=50)
    with pytest.raises(InputError, match=rf"{key_of(50)}.*does not decode \(truncated.*audit"):
        list(read_pixels(images, np.arange(NUM_ROWS), central(), 8))
