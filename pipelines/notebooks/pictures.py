"""The pictures of the README, taken of this project as it is: a notebook that runs, MLflow, the review page.

    python -m pipelines.notebooks.pictures        -> reports/pictures/lab.png, mlflow.png, review.png

The system's Chromium, without a window, clicks what a person would click: JupyterLab is started, notebook 4 is opened
from the list of files, *Run All Cells* is chosen, and the picture is taken when the last cell has run.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from pipelines import stage
from pipelines.params import UserError
from pipelines.repository import root

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

PICTURES, REVIEW, CONFIG = Path("reports/pictures"), Path("reports/review.html"), Path("notebooks/.jupyter")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE, TIMEOUT_S = {"width": 1280, "height": 860}, 600
NOTEBOOK, SHOWN = "04_pretrain.py", "An idea"  # the heading at the top of its picture
LANDING = "lab/workspaces/pictures/tree/notebooks/README.md"  # a workspace of its own: no tab of yours is open
QUIET_MLFLOW = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"  # no assistant in front


def pictures(folder: Path) -> list[Path]:
    """Take all pictures; raises `UserError` when there is no Chromium, or nothing to take a picture of."""
    run = stage.read_json(Path("reports/runs/pretrain.json"), made_by="pretrain")
    if not REVIEW.exists():
        raise UserError(f"{REVIEW} is missing; `dvc repro review` makes it.")
    folder.mkdir(parents=True, exist_ok=True)
    with _jupyterlab() as (address, token), _browser() as context:
        _review(context.new_page(), folder / "review.png")
        _lab(context.new_page(), f"{address}/{LANDING}?reset&token={token}", folder / "lab.png")
        curves = f"mlflow/#/experiments/{run['experiment_id']}/runs/{run['run_id']}/model-metrics"
        _mlflow(context.new_page(), f"{address}/{curves}?workflowType=machine_learning", folder / "mlflow.png")
    return sorted(folder.glob("*.png"))


@contextmanager
def _jupyterlab() -> Iterator[tuple[str, str]]:
    """JupyterLab as `make lab` starts it, without a window; its address and token. It ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, token = f"http://127.0.0.1:{port}", secrets.token_hex(16)
    words = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}"]
    environment = {**os.environ, "JUPYTER_CONFIG_PATH": str(CONFIG), "JUPYTER_TOKEN": token}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(words, cwd=root(), env=environment, **quiet)
    try:
        _wait(f"{address}/api")
        yield address, token
    finally:
        server.terminate()
        server.wait()


def _wait(address: str) -> None:
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        try:
            requests.get(address, timeout=5)
            return
        except requests.RequestException:
            time.sleep(0.5)
    raise UserError("JupyterLab does not start; `make lab` says why.")


@contextmanager
def _browser() -> Iterator[BrowserContext]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise UserError("no Chromium is on this machine; install one, for example with `apt-get install chromium`.")
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=options)
        context = browser.new_context(viewport=SIZE, reduced_motion="reduce")
        context.set_default_timeout(TIMEOUT_S * 1000)
        context.add_init_script(QUIET_MLFLOW)
        yield context
        browser.close()


def _review(page: Page, target: Path) -> None:
    page.goto(REVIEW.resolve().as_uri())
    page.screenshot(path=target)
    stage.say(f"pictures   {target}")


def _lab(page: Page, address: str, target: Path) -> None:
    """Open the notebook with a double click, run all cells by the menu, and look at its middle."""
    page.goto(address)
    page.locator(".jp-DirListing-item", has_text=NOTEBOOK).dblclick()
    notebook = page.locator(".jp-NotebookPanel:visible")
    notebook.locator(".jp-CodeCell").first.wait_for()
    status = notebook.locator(".jp-Notebook-ExecutionIndicator")
    status.and_(page.locator("[data-status=idle]")).wait_for()
    notebook.locator(".jp-Cell").first.click()  # the menu acts on where the cursor is
    page.locator(".lm-MenuBar-item", has_text="Run").click()
    page.locator("[data-command='runmenu:run-all']").click()
    stage.say(f"pictures   {NOTEBOOK} runs from top to bottom ...")
    status.and_(page.locator("[data-status=busy]")).wait_for()
    status.and_(page.locator("[data-status=idle]")).wait_for()
    notebook.get_by_role("heading", name=SHOWN).evaluate("heading => heading.scrollIntoView()")
    page.wait_for_timeout(2000)
    page.screenshot(path=target)
    stage.say(f"pictures   {target}")


def _mlflow(page: Page, address: str, target: Path) -> None:
    page.goto(address)
    page.locator(".js-plotly-plot svg").first.wait_for()
    page.get_by_placeholder("Search metric charts").fill("loss")
    page.wait_for_timeout(5000)
    page.screenshot(path=target)
    stage.say(f"pictures   {target}")


if __name__ == "__main__":
    with stage.exits("pictures"):
        pictures(PICTURES)
