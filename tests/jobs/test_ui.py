"""`beit ui`: the server's processes end with the command, and its address is the last word."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import ui
from pipelines.errors import StageFailed
from tests.servers import answers, free_port

# As MLflow's: the command starts the process that answers, and does not end it.
SERVER = """
import subprocess, sys
print("its own line: http://127.0.0.1", flush=True)
child = [sys.executable, "-m", "http.server", sys.argv[1], "--bind", "127.0.0.1"]
subprocess.run(child)
"""


def served(log: Path, port: int) -> subprocess.Popen:
    """`beit ui` of such a server, when it has said where to look."""
    program = (
        "import signal, sys\n"
        "from jobs import ui\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"server = [sys.executable, '-c', {SERVER!r}, '{port}']\n"
        f"ui._serve = lambda *_: ui.serve(server, {port}, 'Open the table')\n"
        "sys.exit(ui.main([]))"
    )
    with log.open("w") as said:
        command = subprocess.Popen(
            [sys.executable, "-c", program], stdout=said, stderr=said, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while "Open the table" not in log.read_text():
        assert command.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    assert answers(port)
    return command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_server_ends_with_the_command(number: int, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = served(log, port)
    assert log.read_text().index("its own line") < log.read_text().index("Open the table")
    command.send_signal(number)
    assert command.wait(timeout=60) == 0
    assert log.read_text().endswith("the server has ended\n")
    assert not answers(port)


def test_who_kills_the_group_ends_the_server(tmp_path: Path) -> None:
    port = free_port()
    command = served(tmp_path / "log", port)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    deadline = time.monotonic() + 30
    while answers(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_does_not_start_is_a_failure() -> None:
    with pytest.raises(StageFailed, match="ended with code 3"):
        ui.serve([sys.executable, "-c", "raise SystemExit(3)"], free_port(), "Open the table")
