"""`sync`: fills MLflow from what runs have kept, later and from wherever a server can be reached.

A run that is there already gets what it lacks, each thing once; one that is not there, because it
was trained where no server was, is made. See `pipelines.tracking.spool`.
"""

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelines import lease, lease_store, storage
from pipelines.config.lease import LeaseConfig
from pipelines.config.sync import SyncConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError, StageFailed
from pipelines.redaction import HIDDEN
from pipelines.tracking import opened_run, store
from pipelines.tracking.context import context_tags
from pipelines.tracking.filler import Filler
from pipelines.tracking.spool import Spool
from pipelines.training.run_dir import RunDir

# A run whose workers have written nothing for so long, and whose driver has said nothing, is dead.
DEAD_AFTER_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What became of one run."""

    uri: str
    run_id: str
    status: str
    values: int
    """Sent now; 0, as the next, if MLflow had them."""
    pictures: int

    def line(self) -> str:
        """For a person."""
        return (
            f"{self.uri}: {self.status}, MLflow run {self.run_id[:8]}; sent {self.values:,} values "
            f"and {self.pictures} pictures that it lacked"
        )


@dataclass(frozen=True, kw_only=True)
class SyncResult:
    """What became of all."""

    runs: tuple[Synced, ...]

    def summary(self) -> str:
        """One line a run."""
        return "\n".join(run.line() for run in self.runs)


def run(config: SyncConfig) -> SyncResult:
    """Fills MLflow from every run.

    Raises:
        InputError: no run is given, one has no record, or no server answers.
        StageFailed: a server ceased to answer; names the runs that are not complete.
    """
    if not config.runs:
        raise InputError("runs = []: give run directories")
    spools = [_spool(uri) for uri in config.runs]
    done, failed = [], []
    for spool in spools:
        try:
            done.append(_sync(spool, config.tracking))
        except (InputError, OSError):
            raise
        except Exception as error:  # of MLflow, which has many
            failed.append(f"{spool.uri} ({str(error).splitlines()[0][:200]})")
    result = SyncResult(runs=tuple(done))
    if failed:
        print(result.summary(), file=sys.stderr)
        raise StageFailed(f"not complete: {', '.join(failed)}; give the same command again")
    return result


def _spool(uri: str) -> Spool:
    """The record of a run directory, or that beside another stage's output."""
    there = storage.absolute(uri)
    for place in (there, storage.beside(there, ".record")):
        if Spool(place).record():
            return Spool(place)
    raise InputError(
        f"runs: {uri} has no record (tracking.json); give the directory of a training run, or the "
        "output of a stage that has said `beit sync`"
    )


def _sync(spool: Spool, config: TrackingConfig) -> Synced:
    record = spool.record()
    uri = config.uri or record["stored_in"]
    if HIDDEN in uri:
        raise InputError(f"tracking.uri: {uri} was recorded without its secret; give it again")
    tracking_uri = store.absolute_tracking_uri(uri)
    client = store.connect(tracking_uri)
    is_run = storage.exists(spool.at("run.json"))
    known = RunDir(spool.uri).record()["mlflow_run_id"] if is_run else record.get("run_id", "")
    config = dataclasses.replace(config, run_name=record["name"])
    if not known:  # trained with tracking off
        tags = context_tags(record["stage"], config.job_id)
        spool.update(tags={**tags, **record["tags"]})
    run_id = opened_run(client, config, tracking_uri, spool, known)
    if is_run:
        RunDir(spool.uri).set_run_id(run_id)
    Spool(spool.uri).update(run_id=run_id)
    if record["status"] == "RUNNING":
        _judge(spool.uri)
    values = pictures = 0
    # A driver that ends meanwhile has last words. One that goes on sends the rest itself, or leaves
    # it to the next call: what it writes while this one reads has no end.
    while True:
        filler = Filler(client, run_id, Spool(spool.uri))
        filler.fill(final=True)
        values, pictures = values + filler.sent["values"], pictures + filler.sent["pictures"]
        newest = Spool(spool.uri)
        if newest.record()["status"] == filler.spool.record()["status"]:
            break
    status = newest.record()["status"]
    newest.update(complete=status != "RUNNING", stored_in=tracking_uri)
    if not is_run and status != "RUNNING":
        storage.delete_prefix(spool.uri)
    return Synced(
        uri=spool.uri,
        run_id=run_id,
        status=status,
        values=values,
        pictures=pictures,
    )


def _judge(uri: str) -> None:
    """Says FAILED of a run that does not live any more and could not say so itself."""
    attempts = RunDir(uri).attempts()
    spool = Spool(uri)
    seen = max([spool.record()["started"], *(attempt.until for attempt in attempts)])
    # One that waits for nodes, or logs once an hour, says nothing either: its lease does.
    if time.time() - seen > DEAD_AFTER_SECONDS and not _is_at_work(uri):
        last = datetime.datetime.fromtimestamp(seen, datetime.UTC).isoformat(timespec="seconds")
        spool.update(status="FAILED", error=f"killed; the last sign of it: {last}", ended=seen)


def _is_at_work(uri: str, pause: Callable[[float], None] = time.sleep) -> bool:
    """Whether somebody holds this output: watches for a heartbeat, for half a lease."""
    place = lease_store.Folder(storage.join(uri, lease.FOLDER))

    def living() -> list[lease_store.Claim]:
        claims = lease_store.read_claims(place)
        return [claim for claim in claims if not claim.ended and not claim.owner.is_gone()]

    def signs(claims: list[lease_store.Claim]) -> set[tuple[str, bytes]]:
        return {(claim.name, claim.beat) for claim in claims}

    before = living()
    for _ in range(30):
        if not before:
            return False
        pause((before[-1].expires or LeaseConfig.expires_seconds) / 60)
        now = living()
        # A new claim or another beat is a sign of life; that one has gone is none.
        if signs(now) - signs(before):
            return True
        before = now
    return False
