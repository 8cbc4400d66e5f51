"""Stages that are killed, interrupted or out of disk: nothing of before is lost, and training goes on where it was."""

import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from rich.progress import Progress

from model.checkpoint import CheckpointStore, CheckpointWriter
from model.train import take_step
from pipelines import processes, stage, tracking
from pipelines.params import UserError, load_params
from pipelines.pretrain import BASE, TOKENS, pretrain

PRETRAIN = ("pipelines.pretrain",)


def checkpoints(project) -> list[Path]:
    return sorted((project.folder / ".checkpoints" / "pretrain").glob("*/step-*"))


def wait_for_step(project, process: subprocess.Popen[str], step: int) -> None:
    """Until a checkpoint of at least `step` steps is there."""
    while not any(int(path.name.removeprefix("step-")) >= step for path in checkpoints(project)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def longer(reproduced, tmp_path_factory):
    """A project that pretrains for 60 steps, and the digest of the weights of an unbroken run."""
    project = reproduced.copy(tmp_path_factory.mktemp("longer") / "project")
    project.set_params(pretrain={"steps": 60, "checkpoint_every": 3})
    project.run("python", "-m", *PRETRAIN)
    return project, project.digests("data/models/base")


def test_killed_three_times_the_weights_are_those_of_an_unbroken_run(longer) -> None:
    project, unbroken = longer
    assert not checkpoints(project), "a finished training leaves no checkpoint"
    shutil.rmtree(project.folder / "data/models/base")
    moments = sorted(random.sample(range(3, 50), 3))
    for moment in moments:
        process = project.start(*PRETRAIN)
        wait_for_step(project, process, moment)
        time.sleep(random.random() / 20)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        assert not (project.folder / "data/models/base").exists(), moments
    before_last, newest = checkpoints(project)[-2:]
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-100])
    done = project.run("python", "-m", *PRETRAIN)
    assert project.digests("data/models/base") == unbroken, moments
    assert (
        f"checkpoint {newest} is damaged" in done.stderr
        and f"continues from {checkpoints_before(newest)}" in done.stderr
    )


def checkpoints_before(newest: Path) -> str:
    return f"step-{int(newest.name.removeprefix('step-')) - 3:08d}"


def test_the_run_of_a_killed_training_is_continued(longer) -> None:
    project, _ = longer
    client = client_of(project)
    experiment = client.get_experiment_by_name("shovel").experiment_id
    run = client.get_run(project.read("reports/runs/pretrain.json")["run_id"])
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in points] == list(range(60)), "every step once"
    assert run.info.status == "FINISHED"
    assert {found.info.status for found in client.search_runs([experiment], "tags.stage = 'pretrain'")} == {"FINISHED"}


def client_of(project) -> MlflowClient:
    uri = f"sqlite:///{project.folder}/.mlflow/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


DYING = """
import os
from pathlib import Path
from pipelines import stage

rename, target = Path.rename, Path("clean")
Path.rename = lambda path, other: (rename(path, other), os._exit(9))
with stage.replacing(target) as fresh:
    fresh.mkdir()
    (fresh / "text").write_text("new")
    stage.remove = lambda path: os._exit(9)
"""


def test_a_process_that_dies_while_it_replaces_a_folder_loses_none(tmp_path: Path, reproduced, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "clean"
    target.mkdir()
    (target / "text").write_text("old")
    died = subprocess.run([sys.executable, "-c", DYING], env=reproduced.environment(), check=False)
    assert died.returncode == 9 and (target / "text").read_text() in ("old", "new")
    assert len(list(tmp_path.iterdir())) == 2, "the dead process left something"
    living = tmp_path / f".clean.new-1-{processes.identity().replace(':', '+')}"
    living.mkdir()
    with stage.replacing(target) as fresh:
        fresh.mkdir()
    assert set(tmp_path.iterdir()) == {target, living} and not list(target.iterdir())
    monkeypatch.setattr(stage, "_exchange", lambda *_: False)  # as elsewhere than on Linux
    with stage.replacing(target) as fresh:
        fresh.mkdir()
        (fresh / "text").write_text("newer")
    assert set(tmp_path.iterdir()) == {target, living} and (target / "text").read_text() == "newer"


def test_an_interrupt_that_a_callback_forgot_comes_again(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(stage, "_interrupted", threading.Event())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    formatwarning = warnings.formatwarning
    try:
        with pytest.raises(SystemExit) as ended, stage.exits("pretrain"), stage.progress("pretrain", 2) as advance:
            advance()
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            advance()
    finally:
        warnings.formatwarning = formatwarning
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == 130 and "pretrain: interrupted" in capsys.readouterr().err


def test_replayed_steps_tell_nothing_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Progress] = []
    monkeypatch.setattr(stage, "Progress", lambda *words, **more: made.append(Progress(*words, **more)) or made[0])
    with stage.progress("pretrain", 4) as advance:
        for step in range(3):
            advance(step=step, replayed=step < 2)
            assert made[0].tasks[0].completed == step + 1 and made[0].tasks[0].speed is None
        advance(step=3, replayed=False)
        assert made[0].tasks[0].speed is not None


def test_ctrl_c_puts_the_previous_output_back(longer) -> None:
    project, _ = longer
    project.run("dvc", "commit", "--force", "pretrain")
    project.set_params(pretrain={"seed": 5})
    before = project.digests("data/models/base", "reports")
    process = project.start("pipelines.cli", "run", "pretrain")
    wait_for_step(project, process, 3)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate()[0]
    told = "pretrain: interrupted; the previous output is unchanged, the same command continues from step "
    assert process.returncode == 130 and output.splitlines()[-1].startswith(told)
    assert not [word for word in ("Traceback", "ERROR", "mend") if word in output]
    assert project.digests("data/models/base", "reports") == before
    killed = client_of(project).search_runs(["1"], "tags.stage = 'pretrain' and attributes.status = 'KILLED'")
    assert len(killed) == 1 and killed[0].data.params["seed"] == "5"


OUTPUTS = {
    "fetch": ["data/raw"], "clean": ["data/clean", "data/chat"], "encode": ["data/tokens"],
    "pretrain": ["data/models/base"], "finetune": ["data/models/chat"], "export": ["data/models/release"],
}  # fmt: skip


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_full_disk_is_one_sentence_and_the_previous_output_stays(project, stage: str) -> None:
    before = project.digests("data", "reports")
    for path in (*OUTPUTS[stage], f"reports/{stage}.json"):  # as DVC does before it starts a stage
        full = project.folder / path
        shutil.rmtree(full) if full.is_dir() else full.unlink()
    limit = {"fetch": 2_000, "clean": 40_000}.get(stage, 100_000)
    done = subprocess.run(
        [sys.executable, "-m", f"pipelines.{stage}"],
        cwd=project.folder,
        env=project.environment(DVC_STAGE=stage),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and f"{stage}: the disk is full" in done.stderr and "Traceback" not in done.stderr
    after = project.digests("data", "reports")
    assert {path for path in before | after if before.get(path) != after.get(path)} == set()


def test_a_loss_that_is_not_finite_stops_with_one_sentence(project) -> None:
    project.set_params(pretrain={"model": project.model | {"initializer_range": 9999.0}})
    done = project.run("python", "-m", *PRETRAIN, check=False)
    project.run("git", "checkout", "-q", "params.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the loss of step 0 is not finite (documents of the batch: code/" in done.stderr
    assert "there is no checkpoint yet: lower `pretrain.learning_rate`" in done.stderr


def test_the_last_good_checkpoint_before_a_loss_that_is_not_finite(project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)

    def sixth_is_infinite(net, optimizer, data, step, config, device):
        record = take_step(net, optimizer, data, step, config, device)
        return record | {"loss": math.inf} if step == 5 else record

    monkeypatch.setattr("model.train.take_step", sixth_is_infinite)
    with pytest.raises(UserError) as caught:
        pretrain(load_params().pretrain, TOKENS, BASE, Path("curve.csv"), tracking.Run("pending-test", "", None))
    (newest,) = {path for path in checkpoints(project) if path.name == "step-00000004"}
    assert "the loss of step 5 is not finite" in str(caught.value)
    assert f"the last good checkpoint is {newest}: lower" in str(caught.value)
    shutil.rmtree(project.folder / ".checkpoints")


def test_a_checkpoint_written_behind_holds_what_was_there_and_its_failure_is_heard_of(tmp_path: Path) -> None:
    store, weights = CheckpointStore(tmp_path / "store"), torch.zeros(3)
    with CheckpointWriter(store) as writer:
        writer.save(1, {"net": {"weights": weights}, "history": [{"loss": 1.0}]})
        weights += 1
    state = store.latest()
    assert torch.equal(state["net"]["weights"], torch.zeros(3)) and state["history"] == [{"loss": 1.0}]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), CheckpointWriter(CheckpointStore(tmp_path / "file")) as writer:
        writer.save(1, {})


def test_the_newest_sound_checkpoint_is_the_one_that_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {"step": step})
    (tmp_path / "step-00000002" / "state.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        assert store.latest_path() == tmp_path / "step-00000001"
