"""Pictures: what must be visible is visible, in its place."""

import io

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from pipelines import pictures
from pipelines.pictures.canvas import CONTOUR, MASKED, SERIES


def batch(count=3, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def has_tile(picture, tile):
    """Whether the exact pixels of `tile` (h, w, 3), enlarged, occur anywhere in the picture."""
    found = np.asarray(picture)
    windows = np.lib.stride_tricks.sliding_window_view(found[..., 0], tile.shape[:2])
    # Frames cover the outermost pixels, so the inside is compared.
    inside = np.s_[2:-2, 2:-2]
    rows, columns = np.nonzero(windows[:, :, 64, 64] == tile[64, 64, 0])
    return any(
        np.array_equal(found[y : y + len(tile), x : x + len(tile)][inside], tile[inside])
        for y, x in zip(rows, columns, strict=True)
    )


def enlarged(image, factor):
    return image.transpose(1, 2, 0).repeat(factor, 0).repeat(factor, 1)


def count(picture, colour):
    return int((np.asarray(picture) == np.array(colour)).all(-1).sum())


def test_masked_input_shows_images_and_greys_the_masked_patches():
    images = batch(3)
    mask = np.zeros((3, 16), bool)
    mask[0, 5] = True
    picture = pictures.masked_input_grid(torch.from_numpy(images), mask, patch_size=8)
    assert all(has_tile(picture, enlarged(image, 8)) for image in images)
    hidden = enlarged(images[0], 8)
    hidden[64:128, 64:128] = MASKED
    assert has_tile(picture, hidden)


def test_pictures_of_a_usual_size_are_doubled():
    images = batch(1, 224)
    picture = pictures.masked_input_grid(images, np.zeros((1, 196), bool), patch_size=16)
    assert has_tile(picture, enlarged(images[0], 2))


def test_what_is_painted_stands_beside_what_was_seen():
    images, painted = batch(2), batch(2, seed=3)
    mask = np.zeros((2, 16), bool)
    mask[:, 5] = True
    picture = pictures.painted_grid(torch.from_numpy(images), mask, painted, patch_size=8)
    assert all(has_tile(picture, enlarged(image, 8)) for image in (*images, *painted))
    hidden = enlarged(images[0], 8)
    hidden[64:128, 64:128] = MASKED
    assert has_tile(picture, hidden)


def test_reconstruction_shows_four_columns_and_outlines_the_prediction():
    images, true, predicted = batch(2, 64), batch(2, 32, 1), batch(2, 32, 2)
    mask = np.zeros((2, 8, 8), bool)
    mask[:, 2:4, 2:5] = True
    picture = pictures.reconstruction_grid(
        images, mask.reshape(2, 64), true, predicted, patch_size=8, accuracy=[0.25, 1.0]
    )
    assert all(has_tile(picture, enlarged(image, 8)) for image in true)
    assert all(has_tile(picture, enlarged(image, 4)) for image in images)
    # A 3 x 2 rectangle of 32-pixel cells, outlined four pixels wide, in each of two rows.
    assert count(picture, CONTOUR) == pytest.approx(2 * 4 * (2 * 96 + 2 * 64), rel=0.1)


def test_no_mask_no_outline():
    images = batch(1, 32)
    picture = pictures.reconstruction_grid(
        images, np.zeros((1, 16), bool), images, images, patch_size=8
    )
    assert count(picture, CONTOUR) == 0


def test_equal_tokens_have_equal_colours():
    ids = np.array([[0, 1, 2, 0, 1, 2, 0, 1, 2]])
    picture = pictures.token_map(ids, grid_size=(3, 3))
    colours = {pictures._token_colour(value) for value in range(3)}
    assert len(colours) == 3
    # 256 is no multiple of 3: cells differ by a pixel.
    areas = [count(picture, colour) for colour in colours]
    assert min(areas) > 0.9 * max(areas) > 16000


def test_codebook_usage_draws_a_bar_for_every_used_token():
    counts = np.zeros(64, int)
    counts[[3, 9, 40]] = [1000, 100, 1]
    some = count(pictures.codebook_usage(counts), SERIES[0])
    more = count(pictures.codebook_usage(np.full(64, 1000)), SERIES[0])
    assert 0 < some < more
    pictures.codebook_usage(np.zeros(8, int))  # an unused codebook is no error


def test_confusion_marks_the_diagonal():
    picture = pictures.confusion(np.eye(3, dtype=int) * 5, ["cat", "dog", "a very long class name"])
    # Three full cells, less the ink of the figures in them.
    assert count(picture, SERIES[0]) > 3 * 56 * 56 * 0.7
    assert count(picture, SERIES[1]) == 0
    wrong = pictures.confusion(np.eye(3, dtype=int)[::-1], ["cat", "$10 off", "猫 _ $x"])
    assert count(wrong, SERIES[1]) > 2 * 56 * 56 * 0.7


def test_names_of_axes_are_whole_beside_names_of_classes():
    names = ["Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body",
             "Smileys & Emotion", "Symbols", "Travel & Places"]  # fmt: skip
    note = "513 test images, accuracy 50.3 % [45.8, 54.6]"
    picture = np.asarray(pictures.confusion(np.eye(9, dtype=int), names, title="t", note=note))
    edge = np.concatenate([picture[:, :8].ravel(), picture[:, -8:].ravel()])
    assert (edge == 255).all()


def test_confusion_of_many_classes_stays_small():
    matrix = 50 * np.eye(1000, dtype=int)
    matrix[7, 3], matrix[5, 2] = 40, 20
    names = [f"class {i}" for i in range(1000)]
    picture = pictures.confusion(matrix, names)
    assert max(picture.size) <= 2000
    bars = (np.asarray(picture) == SERIES[1]).all(-1)
    widths = np.unique(bars.sum(1))[1:]
    assert widths.max() == pytest.approx(2 * widths.min(), rel=0.02)  # 40 and 20, nothing else
    pictures.confusion(50 * np.eye(40, dtype=int), names[:40])  # no error at all


def test_curves_have_intervals_and_axes_that_do_not_magnify_noise():
    noise = {"probe": ([1, 2, 3], [0.50, 0.501, 0.499])}
    close, wide = (pictures.curve(noise, title="t", least_span=span) for span in (0.0, 0.5))

    def height(picture):
        rows = np.flatnonzero((np.asarray(picture) == SERIES[0]).all(-1)[:, 400:].any(1))
        return rows[rows < 600].max() - rows[rows < 600].min()

    assert height(wide) < height(close) / 10
    banded = pictures.curve(noise, title="t", bands={"probe": ([0.4] * 3, [0.6] * 3)})
    assert len(np.unique(np.asarray(banded).reshape(-1, 3), axis=0)) > 5
    pale = (np.asarray(banded)[..., 2].astype(int) - np.asarray(banded)[..., 0] > 20).sum()
    assert pale > 50_000


def test_plots_are_the_same_each_time_and_leave_no_state():
    first, second = (pictures.codebook_usage(np.arange(50), title="$") for _ in range(2))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert not pyplot.get_fignums()


def test_curves_skip_what_is_not_finite():
    series = {"loss": ([0, 1, 2, 3], [4.0, float("nan"), 3.0, 2.0]), "flat": ([0, 3], [1.0, 1.0])}
    picture = pictures.curve(series, title="Loss")
    assert count(picture, SERIES[0]) > 20
    assert count(picture, SERIES[1]) > 100
    pictures.curve({"empty": ([], [])}, title="Nothing yet")


def test_sheets_take_any_number_of_images():
    for number in (1, 2, 5, 9, 17):
        images = batch(number, 24)
        pictures.contact_sheet(images, labels=["a label that is too long"] * number)
        pictures.tokenizer_grid(images, images)
        pictures.masked_input_grid(images, np.zeros((number, 9), bool), patch_size=8)
        ids = np.arange(number * 9).reshape(number, 9)
        pictures.token_map(ids, grid_size=(3, 3), images=images)


def test_a_long_note_takes_lines_and_no_width():
    short = pictures.contact_sheet(batch(8), note="what is seen")
    long = pictures.contact_sheet(batch(8), note="what is seen " * 30)
    assert long.width == short.width
    more = np.asarray(long)[: long.height - short.height + 40]
    assert (more[:, -20:] == 255).all()
    assert long.height > short.height + 60


def test_wrong_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"pass uint8 \(B, 3, H, W\)"):
        pictures.contact_sheet(batch().transpose(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 15\); 4x4 patches of 8 pixels"):
        pictures.masked_input_grid(batch(), np.zeros((3, 15), bool), patch_size=8)


def test_png_is_the_picture():
    picture = pictures.contact_sheet(batch(2))
    again = Image.open(io.BytesIO(pictures.png(picture)))
    assert np.array_equal(np.asarray(again), np.asarray(picture))


def test_a_contact_sheet_keeps_the_shape_of_pictures():
    wide = np.broadcast_to(np.array([9, 200, 30], np.uint8)[:, None, None], (3, 40, 80))
    tall = np.broadcast_to(np.array([200, 9, 30], np.uint8)[:, None, None], (3, 80, 20))
    picture = pictures.contact_sheet([wide, tall])
    for colour, (height, width) in (((9, 200, 30), (96, 192)), ((200, 9, 30), (192, 48))):
        rows, columns = (np.asarray(picture) == np.array(colour)).all(-1).nonzero()
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (height, width)
