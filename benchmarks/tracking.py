"""Training recorded by an MLflow server that takes 5 s a request, beside training that is not.

    OMP_NUM_THREADS=1 python -m benchmarks.tracking [--pairs 16] [--core 0] [--output FILE.md]

One recorded training, in blocks of steps: in one of two, by chance the first or the second, all
threads of tracking stand still. The server is MLflow's own, behind a proxy that keeps every request
for `--delay` seconds; before each block all rest for longer, so that nothing of the one before is
under way. Compared is the processor time of the whole process, in which everything counts: what
training takes, what tracking takes, and what they cost each other. For the process keeps to one
core, and there nothing else lengthens a training: who waits for the interpreter's lock waits for
somebody who uses that core. The clock is told as well, but says little on a machine that does other
things.

It is more than tracking costs in earnest: what a block holds up is made up for in the next one, the
proxy is a thread of the process, and where Ray trains, all but the load of the machine is sent by
another process than the training's. What happens once a run is told apart: its start, without the
import of MLflow, and its end.
"""

import argparse
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import requests
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

from jobs.environment import prepare_environment
from pipelines import pretrain, tracking
from pipelines.config.tracking import TrackingConfig
from pipelines.tracking import store
from pipelines.tracking.background import Background
from pipelines.tracking.filler import Filler
from pipelines.training.log import TrainLog
from tests.faulty_proxy import faulty_proxy
from tests.pipelines.pretrain_fixtures import make_tables, small_config
from tests.servers import mlflow_server, running

PERIOD = 10
THREADS = ("tracking", "heartbeat", "system-metrics")
ALL, OWN, CLOCK = range(3)


class Blocks:
    """Lets tracking work in some blocks of a training, and measures all of them.

    Args:
        steps: of a block.
        rest: seconds before each.
        recorded: of each block whether tracking works in it.
    """

    def __init__(self, steps: int, rest: float, recorded: list[bool]) -> None:
        self.steps, self.rest, self.recorded = steps, rest, recorded
        self.may_work = threading.Event()
        self.seconds: list[np.ndarray] = []
        """Of each period: of the processor in all, in tracking, and by the clock."""
        self._began = np.zeros(3)

    def period(self, step: int) -> None:
        """A logging period has ended, `step` steps are done."""
        self.seconds.append(_seconds() - self._began)
        if step % self.steps == 0:
            block = step // self.steps
            print(block, self.may_work.is_set(), self.seconds[-1].round(4), flush=True)
            self.may_work.clear()
            time.sleep(self.rest)
            if block == len(self.recorded) or self.recorded[block]:
                self.may_work.set()
        self._began = _seconds()

    def by_block(self) -> np.ndarray:
        """(blocks, periods, 3), without the first block, which warms up."""
        return np.stack(self.seconds).reshape(len(self.recorded), -1, 3)[1:]

    def held(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same, but the threads of tracking wait until they may work."""

        def call(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread().name in THREADS:
                self.may_work.wait()
            return function(*arguments, **options)

        return call


def _seconds() -> np.ndarray:
    threads = (
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.name in THREADS and thread.ident
    )
    return np.array([time.process_time(), sum(threads), time.monotonic()])


@contextmanager
def blocks_of(blocks: Blocks, once: dict[str, float]) -> Iterator[None]:
    """Logging periods end with `blocks`; `once` gets the seconds of the run's start and end."""
    period = TrainLog.period

    def measured(log: TrainLog, step: int, *arguments: Any) -> None:
        period(log, step, *arguments)
        blocks.period(step + 1)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*arguments, **options)
            finally:
                once[name] = time.monotonic() - began

        return call

    with ExitStack() as patches:
        for owner, name, replacement in (
            (TrainLog, "period", measured),
            (requests.Session, "send", blocks.held(requests.Session.send)),
            (Filler, "fill", blocks.held(Filler.fill)),
            (CPUMonitor, "collect_metrics", blocks.held(CPUMonitor.collect_metrics)),
            (tracking, "start_run", timed("start", tracking.start_run)),
            (Background, "close", timed("end", Background.close)),
        ):
            patches.enter_context(mock.patch.object(owner, name, replacement))
        yield


def main() -> None:
    """Measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of a block")
    parser.add_argument("--delay", type=float, default=5.0)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    prepare_environment()
    orders = random.Random(0).choices(((True, False), (False, True)), k=options.pairs)
    # The first block warms up.
    recorded = [False, *(kind for order in orders for kind in order)]
    blocks, once = Blocks(options.steps, options.delay + 1, recorded), dict[str, float]()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        tables = make_tables(work / "tables")
        database = f"sqlite:///{work}/mlflow.db"
        store.quiet_mlflow()
        store.experiment_id(store.connect(database), TrackingConfig(), database)
        with (
            running(mlflow_server(work, database, str(work / "files"))) as server,
            faulty_proxy(server.port, rate=1.0, faults=("slow",), delay=options.delay) as proxy,
            blocks_of(blocks, once),
        ):
            os.sched_setaffinity(0, {options.core})
            uri = f"http://127.0.0.1:{proxy.port}"
            pretrain.run(config(tables, work / "run", len(recorded) * options.steps, uri))
            requests_made = sum(proxy.counts.values())
    text = report(options, blocks, once, requests_made)
    print(text)
    if options.output:
        Path(options.output).write_text(text)


def config(tables: tuple[str, str], output: Path, steps: int, uri: str) -> Any:
    """A small network: the more steps a second, the more its threads stand in each other's way."""
    return small_config(
        tables, output, log_every=PERIOD,
        model={"dim": 64, "depth": 2, "num_heads": 2},
        data={"global_batch_size": 16},
        optim={"steps": steps, "warmup_steps": 2},
        checkpoint={"every_steps": 10 * steps},
        tracking={"enabled": True, "uri": uri},
    )  # fmt: skip


def report(
    options: argparse.Namespace, blocks: Blocks, once: dict[str, float], requests_made: int
) -> str:
    """The table as Markdown."""
    seconds, recorded = blocks.by_block(), np.array(blocks.recorded[1:])
    alone = seconds[..., ALL] - seconds[..., OWN]
    own = seconds[recorded][..., OWN].mean() / alone[~recorded].mean()
    rows = [
        _row("all of the process", seconds[..., ALL].mean(1), recorded),
        _row("all but tracking, median period", np.median(alone, 1), recorded),
        _row("by the clock, median period", np.median(seconds[..., CLOCK], 1), recorded),
    ]
    low, high = (100 * own + end for end in _more(np.median(alone, 1), recorded)[1:])
    return "\n".join(
        [
            "# Training beside a slow MLflow server",
            "",
            f"{options.pairs} pairs of blocks of {options.steps} steps, without and with tracking, "
            f"of one training on one core of a CPU; every one of {requests_made} requests took "
            f"{options.delay:g} s. By `benchmarks/tracking.py`, which says what is counted.",
            "",
            f"| ms of {PERIOD} steps | without | with | more, of pairs [95 %] |",
            "| --- | --- | --- | --- |",
            *rows,
            f"| tracking | | {1000 * seconds[recorded][..., OWN].mean():.1f} | {own:+.2%} |",
            "",
            "What differs between blocks is mostly the machine's: tracking and what it costs the "
            f"rest lie between {low:+.2f} and {high:+.2f} % by the second and the last row. By the "
            f"books of its threads it is {own:.2%}, and {2 * own:.2%} at most with those who wait "
            "for the interpreter's lock, for it is held no longer than they work.",
            "",
            f"Once a run: its start took {once['start']:.0f} s, its end, after the last step and "
            f"with the model, {once['end']:.0f} s.",
            "",
        ]
    )


def _row(name: str, of_blocks: np.ndarray, recorded: np.ndarray) -> str:
    off, on = (1000 * of_blocks[kind].mean() for kind in (~recorded, recorded))
    mean, low, high = _more(of_blocks, recorded)
    return f"| {name} | {off:.1f} | {on:.1f} | {mean:+.2f} % [{low:+.2f}, {high:+.2f}] |"


def _more(of_blocks: np.ndarray, recorded: np.ndarray) -> tuple[float, float, float]:
    """Mean of the paired differences in percent, and its interval from a bootstrap over pairs."""
    off, on = of_blocks[~recorded], of_blocks[recorded]
    more = 100 * (on - off) / off.mean()
    draws = np.random.default_rng(0).integers(0, len(more), (10_000, len(more)))
    low, high = np.percentile(more[draws].mean(1), (2.5, 97.5))
    return float(more.mean()), float(low), float(high)


if __name__ == "__main__":
    main()
