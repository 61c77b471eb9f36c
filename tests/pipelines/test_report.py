"""One file that puts runs side by side: its figures, and what a browser draws of it."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines import report
from pipelines.config.report import ReportConfig
from pipelines.config.tracking import TrackingConfig
from pipelines.errors import InputError
from pipelines.evaluation.probes import accuracy_interval
from pipelines.pictures.canvas import SERIES
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
            {"linear_accuracy": accuracy, "linear_accuracy_low": accuracy - 0.05,
             "linear_accuracy_high": accuracy + 0.05}, images
        )  # fmt: skip
        kept = {"linear": "".join(map(str, hits.astype(int))), "groups": list(range(NUM_IMAGES))}
        judge.log_artifact_file("hits.json", json.dumps(kept).encode())
        identity = {"weights": run.run_id, "image_table": "I" * 32}
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
    assert base[0] == "beit · tiny · blockwise 75 · 9 epochs · emoji"
    for row, name in ((base, "base"), (wide, "wide")):
        found = [100 * hits[name, seed].mean() for seed in (0, 1)]
        assert row[1:4] == ["2", f"{np.mean(found):.1f}", f"{np.std(found, ddof=1):.1f}"]
    pairs = [np.mean([hits[name, 0], hits[name, 1]], axis=0) for name in ("base", "wide")]
    difference = pairs[1] - pairs[0]
    low, high = accuracy_interval(difference, [str(i) for i in range(NUM_IMAGES)], seed=0)
    assert base[4] == ""
    assert wide[4] == f"{100 * difference.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    unpaired = 2 * 1.96 * np.sqrt(sum(p.var() for p in pairs) / NUM_IMAGES)
    assert high - low < unpaired, "what the pairing is for"


def test_it_says_what_differs_best_and_last_lineage_and_cost(made):
    _, _, _, output = made
    tables = Tables(output.read_text()).tables
    assert [row[0] for row in tables["differences"][1:]] == ["model.dim", "seed"]
    assert tables["differences"][1][1:] == ["192", "192", "384", "384"]
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
    for wrong in ("/nowhere", "0" * 32, "params.seed ="):
        with pytest.raises(InputError, match="runs: "):
            report.chosen_runs(client, [wrong], "beit", 10)


def test_of_other_images_there_is_no_paired_difference(made):
    config, runs, _, _ = made
    client = MlflowClient(config.uri)
    first, second = (facts_of(client, client.get_run(run), ["loss"]) for run in (runs[0], runs[2]))
    assert report.settings_of([first, second])[1].difference is not None
    other = dataclasses.replace(second.judgement, identity="other images")
    second = dataclasses.replace(second, judgement=other)
    assert report.settings_of([first, second])[1].difference is None


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_browser_draws_curves_intervals_and_pictures(made, tmp_path):
    _, _, _, output = made
    shot = tmp_path / "page.png"
    subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={tmp_path}/profile",
         "--window-size=1300,3200", f"--screenshot={shot}", output.as_uri()],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    drawn = np.asarray(Image.open(shot).convert("RGB")).astype(int)

    def count(colour):
        return int((abs(drawn - colour).max(-1) <= 3).sum())

    assert count(np.array(SERIES[0])) > 200, "interval and first curve"
    assert count(np.array(SERIES[3])) > 100, "the last curve"
    assert count(np.array((10, 200, 90))) > 2 * 2000, "pictures of both seeds"
    assert count(np.array((10, 90, 90))) > 2 * 2000
