"""`shovel status` in the states of a repository, and what the command line promises: exit codes, speed, completion."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click import Context
from typer.main import get_command

from pipelines.cli import EXITS, app
from pipelines.commands import complete

ROOT = Path(__file__).parents[2]


def status(project) -> dict:
    return json.loads(project.run("shovel", "status", "--json").stdout)


def test_a_fresh_clone(fresh_project) -> None:
    found = status(fresh_project)
    assert found["next"]["command"] == "shovel demo" and found["summary"] == "Nothing has run here yet."
    assert {stage["state"] for stage in found["stages"].values()} == {"stale"} and found["versions"] == {}
    assert not (fresh_project.folder / ".mlflow").exists(), "asking makes nothing"


def test_after_a_run_then_data_edited_params_edited_and_a_stage_that_failed(project) -> None:
    found = status(project)
    assert {stage["state"] for stage in found["stages"].values()} == {"fresh"}
    assert found["next"]["command"] == "git add -A && git commit"
    bits = project.read("reports/evaluate-chat.json")["bits_per_byte"]
    assert found["figures"]["bits per held-out byte, chat"] == bits
    project.commit("first")
    assert status(project)["next"]["command"] == "shovel propose"

    own = project.folder / "data/own/code"
    text = next(own.glob("*.py")).read_text()
    (own / "more.py").write_text(f"# more\n{text[::-1]}")
    found = status(project)
    assert found["summary"] == "fetch is stale: data/own changed." and found["next"]["command"] == "shovel run"
    assert found["stages"]["review"]["why"].endswith("will run before it")
    assert any("data/own/code/more.py" in note for note in found["notes"])
    (own / "more.py").unlink()

    project.set_params(finetune={"learning_rate": 1e-4})
    found = status(project)
    assert found["summary"] == "finetune is stale: finetune.learning_rate modified."
    assert found["next"]["why"] == "runs finetune, evaluate@chat, export and review"

    project.set_params(finetune={"languages": ["xx"]})
    failed = project.run("shovel", "run", "finetune", check=False)
    assert failed.returncode == 2
    found = status(project)
    assert found["stages"]["finetune"]["state"] == "failed" and found["next"]["why"] == "once that is mended"
    assert "finetune failed: params.yaml: `finetune.languages` ['xx'] has no dialogues" in found["summary"]
    screen = project.run("shovel", "status").stdout
    assert screen.count("\n") <= 24 and screen.rstrip().splitlines()[-1].startswith("next  shovel run")
    project.run("git", "checkout", "-q", "params.yaml")
    assert status(project)["next"]["command"] == "shovel propose"


def test_exit_codes_are_those_that_the_help_names(project) -> None:
    said = " ".join(project.run("shovel", "--help", COLUMNS="120").stdout.split())
    assert EXITS in said
    assert project.run("shovel", "status").returncode == 0
    for command in ("run train --set a=1", "keep nothing", "use moon", "run --keep", "compare x", "chat"):
        done = project.run("shovel", *command.split(), check=False)
        assert done.returncode == 2 and re.search(r"^shovel: .*[.;]$", done.stderr, re.MULTILINE), done.stderr
        assert "Traceback" not in done.stderr
    assert project.run("shovel", "nonsense", check=False).returncode == 2


def test_every_command_has_help_and_the_new_ones_an_example(project) -> None:
    for command in app.registered_commands:
        assert command.callback.__doc__
    for name in ("status", "run", "use", "runs", "watch", "keep", "compare", "propose", "review", "chat", "generate"):
        text = next(c.callback.__doc__ for c in app.registered_commands if c.callback.__name__ == name)
        assert re.search(rf"Examples?: shovel {name}", text), name


def test_the_shell_completes_presets_stages_and_runs(project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)
    assert complete.presets("d") == ["demo"] and complete.stages("f") == ["fetch", "finetune"]
    assert complete.runs("") == []
    parameter = next(p for p in get_command(app).commands["use"].params if p.name == "preset")
    assert [item.value for item in parameter.shell_complete(Context(get_command(app)), "la")] == ["laptop"]
    assert "--show-completion" in project.run("shovel", "--help", COLUMNS="120").stdout


def test_the_commands_load_nothing_heavy(project) -> None:
    code = "import sys, pipelines.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "mlflow", "dvc", "pandas", "numpy", "pydantic", "transformers", "great_expectations"}
