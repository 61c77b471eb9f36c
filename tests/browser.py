"""A real browser, asked what it draws: Chromium without a window, over its DevTools protocol."""

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-port=0",
)  # fmt: skip

# Of MLflow's pages, as expressions to wait for: the side panel is closed, all of a description is
# shown, its figures are drawn, and what stands in a column on the screen.
ASSISTANT_CLOSED = """(() => { const b = document.querySelector('button[aria-label=Close]');
  if (b) b.click(); return !b && document.querySelector('[role=grid], h1, h2') !== null; })()"""
ALL_SHOWN = """(() => { if (document.body.innerText.includes('Show less')) return true;
  const b = [...document.querySelectorAll('button')].find(b => b.innerText.includes('Show more'));
  if (b) b.click(); return false; })()"""
FIGURES_DRAWN = """(() => { const figures = [...document.images]
  .filter(i => i.src.includes('figures/'));
  return figures.length > 0 && figures.every(i => i.complete && i.naturalWidth > 0); })()"""
ON_SCREEN = """const onScreen = e => { const r = e.getBoundingClientRect();
  return r.width > 0 && r.height > 0 && r.left >= 0 && r.top >= 0 && r.right <= innerWidth
    && r.bottom <= innerHeight; };"""


def cells_on_screen(column: str) -> str:
    """Texts of a column of the table of runs that are seen without scrolling."""
    selector = f'[role=gridcell][col-id="{column}"]'
    return f"""(() => {{ {ON_SCREEN}
      return [...document.querySelectorAll('{selector}')].filter(onScreen)
        .map(e => e.innerText); }})()"""


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.numbers = socket, itertools.count(1)

    async def ask(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = json.loads((await self.socket.receive()).data)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    async def resize(self, width: int, height: int) -> None:
        await self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    async def open(self, url: str) -> None:
        await self.ask("Page.navigate", url=url)

    async def value(self, script: str):
        """What an expression of JavaScript gives; promises are waited for."""
        answer = await self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait_for(self, script: str, seconds: float = 120.0):
        """Until the expression gives something true: that. What is not there yet is no error."""
        deadline = time.monotonic() + seconds
        tried = f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()"
        while not (found := await self.value(tried)):
            assert time.monotonic() < deadline, f"{script}: not in {seconds:.0f} s"
            await asyncio.sleep(0.3)
        return found

    async def screenshot(self, path: Path) -> None:
        """What is seen without scrolling, as PNG."""
        answer = await self.ask("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.asynccontextmanager
async def browser(profile: Path, *, width: int = 1440, height: int = 900) -> AsyncIterator[Page]:
    """A window of this size; its profile is written to a directory of the caller's."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    process = subprocess.Popen(
        [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        told, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (told.is_file() and "\n" in told.read_text()):
            assert time.monotonic() < deadline, "the browser does not start"
            await asyncio.sleep(0.1)
        port = told.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with session.ws_connect(
                tabs[0]["webSocketDebuggerUrl"], max_msg_size=0, heartbeat=None
            ) as socket:
                page = Page(socket)
                await page.resize(width, height)
                yield page
    finally:
        process.kill()
        process.wait()
