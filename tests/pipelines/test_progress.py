"""The progress line: what rate and estimate speak of."""

import io
import re
import time

from pipelines.progress import Progress
from pipelines.steps import say_step
from pipelines.training.goodput import Attempt
from pipelines.training.log import ProgressThread
from pipelines.training.run_dir import RunDir


def last_line(progress):
    return progress.stream.getvalue().strip().splitlines()[-1]


def test_starting_up_is_in_no_rate():
    progress = Progress(100, "x", "images", stream=io.StringIO())
    progress.start -= 60  # a minute of starting up
    progress.update(10)
    progress.close()
    assert "6.00s/ images" in last_line(progress)
    progress.counted_from(0, 2.0)
    progress.close()
    assert re.search(r"\[00:02<00:18, +[45]\.\d+ images/s\]", last_line(progress))


def test_the_last_state_is_printed_once():
    progress = Progress(2, "x", "images", stream=io.StringIO(), log_every=0)
    progress.update(1)
    progress.update(2)
    progress.every = 60
    progress.update(2)  # seen again
    progress.close()
    assert re.findall(r"(\d)/2", progress.stream.getvalue()) == ["1", "2"]


def test_a_training_counts_its_steps_from_its_own_books(tmp_path, capsys):
    run = RunDir(str(tmp_path / "run"))
    thread = ProgressThread(run, "pretrain", total_steps=100, start_step=40)
    thread.progress.stream = io.StringIO()
    thread.progress.start -= 300  # nodes were waited for
    books = {"startup": 50.0, "compute": 8.0, "data_wait": 2.0}
    attempt = Attempt(
        number=1, launched_at=0.0, entered_at=time.time(), start_step=40, next_step=60, workers=8,
        seconds=books, latest={"loss": "1.0"},
    )  # fmt: skip
    run.write_attempt(attempt)
    thread._show()
    thread.progress.close()
    assert re.search(r"60/100 \[00:10<00:20, +[12]\.\d+ step/s\]", last_line(thread.progress))
    said = capsys.readouterr().err
    assert re.search(r"^\[\d\d:\d\d:\d\dZ \+\d+ s\] 8 workers started, from step 40", said)


def test_a_training_is_not_silent_before_its_first_step(tmp_path, capsys):
    thread = ProgressThread(
        RunDir(str(tmp_path / "run")), "pretrain", total_steps=100, start_step=0
    )
    thread.progress.stream = io.StringIO()
    thread._show()
    assert capsys.readouterr().err == ""
    thread.began = thread.said = time.monotonic() - 11
    thread._show()
    thread._show()
    said = capsys.readouterr().err
    assert said.count("still waiting for workers after 11 s") == 1
    thread.began -= 60  # then once a minute
    thread.said -= 11
    thread._show()
    assert capsys.readouterr().err == ""


def test_a_step_says_the_time(capsys):
    say_step("waiting for nodes")
    assert re.fullmatch(r"\[\d\d:\d\d:\d\dZ \+\d+ s\] waiting for nodes\n", capsys.readouterr().err)
