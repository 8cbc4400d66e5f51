"""All six notebooks from top to bottom on a small project, as their stage runs them; and how JupyterLab is set up."""

import ast
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import requests
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def executed(project):
    project.commit("first model")
    project.run("dvc", "--cd", "notebooks", "repro")
    return project


def outputs(project, name: str) -> list:
    notebook = nbformat.read(project.folder / f"notebooks/pages/{name}.ipynb", as_version=4)
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_leaves_a_page(executed, name: str) -> None:
    page = (executed.folder / f"notebooks/pages/{name}.html").read_text()
    assert not re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>""", page)
    shown = outputs(executed, name)
    assert not [output.text for output in shown if output.get("name") == "stderr"]
    text = "".join(str(output.get("text", "")) for output in shown)
    assert not re.search(r"Warning|Traceback|\[A-Z\]+\[0m", text)
    assert [output for output in shown if "image/png" in output.get("data", {})] or name == "06_review"


def test_the_pages_are_in_mlflow_and_the_models_lineage_does_not_know_them(executed) -> None:
    uri = f"sqlite:///{executed.folder}/.mlflow/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("shovel").experiment_id
    for name in NAMES:
        (run,) = client.search_runs([experiment], f"tags.`mlflow.runName` = 'notebooks-{name}'")
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {f"{name}.html", f"{name}.ipynb"}
        assert run.data.metrics["cells"] > 3 and run.info.status == "FINISHED"
    assert not list((executed.folder / "reports/runs").glob("notebooks*"))


def test_notebooks_leave_the_project_as_it_was(executed) -> None:
    """What notebook 6 promotes and keeps, it does in its copy; the runs of 4 and 5 are gone."""
    assert executed.run("dvc", "status", "--json").stdout.strip() == "{}"
    assert executed.run("git", "status", "--porcelain").stdout.strip() == "?? notebooks/dvc.lock"
    assert "champion" not in executed.run("shovel", "status").stdout
    assert not list((executed.folder / ".runs").glob("*/run.json"))


def test_the_rehearsal_promotes_and_rolls_back(executed) -> None:
    texts = [
        str(output.get("data", {}).get("text/plain", output.get("text", ""))) for output in outputs(executed, NAMES[-1])
    ]
    assert any("version 1, champion" in text for text in texts) and any("version 2, champion" in text for text in texts)
    assert any("params.yaml not committed" in text for text in texts)


def test_an_error_is_one_sentence_that_names_the_cell(executed) -> None:
    unknown = executed.run("python", "-m", "pipelines.notebooks.execute", "07", check=False)
    assert unknown.returncode == 2 and "choose one of 01_data" in unknown.stderr
    (executed.folder / "notebooks/07_broken.py").write_text("# %%\nx = 1\n\n# %%\nx / 0\n")
    broken = executed.run("python", "-m", "pipelines.notebooks.execute", "07_broken", check=False)
    assert broken.returncode == 2 and "cell 2: ZeroDivisionError: division by zero" in broken.stderr
    (executed.folder / "notebooks/07_broken.py").unlink()
    code = (
        "import sys; sys.modules['jupytext'] = None; from pipelines.notebooks import execute; execute.main('01_data')"
    )
    missing = executed.run("python", "-c", code, check=False)
    assert missing.returncode == 2 and missing.stderr.strip().endswith("`make lab` installs what notebooks need.")


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_hold_no_logic(name: str) -> None:
    tree = ast.parse((ROOT / "notebooks" / f"{name}.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert all(node.end_lineno - node.lineno < 5 for node in functions)


def test_jupyterlab_opens_python_files_as_notebooks_and_asks_for_a_token(project) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}"]
    environment = project.environment(JUPYTER_CONFIG_PATH="notebooks/.jupyter", JUPYTER_TOKEN="abc")
    log = project.folder / ".make" / "lab.log"
    with log.open("w") as file:
        server = subprocess.Popen(words, cwd=project.folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(f"{address}/api")
        assert requests.get(f"{address}/lab/api/settings", timeout=10).status_code == 403
        token = {"token": "abc"}
        settings = requests.get(f"{address}/lab/api/settings", params=token, timeout=30).json()["settings"]
        opened = next(one for one in settings if one["id"] == "@jupyterlab/docmanager-extension:plugin")
        assert opened["schema"]["properties"]["defaultViewers"]["default"]["python"] == "Jupytext Notebook"
        entries = requests.get(f"{address}/server-proxy/servers-info", params=token, timeout=10).json()
        assert {entry["name"] for entry in entries["server_processes"]} == {"mlflow", "plots"}
        page = requests.get(f"{address}/plots/page", params=token, timeout=60).text
        assert "pretraining loss" in page and "cdn" not in re.findall(r"<script[^>]*>", page)
    finally:
        server.terminate()
        server.wait(20)
    assert f"http://127.0.0.1:{port}/lab/tree/notebooks/README.md?token=" in log.read_text()


def _wait(address: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if requests.get(address, timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.3)
    raise AssertionError(f"{address} does not answer")
