"""The tokenize stage with every kind of tokenizer: cached tokens are those computed online."""

import numpy as np
import pytest
import torch

from beit.images import decode_image
from beit.tokenizers import KmeansTokenizer, ProjectionTokenizer, VqkdTokenizer
from beit.views import render, sample_view
from pipelines import tokenize_images
from pipelines.errors import InputError
from pipelines.tables import tokenizer_store
from pipelines.tables.image_table import ImageTable
from pipelines.tables.token_table import TokenTable
from tests.chaos import world

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.long]
ROWS = 60
MAKERS = {
    "kmeans": lambda: KmeansTokenizer(image_size=32, patch_size=8, vocab_size=64),
    "projection": lambda: ProjectionTokenizer(image_size=32, patch_size=8, vocab_size=64),
    "vqkd": lambda: VqkdTokenizer(
        image_size=32, patch_size=8, dim=64, depth=2, num_heads=2, vocab_size=64, code_dim=8
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return world.make_images(str(tmp_path_factory.mktemp("images")), count=ROWS)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_cached_tokens_equal_online_tokens(kind, images, tmp_path):
    torch.manual_seed(0)
    uri, output = str(tmp_path / "tokenizer"), str(tmp_path / "tokens")
    patches = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    tokenizer_store.save(MAKERS[kind]().eval(), uri, source={}, patches=patches)
    tokenize_images.run(world.make_config(images, uri, output))
    table, source = TokenTable.open(output), ImageTable.open(images)
    assert table.identity.precision == "float32"
    encoder = tokenizer_store.load(uri)
    for row in range(0, ROWS, 3):
        record = source.read_rows(row, row + 1).to_pylist()[0]
        image = decode_image(record["image"])
        _, cached = table.read_rows(row, row + 1)
        for view in range(cached.shape[1]):
            drawn = sample_view(table.policy, record["digest"], view, image.height, image.width)
            pixels = render(image, drawn, 32, encoder.interpolation).transpose(2, 0, 1)
            online = encoder.encode(torch.from_numpy(pixels[None].copy()))[0]
            np.testing.assert_array_equal(cached[0, view].astype(np.int64), online.numpy())


def test_a_precision_that_a_kind_has_not_is_refused(images, tmp_path):
    uri = str(tmp_path / "tokenizer")
    tokenizer_store.save(MAKERS["kmeans"]().eval(), uri, source={})
    config = world.make_config(images, uri, str(tmp_path / "tokens"), precision="float16")
    with pytest.raises(InputError, match=r"precision = float16: .* has only float32; choose auto"):
        tokenize_images.run(config)
