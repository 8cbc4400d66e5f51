"""From the registry to an endpoint that follows it: moved under load, rolled back, refused, killed, left alone."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import openai
import psutil
import pytest
import requests
import typer
from mlflow import MlflowClient
from ruamel.yaml import YAML
from shared_server import free_port
from test_tracking import server as mlflow_server

from pipelines import digests, tracking
from pipelines.commands import servers
from pipelines.deployment import deploy, endpoint
from pipelines.params import UserError, load_params

NAME, RELEASE = "shovel-demo", "data/models/release"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real MLflow server; the last test ends it."""
    with (
        mlflow_server(tmp_path_factory.mktemp("registry"), free_port()) as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MLFLOW_TRACKING_URI", address)
        yield address


@pytest.fixture(scope="module")
def versions(project, registry: str) -> list[str]:
    """Two versions, the first of them live; the second has another layout of one file, and the review to go with it."""
    project.run("shovel", "keys")
    project.commit("first")
    project.run("shovel", "register")
    project.run("shovel", "promote")
    project.commit("released")
    rewrite(project, f"{RELEASE}/generation_config.json", lambda text: json.dumps(json.loads(text), indent=4).encode())
    project.run("dvc", "commit", "-fq", "export", "agreement")
    project.run("dvc", "repro", "-sf", "review")
    project.commit("second")
    project.run("shovel", "register")
    return ["1", "2"]


def test_an_ipv6_address_is_in_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = endpoint.claim(deploy.Target(NAME, "champion"), "builtin", "::1", 8000, None)
    assert state["address"] == "http://[::1]:8000" == requests.Request("GET", state["address"]).prepare().url[:-1]
    assert endpoint.url("127.0.0.1", 8000) == "http://127.0.0.1:8000"


def test_a_server_that_loads_its_model_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    state = {"model": f"{NAME}@champion", "address": "http://127.0.0.1:8000", "engine": "builtin", "version": None}
    monkeypatch.setattr(endpoint, "running", lambda: state)
    monkeypatch.setattr(endpoint, "health", lambda address: {"status": "loading"})
    with pytest.raises(typer.Exit) as ended:
        servers.deploy(status=True)
    assert ended.value.exit_code == 1 and f"{NAME}@champion is being loaded" in capsys.readouterr().out


def test_a_server_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    started, start = [], endpoint.start

    def start_deaf(command, environment, output):
        started.append(start([sys.executable, "-c", deaf], environment, output))
        while not output.read_text():
            time.sleep(0.01)
        return started[0]

    monkeypatch.setattr(endpoint, "start", start_deaf)
    monkeypatch.setattr(endpoint, "await_ready", lambda *_, **__: None)
    monkeypatch.setattr(endpoint, "STOP_S", 0.1)
    with endpoint.serving(tmp_path):
        pass
    assert started[0].returncode == -signal.SIGKILL and not list((tmp_path / ".serve").iterdir())


def test_copies_that_nobody_serves_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    champion, previous, running, written, fresh, left = (digit * 16 for digit in "abcdef")
    for name in (champion, previous, running, written, fresh, left, "vllm"):
        (tmp_path / ".serve" / name).mkdir(parents=True)
    (tmp_path / ".serve/server.json").write_text(json.dumps({"folder": f".serve/{running}"}))
    (tmp_path / ".serve/vllm/compose.yaml").write_text(f"volumes: [/{written}:/model:ro]")
    tags = {"champion": champion, "previous": previous}
    monkeypatch.setattr(
        tracking, "version_behind", lambda client, name, alias: SimpleNamespace(tags={"digest": tags[alias] * 4})
    )
    deploy._sweep(None, NAME, tmp_path / ".serve" / fresh)
    kept = {path.name for path in (tmp_path / ".serve").iterdir()}
    assert kept == {champion, previous, running, written, fresh, "vllm", "server.json"}


def rewrite(project, name: str, change) -> None:
    """Change a file whose other name is in DVC's cache, without changing that."""
    file = project.folder / name
    content = change(file.read_bytes())
    file.unlink()
    file.write_bytes(content)


@pytest.fixture(scope="module")
def client(registry: str) -> MlflowClient:
    return MlflowClient(registry, registry)


@pytest.fixture(scope="module")
def address(project, versions: list[str]) -> Iterator[str]:
    """Where the champion is served; ended at the end of the file."""
    port = free_port()
    done = project.run("shovel", "deploy", f"models:/{NAME}@champion", "--port", str(port))
    assert f"{NAME}@champion version 1 answers" in done.stdout
    yield f"http://127.0.0.1:{port}"
    project.run("shovel", "deploy", "--stop")
    assert not (project.folder / ".serve/server.json").exists()


def served(address: str) -> str:
    return str(requests.get(f"{address}/health", timeout=10).json()["version"])


class Load:
    """Eight people who ask one question after the other and read the answers as they are written."""

    def __init__(self, address: str) -> None:
        self.failures: list[str] = []
        self.answers = 0
        self._address, self._stopping = address, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(8)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with openai.OpenAI(base_url=f"{self._address}/v1", api_key="none", max_retries=0, timeout=60) as people:
            while not self._stopping.is_set():
                try:
                    self._one(people, number)
                except Exception as error:  # noqa: BLE001  any failure counts
                    self.failures.append(repr(error))

    def _one(self, people: openai.OpenAI, number: int) -> None:
        question = [{"role": "user", "content": f"What is {number} plus {number}?"}]
        stream = people.chat.completions.create(
            model=NAME, messages=question, max_tokens=24, stream=True, temperature=1
        )
        reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices]
        if not reasons or reasons[-1] not in ("stop", "length"):
            self.failures.append(f"an answer ended with {reasons[-1:]}")
        self.answers += 1


def test_what_is_served_is_noted_on_the_version(project, address, client) -> None:
    assert served(address) == "1"
    noted = json.loads(client.get_model_version(NAME, "1").tags["deployed"])
    assert noted["address"] == address and noted["by"].startswith("Ada") and noted["at"]
    assert f"version 1 at {address}" in project.run("shovel", "deploy", "--status").stdout
    again = project.run("shovel", "deploy", check=False)
    assert again.returncode == 2 and "is served already at" in again.stderr


def test_champion_moves_under_load_and_back_and_nobody_notices(project, address, client) -> None:
    with Load(address) as load:
        time.sleep(1)
        moved = project.run("shovel", "promote", "2")
        assert served(address) == "2" and "answers with version 2" in moved.stdout
        before = load.answers
        back = project.run("shovel", "rollback")
        seconds = re.search(r"the server answers with version 1 after ([\d.]+) s", back.stdout)
        assert served(address) == "1" and float(seconds[1]) < 30
        assert load.answers > before
    assert load.failures == [] and load.answers >= 16
    assert "deployed" in client.get_model_version(NAME, "2").tags


def test_an_alias_moved_by_hand_is_refused_and_the_old_version_goes_on(project, address, client) -> None:
    made = client.create_model_version(NAME, "dvc://data/nowhere", tags=_tags_without_decision(client)).version
    client.set_registered_model_alias(NAME, "champion", made)
    try:
        refused = _follows(address, "refused")
    finally:
        client.set_registered_model_alias(NAME, "champion", "1")
    assert refused["version"] == made and "nobody promoted" in refused["why"]
    assert served(address) == "1"
    note = json.loads(client.get_model_version(NAME, made).tags["deploy.refused"])
    assert "nobody promoted" in note["why"]
    assert "goes on serving" in (project.folder / ".serve/server.log").read_text()


def _follows(address: str, key: str):
    """What /health says of the alias, once it says so."""
    deadline = time.monotonic() + 120
    while (found := requests.get(f"{address}/health", timeout=10).json()["follows"][key]) is None:
        assert time.monotonic() < deadline, key
        time.sleep(0.1)
    return found


def _tags_without_decision(client: MlflowClient) -> dict[str, str]:
    tags = client.get_model_version(NAME, "1").tags
    return {name: value for name, value in tags.items() if not name.startswith(("release.", "decision", "deployed"))}


FLIPPED = {
    "model.safetensors": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "tokenizer.json": lambda content: content.replace(b'"t h"', b'"h t"', 1).replace(b'"t",\n', b'"h",\n', 1),
    "config.json": lambda content: content.replace(b"rms_norm_eps", b"rms_norm_epz", 1),
}


@pytest.mark.parametrize("name", FLIPPED)
def test_what_was_tampered_with_is_not_served(project, address, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(project.folder)
    file = Path(RELEASE, name)
    sound = file.read_bytes()
    where, params = deploy.Target(NAME, "previous"), load_params()
    client = tracking.connect()
    assert deploy.prepare(client, where, params).version.version == "2"
    assert FLIPPED[name](sound) != sound
    rewrite(project, file.as_posix(), FLIPPED[name])
    try:
        with pytest.raises(UserError, match=f"version 2 of {NAME} is not served: exported files .*{name} differs"):
            deploy.prepare(client, where, params)
    finally:
        rewrite(project, file.as_posix(), lambda _: sound)


def test_what_git_has_pulled_and_dvc_not_yet_comes_from_the_cache(project, versions, monkeypatch) -> None:
    monkeypatch.chdir(project.folder)
    project.run("git", "checkout", "-q", "HEAD~1", "dvc.lock")
    project.run("dvc", "checkout", "-q", RELEASE)
    project.run("git", "checkout", "-q", "HEAD", "dvc.lock")
    second = tracking.connect().get_model_version(NAME, "2").tags["digest"]
    assert digests.of_folder(Path(RELEASE)) != second
    model = deploy.prepare(tracking.connect(), deploy.Target(NAME, "previous"), load_params())
    assert model.version.version == "2" and digests.of_folder(model.folder) == second
    assert "every check holds" in project.run("shovel", "verify", "2").stdout
    project.run("dvc", "checkout", "-q", RELEASE)


def test_a_killed_server_is_forgotten_and_what_stops_a_start_is_said(project, address) -> None:
    state = project.read(".serve/server.json")
    process = psutil.Process(state["pid"])
    process.kill()
    process.wait(10)
    assert project.run("shovel", "deploy", "--status", check=False).returncode == 1
    port = int(address.rsplit(":", 1)[1])
    with socket.create_server(("127.0.0.1", port)):
        taken = project.run("shovel", "deploy", "--port", str(port), check=False)
    assert taken.returncode == 2 and f"port {port} cannot be used on 127.0.0.1" in taken.stderr
    absent = project.run("shovel", "deploy", f"{NAME}@nightly", "--port", str(port), check=False)
    assert absent.returncode == 2 and f"{NAME} has no nightly" in absent.stderr and "Traceback" not in absent.stderr
    project.run("shovel", "deploy", "--port", str(port))
    assert served(address) == "1"


def test_a_version_comes_from_the_remote_where_no_cache_has_it(project, versions, tmp_path: Path, monkeypatch) -> None:
    project.run("dvc", "remote", "add", "--local", "-d", "store", str(tmp_path / "store"))
    project.run("dvc", "push", "-q", RELEASE)
    clone = tmp_path / "clone"
    project.run("git", "clone", "-q", str(project.folder), str(clone))
    monkeypatch.chdir(clone)
    (clone / ".dvc/config.local").write_bytes((project.folder / ".dvc/config.local").read_bytes())
    model = deploy.prepare(tracking.connect(), deploy.Target(NAME, "previous"), load_params())
    assert model.folder.parent == deploy.SERVING and digests.of_folder(model.folder) == model.version.tags["digest"]
    with pytest.raises(UserError, match="has not got"):
        deploy.prepare(tracking.connect(), deploy.Target(NAME, "champion"), load_params())


def test_vllm_is_written_and_not_started(project, versions) -> None:
    done = project.run("shovel", "deploy", f"{NAME}@previous", "--engine", "vllm", "--port", "8123")
    compose = YAML(typ="safe").load(project.folder / ".serve/vllm/compose.yaml")["services"]["vllm"]
    assert compose["image"] == "quay.io/ascend/vllm-ascend:v0.23.0" and compose["ports"] == ["127.0.0.1:8123:8123"]
    assert "--served-model-name" in compose["command"] and "CANN 9.1.0 belong together" in done.stdout
    model = Path(compose["volumes"][0].split(":")[0])
    assert (model / "config.json").exists() and model.parent.name == ".serve"


def test_serving_goes_on_without_the_registry(project, address) -> None:
    for process in psutil.Process().children():
        if "mlflow" in process.cmdline():
            os.killpg(process.pid, signal.SIGKILL)
    assert _follows(address, "registry_silent_s") >= 0
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as people:
        question = [{"role": "user", "content": "How are you?"}]
        assert people.chat.completions.create(model=NAME, messages=question, max_tokens=4).choices
    assert "the registry has not answered" in project.run("shovel", "deploy", "--status").stdout
