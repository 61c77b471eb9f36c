"""What runs of seconds share: small tables, and one thread, so that sums have one order."""

from collections.abc import Iterator

import pytest
import torch

from tests.pipelines.pretrain_fixtures import make_tables


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An image table and a token table of it; nobody writes to them."""
    return make_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
