"""What an attempt of a job leaves, and that a scheduler's retry of bad input starts nothing."""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from jobs.attempt import KeptLog
from pipelines import storage

REPOSITORY = Path(__file__).parents[2]
# A stage without cluster: `prepare`, whose place is taken by a few lines.
DRIVER = """
import sys
from types import ModuleType
from jobs import cli, command
from pipelines.errors import InputError, StageFailed
from pipelines.steps import say_step
command.connect_to_ray = lambda: None
command.preflight = lambda stage, config: None
module = ModuleType("pipelines.prepare")
def run(config, start_ray):
    print("on stdout", flush=True)
    say_step("on stderr, with https://anna:geheim@host in it")
    import os
    os.system("echo of a child")
    {body}
module.run = run
sys.modules["pipelines.prepare"] = module
sys.exit(cli.main(["prepare", *sys.argv[1:]]))
"""
REFUSED = "raise InputError('source: no such folder')"


def attempt(
    output, body, *flags, job="beit-job", errors=subprocess.PIPE, timeout=None, **environment
):
    environment = {name: value for name, value in environment.items() if value}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("BEIT_", "RAY_ADDRESS"))}
    return subprocess.run(
        [sys.executable, "-c", DRIVER.replace("{body}", textwrap.indent(body, "    ").strip()),
         "--source", "/photos", "--output", str(output), *flags],
        cwd=REPOSITORY, env={**inherited, "BEIT_JOB": job, **environment},
        text=True, stdout=subprocess.PIPE, stderr=errors, check=False, timeout=timeout,
    )  # fmt: skip


def result(output):
    return json.loads(Path(f"{output}.result.json").read_text())


def kept(output):
    return [path.read_text() for path in sorted(Path(f"{output}.logs").iterdir())]


@pytest.mark.parametrize(
    ("body", "code", "cause"),
    [
        ("pass", 0, ""),
        ("raise StageFailed('collapsed')", 1, "failed: collapsed"),
        ("raise KeyError('a bug')", 1, "crashed: KeyError: 'a bug'"),
        (REFUSED, 2, "error: source: no such folder"),
        ("raise KeyboardInterrupt('Asked to end (SIGTERM).')", 130, "interrupted. Asked to end"),
    ],
)
def test_an_attempt_leaves_code_cause_and_log(tmp_path, body, code, cause):
    output = tmp_path / "images"
    done = attempt(output, body)
    assert done.returncode == code
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(f"beit: exit code {code}" + (f": {cause}" if cause else ""))
    assert result(output)["exit_code"] == code
    assert result(output)["cause"].startswith(cause)
    (log,) = kept(output)
    for text in ("beit prepare: attempt beit-job-", "on stdout", "on stderr", "of a child", last):
        assert text in log
    assert "geheim" not in log
    assert log.strip().splitlines()[-1] == last
    assert ("Traceback" in log) == ("a bug" in cause)


def test_what_goes_to_one_file_stays_in_its_order(tmp_path):
    """As in Ray's log of a job."""
    output = tmp_path / "images"
    body = (
        "for number in range(200):\n"
        "    print('line', number, file=(sys.stdout, sys.stderr)[number % 2], flush=True)\n"
        f"{REFUSED}"
    )
    done = attempt(output, body, errors=subprocess.STDOUT)
    for text in (done.stdout, *kept(output)):
        lines = [line for line in text.splitlines() if line.startswith("line ")]
        assert lines == [f"line {number}" for number in range(200)]
        assert text.strip().splitlines()[-1].startswith("beit: exit code 2")


def test_flags_that_do_not_parse_are_told_as_the_last_line(tmp_path):
    done = attempt(tmp_path / "images", "pass", "--no_such_flag", "1")
    assert done.returncode == 2
    assert done.stdout.strip().splitlines()[-1].startswith("beit: exit code 2")


def test_a_retry_of_bad_input_starts_nothing(tmp_path):
    output = tmp_path / "images"
    assert attempt(output, REFUSED).returncode == 2
    again = attempt(output, "pass")
    assert again.returncode == 2
    assert "on stdout" not in again.stdout
    assert "no such folder" in again.stderr
    assert "BEIT_RETRY=1" in again.stderr
    assert "source: no such folder" in result(output)["cause"]  # the first cause stays on record
    assert len(kept(output)) >= 1
    assert attempt(output, REFUSED, BEIT_RETRY="1").returncode == 2


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (["--min_side", "9"], {}),  # another configuration
        ([], {"BEIT_RETRY": "1"}),
        ([], {"job": "beit-job-2"}),  # a person has submitted it again
    ],
)
def test_what_is_no_blind_retry_runs(tmp_path, flags, environment):
    output = tmp_path / "images"
    assert attempt(output, REFUSED).returncode == 2
    assert attempt(output, "pass", *flags, **environment).returncode == 0
    assert result(output)["exit_code"] == 0


def test_other_ends_are_tried_again(tmp_path):
    output = tmp_path / "images"
    attempt(output, "raise StageFailed('x')")
    assert attempt(output, "pass").returncode == 0


def test_a_long_log_is_kept_in_pieces(tmp_path):
    output = tmp_path / "images"
    body = (
        "from jobs import attempt\nattempt.SEGMENT_BYTES = 1000\n"
        "import gc\nlog = next(o for o in gc.get_objects() if isinstance(o, attempt.KeptLog))\n"
        "import time\n"
        "for number in range(300):\n"
        "    print('line', number, flush=True)\n"
        "    number % 50 or (time.sleep(0.05), log._flush())"
    )
    assert attempt(output, body).returncode == 0
    pieces = kept(output)
    assert len(pieces) > 1
    lines = [line for line in "".join(pieces).splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(300)]


def test_a_piece_whose_storing_failed_is_stored_later(tmp_path):
    output = tmp_path / "images"
    body = (
        "from jobs import attempt\nfrom pipelines import storage\nimport gc, time\n"
        "log = next(o for o in gc.get_objects() if isinstance(o, attempt.KeptLog))\n"
        "attempt.SEGMENT_BYTES = 10\nwrite = storage.write_bytes\n"
        "def refuse(*_): raise OSError('away')\n"
        "print('what would be lost', flush=True)\ntime.sleep(0.1)\n"
        "storage.write_bytes = refuse\nlog._flush()\nstorage.write_bytes = write\n"
        "print('what came after', flush=True)"
    )
    assert attempt(output, body).returncode == 0
    # Lines of stderr may come between: it is read beside stdout.
    assert re.search("what would be lost\n.*what came after", "".join(kept(output)), re.DOTALL)


def test_a_log_that_grows_while_it_is_stored_waits_for_its_next_turn(monkeypatch):
    log = KeptLog.__new__(KeptLog)  # without taking this process's descriptors
    log.place, log.name, log.number, log.begin, log.kept = "memory://logs", "log", 0, 0, 0
    sent = []

    def store(_, data):
        sent.append(data)
        assert len(sent) < 3
        log.spool.write(b"meanwhile\n")

    monkeypatch.setattr(storage, "write_bytes", store)
    with tempfile.TemporaryFile(buffering=0) as log.spool:
        log.spool.write(b"first\n")
        log._flush()
        assert sent == [b"first\n"]
        log._flush()
        assert sent[1:] == [b"first\nmeanwhile\n"]


def test_nobody_who_reads_stops_no_job(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER.replace("{body}", "print('x' * 500_000)"),
             "--source", "/photos", "--output", str(tmp_path / "images")],
            cwd=REPOSITORY, env={**os.environ, "BEIT_JOB": "job"}, stdout=writing,
            stderr=writing, check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert done.returncode == 0
    assert result(tmp_path / "images")["exit_code"] == 0


def test_a_library_may_print_much_while_it_holds_the_gil(tmp_path):
    """As C does: no other thread of Python runs until all of it has gone through the pipe."""
    size = 300_000
    body = f"import ctypes\nctypes.PyDLL(None).write(1, b'x' * {size}, {size})"
    done = attempt(tmp_path / "images", body, timeout=60)
    assert done.returncode == 0
    assert done.stdout.count("x" * size) == 1
    assert kept(tmp_path / "images")[0].count("x" * size) == 1


def test_an_end_of_all_processes_of_a_job_is_told(tmp_path):
    """As `scancel` does it: the processes that copy the log get the signal, too."""
    body = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "def parent(stat):\n"
        "    try:\n"
        "        return int(stat.read_text().rpartition(')')[2].split()[1])\n"
        "    except OSError:  # ended in this moment\n"
        "        return None\n"
        "stats = Path('/proc').glob('[0-9]*/stat')\n"
        "pids = [int(stat.parent.name) for stat in stats if parent(stat) == os.getpid()]\n"
        "assert len(pids) == 2, pids\n"
        "[os.kill(pid, signal.SIGTERM) for pid in pids]\n"
        "raise KeyboardInterrupt('Asked to end (SIGTERM).')"
    )
    done = attempt(tmp_path / "images", body)
    assert done.returncode == 130
    assert "beit: exit code 130" in done.stdout
    assert "beit: exit code 130" in kept(tmp_path / "images")[0]


def test_ray_is_imported_by_nothing_before_its_settings_stand(tmp_path):
    body = "import sys\nassert 'ray' not in sys.modules"
    assert attempt(tmp_path / "images", body).returncode == 0


def test_without_a_job_nothing_is_left(tmp_path):
    output = tmp_path / "images"
    assert attempt(output, REFUSED, job="").returncode == 2
    assert list(tmp_path.iterdir()) == []
