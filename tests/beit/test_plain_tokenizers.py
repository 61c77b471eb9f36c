"""K-means of raw patches and a random projection of them, against their definitions."""

import pytest
import torch
from torch.nn import functional as F

from beit.tokenizers import KmeansTokenizer, ProjectionTokenizer, clustering


def pictures(count=24, size=16, seed=0):
    """Pictures of few colours: blocks of 4 x 4 pixels with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 5, (count, 1, size // 4, size // 4), generator=generator) * 50.0
    tinted = blocks * torch.tensor([1.0, 0.5, 0.8])[:, None, None]
    noise = torch.randint(0, 4, (count, 3, size, size), generator=generator)
    return (F.interpolate(tinted, scale_factor=4) + noise).to(torch.uint8)


def patches_of(images, patch):
    """float64 (B * h * w, 3 * patch^2) in [0, 1], by loops."""
    starts = range(0, images.shape[2], patch)
    found = [
        image[:, y : y + patch, x : x + patch].reshape(-1)
        for image in images
        for y in starts
        for x in starts
    ]
    return torch.stack(found).double() / 255


@pytest.fixture(scope="module")
def kmeans():
    tokenizer = KmeansTokenizer(image_size=16, patch_size=4, vocab_size=5)
    tokenizer.fit(pictures(), generator=torch.Generator().manual_seed(0))
    return tokenizer


def test_kmeans_finds_the_colours_and_paints_with_them(kmeans):
    images = pictures(seed=1)
    distances = torch.cdist(patches_of(images, 4), kmeans.centres.double())
    tokens, logits = kmeans.match(images)
    assert torch.equal(tokens.flatten(), distances.argmin(1))
    torch.testing.assert_close(
        logits.flatten().double(), -distances.amin(1).square(), atol=1e-5, rtol=1e-4
    )
    assert len(tokens.unique()) == 5
    difference = kmeans.decode(tokens).int() - images.int()
    assert difference.abs().max() <= 3  # the noise
    wide = torch.cat((images, images), dim=3)
    assert torch.equal(kmeans.decode(kmeans.encode(wide), (4, 8)).int()[..., :16] - images.int(),
                       difference)  # fmt: skip


def test_kmeans_is_the_same_inside_a_step_of_low_precision():
    points = F.normalize(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), dim=1)

    def centres():
        generator = torch.Generator().manual_seed(1)
        return clustering.kmeans(points, 40, generator=generator, num_iterations=5)[0]

    expected = centres()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(centres(), expected)


def test_kmeans_wants_as_many_patches_as_codes(kmeans):
    with pytest.raises(ValueError, match="16 patches are too few to place 17 codes"):
        KmeansTokenizer(image_size=16, patch_size=4, vocab_size=17).fit(
            pictures(1), generator=torch.Generator()
        )


def test_fitting_is_repeatable_and_changes_the_identity(kmeans):
    again = KmeansTokenizer(image_size=16, patch_size=4, vocab_size=5)
    before = again.fingerprint()
    again.fit(pictures(), generator=torch.Generator().manual_seed(0))
    assert again.fingerprint() == kmeans.fingerprint() != before


def test_projection_is_the_nearest_random_direction():
    torch.manual_seed(3)
    tokenizer = ProjectionTokenizer(image_size=16, patch_size=4, vocab_size=64, code_dim=8)
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    images[:, 1, 5, 6] = 7  # a pixel that never varies
    tokenizer.fit(images)
    patches = patches_of(images, 4)
    standard = (patches - patches.mean(0)) / patches.std(0, correction=0)
    projected = F.normalize(standard @ tokenizer.matrix.double().T, dim=1)
    cosines = projected @ F.normalize(tokenizer.codebook.double(), dim=1).T
    tokens, logits = tokenizer.match(images)
    torch.testing.assert_close(logits.flatten().double(), cosines.amax(1), atol=1e-5, rtol=0)
    assert torch.equal(tokens.flatten(), cosines.argmax(1))
    assert len(tokens.unique()) > 40
    # The random parts follow from the seed, not from the images.
    torch.manual_seed(3)
    other = ProjectionTokenizer(image_size=16, patch_size=4, vocab_size=64, code_dim=8)
    assert torch.equal(other.matrix, tokenizer.matrix)
    assert torch.equal(other.codebook, tokenizer.codebook)
    with pytest.raises(ValueError, match="has no decoder"):
        tokenizer.decode(tokens)


def test_flat_pictures_give_finite_logits():
    tokenizer = ProjectionTokenizer(image_size=8, patch_size=4, vocab_size=16, code_dim=4)
    white = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    tokenizer.fit(white)
    assert torch.isfinite(tokenizer.logits(white)).all()
