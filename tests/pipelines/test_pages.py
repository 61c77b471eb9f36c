"""MLflow's pages in a real browser: what a reader sees without scrolling or searching."""

import asyncio
import shutil

import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines.config.tracking import TrackingConfig
from pipelines.tracking.table import view_link
from tests.browser import ALL_SHOWN, BROWSER, FIGURES_DRAWN, ON_SCREEN, browser, cells_on_screen
from tests.pipelines.tracking_fixtures import dataset, start
from tests.servers import mlflow_server, running

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="no browser is installed"),
]
ACCURACIES = (0.5125, 0.6375)
PLOT = Image.new("RGB", (1520, 840), (200, 60, 90))
SHEET = Image.new("RGB", (660, 900), (10, 200, 90))
PROBES = cells_on_screen("metrics.`linear_accuracy`")
# Charts are drawn when they come near the window.
PICTURE_IN_ITS_CARD = f"""(() => {{ {ON_SCREEN}
  const picture = document.images[0];
  if (picture) {{ picture.scrollIntoView({{block: 'center'}}); return onScreen(picture)
    && picture.naturalWidth > 0 && picture.getBoundingClientRect().height > 100; }}
  for (const e of document.querySelectorAll('*'))
    if (e.scrollHeight > e.clientHeight + 50 && ['auto', 'scroll'].includes(
        getComputedStyle(e).overflowY)) e.scrollTop += 300;
  return false; }})()"""


# What stands beside the description is 440 pixels wide, and the page has a margin.
SIDE_PANEL = """[...document.querySelectorAll('*')].some(e => !e.children.length &&
  e.innerText === 'Created at' && e.getBoundingClientRect().left + 440 <= innerWidth - 24)"""


@pytest.fixture(name="served")
def served_fixture(empty_store, tmp_path):
    """Address of the server, and ids of pretrainings, each with its evaluation."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    images, runs = dataset("image_table", "I" * 32, uri="/data/emoji"), []
    for seed, accuracy in enumerate(ACCURACIES):
        params = {"model.dim": 192, "model.depth": 12, "seed": seed, "objective.kind": "beit",
                  "masking.kind": "blockwise", "masking.num_masked": 75, "optim.epochs": 9,
                  "optim.lr": 1e-3, "images": "/data/emoji"}  # fmt: skip
        with start(config, stage="pretrain", params=params, inputs=[images]) as run:
            for step in (1, 2, 3):
                run.log_metrics({"loss": 1 / step, "mim_accuracy": 0.1 * step}, step)
            run.log_image("probes", PLOT, 3)
            run.log_image("reconstruction", SHEET, 3)
            run.set_output(dataset("weights", str(seed) * 32))
        with start(config, stage="evaluate", parent_run_id=run.run_id, inputs=[images]) as judge:
            judge.judge({"linear_accuracy": accuracy, "linear_low": accuracy - 0.02,
                         "linear_high": accuracy + 0.02}, images)  # fmt: skip
        runs.append(run.run_id)
    server = mlflow_server(tmp_path, config.uri, str(tmp_path / "mlartifacts"))
    with running(server):
        yield f"http://127.0.0.1:{server.port}", runs


def test_the_table_and_the_page_of_a_run_answer_at_once(served, tmp_path):
    asyncio.run(look(*served, tmp_path))


async def look(address, runs, tmp_path):
    experiment = MlflowClient(address).get_run(runs[0]).info.experiment_id
    async with browser(tmp_path / "profile", width=1280, height=800) as page:
        await page.open(view_link(address, experiment))
        await page.wait_for(f"{PROBES}.length === 2")
        found = await page.value(PROBES)
        assert [float(text) for text in found] == sorted(ACCURACIES, reverse=True)
        await page.resize(1440, 900)
        run = f"{address}/#/experiments/{experiment}/runs/{runs[1]}"
        await page.open(f"{run}?workflowType=machine_learning")
        await page.wait_for("document.body.innerText.includes('Linear probe 63.7 % [61.7, 65.8]')")
        await page.wait_for(ALL_SHOWN)
        await page.wait_for(FIGURES_DRAWN)
        assert await page.value(SIDE_PANEL), "no figure pushes it out of the window"
        await page.open(f"{run}/model-metrics?workflowType=machine_learning")
        await page.wait_for(PICTURE_IN_ITS_CARD)
