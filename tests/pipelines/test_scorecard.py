"""The scorecard against brute force, and the gate."""

import math

import numpy as np
import pytest
import torch

from beit.tokenizers import DalleTokenizer, DvaeTokenizer
from beit.views import ViewPolicy
from pipelines import scorecard
from pipelines.errors import StageFailed
from pipelines.pictures.scorecards import scorecard_pictures
from pipelines.reading.pixels import drawn, read_pixels
from pipelines.scorecard import (
    SCORE_VIEW,
    check_gate,
    evenly_spaced,
    sample_rows,
    score,
    score_batches,
    scorecard_record,
    token_statistics,
)
from tests.pipelines.tokenizer_fixtures import disc, image_table


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("images"))
    return image_table(uri, [disc(seed) for seed in range(50)])


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return DvaeTokenizer(image_size=16, patch_size=4, dim=48, vocab_size=32)


def test_statistics_by_hand():
    grids = np.array([[[0, 1], [0, 1]], [[0, 1], [0, 2]]])
    found = token_statistics(grids, vocab_size=8)
    shares = np.array([4, 3, 1]) / 8
    entropy = -(shares * np.log(shares)).sum()
    assert (found.num_tokens, found.codes_used, found.dead_codes) == (8, 3, 5)
    assert found.perplexity == pytest.approx(math.exp(entropy))
    assert found.top_share == 0.5
    assert found.unigram_entropy == pytest.approx(entropy + 2 / 16)


def test_entropies_of_known_sources():
    generator = np.random.default_rng(0)
    independent = generator.integers(0, 64, (400, 8, 8))
    found = token_statistics(independent, 64)
    assert found.perplexity == pytest.approx(64, rel=0.01)
    assert found.unigram_entropy == pytest.approx(math.log(64), abs=0.01)
    assert found.neighbour_entropy == pytest.approx(math.log(64), abs=0.01)
    rows = np.repeat(generator.integers(0, 8, (400, 8, 1)), 8, axis=2)
    columns = np.repeat(generator.integers(0, 8, (400, 1, 8)), 8, axis=1)
    for copied in (rows, columns):  # one neighbour tells all, the other nothing
        found = token_statistics(copied, 8)
        assert found.neighbour_entropy == pytest.approx(math.log(8) / 2, abs=0.02)
    constant = token_statistics(np.zeros((3, 4, 4), int), 64)
    assert (constant.perplexity, constant.unigram_entropy, constant.neighbour_entropy) == (1, 0, 0)
    assert token_statistics(np.zeros((3, 1, 1), int), 64).neighbour_entropy == 0


@pytest.mark.parametrize("exponent", [0.0, 1.1])
def test_independent_tokens_tell_nothing_of_each_other(exponent):
    """Also where nearly all pairs of the vocabulary are never seen."""
    generator = np.random.default_rng(0)
    shares = np.arange(1, 8193) ** -exponent
    shares /= shares.sum()
    found = token_statistics(generator.choice(8192, (256, 14, 14), p=shares), 8192)
    truth = -(shares * np.log(shares)).sum()
    assert found.unigram_entropy == pytest.approx(truth, abs=0.05)
    assert found.neighbour_entropy == pytest.approx(truth, abs=0.05)


def test_a_large_vocabulary_whose_neighbours_tell_half():
    """A token is its left neighbour half of the time: H = h(p) + (1 - p) log V, nearly."""
    generator = np.random.default_rng(0)
    grids = generator.integers(0, 512, (2000, 14, 14))
    same = generator.random((2000, 14)) < 0.5
    for column in range(1, 14):
        grids[:, :, column] = np.where(same, grids[:, :, column - 1], grids[:, :, column])
        same = generator.random((2000, 14)) < 0.5
    given_left = math.log(2) + 0.5 * math.log(512)
    expected = (given_left + math.log(512)) / 2
    assert token_statistics(grids, 512).neighbour_entropy == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(
    "bad", [np.zeros((0, 2, 2), int), np.full((1, 2, 2), 8), -np.ones((1, 1, 1), int)]
)
def test_bad_tokens_are_refused(bad):
    with pytest.raises(ValueError, match=r"\[0, 8\)"):
        token_statistics(bad, 8)


def test_rows_are_spread_and_distinct():
    assert evenly_spaced(10, 3).tolist() == [0, 3, 6]
    assert evenly_spaced(3, 10).tolist() == [0, 1, 2]
    rows = evenly_spaced(10**9, 1000)
    assert len(set(rows.tolist())) == 1000
    assert rows.max() < 10**9


def test_rows_of_a_large_table_lie_in_few_groups(images, monkeypatch):
    assert sample_rows(images, 7).tolist() == evenly_spaced(50, 7).tolist()
    monkeypatch.setattr(scorecard, "MAX_GROUPS", 3)
    assert len(images.row_groups) > 3
    rows = sample_rows(images, 8)
    assert len(set(rows.tolist())) == len(rows) <= 8
    groups = {images.row_groups.overlapping(row, row + 1)[0] for row in rows.tolist()}
    assert len(groups) == 3
    assert rows.max() > 25  # spread over the table


def test_score_of_a_table(images, tokenizer):
    card = score(tokenizer, images, num_images=20, batch_size=6)
    assert card.num_images == 20
    assert card.counts.sum() == card.tokens.num_tokens == 20 * 16
    assert (card.counts > 0).sum() == card.tokens.codes_used
    assert card.images.shape == card.reconstructions.shape == (8, 3, 16, 16)
    assert card.token_ids.shape == (8, 4, 4)
    # Brute force over the same views.
    rows = evenly_spaced(images.num_rows, 20)
    views = np.concatenate(
        list(read_pixels(images, rows, drawn(ViewPolicy(), SCORE_VIEW), 16, "lanczos"))
    )
    decoded = tokenizer.decode(tokenizer.encode(torch.from_numpy(views))).numpy()
    difference = (decoded.astype(float) - views) / 255
    assert card.mse == pytest.approx((difference**2).mean(), rel=1e-5)
    assert card.mae == pytest.approx(np.abs(difference).mean(), rel=1e-5)
    assert card.psnr == pytest.approx(-10 * math.log10(card.mse))
    assert np.array_equal(card.images, views[:8])
    assert np.array_equal(card.reconstructions, decoded[:8])
    # The same whatever the batches.
    again = score(tokenizer, images, num_images=20, batch_size=20)
    assert again.metrics() == pytest.approx(card.metrics())
    assert set(scorecard_record(card)) == set(card.metrics())
    assert "codes used" in card.summary()


def test_score_without_decoder():
    """Each code is shown by the patches nearest to it, found here by brute force."""
    torch.manual_seed(0)
    tokenizer = DalleTokenizer(image_size=16, hidden_dim=8, vocab_size=32, has_decoder=False)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    card = score_batches(tokenizer, images.split(15))
    assert card.mse is card.mae is card.psnr is None
    assert "mse" not in card.metrics()
    assert "reconstruction" not in card.summary()
    logits = tokenizer.logits(images).detach()
    best = {}
    for image in range(40):
        for cell in range(4):
            y, x = divmod(cell, 2)
            code = int(logits[image, :, y, x].argmax())
            patch = images[image, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            best.setdefault(code, []).append((float(logits[image, code, y, x]), patch))
    nearest = card.nearest
    assert nearest.patches.shape == (32, 3, 8, 8)
    for code in range(32):
        found = sorted(best.get(code, []), key=lambda pair: -pair[0])
        expected = found[0][1] if found else torch.full((3, 8, 8), 128)
        assert torch.equal(nearest.patches[code].int(), expected.int())
    assert nearest.codes.tolist() == sorted(best, key=lambda code: (-len(best[code]), code))
    for code, examples in zip(nearest.codes.tolist(), nearest.examples, strict=True):
        found = sorted(best[code], key=lambda pair: -pair[0])[:8]
        for example, (_, patch) in zip(examples, found, strict=False):
            assert torch.equal(example, patch)
        assert (examples[len(found) :] == 128).all()
    # Pictures of tokens are laid out of those patches.
    tokens = tokenizer.encode(images[:8]).unflatten(1, (2, 2))
    for picture, grid in zip(card.reconstructions, tokens, strict=True):
        for y in range(2):
            for x in range(2):
                tile = picture[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                assert np.array_equal(tile, nearest.patches[grid[y, x]])
    drawn = scorecard_pictures(card, "here")
    assert set(drawn) == {"tokenizer", "codebook_usage", "codes"}


def test_gate(images, tokenizer):
    good = score(tokenizer, images, num_images=20)
    check_gate(good, min_perplexity=1.0, min_codes=1, remedy="never")
    with torch.no_grad():
        tokenizer.encoder.head.bias[5] = 1e4
    collapsed = score(tokenizer, images, num_images=20)
    assert collapsed.tokens.codes_used == 1
    with pytest.raises(StageFailed, match=r"perplexity 1 of 32 .*min_perplexity = 2 .*; do this"):
        check_gate(collapsed, min_perplexity=2, min_codes=1, remedy="do this")
    with pytest.raises(StageFailed, match=r"codes used 1 of 32 .*min_codes = 4 "):
        check_gate(collapsed, min_perplexity=0, min_codes=4, remedy="do this")
