"""MLflow is filled from files: everything once, whatever dies, against a real MLflow store."""

import json
import shutil
import time

import pytest
from mlflow import MlflowClient
from PIL import Image

from jobs.environment import ENVIRONMENT
from pipelines import lease, sync, tracking
from pipelines.config.sync import SyncConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import LeaseLost
from pipelines.lease_owner import Owner
from pipelines.tracking import background, model_registry
from pipelines.tracking.background import Background
from pipelines.tracking.filler import Filler, known_pictures
from pipelines.tracking.spool import LinesFile, Place, Spool
from pipelines.tracking.system_metrics import SystemMetrics
from pipelines.training.run_dir import RunDir
from tests.pipelines.tracking_fixtures import (  # noqa: F401 - fixtures
    config_fixture,
    dataset,
    start,
    steps,
)
from tests.servers import mlflow_server, running

PERIODS = 2500  # more than one request carries
EVENT = {"event": "probe", "time": 1.5e9, "step": 9, "figures": {"knn accuracy?": 0.5}}


def written(path, *, periods=PERIODS, status="FINISHED"):
    """What a training leaves for MLflow."""
    spool = Spool(str(path))
    lines = LinesFile(spool.at("metrics.jsonl"), start_step=0)
    for step in range(periods):
        lines.append({"step": step, "loss": 1 / (1 + step), "loss_per_step": [1.0], "nan": None,
                      "first_step": step})  # fmt: skip
    run = RunDir(str(path))
    run.event("probe", **{k: v for k, v in EVENT.items() if k not in ("event", "time")})
    run.event("spike", step=8)
    run.event("resumed", message="not of a step")
    for step in (5, 10):
        spool.picture("pictures/painted", Image.new("RGB", (16, 16)), step)
    spool.file("deep/note.txt", b"kept")
    (path / "config.yaml").write_text("a: 1")
    spool.update(
        stage="pretrain", name="base", params={"lr": "1"}, tags={"a": "b"}, inputs=[],
        status=status, error="" if status == "FINISHED" else "ValueError: no", ended=2e9,
        started=1e9, complete=False, stored_in="", curves_from=1,
    )  # fmt: skip
    return spool


def check_whole(client, run, *, periods=PERIODS):
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert steps(client, run, "loss") == list(range(1, periods + 1))
    assert steps(client, run, "event_spike") == [8]
    assert steps(client, run, "knn accuracy_") == [9]
    assert set(stored.data.metrics) == {"loss", "event_spike", "knn accuracy_"}
    assert known_pictures(client, run.run_id) == {("pictures/painted", s) for s in (5, 10)}
    assert len(client.list_artifacts(run.run_id, "images")) == 4  # two files a picture
    assert {file.path for file in client.list_artifacts(run.run_id)} == {
        "images", "deep", "config.yaml", "figures",
    }  # fmt: skip
    assert (stored.data.params, stored.data.tags["a"]) == ({"lr": "1"}, "b")
    assert "beit.error" not in stored.data.tags


class Mortal:
    """A client whose process dies at its n-th request: before it is stored, or after."""

    def __init__(self, client, requests, *, stored):
        self.client, self.left, self.stored = client, requests, stored

    def __getattr__(self, name):
        def request(*arguments, **options):
            self.left -= 1
            if self.left < 0 and not self.stored:
                raise SystemExit
            answer = getattr(self.client, name)(*arguments, **options)
            if self.left < 0:
                raise SystemExit
            return answer

        return request


def test_a_process_killed_again_and_again_leaves_nothing_out_and_nothing_twice(config, tmp_path):
    spool = written(tmp_path / "run")
    run = start(config)
    run._background.close()
    client = MlflowClient(config.uri)
    deaths = 0
    for requests in range(100):
        mortal = Mortal(client, requests // 2, stored=bool(requests % 2))
        try:
            Filler(mortal, run.run_id, spool).fill(final=True)
        except SystemExit:
            deaths += 1
        else:
            break
    assert 10 <= deaths < 99
    check_whole(client, run)
    again = Filler(client, run.run_id, Spool(spool.uri))
    again.fill(final=True)
    assert (again.sent["values"], again.sent["pictures"]) == (0, 0)
    check_whole(client, run)


def test_lines_are_read_once_unless_they_are_written_anew(tmp_path):
    spool, name, file = Spool(str(tmp_path)), "metrics.jsonl", tmp_path / "metrics.jsonl"

    def found(place):
        values, place = spool.values_after(name, place, size=file.stat().st_size)
        return [(one.step, one.metrics["loss"]) for one in values], place

    def append(step, loss, end="\n"):
        with file.open("a") as lines:
            lines.write(f'{{"step": {step}, "loss": {loss}}}{end}')

    append(0, 9.0)
    append(1, 8.0)
    first, place = found(Place())
    assert first == [(0, 9.0), (1, 8.0)]
    assert found(place) == ([], place)
    append(2, 7.0)
    append(3, 6.0, end="")  # cut off by a kill, at its very end
    assert found(place)[0] == [(2, 7.0), (3, 6.0)]
    place = found(place)[1]
    assert found(place)[0] == [(3, 6.0)]
    # A run goes back, and what is written anew is longer than what has been read.
    file.write_text("")
    for step in range(5):
        append(step, 5.0)
    assert found(place)[0] == [(step, 5.0) for step in range(5)]
    file.write_text("")
    append(0, 4.0)
    assert found(place)[0] == [(0, 4.0)]


def test_a_failure_is_taken_back_by_the_start_that_mends_it(config, tmp_path):
    spool = written(tmp_path / "run", periods=3, status="FAILED")
    with start(config) as run:
        pass
    client = MlflowClient(config.uri)
    Filler(client, run.run_id, spool).fill(final=True)
    failed = client.get_run(run.run_id)
    assert (failed.info.status, failed.data.tags["beit.error"]) == ("FAILED", "ValueError: no")
    assert failed.info.end_time == 2e12
    assert "config.yaml" in {file.path for file in client.list_artifacts(run.run_id)}
    assert "ValueError: no" in failed.data.tags["mlflow.note.content"]
    spool.update(status="FINISHED", error="")
    Filler(client, run.run_id, spool).fill(final=True)
    check_whole(client, run, periods=3)
    assert "ValueError" not in client.get_run(run.run_id).data.tags["mlflow.note.content"]


def test_what_an_earlier_version_began_keeps_its_steps(config, tmp_path):
    """They counted from 0, and the first of them kept no record beside the lines."""
    lines, record = tmp_path / "run/metrics.jsonl", tmp_path / "run/tracking.json"
    with start(config) as run:
        pass
    client = MlflowClient(config.uri)
    for step in range(3):
        LinesFile(str(lines), start_step=step).append({"step": step, "loss": 0.5})
        client.log_metric(run.run_id, "loss", 0.5, step=step)
    for step in (3, 4):
        LinesFile(str(lines), start_step=step).append({"step": step, "loss": 0.5})
        with start(config, stage="pretrain", spool=str(lines.parent), resume_run_id=run.run_id):
            pass
        assert steps(client, run, "loss") == list(range(step + 1))
        kept = json.loads(record.read_text())
        record.write_text(json.dumps({k: v for k, v in kept.items() if k != "curves_from"}))


class Away:
    """A filler whose server is away for so many calls."""

    patience, allowance = 1.0, 0.0

    def __init__(self, failures):
        self.failures, self.calls, self.deadline = failures, [], 0.0

    def beat(self):
        pass

    def fill(self, *, final=False):
        self.calls.append(final)
        if len(self.calls) <= self.failures:
            raise ConnectionError("refused by http://anna:geheim@mlflow")


def test_at_the_end_a_dead_server_is_waited_for_only_so_long(caplog):
    away = Background(Away(10**9), every=60, shown="mlflow")
    begin = time.monotonic()
    assert not away.close()
    assert 0.9 < time.monotonic() - begin < 5
    assert caplog.text.count("mlflow takes nothing") == 1
    assert "geheim" not in caplog.text


def test_nothing_is_kept_where_another_driver_has_taken_over(tmp_path):
    def lost():
        raise LeaseLost("taken over")

    spool = Spool(str(tmp_path), lost)
    for write in (
        lambda: spool.picture("masks", Image.new("L", (1, 1)), 1),
        lambda: spool.file("x", b"1"),
        lambda: spool.update(status="FAILED"),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert not list(tmp_path.iterdir())


def test_a_server_that_comes_back_in_time_gets_everything():
    away = Background(Away(2), every=60, shown="mlflow")
    away.filler.patience = 20.0
    assert away.close()
    assert away.filler.calls[-1] is True


def closed(client, run_id, spool):
    """Whether MLflow took it all, and after how many seconds that was known."""
    filler = Filler(client, run_id, spool)
    filler.patience = 2.0
    begin = time.monotonic()
    return Background(filler, every=60, shown="mlflow").close(), time.monotonic() - begin


def test_a_server_that_refuses_one_thing_for_good_holds_nobody_up(config, tmp_path, monkeypatch):
    spool = written(tmp_path / "run", periods=3)
    with start(config) as run:
        pass
    client = MlflowClient(config.uri)
    monkeypatch.setattr(background, "LONGEST_CLOSE", 20.0)  # 2 s without progress are enough
    (tmp_path / "run/weights").mkdir()
    (tmp_path / "run/weights/weights.safetensors").write_bytes(bytes(30_000_000))
    spool.update(weights={"uri": spool.at("weights"), "registered_model": "beit"})
    monkeypatch.setattr(model_registry, "log_weights", refuse)
    complete, seconds = closed(client, run.run_id, spool)
    assert (complete, seconds < 15) == (False, True)
    assert len(steps(client, run, "loss")) == 3
    stored = client.get_run(run.run_id)  # ended as it has, and says what is missing
    assert (stored.info.status, stored.info.end_time) == ("FINISHED", 2e12)
    assert stored.data.tags["beit.model_missing"] == "413"
    assert "No model is here: 413" in stored.data.tags["mlflow.note.content"]
    monkeypatch.setattr(model_registry, "log_weights", lambda *_, **__: "m-1")
    monkeypatch.setattr(client, "set_logged_model_tags", lambda *_: None)
    assert closed(client, run.run_id, spool)[0]
    assert "beit.model_missing" not in client.get_run(run.run_id).data.tags
    # Nor does one that seems to make progress for ever.
    monkeypatch.setattr(background, "LONGEST_CLOSE", 1.0)
    endless = Background(Endless(10**9), every=60, shown="mlflow")
    assert not endless.close()


def refuse(*_, **__):
    raise ConnectionError("413")


class Endless(Away):
    """A filler that moves its deadline on with every failure."""

    def fill(self, *, final=False):
        self.deadline = time.monotonic() + 60
        super().fill(final=final)


def test_an_evaluation_whose_parent_was_deleted_ends(config, tmp_path):
    client = MlflowClient(config.uri)
    with start(config, stage="pretrain") as parent:
        pass
    with start(config, stage="evaluate", parent_run_id=parent.run_id) as judge:
        wait_until(lambda: "mlflow.parentRunId" in client.get_run(judge.run_id).data.tags)
        client.delete_run(parent.run_id)
        judge.judge({"linear_accuracy": 0.5}, dataset("image_table", "I" * 32))
    assert client.get_run(judge.run_id).info.status == "FINISHED"


class Slow(Away):
    """A filler whose server takes its time for everything."""

    def __init__(self, seconds):
        super().__init__(0)
        self.seconds, self.beats = seconds, 0

    def beat(self):
        self.beats += 1

    def fill(self, *, final=False):
        super().fill(final=final)
        time.sleep(self.seconds)


def test_a_slow_server_is_filled_and_told_of_life_all_the_same(monkeypatch):
    monkeypatch.setattr(background, "MAX_PAUSE", 0.1)
    monkeypatch.setattr(background, "BEAT_EVERY", 0.05)
    slow = Background(Slow(0.5), every=0.01, shown="mlflow")
    slow.filler.patience = 20.0
    wait_until(lambda: len(slow.filler.calls) >= 2, seconds=5)  # not in 20 times half a second
    assert slow.filler.beats > 3  # also while it fills
    assert slow.close()


def test_what_a_dead_server_missed_is_kept_and_synced(config, tmp_path, monkeypatch, caplog):
    def away(self, **options):
        raise ConnectionError("away")

    monkeypatch.setattr(Filler, "fill", away)
    with start(config, output=str(tmp_path / "tokens"), params={"uri": "s3://k:geheim@b"}) as run:
        run._background.filler.patience = 0.2
        run.log_metrics({"codes": 7.0}, 3)
        run.log_image("codes", Image.new("RGB", (4, 4)))
        run.set_note("done")
    monkeypatch.undo()
    kept = tmp_path / "tokens.record"
    assert f"`beit sync {kept}` sends it" in caplog.text
    assert not [f for f in kept.rglob("*") if f.is_file() and b"geheim" in f.read_bytes()]
    client = MlflowClient(config.uri)
    assert client.get_run(run.run_id).info.status == "RUNNING"
    result = sync.run(SyncConfig(runs=[str(tmp_path / "tokens")]))
    assert (result.runs[0].run_id, result.runs[0].pictures) == (run.run_id, 1)
    stored = client.get_run(run.run_id)
    assert (stored.info.status, stored.data.metrics) == ("FINISHED", {"codes": 7.0})
    assert stored.data.tags["mlflow.note.content"].startswith("done\n\n![codes.png](get-artifact?")
    assert not kept.exists()


def test_a_run_trained_without_a_server_is_made_later(config, tmp_path):
    spool = written(tmp_path / "run", periods=3)
    RunDir(spool.uri).begin(TrackingConfig(), {}, may_change=())
    synced = sync.run(SyncConfig(runs=[spool.uri], tracking=config)).runs[0]
    client = MlflowClient(config.uri)
    check_whole(client, synced, periods=3)
    info = client.get_run(synced.run_id).info
    assert (info.run_name, info.start_time, info.end_time) == ("base", 1e12, 2e12)
    assert RunDir(spool.uri).record()["mlflow_run_id"] == synced.run_id
    again = sync.run(SyncConfig(runs=[spool.uri], tracking=config)).runs[0]
    assert (again.run_id, again.values) == (synced.run_id, 0)


def test_of_a_run_that_died_without_a_word_sync_says_so(config, tmp_path):
    spool = written(tmp_path / "run", periods=3, status="RUNNING")
    RunDir(spool.uri).begin(TrackingConfig(), {}, may_change=())
    sync.run(SyncConfig(runs=[spool.uri], tracking=config))
    run_id = RunDir(spool.uri).record()["mlflow_run_id"]
    stored = MlflowClient(config.uri).get_run(run_id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["beit.error"].startswith("killed; the last sign of it: 2001-09-09")


def test_a_run_whose_driver_waits_for_nodes_is_not_dead(tmp_path):
    folder = lease.Folder(str(tmp_path / lease.FOLDER))
    holder = lease.Lease(folder, Owner.here("pretrain", ""), expires=60)
    assert not sync._is_at_work(str(tmp_path), pause=lambda _: None)
    holder.take(poll=0, waiting=lambda _: None, alive=lambda _: None)
    assert sync._is_at_work(str(tmp_path), pause=lambda _: holder.beat())
    assert not sync._is_at_work(str(tmp_path), pause=lambda _: None)
    holder.end()
    assert not sync._is_at_work(str(tmp_path), pause=lambda _: holder.beat())


def test_a_claim_that_cannot_be_read_is_watched_like_any_other(tmp_path):
    """As one of a later version is."""
    claim, beat = tmp_path / "_lease/000001-a.json", tmp_path / "_lease/000001-a.beat"
    claim.parent.mkdir()
    claim.write_text("{}")
    pauses = []
    assert not sync._is_at_work(str(tmp_path), pause=pauses.append)
    assert sum(pauses) == 30  # half a lease of one minute
    assert sync._is_at_work(str(tmp_path), pause=lambda seconds: beat.write_text(str(seconds)))


def test_a_claim_that_was_taken_back_is_no_sign_of_life(tmp_path):
    folder = tmp_path / "_lease"
    folder.mkdir()
    for name in ("000001-dead.json", "000002-brief.json"):
        (folder / name).write_text("{}")
    brief = folder / "000002-brief.json"
    assert not sync._is_at_work(str(tmp_path), pause=lambda _: brief.unlink(missing_ok=True))


def test_a_driver_that_ends_while_sync_is_at_work_keeps_its_last_words(
    config, tmp_path, monkeypatch
):
    spool = written(tmp_path / "run", periods=3, status="RUNNING")
    spool.update(started=time.time())
    RunDir(spool.uri).begin(TrackingConfig(), {}, may_change=())
    sent = Filler._send_pictures

    def ends(filler):
        sent(filler)
        spool.update(status="FINISHED", tags={"a": "b", "beit.output.weights": "W"})

    monkeypatch.setattr(Filler, "_send_pictures", ends)
    synced = sync.run(SyncConfig(runs=[spool.uri], tracking=config)).runs[0]
    record = Spool(spool.uri).record()
    assert (record["status"], record["complete"]) == ("FINISHED", True)
    assert record["tags"]["beit.output.weights"] == "W"
    stored = MlflowClient(config.uri).get_run(synced.run_id)
    assert (stored.info.status, stored.data.tags["beit.output.weights"]) == ("FINISHED", "W")


def test_a_driver_that_goes_on_writing_holds_sync_not_up(config, tmp_path, monkeypatch):
    spool = written(tmp_path / "run", periods=3, status="RUNNING")
    spool.update(started=time.time())
    RunDir(spool.uri).begin(TrackingConfig(), {}, may_change=())
    sent, calls = Filler._send_pictures, []

    def writes(filler):
        assert len(calls) < 5, "sync runs after a driver that never ends"
        calls.append(1)
        sent(filler)
        spool.update(tags={"a": "b", "n": str(len(calls))})

    monkeypatch.setattr(Filler, "_send_pictures", writes)
    synced = sync.run(SyncConfig(runs=[spool.uri], tracking=config)).runs[0]
    assert (synced.status, synced.values) == ("RUNNING", 5)
    assert Spool(spool.uri).record()["tags"]["n"] == "1"


def test_values_that_are_no_numbers_are_told_not_raised(config, caplog):
    with start(config) as run:
        run.log_metrics({"loss": "high"}, 1)
        for step, value in ((2, float("nan")), (3, float("inf")), (4, 4.0)):
            run.log_metrics({"loss": value}, step)
    assert "loss of step 1 not recorded" in caplog.text
    assert steps(MlflowClient(config.uri), run, "loss") == [2, 3, 4]


def test_load_of_a_machine_goes_on_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(SystemMetrics, "sample_every", 0.02)
    monkeypatch.setattr(SystemMetrics, "publish_every", 0.05)
    spool, file = Spool(str(tmp_path)), tmp_path / "system.jsonl"
    for least in (2, 4):
        system = SystemMetrics(LinesFile(spool.at("system.jsonl")))
        wait_until(lambda least=least: file.read_text().count("\n") >= least)
        system.close()
    found = list(spool.values_after(file.name, Place(), size=file.stat().st_size)[0])
    assert [values.step for values in found] == list(range(len(found)))
    assert "system/cpu_utilization_percentage" in found[0].metrics


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.mark.long
def test_a_real_server_may_go_and_come_back(empty_store, tmp_path, monkeypatch):
    """Away in between, then dead at the end: the run is marked, and `sync` makes it whole."""
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, ENVIRONMENT[name])  # as of every command: else minutes pass
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    with running(mlflow_server(tmp_path, store, str(tmp_path / "served"))) as server:
        uri = f"http://127.0.0.1:{server.port}"
        config = TrackingConfig(uri=uri)
        run = tracking.start_run(config, stage="pretrain", params={}, spool=str(tmp_path / "run"))
        assert run.url == f"{uri}/#/experiments/1/runs/{run.run_id}?workflowType=machine_learning"
        RunDir(str(tmp_path / "run")).begin(config, {}, may_change=(), mlflow_run_id=run.run_id)
        client = MlflowClient(uri)
        for step in range(10):
            run.log_metrics({"loss": float(step)}, step)
        wait_until(lambda: len(steps(client, run, "loss")) == 10)
        server.kill()
        for step in range(10, 30):
            begin = time.monotonic()
            run.log_metrics({"loss": float(step)}, step)
            assert time.monotonic() - begin < 0.5
        server.start()
        wait_until(lambda: len(steps(client, run, "loss")) == 30)
        server.kill()
        run.log_image("picture", Image.new("RGB", (16, 16)), 30)
        begin = time.monotonic()
        run.finish()
        assert time.monotonic() - begin < 60
        server.start()
        assert client.get_run(run.run_id).info.status == "RUNNING"
        synced = sync.run(SyncConfig(runs=[str(tmp_path / "run")])).runs[0]
        assert (synced.run_id, synced.pictures) == (run.run_id, 1)
        assert steps(client, run, "loss") == list(range(30))
        assert client.get_run(run.run_id).info.status == "FINISHED"
        assert known_pictures(client, run.run_id) == {("picture", 30)}
