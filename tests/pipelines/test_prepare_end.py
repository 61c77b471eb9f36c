"""The end of a prepare, where it may be killed or meet another driver; no unit is left to do."""

import dataclasses
from pathlib import Path

import pytest

from pipelines import prepare, storage
from pipelines.config.prepare import PrepareConfig
from pipelines.errors import InputError, LeaseLost
from pipelines.lease_owner import Owner
from pipelines.lease_store import Claim
from pipelines.preparation.source_plan import make_plan, read_plan
from tests.pipelines.image_sources import write_folder
from tests.pipelines.prepare_fixtures import config_of, work_off


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    write_folder(tmp_path / "in")
    return config_of(tmp_path / "in", tmp_path / "out", part_mb=0.004)


def names(config: PrepareConfig) -> set[str]:
    return {path.name for path in Path(config.output).iterdir()}


@pytest.mark.parametrize("step", ["read_plan", "make_plan"])
def test_a_driver_that_lost_the_race_finds_the_table(config, monkeypatch, step) -> None:
    """The other one finishes, and clears its working files away, just before this step."""
    if step != "make_plan":
        work_off(config)
    real = getattr(prepare, step)

    def overtaken(*args):
        monkeypatch.setattr(prepare, step, real)
        if step == "make_plan":
            work_off(config)
        assert not prepare.run(config).already_done
        raise FileNotFoundError("the plan is gone")

    monkeypatch.setattr(prepare, step, overtaken)
    result = prepare.run(config)
    assert result.already_done and result.num_rows == 15
    assert "_work" not in names(config)


@pytest.mark.parametrize("step", ["_receipts", "_run_units"])
def test_a_driver_that_was_taken_over_from_commits_nothing(config, monkeypatch, step) -> None:
    """It stood still at this step for longer than its lease."""
    real = getattr(prepare, step)

    def overtaken(*args):
        done = real(*args)
        (ours,) = Path(config.output, "_lease").glob("*.json")
        owner = Owner(stage="test", host="b", process=1)
        other = Claim(name="000002-other", over=(ours.stem,), owner=owner)
        assert storage.create(f"{config.output}/_lease/{other.name}.json", other.record())
        return done

    monkeypatch.setattr(prepare, step, overtaken)
    with pytest.raises(LeaseLost, match="was taken over by test on b"):
        prepare.run(config)
    assert "manifest.json" not in names(config)


def test_a_plan_that_is_gone_is_not_made_again(config, monkeypatch) -> None:
    work_off(config)
    real = prepare.read_plan

    def overtaken(*args):
        monkeypatch.setattr(prepare, "read_plan", real)
        prepare.run(config)
        return

    monkeypatch.setattr(prepare, "read_plan", overtaken)
    monkeypatch.setattr(prepare, "make_plan", None)
    assert prepare.run(config).already_done


def test_what_killed_drivers_and_writers_left_is_cleared(config) -> None:
    work_off(config)
    output = Path(config.output)
    left = ["part-99999.parquet", ".part-00000.parquet.0a1b2c3d.tmp", ".manifest.json.0a1b.tmp"]
    for name in left:
        (output / name).write_bytes(b"left")
    foreign = "part-00000-0c5f9a3e.snappy.parquet"
    (output / foreign).write_bytes(b"of another program")
    prepare.run(config)
    whole = names(config)
    assert not whole & {"_work", *left}
    assert foreign in whole
    # Killed between the manifest and the clearing.
    (output / "_work/receipts").mkdir(parents=True)
    (output / left[1]).write_bytes(b"left")
    assert prepare.run(config).already_done
    assert names(config) == whole


def test_two_drivers_that_plan_at_once_with_other_options_do_not_mix(config, monkeypatch) -> None:
    """The second one has seen no plan when it begins to list the source."""
    make_plan(config, config.output)
    same = make_plan(config, config.output)
    assert same.options == read_plan(config, config.output).options
    other = dataclasses.replace(config, max_side=32)
    with pytest.raises(InputError, match="max_side"):
        make_plan(other, config.output)
    assert read_plan(config, config.output).options["max_side"] == config.max_side


def test_a_finished_table_with_a_lost_part_is_not_done(config) -> None:
    work_off(config)
    whole = prepare.run(config)
    part = Path(config.output) / "part-00001.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:-5])
    with pytest.raises(InputError, match=r"part-00001\.parquet has .* bytes \(1 of \d+ parts"):
        prepare.run(config)
    part.unlink()
    with pytest.raises(InputError, match=r"part-00001\.parquet is missing"):
        prepare.run(config)
    part.write_bytes(data)
    assert prepare.run(config).fingerprint == whole.fingerprint
