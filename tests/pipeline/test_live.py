"""Runs that go on without who started them, that are interrupted, watched from elsewhere, or start twice at once."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from pipelines import live, processes, stage
from pipelines import project as surface
from pipelines.commands.runs import try_out
from pipelines.params import UserError
from pipelines.workbench import display, kernel, overrides, running, runs, trials

ROOT = Path(__file__).parents[2]
KERNEL = """
from pipelines import project
project.run("pretrain", steps=400, checkpoint_every=4)
"""


def until(condition, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_a_kernel_that_is_killed_loses_nothing_and_an_interrupt_keeps_the_checkpoint(here) -> None:
    dying = subprocess.Popen([sys.executable, "-c", KERNEL], cwd=here.folder, start_new_session=True)
    until(lambda: len(surface.runs()) == 1 and len(surface.attach(surface.runs().index[0]).curve) > 5, "no curve")
    os.killpg(dying.pid, signal.SIGKILL)
    dying.wait()
    run = surface.attach(surface.runs().index[0])
    steps = len(run.curve)
    until(lambda: len(run.curve) > steps, "the run ended with its kernel")
    assert surface.stages().loc["pretrain", "state"] == "fresh", "the repository itself is as it was"
    snapshot = run.progress
    assert snapshot.running and snapshot.total == 400 and snapshot.seconds_left > 0
    page = run._repr_html_()
    assert "data:image/svg+xml" in page and "of 400" in page and "tokens/s" in page and "left" in page
    assert run.id in display.line(run) and "▁" in display.line(run)

    waiting = surface.run("pretrain", wait=False, steps=12, seed=3)
    until(lambda: waiting.status == "waiting", "the second did not wait")
    assert f"waits for process {processes.pid(snapshot.process)} ({run.id}, since" in waiting.message
    waiting.stop()
    assert waiting.status == "interrupted"

    until(lambda: len(run.curve) > 8, "no checkpoint yet")
    assert run.stop().status == "interrupted" and "interrupted" in run.message
    kept = sorted((here.folder / ".checkpoints/pretrain").glob("*/step-*"))
    assert kept and not (run.folder / "data/models/base").exists()
    again = surface.run("pretrain", wait=False, steps=400, checkpoint_every=4)
    until(lambda: again.curve.size and again.progress.done > 0, "no curve")
    assert f"continues from {kept[-1].name}" in again.log
    assert again.curve["loss"].iloc[0] == run.curve["loss"].iloc[0], "the curve begins at its first step"
    again.stop()
    with pytest.raises(UserError, match=f"{again.id} is interrupted"):
        surface.keep(again)
    again.remove()
    assert again.id not in surface.runs().index
    with pytest.raises(UserError, match="no run is called"):
        surface.attach(again.id)


def test_a_dvc_repro_in_a_terminal_is_watched_and_an_edit_meanwhile_is_not_recorded(here) -> None:
    here.set_params(pretrain={"steps": 60, "checkpoint_every": 3})
    before = here.digests("data/models/base", "reports")
    terminal = here.start("dvc", "repro", "--single-item", "pretrain")
    workspace = surface.attach()
    until(lambda: workspace.running and len(workspace.curve) > 1, "nobody sees it")
    assert surface.stages().loc["pretrain", "state"] == "running" and surface.stages().loc["finetune", "state"]
    here.set_params(pretrain={"weight_decay": 0.2})
    assert surface.watch().id == "workspace"
    output = terminal.communicate()[0]
    assert terminal.returncode and "`pretrain.weight_decay` of params.yaml was edited while pretrain ran" in output
    assert here.digests("data/models/base", "reports") == before
    stages = surface.stages()
    assert stages.loc["pretrain", "state"] == "failed" and "undo the edit" in stages.loc["pretrain", "why"]
    here.set_params(pretrain={"weight_decay": 0.1})
    run = surface.run("pretrain")
    assert run.id == "workspace" and run.succeeded and "continues from step-00000057" in run.log
    here.run("git", "checkout", "-q", "params.yaml")
    here.run("dvc", "repro", "--single-item", "pretrain")


def test_mistakes_are_one_sentence(here) -> None:
    cases = {
        "no stage is called 'train'; choose one of fetch": lambda: surface.run("train"),
        "`pretrain.learning_rat` is not a known key; did you mean": lambda: surface.run("pretrain", learning_rat=1e-3),
        "`pretrain.learning_rate` is -1, but": lambda: surface.run("pretrain", learning_rate=-1),
        "`finetune.steps` changes nothing in pretrain": lambda: surface.run("pretrain", finetune={"steps": 3}),
        "add upto=True to run that first": lambda: surface.run("finetune", pretrain={"steps": 3}),
        "baselines has no section": lambda: surface.run("baselines", max_bytes=2000),
        "'nobody' is no run, no revision": lambda: surface.compare("nobody", "workspace"),
        "nothing runs here now": lambda: surface.watch(),
        "--set takes one stage; name only the last, b": lambda: try_out(["a", "b"], ["steps=1"], False),
        "the workspace is kept already": lambda: surface.keep("workspace"),
        "None is no run; name one of `shovel runs` by its id": lambda: surface.keep(None),
    }
    for sentence, mistake in cases.items():
        with pytest.raises(UserError) as caught:
            mistake()
        assert sentence in str(caught.value) and "\n" not in str(caught.value)
        assert caught.value._render_traceback_() == [f"UserError: {caught.value}"]
    (here.folder / "data/tokens").rename(here.folder / "tokens")
    with pytest.raises(UserError, match=r"data/tokens, which pretrain reads, is missing; the stage encode makes it: p"):
        surface.run("pretrain", steps=3)
    (here.folder / "tokens").rename(here.folder / "data/tokens")


def test_nothing_to_watch_is_said_and_the_line_fits_its_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing has run here yet; `shovel run` starts the stages"):
        running.look(runs.Run(live.WORKSPACE))
    with pytest.raises(UserError, match="nothing runs here now; `shovel runs` lists what ran"):
        running.current()
    progress = live.Progress(live.file_of(live.WORKSPACE, "pretrain"))
    progress.tell(stage="pretrain", process=processes.identity(), status=live.RUNNING)
    progress.begin("pretrain", 2000)
    for step in range(1200):
        progress.advance(1, {"step": step, "loss": 9 - step / 400, "tokens_per_s": 12345.0})
    progress._settle()
    progress._flush()
    run = runs.Run(live.WORKSPACE)
    assert "▁" in display.line(run) and "━" in display.line(run)
    for width in (60, 80, 100):
        told = display.line(run, width)
        assert len(told) <= width and told.startswith("workspace  running  ") and "1,200 of 2,000" in told
    assert "━" in display.line(run, 100) and display.line(run, 80).endswith(" left")
    monkeypatch.setattr(stage, "console", Console(file=sys.stderr, force_terminal=True, width=80))
    monkeypatch.setattr(runs.Run, "running", False)
    running.look(run)
    assert max(len(told) for told in re.sub(r"\x1b\[\S+?[a-z]", "", capsys.readouterr().err).splitlines()) <= 80


def test_a_process_that_dies_before_it_speaks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__init__.py").write_text("raise ImportError('half an installation')")
    (tmp_path / ".runs/broken").mkdir(parents=True)
    trials._write_card(tmp_path / ".runs/broken", commands=[], cwd=str(tmp_path), stages=["pretrain"], overrides={})
    trials.launch("broken")
    with pytest.raises(UserError, match="broken failed: it did not start: ImportError: half an installation"):
        running.follow(runs.Run("broken"))
    assert runs.Run("broken").stop().status == "failed"


@pytest.mark.parametrize("word", ["..", ".", "", "../data", "experiment"])
def test_nothing_but_runs_is_removed(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "home", lambda: tmp_path / ".runs")
    for folder in (".runs/experiment/progress", ".runs/mine", "data"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").touch()
    (tmp_path / ".runs/mine/run.json").write_text("{}")
    files = sorted(tmp_path.rglob("*"))
    for name in (word, str(tmp_path / "data")):
        with pytest.raises(UserError, match="no run"):
            runs.Run(name).remove()
    assert sorted(tmp_path.rglob("*")) == files
    runs.Run("mine").remove()
    assert not (tmp_path / ".runs/mine").exists()


def test_the_kernel_says_once_that_its_code_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.check()
    file = Path(overrides.__file__)
    monkeypatch.setitem(kernel._files, file, 1)
    monkeypatch.setitem(kernel._versions, "numpy", "0.1")
    with pytest.warns(UserWarning, match=r"numpy \(0\.1 -> .*overrides\.py changed since this kernel loaded it"):
        kernel.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.check()


def test_writing_overrides_changes_nothing_else_of_the_file(tmp_path: Path) -> None:
    for file in (ROOT / "params.yaml", *sorted((ROOT / "pipelines/presets").glob("*.yaml"))):
        assert overrides.apply({}, file) == file.read_text(), file
    changes = overrides.of_words(
        "pretrain", ["learning_rate=3e-4", "finetune.languages=[en, de]", "mtp_weights=[0, 0.1]"]
    )
    old, new = ((ROOT / "params.yaml").read_text(), overrides.apply(changes, ROOT / "params.yaml"))
    changed = [line.strip() for line in new.splitlines() if line not in old.splitlines()]
    assert changed == ["learning_rate: 0.0003", "mtp_weights: [0, 0.1]", "languages: [en, de]"]


def test_only_the_first_of_several_ranks_writes(here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with live.stage_progress("ranks", str) as progress:
        progress.begin("ranks", 1)
    assert live.read(live.file_of(live.WORKSPACE, "ranks")) is None
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ZeroDivisionError), live.stage_progress("ranks", lambda error: f"ended: {error}"):
        _ = 1 / 0
    found = live.read(live.file_of(live.WORKSPACE, "ranks"))
    assert (found.status, found.message) == ("failed", "ended: division by zero")


def test_a_progress_file_stays_small_and_survives_a_half_written_line(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    progress = live.Progress(file)
    progress.tell(stage="train", process=processes.identity(), status=live.RUNNING)
    progress.begin("train", 40_000)
    for step in range(40_000):
        progress.advance(1, {"step": step, "loss": 1.0})
    progress.tell(status=live.FINISHED)
    with file.open("a") as opened:
        opened.write('{"status": "fai')
    found = live.read(file)
    assert found.status == "finished" and found.done == 40_000 and found.points[-1]["step"] == 39_999
    assert live.POINTS <= len(found.points) < 1.1 * live.POINTS
