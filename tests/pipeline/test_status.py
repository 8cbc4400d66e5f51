"""`shovel status` in the states of a repository, and what the command line promises: exit codes, speed, completion."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from shared_server import free_port
from typer.main import get_command

from pipelines import cli, live, processes
from pipelines.commands import complete, work
from pipelines.params import UserError
from pipelines.stage import read_json

ROOT = Path(__file__).parents[2]
Shovel = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shovel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shovel:
    """A command in this process: (exit code, what it prints, what it says beside)."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shovel", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return command


def status(shovel: Shovel) -> dict:
    code, out, _ = shovel("status", "--json")
    assert code == 0
    return json.loads(out)


def test_a_fresh_clone(fresh_project, shovel: Shovel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fresh_project.folder)
    found = status(shovel)
    assert found["next"]["command"] == "shovel demo" and found["summary"] == "Nothing has run here yet."
    assert {stage["state"] for stage in found["stages"].values()} == {"stale"} and found["versions"] == {}
    assert not (fresh_project.folder / ".mlflow").exists(), "asking makes nothing"
    shutil.rmtree(fresh_project.folder / ".git")
    code, _, said = shovel("status")
    assert code == 2 and "`git init` makes one" in said


def test_both_sides_of_a_merge_are_one_sentence(fresh_project, shovel: Shovel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fresh_project.folder)
    for file, command in (("dvc.lock", "status"), ("reports/runs/review.json", "link"), ("params.yaml", "check")):
        path = fresh_project.folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("<<<<<<< HEAD\nours: {}\n=======\ntheirs: {}\n>>>>>>> main\n")
        sentence = f"shovel: {file} holds both sides of a merge; take one with `git checkout --ours {file}`"
        code, _, said = shovel(command)
        assert (code, said.splitlines()[-1][: len(sentence)]) == (2, sentence)
        path.unlink()
    with pytest.raises(UserError, match="is damaged; `dvc repro -f review` makes it again"):
        path.write_text("{")
        read_json(path, made_by="review")


def test_after_a_run_then_data_edited_params_edited_and_a_stage_that_failed(here, shovel: Shovel) -> None:
    found = status(shovel)
    assert {stage["state"] for stage in found["stages"].values()} == {"fresh"}
    bits = here.read("reports/evaluate-chat.json")["bits_per_byte"]
    assert found["figures"]["bits per held-out byte, chat"] == bits
    here.commit("first")
    here.run("dvc", "plots", "show")
    assert status(shovel)["next"]["command"] == "shovel propose", "DVC's page of plots is nothing to commit"

    more = here.folder / "data/own/code/more.py"
    more.write_text("# more\n")
    found = status(shovel)
    assert found["summary"] == "fetch is stale: data/own changed." and found["next"]["command"] == "shovel run"
    assert found["stages"]["review"]["why"].endswith("will run before it")
    assert any("data/own/code/more.py" in note for note in found["notes"])
    more.unlink()

    here.set_params(finetune={"learning_rate": 1e-4})
    found = status(shovel)
    assert found["summary"] == "finetune is stale: finetune.learning_rate 0.0005 -> 0.0001."
    assert found["next"]["why"] == "runs finetune, evaluate@chat, export, agreement and review"

    here.set_params(finetune={"languages": ["xx"]})
    assert here.run("shovel", "run", "finetune", check=False).returncode == 2
    found = status(shovel)
    assert found["stages"]["finetune"]["state"] == "failed" and found["next"]["why"] == "once that is mended"
    assert "finetune failed: params.yaml: `finetune.languages` ['xx'] has no dialogues" in found["summary"]
    screen = shovel("status")[1]
    assert screen.count("\n") <= 24 and screen.rstrip().splitlines()[-1].startswith("next  shovel run")
    here.run("git", "checkout", "-q", "params.yaml")
    assert status(shovel)["next"]["command"] == "shovel propose"


def test_a_clone_is_told_to_pull(here, shovel: Shovel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here.commit("a model")
    here.run("git", "clone", "-q", str(here.folder), str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert status(shovel)["next"]["command"] == "shovel run"
    (tmp_path / ".dvc/config.local").write_text("[core]\nremote = store\n['remote \"store\"']\nurl = /mnt/store\n")
    found = status(shovel)
    assert found["summary"] == "fetch is stale: data/raw is not in DVC's cache."
    assert found["next"]["command"] == "dvc pull"


def test_exit_codes_are_those_that_the_help_names(
    here, shovel: Shovel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = shovel("--help")
    assert code == 0 and cli.EXITS in " ".join(said.split())
    assert shovel("status")[0] == 0
    for words in (
        "run train --set a=1",
        "run train",
        "keep nothing",
        "use moon",
        "run --keep",
        "compare x",
        "chat",
        "watch",
    ):
        code, _, said = shovel(*words.split())
        assert code == 2 and re.search(r"^shovel: .*[.;]$", said, re.MULTILINE), said
        assert "Traceback" not in said
    assert shovel("nonsense")[0] == 2
    code, invited, said = shovel("serve", "champion", "--port", str(free_port()))
    assert code == 2 and not invited and "shovel-demo has no champion; `shovel status` shows" in said

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.workbench.overview.overview", interrupted)
    assert shovel("status")[0] == 130
    monkeypatch.setattr("pipelines.trust.audit.audit", lambda pid: type("Found", (), {"free": False})())
    monkeypatch.setattr("pipelines.trust.audit.sentence", lambda found: "an NVIDIA part is loaded")
    assert shovel("audit", "--pid", "1")[0] == 1


def test_every_command_has_help_and_those_of_the_daily_work_an_example() -> None:
    helps = {command.callback.__name__: command.callback.__doc__ for command in cli.app.registered_commands}
    assert all(helps.values())
    for name in ("status", "run", "use", "runs", "watch", "keep", "compare", "propose", "review", "chat", "generate"):
        assert re.search(rf"Examples?: shovel {name}", helps[name]), name


def test_what_runs_here_already_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    progress = live.Progress(live.file_of(live.WORKSPACE, "evaluate-chat"))
    progress.tell(stage="evaluate-chat", process=processes.identity(), status=live.RUNNING)
    sentence = rf"^evaluate-chat runs here already \(process {os.getpid()}, since \d\d:\d\d\); `shovel watch` shows it"
    for stages in ([], ["evaluate@chat"], ["evaluate"]):
        with pytest.raises(UserError, match=sentence):
            work._repro(stages)
    work._require_idle(["clean"])
    locked = "ERROR: 'data/models/base' is busy, it is being blocked by:\n  (PID 1): dvc repro"
    with pytest.raises(UserError, match=sentence):
        work._stop(time.time(), 255, locked)
    progress.tell(status=live.FINISHED)
    with pytest.raises(UserError, match="another `dvc` works in this repository"):
        work._stop(time.time(), 255, locked)


def test_a_pipe_gets_the_whole_table_of_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shovel: Shovel) -> None:
    row = {"caller": "a" * 40, "model": "shovel-demo" * 9, "requests": 12345, "cost": 0.5, "currency": "EUR"}
    monkeypatch.setattr("pipelines.serving.ledger.totals", lambda file, since: [dict(row)])
    told = shovel("usage")[1].splitlines()
    assert len(told) == 2 and told[1].split() == ["a" * 40, "shovel-demo" * 9, "12,345", "0.500000", "EUR"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("ui --port 99999", "65535"),
        ("serve --port -5", "'--port'"),
        ("serve --port 0", "'--port'"),
        ("generate hi --seed 99999999999999999999999", "'--seed'"),
        ("doctor --output /", "is a directory"),
        ("doctor --output /nowhere/doctor.json", "the folder /nowhere does not exist"),
        ("audit --sbom /nowhere/sbom.json", "the folder /nowhere does not exist"),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence(shovel: Shovel, words: str, sentence: str) -> None:
    code, _, said = shovel(*words.split())
    assert code == 2 and sentence in said and not Path("/nowhere").exists()


WORDS = {"use": "demo", "compare": "champion", "keep": "x", "chat": "hi", "generate": "hi"}


def test_outside_of_a_project_all_say_the_same_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shovel: Shovel
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = "shovel: there is no dvc.yaml here; run from a folder of the repository.\n"
    for theme, commands in cli.COMMANDS.items():
        for name in (command.__name__ for command in commands if theme != cli.ANYWHERE):
            code, _, said = shovel(name, *WORDS.get(name, "").split())
            assert (code, said) == (2, sentence), name
    assert shovel("chat", "--help")[0] == 0
    project = next(line for line in json.loads(shovel("doctor", "--json")[1]) if line["part"] == "project")
    assert (project["state"], project["found"]) == ("warn", "none in this folder")
    assert not list(tmp_path.iterdir())


def test_the_shell_completes_presets_stages_and_runs(here, shovel: Shovel) -> None:
    assert complete.presets("d") == ["demo"] and complete.stages("f") == ["fetch", "finetune"]
    assert complete.stages("ev") == ["evaluate", "evaluate@base", "evaluate@chat"]
    (here.folder / ".runs/pretrain-1").mkdir(parents=True)
    (here.folder / ".runs/pretrain-1/run.json").write_text("{}")
    assert complete.runs("pre") == ["pretrain-1"]
    assert complete.states("p") == complete.models("p") == ["previous", "pretrain-1"]
    assert complete.states("w") == ["workspace"] and complete.models("ch") == ["champion", "challenger", "chat"]
    command = get_command(cli.app)
    parameter = next(p for p in command.commands["use"].params if p.name == "preset")
    assert [item.value for item in parameter.shell_complete(typer.Context(command), "la")] == ["laptop"]
    assert "--install-completion" in shovel("--help")[1]


def test_the_commands_load_nothing_heavy() -> None:
    code = "import sys, pipelines.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "mlflow", "dvc", "pandas", "numpy", "pydantic", "transformers", "great_expectations"}
