"""Kill -9 at random, and the table is as if nothing had been. The long version: `chaos.py`."""

import re

import pytest

from pipelines import storage
from pipelines.tables.image_table import ImageParts
from tests.chaos import chaos, world
from tests.faulty_proxy import faulty_proxy
from tests.s3_server import bucket, s3  # noqa: F401 - fixtures


@pytest.fixture
def arena(request, tmp_path_factory, ray_turn):
    # Ray's sockets need short paths; only our own files lie here.
    root = tmp_path_factory.mktemp("arena")
    images = world.make_images(str(root / "images"), count=10 * request.param, parts=4)
    tokenizer = world.make_tokenizer(str(root / "tokenizer"))
    arena = chaos.Arena(root, images, tokenizer, root / "tokens", rows_per_unit=10)
    yield arena
    arena.close()


def undisturbed(arena):
    """The table that the same job makes when nobody kills."""
    output = str(arena.directory / "reference")
    arena.job["output"] = output
    arena.environment["CHAOS_UNIT_SECONDS"] = "0"
    assert arena.start_driver("reference").wait(600) == 0, arena.log()
    return output


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.long
@pytest.mark.parametrize(("arena", "kills"), [(50, 10)], indirect=["arena"])
def test_kills_of_every_kind_change_nothing(arena, kills):
    output = arena.job["output"]
    tally = arena.run(kills=kills, seed=1)
    assert tally.total == kills
    assert set(tally.kills) == set(chaos.KINDS)
    chaos.check(arena, tally, output, undisturbed(arena))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.long
@pytest.mark.parametrize("arena", [30], indirect=True)
def test_kills_change_nothing_where_tokens_are_reused(arena):
    """Nine of ten images of every unit are in an older table, under other names."""
    output, older = arena.job["output"], str(arena.directory / "older")
    kept = {number for number in range(300) if number % 10}
    images = ImageParts.open(world.make_images(older, count=300, keep=kept, prefix="older/"))
    world.write_tokens(images, arena.job["tokenizer"], f"{older}-tokens")
    arena.job["changes"] |= {"reuse": [f"{older}-tokens"], "reuse_images": [older]}
    tally = arena.run(kills=6, seed=3)
    assert tally.total == 6
    assert re.search(r"images_reused=[1-9]", arena.log())
    for name in ("reuse", "reuse_images"):
        del arena.job["changes"][name]
    chaos.check(arena, tally, output, undisturbed(arena))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.long
@pytest.mark.parametrize("arena", [50], indirect=True)
def test_two_drivers_at_once_do_no_harm(arena):
    output = arena.job["output"]
    arena.environment["CHAOS_UNIT_SECONDS"] = "0"
    drivers = [arena.start_driver(name) for name in ("job", "other")]
    assert [driver.wait(900) for driver in drivers] == [0, 0], arena.log()
    table = chaos.contents(output)
    # The slower one may have left its notes beside the finished table; the table is whole.
    files = {name: data for name, data in table.items() if not name.startswith("_work/")}
    reference = undisturbed(arena)
    assert files == chaos.contents(reference)
    assert storage.exists(storage.join(output, "manifest.json"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.long
def test_kills_and_a_failing_store_change_nothing(tmp_path, ray_turn, s3, bucket):  # noqa: F811
    """Everything on an S3 server, behind a proxy that fails one request in ten."""
    images = world.make_images(s3.uri(bucket, "images"), count=200, parts=2)
    tokenizer = world.make_tokenizer(s3.uri(bucket, "tokenizer"))
    with faulty_proxy(s3.port, rate=0.1) as proxy:
        uris = [s3.uri(bucket, name, port=proxy.port) for name in ("images", "tokenizer", "tokens")]
        arena = chaos.Arena(tmp_path, *uris, rows_per_unit=10)
        try:
            tally = arena.run(kills=5, seed=2)
            faults = sum(count for fault, count in proxy.counts.items() if fault != "ok")
            arena.job |= {"images": images, "tokenizer": tokenizer}
            reference = s3.uri(bucket, "reference")
            arena.job["output"] = reference
            arena.environment["CHAOS_UNIT_SECONDS"] = "0"
            assert arena.start_driver("reference").wait(600) == 0, arena.log()
        finally:
            arena.close()
    assert tally.total == 5
    assert faults > 10
    chaos.check(arena, tally, s3.uri(bucket, "tokens"), reference)
