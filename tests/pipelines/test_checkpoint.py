import errno

import pytest
import torch

from pipelines import storage
from pipelines.training import checkpoint
from pipelines.training.checkpoint import (
    MARKER,
    Checkpoint,
    DamagedCheckpointError,
    Saver,
    checkpoint_name,
    complete_steps,
    list_steps,
    load,
    load_newest,
    resume_point,
    retain,
    save,
)
from pipelines.training.distributed import World


def make(step, value=None):
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(5, 3, generator=generator), "b.c": torch.randn(7)}
    if value is not None:
        weights["a"][2, 1] = value
    return Checkpoint(
        step=step,
        weights=weights,
        moments={"step.a": torch.tensor(3.0), "exp_avg.a": torch.randn(5, 3)},
        state={"health": {"norms": [1.5]}, "config": {"seed": 0}},
    )


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "checkpoints")


def rejections(root):
    told = []
    found = load_newest(root, rejected=lambda step, reason: told.append((step, reason)))
    return found, told


def test_what_is_saved_is_loaded(root):
    one = make(12000)
    uri = save(root, one)
    assert uri.endswith("step_00012000")
    back = load(root, 12000)
    assert back.step == 12000
    assert back.state["health"] == {"norms": [1.5]}
    for saved, loaded in ((one.weights, back.weights), (one.moments, back.moments)):
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_the_same_step_is_written_again_to_the_same_place(root):
    save(root, make(4))
    save(root, make(4))
    assert list_steps(root) == [4]
    assert load(root, 4)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_file_falls_back_to_the_previous_one_and_says_so(root, name, damage, tmp_path):
    save(root, make(4))
    uri = save(root, make(8))
    file = tmp_path / "checkpoints" / "step_00000008" / name
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "altered":
        file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    else:
        file.unlink()
    found, told = rejections(root)
    assert found is not None
    assert found.step == 4
    assert len(told) == 1
    assert told[0][0] == 8
    assert f"{uri}/{name}" in told[0][1]


def test_a_checkpoint_without_marker_does_not_count(root):
    save(root, make(4))
    storage.delete(storage.join(save(root, make(8)), MARKER))
    found, told = rejections(root)
    assert found is not None
    assert found.step == 4
    assert "COMPLETE is missing" in told[0][1]
    assert complete_steps(root) == [4]
    assert list_steps(root) == [4, 8]


def test_a_marker_that_is_no_json_does_not_count(root, tmp_path):
    save(root, make(4))
    (tmp_path / "checkpoints" / "step_00000004" / MARKER).write_text("{")
    found, told = rejections(root)
    assert found is None
    assert told[0][0] == 4


def test_nothing_there_is_no_checkpoint(root):
    assert rejections(root) == (None, [])


def test_a_run_does_not_continue_from_a_damaged_one_twice(root, tmp_path):
    for step in (4, 8):
        save(root, make(step))
    (tmp_path / "checkpoints" / "step_00000008" / "state.json").unlink()
    told = []
    world = World(rank=0, size=1, device=torch.device("cpu"))
    found = resume_point(root, world, rejected=lambda step, reason: told.append(step))
    assert found.step == 4
    assert told == [8]
    assert complete_steps(root) == [4]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(root, value):
    with pytest.raises(DamagedCheckpointError, match=r"a holds values that are not finite"):
        save(root, make(4, value))
    assert list_steps(root) == []


def test_retention_keeps_the_newest_complete_ones(root):
    for step in (0, 4, 8, 12, 16):
        save(root, make(step))
    storage.delete(storage.join(root, checkpoint_name(8), MARKER))
    assert retain(root, 2) == [0, 4, 8]
    assert complete_steps(root) == [12, 16]
    assert retain(root, 2) == []


def test_an_unfinished_newer_one_is_left_alone(root):
    save(root, make(4))
    save(root, make(8))
    storage.delete(storage.join(save(root, make(12)), MARKER))
    retain(root, 2)
    assert list_steps(root) == [4, 8, 12]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("full_at", ["model.safetensors", "optimizer.safetensors", MARKER])
def test_a_full_disk_keeps_the_previous_checkpoint_and_is_told(
    root, monkeypatch, asynchronous, full_at
):
    told = []
    saver = Saver(
        root, keep=3, asynchronous=asynchronous, failed=lambda step, why: told.append((step, why))
    )
    saver.save(make(4))
    assert saver.wait() == 4
    write = storage.write_bytes

    def full(uri, data, **check):
        if uri.endswith(full_at):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(uri, data, **check)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", full)
        saver.save(make(8))
        assert saver.wait() == 4
    assert told[0][0] == 8
    assert "No space left" in told[0][1]
    found, rejected = rejections(root)
    assert found.step == 4
    # Nothing at all was written when already the first file did not fit.
    assert [step for step, _ in rejected] == ([] if full_at == "model.safetensors" else [8])
    # Space is back: the run goes on saving.
    saver.save(make(12))
    assert saver.wait() == 12
    saver.close()


def test_saving_in_the_background_does_not_wait_and_takes_one_at_a_time(root, monkeypatch):
    import threading

    gate, started = threading.Event(), threading.Event()
    real = checkpoint.save

    def slow(root, one, check):
        started.set()
        gate.wait(10)
        return real(root, one, check=check)

    monkeypatch.setattr(checkpoint, "save", slow)
    saver = Saver(root, keep=3, asynchronous=True, failed=lambda *_: None)
    saver.save(make(4))
    assert started.wait(10)
    assert saver.last_saved is None
    gate.set()
    saver.save(make(8))
    assert saver.last_saved is not None
    assert saver.wait() == 8
    assert complete_steps(root) == [4, 8]
    saver.close()


@pytest.mark.parametrize("when", range(4))
def test_a_write_that_stops_anywhere_leaves_no_checkpoint_that_looks_whole(root, monkeypatch, when):
    """Also where an older checkpoint of the same step is being replaced."""
    save(root, make(4))
    save(root, make(8))
    write, count = storage.write_bytes, 0

    def stops(uri, data, **check):
        nonlocal count
        if count == when:
            raise KeyboardInterrupt
        count += 1
        write(uri, data, **check)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "write_bytes", stops)
        save(root, make(8))
    assert rejections(root)[0].step == 4
