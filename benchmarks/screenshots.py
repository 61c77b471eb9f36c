"""The pictures of the README: MLflow's pages of a store and a report, as a browser draws them.

    python -m benchmarks.screenshots --uri sqlite:///mlflow.db --report work/report.html

Serves the store by `beit ui`, opens the table of runs, the page of the best pretraining, and the
report of `beit report`, and writes `table.png`, `run.png` and `report.png`.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

from pipelines.tracking.table import HEADLINE, view_link
from tests.browser import (
    ALL_SHOWN,
    ASSISTANT_CLOSED,
    FIGURES_DRAWN,
    Page,
    browser,
    cells_on_screen,
)
from tests.servers import Server, free_port, running

WIDTH, HEIGHT = 1440, 900
MAX_BYTES = 150_000
PROBES = cells_on_screen(f"metrics.`{HEADLINE}`")


async def draw(address: str, experiment: str, run_id: str, report: Path, output: Path) -> None:
    """Writes the three pictures."""
    with tempfile.TemporaryDirectory() as profile:
        async with browser(Path(profile), width=WIDTH, height=HEIGHT) as page:
            await page.open(view_link(address, experiment))
            await page.wait_for(ASSISTANT_CLOSED)
            await page.wait_for(f"{PROBES}.length > 0")
            await shoot(page, output / "table.png")
            await page.open(
                f"{address}/#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"
            )
            await page.wait_for(ALL_SHOWN)
            await page.wait_for(FIGURES_DRAWN)
            await shoot(page, output / "run.png")
            await page.open(report.absolute().as_uri())
            await page.wait_for("document.querySelector('svg') !== null")
            await shoot(page, output / "report.png")


async def shoot(page: Page, path: Path) -> None:
    """A picture of what is seen, of as many colours as `MAX_BYTES` allow."""
    await asyncio.sleep(2)  # moving parts come to rest
    await page.screenshot(path)
    with Image.open(path) as image:
        shot = image.convert("RGB")
    for colours in (256, 128, 64, 32):
        shot.quantize(colours).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            break
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Starts the server, draws, ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uri", default="sqlite:///mlflow.db")
    parser.add_argument("--experiment", default="beit")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    client = MlflowClient(options.uri)
    experiment = client.get_experiment_by_name(options.experiment).experiment_id
    best, *_ = client.search_runs(
        [experiment], "tags.`beit.stage` = 'pretrain'", order_by=[f"metrics.{HEADLINE} DESC"]
    )
    port = free_port()
    command = [
        sys.executable, "-m", "jobs.cli", "ui", "--uri", options.uri, "--port", str(port),
        "--experiment", options.experiment,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as logs, running(Server(command, port, Path(logs, "log"))):
        address = f"http://127.0.0.1:{port}"
        asyncio.run(draw(address, experiment, best.info.run_id, options.report, options.output))


if __name__ == "__main__":
    main()
