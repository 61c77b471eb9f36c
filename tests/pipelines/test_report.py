"""One file that puts runs side by side: its figures, and what a browser draws of it."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image

from pipelines import report
from pipelines.config.checks import to_dict
from pipelines.config.pretrain import PretrainConfig, ProbeConfig
from pipelines.config.report import ReportConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError
from pipelines.evaluation.probes import accuracy_interval, seeds_half_width
from pipelines.pictures.canvas import SERIES
from pipelines.reporting import facts
from pipelines.reporting.compare import differing
from pipelines.reporting.facts import facts_of
from tests.pipelines.tracking_fixtures import dataset, start

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
NUM_IMAGES = 200
RATES = {("base", 0): 0.5, ("base", 1): 0.54, ("wide", 0): 0.7, ("wide", 1): 0.66}


def hits_of(setting, seed):
    """One random number an image, the same for all: the better run gets more of the same right."""
    drawn = np.random.default_rng(7).random(NUM_IMAGES)
    own = np.random.default_rng([seed, len(setting)]).random(NUM_IMAGES)
    return 0.8 * drawn + 0.2 * own < RATES[setting, seed]


def trained(config, setting, seed):
    params = {"model.dim": 192 if setting == "base" else 384, "model.depth": 12, "seed": seed,
              "objective.kind": "beit", "masking.kind": "blockwise", "masking.num_masked": 75,
              "optim.epochs": 9, "optim.lr": 1e-3, "images": "/data/emoji",
              "output": f"/runs/{setting}{seed}",
              "data.global_batch_size": 256, "scaling.num_workers": 2}  # fmt: skip
    images = dataset("image_table", "I" * 32, uri="/data/emoji")
    with start(config, stage="pretrain", params=params, inputs=[images]) as run:
        for step in range(40):
            own = (setting == "wide") + seed / 2
            run.log_metrics({"loss": 5 / (1 + step) + (step == 39) + own}, step)
        sheet = Image.new("RGB", (60, 40), (10, 200 if setting == "base" else 90, 90))
        run.log_image("reconstruction", sheet, 39)
        done = {"goodput": {"wall_seconds": 1800.0}, "steps": 40, "outcome": "finished"}
        run.log_artifact_file("report.json", json.dumps(done).encode())
        run.set_output(dataset("weights", f"{setting}{seed}".ljust(32, "x")))
    hits = hits_of(setting, seed)
    with start(config, stage="evaluate", parent_run_id=run.run_id, inputs=[images]) as judge:
        accuracy = float(hits.mean())
        judge.judge(
            {"linear_accuracy": accuracy, "linear_low": accuracy - 0.05,
             "linear_high": accuracy + 0.05}, images
        )  # fmt: skip
        kept = {"linear": "".join(map(str, hits.astype(int))), "groups": list(range(NUM_IMAGES))}
        judge.log_artifact_file("hits.json", json.dumps(kept).encode())
        more = setting == "wide"  # judged beside other things, which the linear probe is not of
        identity = {"weights": run.run_id, "image_table": "I" * 32, "baseline": "B" * more,
                    "options": {"num_folds": 5, "attentive": more, "baselines": not more,
                                "test_images": "/t" * more}}  # fmt: skip
        if more:  # by a version that had these fields
            identity["options"] |= {"knn_k": 10, "max_rejected": 5}
        judge.log_artifact_file("evaluation.json", json.dumps({"identity": identity}).encode())
    return run.run_id


@pytest.fixture(scope="module", name="made")
def made_fixture(empty_store, tmp_path_factory):
    """Store, run ids, and the file, made once."""
    path = tmp_path_factory.mktemp("report")
    shutil.copy(empty_store, path / "mlflow.db")
    config = TrackingConfig(uri=f"sqlite:///{path}/mlflow.db")
    runs = [trained(config, *one) for one in RATES]
    output = path / "out/report.html"
    result = report.run(ReportConfig(runs=["experiment:beit"], output=str(output), tracking=config))
    return config, runs, result, output


class Tables(html.parser.HTMLParser):
    """Rows of cells by the table's id, and the addresses that a browser would open."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.addresses, self.cell = {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
        if tag == "table":
            self.rows = self.tables.setdefault(attributes["id"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None


def test_the_table_groups_seeds_and_compares_in_pairs(made):
    _, _, result, output = made
    assert (result.runs, result.settings) == (4, 2)
    tables = Tables(output.read_text()).tables
    _, base, wide = tables["settings"]
    hits = {one: hits_of(*one) for one in RATES}
    assert (base[0], wide[0]) == ("tiny", "small")
    assert "Of all runs: beit · blockwise 75 · 9 epochs · emoji." in output.read_text()
    for row, name in ((base, "base"), (wide, "wide")):
        found = [100 * hits[name, seed].mean() for seed in (0, 1)]
        assert row[1:3] == ["2", f"{np.mean(found):.1f}"]
        assert row[4] == f"{np.std(found, ddof=1):.1f}"
        assert row[3].endswith(" *"), "two seeds: over images alone"
        low, high = map(float, row[3].removesuffix(" *").split(" to "))
        assert 10 < high - low < 16
    assert "* over images alone: an interval over seeds takes three" in output.read_text()
    pairs = [np.mean([hits[name, 0], hits[name, 1]], axis=0) for name in ("base", "wide")]
    difference = pairs[1] - pairs[0]
    low, high = accuracy_interval(difference, np.arange(NUM_IMAGES), seed=0)
    # Over seeds, too: Student's t, as scipy has it, from the variance within both settings.
    rates = [[hits[name, seed].mean() for seed in (0, 1)] for name in ("base", "wide")]
    of_seeds = (scipy.stats.ttest_ind(*rates[::-1]).confidence_interval().high
                - difference.mean())  # fmt: skip
    ends = (difference.mean() + sign * np.hypot(end - difference.mean(), of_seeds)
            for end, sign in ((low, -1), (high, 1)))  # fmt: skip
    assert base[5] == ""
    assert wide[5] == "{:+.1f} [{:+.1f}, {:+.1f}]".format(
        *(100 * value for value in (difference.mean(), *ends))
    )
    unpaired = 2 * 1.96 * np.sqrt(sum(p.var() for p in pairs) / NUM_IMAGES)
    assert high - low < unpaired, "what the pairing is for"


def test_intervals_over_seeds_are_student_s():
    for arms in ([[0.5, 0.53, 0.49]], [[0.5, 0.53], [0.6, 0.61]], [np.linspace(0, 1, 14)]):
        found = seeds_half_width(*arms)
        freedom = sum(len(arm) - 1 for arm in arms)
        within = sum((len(arm) - 1) * np.var(arm, ddof=1) for arm in arms) / freedom
        spread = np.sqrt(within * sum(1 / len(arm) for arm in arms))
        assert found == pytest.approx(scipy.stats.t.ppf(0.975, freedom) * spread, rel=3e-3)
    # Of one degree of freedom it would be nine times as wide as the seeds lie apart.
    for too_few in ([[0.5], [0.6]], [[0.5, 0.53]], [[0.5, 0.53], [0.6]]):
        assert seeds_half_width(*too_few) == 0


def test_it_says_what_differs_best_and_last_lineage_and_cost(made):
    _, _, _, output = made
    tables = Tables(output.read_text()).tables
    head, *rows = tables["differences"]
    assert head == ["run", "model.dim", "seed"]
    assert [row[1] for row in rows] == ["192", "192", "384", "384"]
    head, first, *_ = tables["runs"]
    assert head[3:] == ["loss, last", "loss, best"]
    assert first[3:] == [f"{5 / 40 + 1:.4g}", f"{5 / 39:.4g}"]
    assert tables["lineage"][1][1:] == ["image table", "I" * 12, "?"]
    assert tables["cost"][1][1:3] == ["1.00", "10,240"]


def test_the_file_needs_nothing_else_and_mlflow_has_it(made):
    config, runs, _, output = made
    text = output.read_text()
    page = Tables(text)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "<script" not in text
    client = MlflowClient(config.uri)
    [attached] = client.search_runs(["1"], "tags.`beit.stage` = 'report'")
    kept = client.download_artifacts(attached.info.run_id, "report.html")
    assert Path(kept).read_text() == text
    note = attached.data.tags["mlflow.note.content"]
    assert set(re.findall(r"/runs/([0-9a-f]{32})", note)) == set(runs)


def test_the_report_has_no_name_with_the_options_of_its_place(made, monkeypatch):
    config, runs, _, _ = made
    place = "s3://b/out/told.html?endpoint_override=http://h:1&secret_key=SEK"
    write = report.storage.write_bytes
    monkeypatch.setattr(
        report.storage, "write_bytes", lambda uri, *x, **y: uri == place or write(uri, *x, **y)
    )
    asked = ReportConfig(runs=runs[:1], output=place, tracking=config)
    report.run(asked)
    client = MlflowClient(config.uri)
    [own] = client.search_runs(
        ["1"], "tags.`beit.stage` = 'report'", order_by=["start_time DESC"], max_results=1
    )
    assert "told.html" in [file.path for file in client.list_artifacts(own.info.run_id)]
    assert own.data.tags["mlflow.note.content"].count("told.html under") == 1


def test_runs_are_named_in_every_way(made, tmp_path):
    config, runs, _, _ = made
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps({"mlflow_run_id": runs[3]}))
    asked = [runs[2], "params.seed = '0' and tags.`beit.stage` = 'pretrain'", str(directory)]
    client = MlflowClient(config.uri)
    found = report.chosen_runs(client, asked, "beit", 10)
    assert [run.info.run_id for run in found] == [runs[2], runs[0], runs[3]]
    with pytest.raises(InputError, match="3 runs, max_runs = 2"):
        report.chosen_runs(client, asked, "beit", 2)
    assert facts._is_place("s3://b/run?endpoint_override=http%3A%2F%2Fs3&region=eu"), "no query"
    assert not facts._is_place("params.images = 's3://b/images'")
    for wrong in ("/nowhere", "0" * 32, "params.seed =", "file:///nowhere?a=b"):
        with pytest.raises(InputError, match="runs: "):
            report.chosen_runs(client, [wrong], "beit", 10)


def test_one_run_is_one_run(made, tmp_path):
    config, runs, _, _ = made
    output = tmp_path / "one.html"
    result = report.run(ReportConfig(runs=[runs[0]], output=str(output), tracking=config))
    assert "one.html: 1 run, 1 setting; " in result.summary()
    assert "<h1>1 run of beit</h1>" in output.read_text()


def test_seeds_of_one_setting_are_compared_with_no_other(made, tmp_path):
    config, runs, _, _ = made
    output = tmp_path / "seeds.html"
    report.run(ReportConfig(runs=runs[:2], output=str(output), tracking=config))
    head, _ = Tables(output.read_text()).tables["settings"]
    assert head == ["setting", "seeds", "linear probe %, mean", "95 %", "spread over seeds"]
    assert "<b>Linear probe: 52.0 % ± 4.2 over 2 seeds.</b>" in output.read_text()


def test_seeds_of_earlier_versions_and_otherwise_watched_are_of_one_setting(made):
    client = MlflowClient(made[0].uri)

    def facts_with(change, **options):
        written = to_dict(PretrainConfig(images="/data/emoji", output="/runs/x", **options))
        change(written)
        run = client.create_run("1", tags={"beit.stage": "pretrain"})
        client.log_text(run.info.run_id, yaml.safe_dump(written), "config.yaml")
        return facts_of(client, client.get_run(run.info.run_id), [])

    new = facts_with(lambda written: None, probe=ProbeConfig(every_steps=7), seed=1)
    old = facts_with(lambda written: (written.pop("init"), written["optim"].pop("lr")))
    other = facts_with(lambda written: written["optim"].update(lr=0.5))
    assert new.setting == old.setting != other.setting
    assert differing([new, old]) == {"seed": [1, 0]}
    assert list(differing([new, other])) == ["optim.lr", "seed"]


def test_of_other_images_there_is_no_paired_difference(made):
    config, runs, _, _ = made
    client = MlflowClient(config.uri)
    first, second = (facts_of(client, client.get_run(run), ["loss"]) for run in (runs[0], runs[2]))
    assert report.settings_of([first, second])[1].difference is not None
    other = dataclasses.replace(second.judgement, identity="other images")
    second = dataclasses.replace(second, judgement=other)
    assert report.settings_of([first, second])[1].difference is None


def test_a_setting_of_one_run_has_the_interval_of_its_evaluation(made):
    """Groups by number are drawn in the order of their names, as `evaluate` does, by its seed."""
    client = MlflowClient(made[0].uri)
    run = facts_of(client, client.get_run(made[1][0]), [])
    names = [f"g{number:03}" for number in range(NUM_IMAGES)]
    for seed in (0, 3):
        pairing = dataclasses.replace(run.judgement.pairing, seed=seed)
        judged = dataclasses.replace(run.judgement, pairing=pairing)
        expected = accuracy_interval(pairing.hits, names, seed=seed)
        [setting] = report.settings_of([dataclasses.replace(run, judgement=judged)])
        assert setting.interval == pytest.approx(expected, abs=1e-12)


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_browser_draws_curves_intervals_and_pictures(made, tmp_path):
    _, _, _, output = made
    drawn = drawn_by_a_browser(output, tmp_path)

    def count(colour):
        return int((abs(drawn - colour).max(-1) <= 3).sum())

    assert count(np.array(SERIES[0])) > 200, "interval and first curve"
    assert count(np.array(SERIES[3])) > 100, "the last curve"
    assert count(np.array((10, 200, 90))) > 2 * 2000, "pictures of both seeds"
    assert count(np.array((10, 90, 90))) > 2 * 2000


def drawn_by_a_browser(page, tmp_path, height=3200):
    """int (H, 1300, 3): the page as it is seen."""
    shot = tmp_path / "page.png"
    subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={tmp_path}/profile",
         f"--window-size=1300,{height}", f"--screenshot={shot}", page.as_uri()],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    return np.asarray(Image.open(shot).convert("RGB")).astype(int)


MANY_SEEDS, MANY_SETTINGS, MANY_POINTS = 5, 20, 300
MANY_IMAGES = 1000


def quickly_trained(client, number, sheet):
    """A run with its evaluation as a training leaves them, written without waiting."""
    setting, seed = divmod(number, MANY_SEEDS)
    name = f"beit · tiny/16 · lr {1 + setting}e-4 · seed {seed}"
    tags = {"beit.stage": "pretrain", "beit.output.weights": f"w{number}", "mlflow.runName": name}
    run_id = client.create_run("1", tags=tags).info.run_id
    values = 5 / (1 + np.arange(MANY_POINTS)) + setting / 10
    metrics = [Metric("loss", float(v), 1000 + i, i) for i, v in enumerate(values)]
    client.log_batch(run_id, metrics)
    written = {"optim": {"lr": (1 + setting) * 1e-4}, "seed": seed, "model": {"dim": 192},
               "images": "/data/emoji", "output": f"/runs/{number}"}  # fmt: skip
    client.log_text(run_id, yaml.safe_dump(written), "config.yaml")
    client.log_image(run_id, sheet, artifact_file="figures/reconstruction.png")
    drawn = np.random.default_rng(7).random(MANY_IMAGES)
    own = np.random.default_rng(number).random(MANY_IMAGES)
    hits = 0.8 * drawn + 0.2 * own < 0.3 + setting / 100
    told = {"beit.stage": "evaluate", "mlflow.parentRunId": run_id}
    judge = client.create_run("1", tags=told).info.run_id
    rate = hits.mean()
    # As evaluations named them before.
    ends = {"linear_accuracy_low": rate - 0.03, "linear_accuracy_high": rate + 0.03}
    figures = {"linear_accuracy": rate, **ends}
    client.log_batch(judge, [Metric(name, float(v), 1, 0) for name, v in figures.items()])
    kept = {"linear": "".join(map(str, hits.astype(int))), "groups": list(range(MANY_IMAGES))}
    client.log_text(judge, json.dumps(kept), "hits.json")
    client.log_text(judge, json.dumps({"identity": {"image_table": "I"}}), "evaluation.json")
    client.set_terminated(judge)
    client.set_terminated(run_id)


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_report_of_a_hundred_runs_can_be_read(mlflow_uri, tmp_path):
    """Twenty settings of five seeds: a file to mail, best setting on the first screen."""
    client, config = MlflowClient(mlflow_uri), TrackingConfig(uri=mlflow_uri)
    client.create_experiment("beit", artifact_location=str(tmp_path / "files"))
    noise = np.random.default_rng(0).integers(0, 255, (150, 400, 3), dtype=np.uint8)
    for number in range(MANY_SETTINGS * MANY_SEEDS):
        quickly_trained(client, number, Image.fromarray(noise))
    output, begin = tmp_path / "report.html", time.process_time()  # the clock tells others' load
    result = report.run(ReportConfig(runs=["experiment:beit"], output=str(output), tracking=config))
    seconds = time.process_time() - begin
    print(f"100 runs: {seconds:.1f} s of a processor, {output.stat().st_size / 1e6:.1f} MB")
    assert (result.runs, result.settings) == (100, 20)
    assert output.stat().st_size < 8e6
    assert seconds < 90
    tables = Tables(output.read_text()).tables
    assert [len(tables[name]) for name in ("settings", "runs", "differences")] == [21, 101, 101]
    assert len(tables["differences"][0]) == 3  # run, learning rate, seed: no column a run
    # After the first, which the others are compared with, the best setting comes first.
    means = [float(row[2]) for row in tables["settings"][2:]]
    assert means == sorted(means, reverse=True)
    for said in ("the first 12 of 100 runs", "16 others", "lr 20e-4"):
        assert said in output.read_text()
    drawn = drawn_by_a_browser(output, tmp_path, height=1600)
    assert drawn.shape == (1600, 1300, 3)
    assert (abs(drawn - np.array(SERIES[0])).max(-1) <= 3).sum() > 500, "intervals of settings"
