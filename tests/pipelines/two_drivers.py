"""Two drivers on one run, again and again: `python -m tests.pipelines.two_drivers DIR ROUNDS SEED`.

Each round starts the same pretraining twice, the second one at a random moment of the first. In
turn nothing else happens, the first is killed, or it stands still for longer than its lease and
then goes on. One line of JSON a round says what is different from the run that was alone; nothing
should be. The drivers are forked, so that a round costs a run and no imports.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from pipelines import pretrain
from pipelines.config.lease import LeaseConfig
from pipelines.errors import StageFailed
from tests.pipelines.pretrain_fixtures import make_tables, metrics_of, small_config, weight_bytes

EXPIRES = 1.0
STEPS = 16


def config_of(root, name):
    config = small_config(
        (str(root / "images"), str(root / "tokens")),
        root / name,
        optim={"steps": STEPS, "warmup_steps": 2},
        log_every=1,
    )
    return dataclasses.replace(config, lease=LeaseConfig(expires_seconds=EXPIRES))


def start(config, log):
    """A driver of its own: exits 0 done, 1 with a sentence, 3 with a traceback."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
        torch.set_num_threads(1)
        pretrain.run(config)
        code = 0
    except StageFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def steps_of(run):
    """What may not depend on who ran: no seconds, no rates."""
    return [
        (line["step"], line["first_step"], line["losses"], line["samples"], line["grad_norm"])
        for line in metrics_of(str(run))
    ]


def await_moment(run, child, draw):
    """Before the run begins, or after a number of its steps."""
    steps = draw.randrange(-4, STEPS - 1)
    time.sleep(draw.random() * 0.2)
    while steps > 0 and not ended(child):
        with contextlib.suppress(FileNotFoundError):
            if len(metrics_of(str(run))) >= steps:
                return
        time.sleep(0.005)


def play(root, number, seed, alone):
    """One round; returns what is wrong."""
    draw, name = random.Random(f"{seed} {number}"), f"run-{number}"
    kind = ("nothing", "killed", "still")[number % 3]
    config, log = config_of(root, name), root / f"{name}.log"
    begin = time.monotonic()
    first = start(config, log)
    await_moment(root / name, first, draw)
    if kind == "killed":
        os.kill(first, signal.SIGKILL)
    elif kind == "still":
        os.kill(first, signal.SIGSTOP)
    second = start(config, log)
    if kind == "still":
        while "waiting until" not in log.read_text() and not ended(second):
            time.sleep(0.05)
        time.sleep(EXPIRES * 4 * draw.random())  # taken over meanwhile, or not
        os.kill(first, signal.SIGCONT)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (first, second)]
    wrong = []
    allowed = {"nothing": ((0,), (0,)), "killed": ((-9, 0), (0,)), "still": ((0, 1), (0, 1))}[kind]
    if 0 not in codes or any(code not in ok for code, ok in zip(codes, allowed, strict=True)):
        wrong.append(f"exit codes {codes}: {log.read_text()[-2000:]}")
    elif steps_of(root / name) != alone[0]:
        wrong.append("metrics.jsonl differs")
    elif weight_bytes(str(root / name)) != alone[1]:
        wrong.append("weights differ")
    elif (root / name / "_lease").exists():
        wrong.append("the lease is left")
    taken = "taken over" in log.read_text()
    print(
        json.dumps(
            {
                "round": number,
                "kind": kind,
                "codes": codes,
                "taken_over": taken,
                "seconds": round(time.monotonic() - begin, 1),
                "wrong": wrong,
            }
        ),
        flush=True,
    )


def main(folder, rounds, seed):
    root = Path(folder)
    make_tables(root)
    child = start(config_of(root, "alone"), root / "alone.log")
    assert os.waitpid(child, 0)[1] == 0, (root / "alone.log").read_text()
    alone = steps_of(root / "alone"), weight_bytes(str(root / "alone"))
    for number in range(int(rounds)):
        play(root, number, seed, alone)


if __name__ == "__main__":
    main(*sys.argv[1:])
