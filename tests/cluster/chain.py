"""A chain of stages by `beit submit`: photos in S3, submissions from the client, what they say and
make.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.world import World
from tests.pipelines.pretrain_fixtures import draw_image

# Idle workers, and the bookkeeping of Ray Data: one for a cluster, detached from all jobs.
OF_RAY = {"ray::IDLE", "ray::ActorLocationTracker", "ray::_AutoscalingCoordinatorActor",
          "ray::_StatsActor", "ray::_StatsSummaryActor"}  # fmt: skip
PHOTOS = "s3://beit/photos"
UPLOAD = """
import boto3, pathlib
s3 = boto3.client("s3")
for file in pathlib.Path("/tmp/photos").rglob("*.png"):
    s3.upload_file(str(file), "beit", str(file.relative_to("/tmp")))
"""
KEPT_LOG = """
import boto3
for each in boto3.resource("s3").Bucket("beit").objects.filter(Prefix="{prefix}"):
    print(each.get()["Body"].read().decode(), end="")
"""


def upload_photos(world: World, count: int) -> None:
    """Drawn photos of three classes, a folder each, at `PHOTOS`."""
    for number in range(count):
        file = world.hosts["store"].directory / f"photos/{'abc'[number % 3]}/{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_image(number).save(file)
    world.look(UPLOAD)


class Chain:
    """Submissions from the client, and looks at what they have made."""

    def __init__(self, world: World, flags: Mapping[str, str]) -> None:
        self.world, self.flags, self.number = world, flags, 0
        self.before = world.running()

    def begin(self, stage: str, *more: str) -> "Job":
        self.number += 1
        log = self.world.directory / f"{self.number:02d}-{stage}.log"
        return Job(log, self.world.submit(stage, [*self.flags[stage].split(), *more], log))

    def run(self, stage: str, *more: str) -> "Job":
        job = self.begin(stage, *more)
        job.ends_with(0)
        return job

    def stop(self, job: "Job") -> None:
        """Stops it from the client; returns when that is promised."""
        log = self.world.directory / "stop.log"
        stopped = self.world.beit("submit", "stop", job.submission, log=log)
        assert stopped.wait(timeout=120) == 0, log.read_text()

    def shows_all_of(self, job: "Job", logs: str) -> list[str]:
        """The job's log as it is kept below s3://beit/LOGS: its client shows each line, once."""
        kept = self.world.look(KEPT_LOG.format(prefix=logs + job.submission)).splitlines()
        shown = [line for line in job.text.splitlines() if not line.startswith("--")]
        first = shown.index(kept[0])
        assert shown[first : first + len(kept)] == kept
        return kept

    def leaves_no_process(self) -> None:
        """Waits until head and workers run what they ran before the first job, and Ray's own."""

        def left() -> set[str]:
            return self.world.running() - self.before - OF_RAY

        try:
            self.world.wait(lambda: not left(), "the end of all processes", 60)
        except AssertionError as error:
            raise AssertionError(f"left running: {left()}") from error

    def leaves_no_file(self, *names: str) -> None:
        """All results are on S3: no host has files of these names."""
        for host in self.world.hosts.values():
            assert not {file.name for file in host.directory.iterdir()} & set(names)

    def names(self, prefix: str) -> list[str]:
        """Names of the objects below s3://beit/PREFIX."""
        return self.world.look(
            "import boto3; pages = boto3.client('s3').get_paginator('list_objects_v2')\n"
            f"found = pages.paginate(Bucket='beit', Prefix={prefix!r}).search('Contents')\n"
            "print(*(each['Key'] for each in found if each), sep='\\n')"
        ).split()

    def count(self, prefix: str, name: str) -> int:
        """Objects below s3://beit/PREFIX whose name contains this."""
        return sum(name in each for each in self.names(prefix))


class Job:
    """What the client shows of a job that it follows."""

    def __init__(self, log: Path, process) -> None:
        self.log, self.process = log, process

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def submission(self) -> str:
        return self.text.partition("submitted ")[2].split()[0]

    def says(self, what: str, seconds: float = 600, *, after: str = "") -> None:
        """Waits until the client has shown it; `after`: below what it has shown before."""
        deadline = time.monotonic() + seconds
        while what not in self.text[max(self.text.find(after), 0) :]:
            assert self.process.poll() is None, f"ended before {what!r}:\n{self.text[-4000:]}"
            assert time.monotonic() < deadline, f"never said {what!r}:\n{self.text[-4000:]}"
            time.sleep(0.2)

    def ends_with(self, code: int) -> None:
        found = self.process.wait(timeout=900)
        assert found == code, f"exit code {found}, not {code}:\n{self.text[-6000:]}"
        assert f"exit code {code}." in self.text
