"""The lease: one driver at a time, whatever the store, the clock and the scheduler do."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines import lease as lease_module
from pipelines import lease_owner
from pipelines.config.lease import LeaseConfig
from pipelines.errors import LeaseLost, StageFailed
from pipelines.lease import FOLDER, Fence, Folder, Lease, _beat, held
from pipelines.lease_owner import Owner
from pipelines.lease_store import read_claims
from tests.pipelines.lease_world import EXPIRES, World, drive


def played(seed, *, drivers=3, commits=6, rounds=2, removes=True, **faults):
    world = World(seed=seed, **faults)
    for number in range(drivers):
        drive(world, f"driver-{number}", commits=commits, rounds=rounds, removes=removes)
    world.run()
    return world.log


def overtaken(log):
    """Commits whose check began when the holder of a later generation was at work."""
    created, at_work, found = {}, {}, []
    for position, (kind, _, which, *rest) in enumerate(log):
        if kind == "created":
            created[which] = position
        elif kind == "took":  # a request may arrive again; what was there by now counts
            at_work[which] = (position, created[which])
        elif kind == "commit":
            later = (
                other
                for other, (taken, begun) in at_work.items()
                if taken < rest[0] and begun > at_work[which][1]
            )
            found.extend(later)
    return found


def search(seeds, **options):
    taken = lost = 0
    for seed in seeds:
        log = played(seed, **options)
        assert not overtaken(log), f"seed {seed}"
        taken += sum(entry[0] == "took" for entry in log)
        lost += sum(entry[0] == "lost" for entry in log)
    return taken, lost


class Memory:
    """A folder in memory, whose creations can be delayed, refused or left without an answer."""

    def __init__(self):
        self.files, self.before_create, self.answers, self.error = {}, None, True, None

    def list(self):
        return sorted(self.files)

    def read(self, name):
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def create(self, name, data):
        if self.error:
            raise self.error
        if self.before_create:
            action, self.before_create = self.before_create, None
            action()
        created = self.files.setdefault(name, data) is data
        if not self.answers:
            raise TimeoutError
        return created

    def write(self, name, data):
        self.files[name] = data

    def delete(self, name):
        self.files.pop(name, None)


def lease(store, host, *, clock=None, is_gone=lambda _: False):
    clock = [0.0] if clock is None else clock

    def sleep(seconds):
        clock[0] += seconds

    return Lease(
        store,
        Owner(stage="test", host=host, process=1),
        expires=EXPIRES,
        clock=lambda: clock[0],
        sleep=sleep,
        is_gone=is_gone,
    )


def never(owner):
    raise AssertionError(f"waits for {owner}")


REPOSITORY = Path(__file__).parents[2]
SHORT, LONG = 60, 1500


@pytest.mark.parametrize(
    "count", [SHORT, pytest.param(LONG, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
class TestSimulated:
    def test_nobody_commits_after_another_one_holds(self, count):
        taken, lost = search(range(count), faults=0.05, pauses=0.03)
        assert taken > 2 * count
        assert lost > count / 4  # the world is one in which it matters

    def test_nor_where_drivers_die(self, count):
        taken, _ = search(range(count), faults=0.03, pauses=0.02, deaths=0.01)
        assert taken > count

    def test_one_that_is_well_is_never_taken_over_from(self, count):
        # Nobody stands still, and all that is lost are deletions, half of which arrive late.
        for seed in range(count // 3):
            log = played(seed, faults=0.3, faulty=("delete",), pauses=0.0, most_delay=0.5)
            assert sum(entry[0] == "done" for entry in log) == 6, f"seed {seed}"
            assert not overtaken(log)

    def test_nor_does_it_matter_whether_the_store_creates_only_if_absent(self, count):
        taken, _ = search(range(count), faults=0.05, pauses=0.03, exclusive=False)
        assert taken > 2 * count


class TestTheSearch:
    """It finds what is wrong, or it would prove nothing."""

    def test_finds_a_holder_that_looks_for_its_own_claim_only(self, monkeypatch):
        def check(fence):
            if f"{fence.claim}.json" not in fence.store.list():
                raise LeaseLost

        monkeypatch.setattr(Fence, "check", check)
        with pytest.raises(AssertionError, match="seed"):
            search(range(100), faults=0.2, pauses=0.1)

    def test_finds_a_driver_that_does_not_look_again_after_its_claim(self, monkeypatch):
        def try_without(lease):
            looked, claims = lease.clock(), read_claims(lease.store)
            if all(lease._is_over(claim, looked) for claim in claims):
                lease._set_up(claims)
                lease._begin()

        monkeypatch.setattr(Lease, "_try", try_without)
        with pytest.raises(AssertionError, match="seed"):
            search(range(100), faults=0.0)


class TestTaking:
    def test_an_old_look_takes_nothing_from_who_came_in_between(self):
        """Found ended, then cleared and begun anew by another one: who looked first gives way."""
        store = Memory()
        first = lease(store, "first")
        first.take(poll=1, waiting=never)
        first.end()
        third = lease(store, "third")

        def in_between():
            second = lease(store, "second")
            second.take(poll=1, waiting=never)
            second.remove()
            fences.append(third.take(poll=1, waiting=never))

        fences, met = [], []
        store.before_create = in_between

        def waiting(owner):
            met.append(owner.host)
            fences[0].check()
            third.end()

        late = lease(store, "late").take(poll=1, waiting=waiting)
        assert met == ["third"]
        late.check()

    def test_a_lost_answer_is_read_back(self):
        store = Memory()
        store.answers = False
        lease(store, "one").take(poll=1, waiting=never).check()

    def test_a_deletion_that_arrives_a_second_time_meets_nobody_else(self):
        store, late = Memory(), []
        first = lease(store, "first")
        first.take(poll=1, waiting=never)

        def delete(name):
            late.append(name)
            Memory.delete(store, name)

        store.delete = delete
        first.remove()
        fence = lease(store, "second").take(poll=1, waiting=never)
        assert late
        for name in late:
            Memory.delete(store, name)
        fence.check()

    def test_of_two_that_claim_at_once_one_holds(self):
        store = Memory()
        first, second = (lease(store, host) for host in ("first", "second"))
        store.before_create = lambda: second._set_up([])
        first._try()
        second._try()
        assert (first._holds, second._holds) == (False, True)
        second.fence.check()
        assert first._try().owner.host == "second"

    def test_a_heartbeat_that_stood_still_leaves_nothing_behind(self):
        store = Memory()
        first = lease(store, "first")
        first.take(poll=1, waiting=never)

        def write(name, data):
            del store.write
            second = lease(store, "second", is_gone=lambda _: True)
            second.take(poll=1, waiting=never)
            second.remove()
            store.write(name, data)

        store.write = write
        first.beat()
        assert not store.files

    def test_a_dead_process_is_taken_over_at_once_and_a_living_one_after_its_time(self):
        store, clock = Memory(), [0.0]
        lease(store, "one").take(poll=1, waiting=never)
        lease(store, "two", is_gone=lambda _: True).take(poll=1, waiting=never)
        assert clock == [0.0]
        watching = lease(store, "three", clock=clock)
        watching.take(poll=1, waiting=lambda _: None)
        assert EXPIRES <= clock[0] <= EXPIRES + 1.5  # pauses are 0.5 to 1.5 of `poll`

    def test_a_waiter_that_stands_still_after_its_look_blames_nobody(self):
        """What it read is old by then; the holder has raised its heartbeat meanwhile."""
        store, clock = Memory(), [0.0]
        holder = lease(store, "one", clock=clock)
        fence = holder.take(poll=1, waiting=never)
        watching = lease(store, "two", clock=clock)
        watching._try()

        def read(name):
            data = Memory.read(store, name)
            clock[0] += 2 * EXPIRES if name.endswith(".beat") else 0.0
            return data

        store.read = read
        assert watching._try().owner.host == "one"
        holder.beat()
        fence.check()

    def test_a_store_that_refuses_is_told(self):
        store = Memory()
        store.error = OSError(28, "No space left on device")
        with pytest.raises(OSError, match="No space"):
            lease(store, "one").take(poll=1, waiting=never)

    def test_a_damaged_record_expires(self):
        store, clock = Memory(), [0.0]
        store.files["000001-a.json"] = b"{half"
        lease(store, "two", clock=clock).take(poll=1, waiting=lambda _: None)
        assert clock[0] >= EXPIRES


def test_nothing_of_a_lease_stays_beside_what_is_done(tmp_path):
    """Also not what a driver had half written when it was killed."""
    left = tmp_path / "_lease/.000001.json.0a1b2c3d.tmp"
    with lease_module.held(str(tmp_path), LeaseConfig(), stage="test") as holder:
        left.write_bytes(b"half")
        holder.done()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_driver_left_beside_a_finished_artefact_goes(tmp_path):
    lease_module.clear(str(tmp_path), LeaseConfig(), stage="test")
    assert not list(tmp_path.iterdir())
    dead = dataclasses.replace(Owner.here("test"), process=2**22 + 1, started="1")
    Lease(Folder(str(tmp_path / FOLDER)), dead, expires=60).take(poll=1, waiting=never)
    lease_module.clear(str(tmp_path), LeaseConfig(), stage="test")
    assert not list(tmp_path.iterdir())


class TestHeld:
    """By who stops where another driver is at work."""

    CONFIG = LeaseConfig(when_held="stop", expires_seconds=1.0)

    def elsewhere(self, output):
        owner = Owner(stage="prepare", host="elsewhere", process=1)
        return Lease(Folder(str(output / FOLDER)), owner, expires=1.0)

    def test_a_dead_one_elsewhere_is_taken_over_from(self, tmp_path):
        self.elsewhere(tmp_path).take(poll=1, waiting=never)
        with held(str(tmp_path), self.CONFIG, stage="prepare") as ours:
            ours.fence.check()

    def test_a_living_one_is_refused_by_name(self, tmp_path):
        other = self.elsewhere(tmp_path)
        fence, ended = other.take(poll=1, waiting=never), threading.Event()
        beats = threading.Thread(target=_beat, args=(other, ended))
        beats.start()
        with (
            pytest.raises(StageFailed, match=r"prepare on elsewhere.*nothing was done"),
            held(str(tmp_path), self.CONFIG, stage="prepare"),
        ):
            pass
        ended.set()
        beats.join()
        fence.check()


class TestOwner:
    def test_knows_a_living_a_dead_and_a_reused_process(self):
        here = Owner.here("prepare")
        assert not here.is_gone()
        assert dataclasses.replace(here, started="1").is_gone()
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        dead = dataclasses.replace(here, process=child.pid, started=lease_owner._started(child.pid))
        assert not dead.is_gone()
        child.kill()
        time.sleep(0.2)
        assert dead.is_gone()  # also before it is waited for
        child.communicate()
        assert dead.is_gone()

    def test_a_process_that_proc_hides_is_alive(self, monkeypatch):
        """Another user's, where /proc is mounted with hidepid."""

        def hidden(process):
            raise FileNotFoundError

        def not_ours(process, signal):
            raise PermissionError

        here = Owner.here("prepare")
        monkeypatch.setattr(lease_owner, "_stat", hidden)
        assert not here.is_gone()
        monkeypatch.setattr(lease_owner.os, "kill", not_ours)
        assert not here.is_gone()

    def test_judges_no_process_of_another_machine(self):
        here = Owner.here("prepare")
        assert not dataclasses.replace(here, process=2**22 + 1, machine="elsewhere").is_gone()
        assert not dataclasses.replace(here, process=2**22 + 1, machine="").is_gone()


STAGES = (
    "prepare", "train-tokenizer", "tokenize", "tokenize-views", "render", "pretrain", "finetune",
    "evaluate", "export",
)  # fmt: skip
MANY = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("stage", "rounds"),
    [
        ("pretrain", 4),
        ("tokenize-views", 4),
        *(pytest.param(stage, 50, marks=MANY) for stage in STAGES),
    ],
)
def test_two_drivers_make_what_one_makes(stage, rounds, tmp_path):
    """Processes: started at random moments, one of them killed or stopped and continued."""
    command = [sys.executable, "-m", "tests.pipelines.two_drivers", str(tmp_path), str(rounds), "0"]
    output = subprocess.run(
        [*command, stage], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    played = [json.loads(line) for line in output.stdout.splitlines()]
    assert len(played) == rounds
    assert [one for one in played if one["wrong"]] == []
    assert rounds < 10 or sum(one["taken_over"] for one in played) > rounds // 12
