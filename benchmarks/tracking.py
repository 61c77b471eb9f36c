"""Training recorded by an MLflow server that takes 5 s a request, beside training that is not.

    OMP_NUM_THREADS=1 python -m benchmarks.tracking [--rounds 4] [--output FILE.md]

The server is MLflow's own, behind a proxy that keeps every request for `--delay` seconds. Recorded
and unrecorded runs of the same training take turns. Compared are logging periods, without the
first two of a run: by the clock, and by the processor time of the whole process, in which all that
tracking does beside waiting is counted. On a machine that does other things both differ from run to
run by more than tracking takes; so what its own threads take is told apart, too. The end of a run,
which waits for the server for a bounded time, is left out.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from jobs.environment import prepare_environment
from pipelines import pretrain
from pipelines.config.tracking import TrackingConfig
from pipelines.tracking import store
from pipelines.tracking.background import Background
from pipelines.training.log import TrainLog
from tests.faulty_proxy import faulty_proxy
from tests.pipelines.pretrain_fixtures import make_tables, small_config
from tests.servers import mlflow_server, running

PERIOD, WARM_UP = 10, 2
THREADS = ("tracking", "heartbeat", "system-metrics")
Stamp = tuple[float, float, float]
"""Seconds by the clock, of the processor, and of the processor in threads of tracking."""


def trained(tables: tuple[str, str], output: Path, steps: int, uri: str) -> list[Stamp]:
    """The seconds of every logging period."""
    config = small_config(
        tables, output, log_every=PERIOD,
        model={"dim": 128, "depth": 4, "num_heads": 4},
        data={"global_batch_size": 32},
        optim={"steps": steps, "warmup_steps": 2},
        checkpoint={"every_steps": 10 * steps},
        tracking={"enabled": bool(uri), "uri": uri},
    )  # fmt: skip
    with stamped() as stamps:
        pretrain.run(config)
    pairs = list(pairwise(stamps))[WARM_UP:]
    return [
        (after[0] - before[0], after[1] - before[1], after[2] - before[2])
        for before, after in pairs
    ]


def seconds_of_threads() -> float:
    """Processor time of the threads of tracking that live."""
    clocks = [
        time.pthread_getcpuclockid(thread.ident)
        for thread in threading.enumerate()
        if thread.name in THREADS and thread.ident
    ]
    return sum(map(time.clock_gettime, clocks))


@contextmanager
def stamped() -> Iterator[list[Stamp]]:
    """The times at which periods end; nobody waits for the server after the last."""
    period, close = TrainLog.period, Background.close
    stamps: list[Stamp] = []

    def stamping(log: TrainLog, *arguments: object) -> None:
        stamps.append((time.monotonic(), time.process_time(), seconds_of_threads()))
        period(log, *arguments)

    def leave(background: Background) -> bool:
        background._given_up.set()
        background._wake.set()
        return False

    TrainLog.period, Background.close = stamping, leave
    try:
        yield stamps
    finally:
        TrainLog.period, Background.close = period, close


def main() -> None:
    """Measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--delay", type=float, default=5.0)
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    prepare_environment()
    periods: dict[str, list[Stamp]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        tables = make_tables(work / "tables")
        database = f"sqlite:///{work}/mlflow.db"
        store.quiet_mlflow()
        store.experiment_id(store.connect(database), TrackingConfig(), database)
        with (
            running(mlflow_server(work, database, str(work / "files"))) as server,
            faulty_proxy(server.port, rate=1.0, faults=("slow",), delay=options.delay) as proxy,
        ):
            for number in range(options.rounds):
                for kind, uri in (("off", ""), ("on", f"http://127.0.0.1:{proxy.port}")):
                    found = trained(tables, work / f"{kind}{number}", options.steps, uri)
                    periods[kind] += found
                    print(kind, *(f"{value:.4f}" for value in medians(found)), flush=True)
            requests = sum(proxy.counts.values())
    text = report(options, periods, requests)
    print(text)
    if options.output:
        Path(options.output).write_text(text)


def medians(periods: list[Stamp]) -> tuple[float, float]:
    clock, processor, _ = zip(*periods, strict=True)
    return statistics.median(clock), statistics.median(processor)


def report(options: argparse.Namespace, periods: dict[str, list[Stamp]], requests: int) -> str:
    """The table as Markdown."""
    found = {kind: medians(of_kind) for kind, of_kind in periods.items()}
    rows = [
        f"| {kind} | {len(periods[kind])} | {1000 * clock:.1f} | {1000 * processor:.1f} |"
        for kind, (clock, processor) in found.items()
    ]
    clock, processor = (100 * (on / off - 1) for off, on in zip(*found.values(), strict=True))
    own = 100 * sum(p[2] for p in periods["on"]) / sum(p[1] for p in periods["on"])
    return "\n".join(
        [
            "# Training beside a slow MLflow server",
            "",
            f"{options.rounds} rounds of {options.steps} steps without and with tracking, in "
            f"turns, one thread of a CPU; every one of {requests} requests took "
            f"{options.delay:g} s. Medians of periods of {PERIOD} steps. By "
            "`benchmarks/tracking.py`.",
            "",
            "| tracking | periods | ms by the clock | ms of the processor |",
            "| --- | --- | --- | --- |",
            *rows,
            f"| more | | {clock:+.2f} % | {processor:+.2f} % |",
            "",
            f"Threads of tracking took {own:.2f} % of the processor time of recorded runs.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
