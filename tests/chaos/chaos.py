"""Kills everything a tokenize job consists of, again and again, and looks at what comes out.

`python -m tests.chaos.chaos --kills 50` is the long version of `test_chaos.py`.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from pipelines import audit, storage
from pipelines.config.audit import AuditConfig
from tests.chaos import world

REPOSITORY = Path(__file__).parent.parent.parent
# What Ray calls the processes at work, see driver.py.
RENDER, ENCODE = "render_and_note", "EncodeAndNote"
KINDS = ("decode task", "encode actor", "raylet", "driver")


@dataclasses.dataclass
class Tally:
    """What was killed, and what that cost."""

    kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    units: int = 0
    rendered: int = 0
    encoded: int = 0
    render_in_flight: int = 0
    encode_in_flight: int = 0
    seconds: float = 0.0

    @property
    def total(self):
        return sum(self.kills.values())


class Journal:
    """What workers and drivers noted so far."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.touch()

    def events(self):
        lines = self.path.read_text().splitlines()
        return [json.loads(line) for line in lines]

    def in_flight(self):
        """Units begun and not booked, by stage."""
        open_units = {"render": set(), "encode": set()}
        for event in self.events():
            if event["event"] == "booked":
                for units in open_units.values():
                    units.discard(event["unit"])
            else:
                open_units[event["event"]].add(event["unit"])
        return {stage: len(units) for stage, units in open_units.items()}

    def count(self, event):
        return sum(line["event"] == event for line in self.events())


def patiently(start):
    """Starts a node; on a busy machine it can miss the 30 s that Ray gives it."""
    for _ in range(4):
        try:
            return start()
        except Exception as error:
            last = error
    raise last


class Arena:
    """A cluster of several raylets on this machine, and a driver process on it."""

    def __init__(
        self, directory, images, tokenizer, output, *, unit_seconds=1.0, nodes=2, **changes
    ):
        from ray.cluster_utils import Cluster

        self.directory = Path(directory)
        self.journal = Journal(self.directory / "journal.jsonl")
        self.environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_BACKEND_LOG_LEVEL": "fatal",
            "CHAOS_JOURNAL": str(self.journal.path),
            "CHAOS_UNIT_SECONDS": str(unit_seconds),
        }
        # A node that dies is missed within seconds.
        os.environ |= {
            "PYTHONPATH": str(REPOSITORY),
            "RAY_AUTH_MODE": "disabled",
            # Workers are as important as the rest: starved ones would make the test slow.
            "RAY_worker_niceness": "0",
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "4",
        }
        # Without hooks at exit, for those cannot be set in the thread that brings nodes back.
        self.cluster = patiently(
            lambda: Cluster(
                initialize_head=True,
                shutdown_at_exit=False,
                head_node_args={
                    "num_cpus": 0,
                    "object_store_memory": 150_000_000,
                    "include_dashboard": False,
                },
            )
        )
        self.nodes = [self._add_node() for _ in range(nodes)]
        self.job = {
            "address": self.cluster.address,
            "images": str(images),
            "tokenizer": str(tokenizer),
            "output": str(output),
            "changes": changes,
        }
        self.driver = None
        self.coming = None
        self.returned = 0

    def _add_node(self):
        return patiently(lambda: self.cluster.add_node(num_cpus=2, object_store_memory=150_000_000))

    def _replace_node(self):
        self.nodes.append(self._add_node())
        self.returned += 1

    def close(self):
        if self.coming is not None:
            self.coming.join()
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
        self.cluster.shutdown()

    def start_driver(self, name="job"):
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(self.job))
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.driver", str(path)],
                cwd=REPOSITORY,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def _workers(self, title):
        """Processes below this cluster's own raylets that are at such work now."""
        found = []
        for node in self.nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            try:
                children = psutil.Process(raylet).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for process in children:
                try:
                    if any(title in part for part in process.cmdline()[:1]):
                        found.append(process)
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
        return found

    def kill(self, kind, generator):
        """Kills one of this kind; False if there is none now."""
        if kind == "driver":
            self.driver.send_signal(signal.SIGKILL)
            self.driver.wait()
            return True
        if kind == "raylet":
            if len(self.nodes) < 2:
                return False
            node = self.nodes.pop(generator.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            return True
        workers = self._workers(RENDER if kind == "decode task" else ENCODE)
        if not workers:
            return False
        generator.choice(workers).send_signal(signal.SIGKILL)
        return True

    def run(self, kills, *, seed=0, quiet_seconds=(0.5, 2.5), limit_seconds=1500):
        """Runs the job to its end while killing; returns the tally. Raises if it does not end."""
        generator, tally, begin = random.Random(seed), Tally(), time.monotonic()
        # Every kind gets its share: drivers and raylets are slow to come back.
        plan = ["driver"] * max(1, kills // 10) + ["raylet"] * max(1, kills // 10)
        while len(plan) < kills:
            plan.append(KINDS[len(plan) % 2])
        generator.shuffle(plan)
        self.driver = self.start_driver()
        while time.monotonic() - begin < limit_seconds:
            if self.driver.poll() is not None:
                assert self.driver.returncode == 0, self.log()
                break
            if plan:
                self._wait_for_work(tally, limit_seconds - (time.monotonic() - begin))
                time.sleep(generator.uniform(*quiet_seconds))
                self._kill_next(plan, generator, tally)
            else:
                time.sleep(0.2)
        else:
            raise AssertionError(f"not finished after {limit_seconds} s\n{self.log()}")
        if self.coming is not None:
            self.coming.join()
        assert self.returned == tally.kills["raylet"], "a killed node never came back"
        tally.rendered = self.journal.count("render")
        tally.encoded = self.journal.count("encode")
        tally.seconds = time.monotonic() - begin
        return tally

    def _wait_for_work(self, tally, seconds):
        """Waits until an encoder works: a kill before that would meet nothing."""
        deadline, known = time.monotonic() + seconds, self.journal.count("encode")
        while time.monotonic() < deadline and self.driver.poll() is None:
            if self.journal.count("encode") > known:
                return
            time.sleep(0.05)

    def _kill_next(self, plan, generator, tally):
        if self.driver.poll() is not None:
            return
        for index, kind in enumerate(plan):
            before = self.journal.in_flight()
            if not self.kill(kind, generator):
                continue
            # What began while the blow fell counts as in flight, too.
            after = self.journal.in_flight()
            tally.render_in_flight += max(before["render"], after["render"])
            tally.encode_in_flight += max(before["encode"], after["encode"])
            tally.kills[kind] += 1
            del plan[index]
            print(f"kill {tally.total}: {kind}, in flight {before}", file=sys.stderr, flush=True)
            if kind == "raylet":
                # The job goes on meanwhile with what is left.
                if self.coming is not None:
                    self.coming.join()
                self.coming = threading.Thread(target=self._replace_node)
                self.coming.start()
            if kind == "driver":
                self.driver = self.start_driver()
            return

    def log(self):
        return (self.directory / "job.log").read_text()[-6000:]


def contents(uri):
    """Every file below a URI."""
    return {
        info.path: storage.read_bytes(storage.join(uri, info.path))
        for info in storage.list_files(uri)
    }


def check(arena, tally, output, reference):
    """The table is the undisturbed one to the byte; it passes its audit; little was done twice."""
    table = contents(output)
    assert table.keys() == contents(reference).keys()
    assert table == contents(reference)
    result = audit.run(
        AuditConfig(table=output, images=arena.job["images"], tokenizer=arena.job["tokenizer"])
    )
    tally.units = sum(name.endswith(".parquet") for name in table)
    assert result.num_files == tally.units
    assert tally.encoded - tally.units <= tally.encode_in_flight, tally
    assert tally.rendered - tally.units <= tally.render_in_flight, tally


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--units", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos") as directory:
        root = Path(directory)
        images = world.make_images(str(root / "images"), count=10 * options.units, parts=5)
        tokenizer = world.make_tokenizer(str(root / "tokenizer"))
        arena = Arena(root, images, tokenizer, root / "tokens", rows_per_unit=10)
        try:
            tally = arena.run(options.kills, seed=options.seed, limit_seconds=3600)
            arena.job["output"] = str(root / "reference")
            arena.environment["CHAOS_UNIT_SECONDS"] = "0"
            assert arena.start_driver("reference").wait() == 0
            check(arena, tally, str(root / "tokens"), str(root / "reference"))
        finally:
            arena.close()
    print(
        f"{tally.total} kills in {tally.seconds:.0f} s: {dict(tally.kills)}; {tally.units} units; "
        f"rendered again {tally.rendered - tally.units} (in flight {tally.render_in_flight}), "
        f"encoded again {tally.encoded - tally.units} (in flight {tally.encode_in_flight}); "
        "table equal to the byte, audit passed"
    )


if __name__ == "__main__":
    main()
