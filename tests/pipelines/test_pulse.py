"""Who stands still is named: silent, hanging, or waiting for another one."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.records import write_record
from pipelines.training import pulse
from pipelines.training.goodput import Books
from pipelines.training.pulse import Beat, Pulse, Stalls
from pipelines.training.run_dir import RunDir

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    return RunDir(str(tmp_path))


def beat(run, rank, **fields):
    fields = {"number": 1, "doing": "compute", "still": 0.1, "usual": 0.5, **fields}
    one = Beat(rank=rank, host=f"node-{rank}", process=100 + rank, **fields)
    write_record(run.at("pulse", f"{rank}.json"), asdict(one))


class Watch:
    """The driver's look, on a clock of ours."""

    def __init__(self, run):
        self.now = 0.0
        self.stalls = Stalls(run, factor=20, clock=lambda: self.now)

    def at(self, seconds):
        self.now = seconds
        self.stalls.look()
        return self.stalls.message()


def test_a_silent_worker_is_named_once_and_its_end_is_told(run):
    watch = Watch(run)
    for second in range(40):
        beat(run, 0, number=second, still=float(second), place=["all_reduce (d.py:1)"])
        if second == 0:
            beat(run, 1)
        told = watch.at(second)
        assert bool(told) == (second > pulse.LEAST_SECONDS), second
    assert told.startswith("rank 1 on node-1 (process 101) shows no sign of life since ")
    assert "rank 0 on node-0 (process 100) waits, is in a step since" in told
    assert "in all_reduce (d.py:1). A step usually takes 0.5 s" in told
    # The waiting one gives up, and its file goes: that is no end of it.
    (Path(run.uri) / "pulse/0.json").unlink()
    assert watch.at(41) == ""
    assert [event["event"] for event in run.events()] == ["stalled"]
    beat(run, 0, number=99)
    beat(run, 1, number=99)
    assert watch.at(42) == ""
    assert [event["event"] for event in run.events()] == ["stalled", "stall_ended"]


def test_one_that_hangs_is_told_from_those_that_wait_for_it(run):
    watch = Watch(run)
    beat(run, 0, still=50.0, place=["wait (x.py:1)", "all_reduce (d.py:1)"])
    beat(run, 1, still=50.0, doing="data_wait", place=["read (ingest.py:7)"])
    told = watch.at(0)
    assert told.startswith("rank 1 on node-1 (process 101) waits for data since ")
    assert "in read (ingest.py:7); rank 0 on node-0 (process 100) waits" in told


def test_patience_follows_the_usual_step(run):
    watch = Watch(run)
    beat(run, 0, still=50.0, usual=10.0)
    assert watch.at(0) == ""  # 20 times 10 s have not passed
    beat(run, 0, still=201.0, usual=10.0)
    assert watch.at(1)
    beat(run, 0, still=3000.0, usual=0.0)  # compiles its first step
    assert watch.at(2) == ""
    beat(run, 0, still=3000.0, doing="evaluation")
    assert watch.at(3) == ""


def test_a_group_that_is_restarted_is_not_stalled(run):
    watch = Watch(run)
    beat(run, 0)
    beat(run, 1)
    watch.at(0)
    assert watch.at(60) == ""
    assert "no sign of life" in watch.at(pulse.UNKNOWN_SECONDS + 1)


def test_a_pulse_knows_the_usual_step_and_where_it_is(run):
    books = Books()
    books.switch("compute")
    one = Pulse(run, books, rank=3, limit=None)
    for _ in range(4):
        with books.spend("data_wait"):
            time.sleep(0.05)
        found = one.beat()
    assert 0.04 < found.usual < 1 and found.still == 0.0 and found.doing == "compute"
    assert found.rank == 3 and found.process == os.getpid()
    assert any("test_a_pulse_knows" in place for place in found.place)
    time.sleep(0.2)
    assert one.beat().still >= 0.2


def test_a_worker_that_stands_still_for_too_long_ends(tmp_path):
    script = (
        "import sys, time\n"
        "from pipelines.training.goodput import Books\n"
        "from pipelines.training.pulse import Pulse\n"
        "from pipelines.training.run_dir import RunDir\n"
        "books = Books(); books.switch('compute')\n"
        "with Pulse(RunDir(sys.argv[1]), books, rank=0, limit=0.5, every=0.05):\n"
        "    for _ in range(5):\n"
        "        with books.spend('data_wait'): time.sleep(0.1)\n"
        "    time.sleep(60)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=REPOSITORY,
        check=False,
    )
    assert ended.returncode == 1
    assert "rank 0 on " in ended.stderr and "it ends, to be restarted" in ended.stderr


def test_a_stopped_process_is_named_and_goes_on(run, tmp_path, monkeypatch):
    """Two processes that meet in gloo; one gets SIGSTOP, and later SIGCONT."""
    monkeypatch.setattr(pulse, "LEAST_SECONDS", 2.0)
    command = [sys.executable, "-m", "tests.pipelines.stopped_worker", str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)], cwd=REPOSITORY) for rank in (0, 1)]
    stalls = Stalls(run, factor=5)

    def told(kind):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            stalls.look()
            found = run.events(kind)
            if found:
                return found[-1]["message"]
            time.sleep(0.1)
        raise TimeoutError(kind)

    try:
        while not all(one.usual for one, _ in stalls.heard.values()) or len(stalls.heard) < 2:
            stalls.look()
            time.sleep(0.1)
        workers[1].send_signal(signal.SIGSTOP)
        message = told("stalled")
        assert f"(process {workers[1].pid}) shows no sign of life" in message
        assert f"(process {workers[0].pid}) waits, is in a step" in message
        assert "all_reduce" in message
        workers[1].send_signal(signal.SIGCONT)
        assert told("stall_ended") == "all workers move again"
        (tmp_path / "last").touch()
        assert [worker.wait(60) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
