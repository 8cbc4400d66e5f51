"""MLflow as people meet it: an empty database that several open at once, a server that is down, dies and comes back."""

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines import lineage, locks, processes, register, repository, tracking
from pipelines import stage as stages
from pipelines.deployment import deploy
from pipelines.params import UserError
from pipelines.workbench import choosing, proposal

STAGE = """
import sys, time
from pathlib import Path
from pipelines import tracking

with tracking.stage_run(sys.argv[1], None) as run:
    run.log({"loss": 2.0}, step=1)
    run.flush()
    Path("logged").touch()
    while len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
        time.sleep(0.05)
    run.log({"loss": 1.0}, step=2)
print(run.run_id)
"""


def stage(project, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, *arguments], cwd=folder, env=project.environment(**environment),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """(run id, what was said on the terminal)"""
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out.strip(), errors


def test_four_users_start_at_once_on_an_empty_database(reproduced, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/shared.db"
    starting = [stage(reproduced, tmp_path / str(n), f"user-{n}", MLFLOW_TRACKING_URI=uri) for n in range(4)]
    said = [ended(process)[1] for process in starting]
    assert not any(said), said
    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name("shovel").experiment_id])
    assert {run.info.run_name for run in runs} == {f"user-{n}" for n in range(4)}
    assert {run.info.status for run in runs} == {"FINISHED"} and {run.data.metrics["loss"] for run in runs} == {1.0}


def test_a_repository_that_was_moved_finds_its_artifacts(tmp_path: Path, monkeypatch, capsys) -> None:
    old, new = tmp_path / "old 1%", tmp_path / "new é"
    old.mkdir()
    monkeypatch.chdir(old)
    with tracking.stage_run("review", None) as run:
        (old / "page.html").write_text("a page")
        run.artifact(old / "page.html")
    client = tracking.connect()
    client.create_registered_model("m")
    client.create_model_version("m", (old / "release").as_uri(), run.run_id)
    client.create_model_version("m", "dvc://release")
    elsewhere = client.create_experiment("elsewhere", (tmp_path / "old 1% too").as_uri())
    shutil.move(old, new)
    monkeypatch.chdir(new)
    client = tracking.connect()
    assert f"this repository was in {old} before" in capsys.readouterr().err
    assert Path(client.download_artifacts(run.run_id, "page.html")).read_text() == "a page"
    assert {v.source for v in client.search_model_versions()} == {(new / "release").as_uri(), "dvc://release"}
    assert client.get_experiment(elsewhere).artifact_location == (tmp_path / "old 1% too").as_uri()
    with tracking.stage_run("review", None) as later:
        later.artifact(new / "page.html")
    assert (new / ".mlflow/artifacts" / later.run_id / "artifacts/page.html").exists() and not old.exists()
    assert capsys.readouterr().err == "", "said once"


def test_a_run_whose_process_died_is_killed_and_a_living_one_is_left(reproduced, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mine.db"
    dying = stage(reproduced, tmp_path / "a", "dying", "never", MLFLOW_TRACKING_URI=uri)
    while not (tmp_path / "a" / "logged").exists():
        time.sleep(0.05)
    living = stage(reproduced, tmp_path / "b", "living", str(tmp_path / "go"), MLFLOW_TRACKING_URI=uri)
    while not (tmp_path / "b" / "logged").exists():
        time.sleep(0.05)
    dying.send_signal(signal.SIGKILL)
    dying.communicate()
    client = MlflowClient(uri, uri)
    assert tracking.reap(client) == 1
    runs = client.search_runs([client.get_experiment_by_name("shovel").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {"dying": "KILLED", "living": "RUNNING"}
    (tmp_path / "go").touch()
    ended(living)


def test_what_is_pending_is_delivered_when_its_run_has_ended(reproduced, tmp_path: Path, monkeypatch) -> None:
    folder, pending = tmp_path / "down", tmp_path / "down/.mlflow/pending"
    monkeypatch.chdir(tmp_path)
    running = stage(reproduced, folder, "pretrain", str(tmp_path / "go"), MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    while not (folder / "logged").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    (pending / "0.jsonl").touch()
    (pending / "pending-of-nobody.jsonl").write_text('{"create": "pret\n{"status": "KILLED"}\n')
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/late.db")
    client = tracking.connect()
    assert tracking.sync_pending(client) == (0, 1)
    (tmp_path / "go").touch()
    run_id = ended(running)[0]
    with (pending / f"{run_id}.jsonl").open("a") as file:
        file.write('{"tags": {"half": "wri')
    assert tracking.sync_pending(client) == (1, 0)
    late = tracking.find_run(client, run_id)
    assert [point.value for point in client.get_metric_history(late.info.run_id, "loss")] == [2.0, 1.0]
    assert late.info.status == "FINISHED"
    assert [file.stem for file in pending.iterdir()] == ["pending-of-nobody"]


def test_messages_that_come_after_a_delivery_find_their_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run = tracking.Run("pending-twice", "", None)
    run._send({"create": "pretrain", "tags": {}, "start": 1})
    run.end("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/late.db")
    client = tracking.connect()
    assert tracking.sync_pending(client) == (1, 0)
    run.tag(late="yes")
    run.end("FINISHED")
    assert tracking.sync_pending(client) == (1, 0)
    assert tracking.find_run(client, "pending-twice").data.tags["late"] == "yes"


def test_a_disk_that_takes_no_message_stops_no_training(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".mlflow").write_text("a file where the folder should be")
    run = tracking.Run("pending-lost", "", None)
    run.tag(one="1")
    run.end("FINISHED")
    assert capsys.readouterr().err.count("cannot be written") == 1


@pytest.fixture
def registry(tmp_path: Path, monkeypatch) -> MlflowClient:
    """An empty one, taken for a server's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/registry.db")
    client = tracking.connect()
    monkeypatch.setattr(tracking, "is_local", lambda: False)
    monkeypatch.setattr(locks, "WAIT_S", 0.5)
    monkeypatch.setattr(locks, "POLL_S", 0.05)
    return client


def test_a_lock_that_was_left_behind_is_taken_over_or_named(registry, monkeypatch, capsys) -> None:
    left = {"process": f"{platform.node()}:1:1.00"}
    tracking.create_model(registry, "m.lock", "Ada is changing the registry.", left)
    with locks.exclusively(registry, "m"):
        assert registry.get_registered_model("m.lock").tags == processes.tags()
        tracking.delete_model(registry, "m.lock", left)  # somebody slower, who judged the old one
        assert tracking.find_model(registry, "m.lock")
    assert tracking.find_model(registry, "m.lock") is None
    with locks.exclusively(registry, "m"):
        registry.delete_registered_model("m.lock")
        tracking.create_model(registry, "m.lock", "Ada is changing the registry.", left)
    assert registry.get_registered_model("m.lock").tags == left, "that of another holder stays"

    def refuse(name: str) -> None:
        raise MlflowException("not yours", error_code=7)

    monkeypatch.setattr(registry, "delete_registered_model", refuse)
    with pytest.raises(UserError, match=r"It has lasted 0.5 s: .* registered model m.lock"):
        locks._take(registry, "m.lock")
    assert "waiting: Ada is changing the registry." in capsys.readouterr().err


def test_a_holder_that_lives_here_keeps_its_lock() -> None:
    assert not locks._is_left_behind(processes.identity(), since=0)
    assert locks._is_left_behind("elsewhere:1:1.00", since=0)
    assert not locks._is_left_behind("elsewhere:1:1.00", since=time.time())


def test_link_names_the_commit_with_the_results_and_leaves_deleted_runs_alone(registry, monkeypatch) -> None:
    experiment = tracking.experiment_id(registry)
    kept, gone = (registry.create_run(experiment).info.run_id for _ in range(2))
    registry.delete_run(gone)
    for label, run_id in (("fetch", kept), ("clean", gone)):
        stages.write_json(Path(f"reports/runs/{label}.json"), {"run_id": run_id})
    for commit, loose, named in (("a", ["dvc.lock"], "a+uncommitted"), ("b", [], "b"), ("c", [], "b")):
        monkeypatch.setattr(repository, "commit", lambda commit=commit: commit)
        monkeypatch.setattr(repository, "uncommitted", lambda loose=loose: loose)
        assert lineage.link(Path("reports"))["linked"] == 1
        assert registry.get_run(kept).data.tags["git.commit"] == named
    assert registry.get_run(kept).data.tags["dvc.restored_into"] == "c"


def test_a_deleted_experiment_is_named_with_what_brings_it_back(registry, capsys) -> None:
    registry.delete_experiment(tracking.experiment_id(registry))
    with tracking.stage_run("fetch", None):
        pass
    said = capsys.readouterr().err
    assert "mlflow experiments restore --experiment-id 1` brings it back; this run is kept" in said
    assert "does not answer" not in said
    with pytest.raises(UserError, match="has the experiment shovel among the deleted ones"):
        lineage.link(Path("reports"))
    registry.restore_experiment("1")
    assert lineage.link(Path("reports"))["delivered"] == 1


def test_weights_are_pushed_before_the_lock_is_taken(registry, tmp_path: Path, monkeypatch) -> None:
    release, locked = tmp_path / "release", []
    release.mkdir()
    (release / "config.json").touch()

    def note(*_) -> None:
        locked.append(tracking.find_model(registry, "m.lock") is not None)

    def write(*_):
        note()
        return registry.create_model_version("m", "dvc://release")

    monkeypatch.setattr(repository, "stale_stages", list)
    monkeypatch.setattr(repository, "push", note)
    monkeypatch.setattr(register, "_write", write)
    register.register(SimpleNamespace(name="m"), release, tmp_path)
    assert locked == [False, True]


def test_a_server_that_dies_between_two_aliases_loses_no_champion(registry, tmp_path: Path, monkeypatch) -> None:
    name, reports = "m", tmp_path / "reports"
    registry.create_registered_model(name)
    versions = [registry.create_model_version(name, "dvc://x", tags={"digest": "ab" * 32}) for _ in range(3)]

    def move(chosen, live) -> None:
        register._move(registry, name, reports, chosen, live, "promote", [], "")

    move(versions[0], None)
    move(versions[1], versions[0])
    set_alias = registry.set_registered_model_alias

    def die(name: str, alias: str, number: str) -> None:
        set_alias(name, alias, number) if alias == "previous" else 1 / 0

    with monkeypatch.context() as dying:
        dying.setattr(registry, "set_registered_model_alias", die)
        with pytest.raises(ZeroDivisionError):
            move(versions[2], versions[1])
    assert aliases(registry) == {"champion": 2, "previous": 2}
    assert register.rollback(SimpleNamespace(name=name), reports)["version"] == 1
    assert aliases(registry) == {"champion": 1, "previous": 2}


def test_what_the_registry_has_not_got_is_answered_with_what_there_is(registry, monkeypatch) -> None:
    params = SimpleNamespace(register_=SimpleNamespace(name="demo"))
    for which in (99, "champion"):
        with pytest.raises(UserError, match=rf"demo has no .*{which}; `shovel demo` makes a model and promotes it\."):
            register.version(params.register_, which)
    with pytest.raises(UserError, match="demo has no version yet; `shovel demo` makes a model"):
        proposal.review(params, None)
    with pytest.raises(UserError, match="demo has no champion; `shovel status` shows"):
        deploy.behind(registry, deploy.target("champion", "demo"))
    assert deploy.target("challenger", "demo") == deploy.target("demo@challenger", "other")
    Path("data/models/release").mkdir(parents=True)
    Path("data/models/release/config.json").write_text("{}")
    with pytest.raises(UserError, match="demo has no champion; `shovel propose` makes the first version"):
        register.version(params.register_, "champion")
    registry.create_registered_model("demo")
    for _ in range(2):
        registry.create_model_version("demo", source="here")
    for which in (99, 0, "champion"):
        with pytest.raises(UserError, match=rf"demo has no .*{which}; there are: 1, 2\."):
            register.version(params.register_, which)


def test_a_folder_without_a_model_is_not_called_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model: it has no config.json; name a folder like data/models/base"):
        choosing.model(tmp_path)


def aliases(client: MlflowClient) -> dict[str, int]:
    return {alias: int(number) for alias, number in client.get_registered_model("m").aliases.items()}


def test_a_release_record_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m-2.json").touch()
    assert register._free(tmp_path, "m") == tmp_path / "m.json"
    (tmp_path / "m.json").touch()
    assert register._free(tmp_path, "m") == tmp_path / "m-3.json"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """A real MLflow server on 127.0.0.1, ended with all its children."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "kept")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_may_die_and_come_back(project, tmp_path: Path, port: int) -> None:
    uri = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    with server(tmp_path, port):
        first = stage(project, project.folder, "fetch", str(tmp_path / "go"), **uri)
        while not (project.folder / "logged").exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
    (tmp_path / "go").touch()
    met, said = ended(first)
    assert "does not answer" in said and "`shovel link` delivers it later" in said and said.count("\n") == 1
    done = project.run("dvc", "repro", "-f", "-s", "encode", **uri)
    assert "tracking   the tracking server" in done.stderr and "Traceback" not in done.stderr
    for command in ("link", "register", "promote", "rollback", "compare champion", "experiments"):
        refused = project.run("shovel", *command.split(), check=False, **uri)
        assert refused.returncode == 2 and "does not answer" in refused.stderr.splitlines()[-1]
        assert "Traceback" not in refused.stderr
    assert any(
        "does not answer" in note
        for note in json.loads(project.run("shovel", "status", "--json", **uri).stdout)["notes"]
    )
    with server(tmp_path, port) as address:
        delivered = project.run("shovel", "link", **uri)
        assert "2 delivered late" in delivered.stderr
        client = MlflowClient(address, address)
        assert [point.value for point in client.get_metric_history(met, "loss")] == [2.0, 1.0]
        late = tracking.find_run(client, project.read("reports/runs/encode.json")["run_id"])
        assert {client.get_run(met).info.status, late.info.status} == {"FINISHED"}
        assert late.data.params["vocab_size"] == "400" and late.data.metrics["vocab_size"] == 400
        (project.folder / "logged").unlink()
        project.commit("results")
        project.run("shovel", "register", **uri)
        project.run("shovel", "promote", **uri)
        _is_champion(project, client, uri)


def _is_champion(project, client: MlflowClient, uri: dict[str, str]) -> None:
    version = client.get_model_version_by_alias("shovel-demo", "champion")
    assert version.source.startswith("dvc://data/models/release?sha256=")
    assert "this is the champion of shovel-demo" in project.run("shovel", "status", **uri).stdout
