"""Several people on one MLflow server with PostgreSQL and S3: jobs of CI, a reviewer, a server that dies in between."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator

import boto3
import pytest
from mlflow import MlflowClient
from shared_server import ADMIN, FOLDER, KEYS, SharedServer, binaries, killing, shared_server

from pipelines import digests

PASSWORD = "a long password of theirs"
NAME = "shovel-demo"
pytestmark = pytest.mark.skipif(
    binaries() is None or importlib.util.find_spec("psycopg2") is None,
    reason="PostgreSQL is missing; `apt-get install postgresql` and the extra `dev` bring it",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    """With the accounts that pipelines/server/README.md makes."""
    code = re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)[1]
    with shared_server(tmp_path_factory.mktemp("server")) as running, pytest.MonkeyPatch.context() as patch:
        for key, value in ADMIN.items():
            patch.setenv(key, value)
        code = code.replace("http://127.0.0.1:5000", running.address)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        yield running


def as_user(address: str, name: str) -> dict[str, str]:
    login = {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    return {"MLFLOW_TRACKING_URI": address, **login, **KEYS}


@pytest.fixture(scope="module")
def clones(project, server: SharedServer, tmp_path_factory: pytest.TempPathFactory) -> list:
    """Three clones with one remote on S3; the third has other bytes to register, as has a fourth."""
    endpoint = server.environment["MLFLOW_S3_ENDPOINT_URL"]
    project.run("dvc", "remote", "add", "-d", "store", "s3://dvc")
    project.run("dvc", "remote", "modify", "store", "endpointurl", endpoint)
    project.run("shovel", "keys")
    project.run("dvc", "repro", "-sf", "review", **as_user(server.address, "builder"))
    project.commit("a remote, a key, and a review that the server knows")
    clones = [project.copy(tmp_path_factory.mktemp("clone") / name) for name in ("first", "again", "other", "late")]
    for clone, indent in ((clones[2], 4), (clones[3], 8)):
        file = clone.folder / "data/models/release/generation_config.json"
        content = json.dumps(json.loads(file.read_text()), indent=indent)
        file.unlink()  # a link into DVC's cache
        file.write_text(content)
        clone.run("dvc", "commit", "-fq", "export", "agreement", "review")
        clone.commit("another layout")
    return clones


@pytest.fixture
def client(server: SharedServer) -> MlflowClient:
    return MlflowClient(server.address, server.address)


def at_once(clones: list, *commands: tuple[str, ...], **environment: str) -> list[tuple[int, str]]:
    """(exit code, what was said) of each clone's command, all started together."""
    started = [c.start("pipelines.cli", *words, **environment) for c, words in zip(clones, commands, strict=True)]
    said = [process.communicate()[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def versions(client: MlflowClient) -> dict[int, str]:
    return {int(v.version): v.tags["digest"] for v in client.search_model_versions(f"name = '{NAME}'")}


def test_three_jobs_register_at_once_and_no_version_is_lost_or_doubled(clones, server, client) -> None:
    done = at_once(clones[:3], *[("register",)] * 3, **as_user(server.address, "builder"))
    assert [code for code, _ in done] == [0, 0, 0], done
    found = versions(client)
    assert sorted(found) == [1, 2] and len(set(found.values())) == 2
    assert {model.name for model in client.search_registered_models()} == {NAME}  # no lock is left
    secrets = {name.lower(): value for name, value in KEYS.items() if "KEY" in name}
    store = boto3.client("s3", endpoint_url=server.environment["MLFLOW_S3_ENDPOINT_URL"], **secrets)
    pushed = {entry["Key"] for entry in store.list_objects_v2(Bucket="dvc")["Contents"]}
    for version in client.search_model_versions(f"name = '{NAME}'"):
        md5 = json.loads(version.tags["lineage"])["dvc"]["data/models/release"]
        assert f"files/md5/{md5[:2]}/{md5[2:]}" in pushed
        kept = f"evidence/{version.tags['digest'][:16]}"
        assert f"{kept}/model.sig" in {file.path for file in client.list_artifacts(version.run_id, kept)}
    assert store.list_objects_v2(Bucket="mlflow")["KeyCount"] > 0


def test_only_a_reviewer_promotes(clones, server, client) -> None:
    mine = next(number for number, digest in versions(client).items() if digest == _digest(clones[0]))
    [(code, said)] = at_once(clones[:1], ("promote", str(mine)), **as_user(server.address, "builder"))
    assert code == 2 and "members of the role reviewers may" in said and "Traceback" not in said
    assert not list((clones[0].folder / "reports").glob("releases/*.json"))
    assert "champion" not in client.get_registered_model(NAME).aliases


def test_of_two_promotions_at_once_one_wins_and_the_stale_one_compares_again(clones, server, client) -> None:
    user = as_user(server.address, "reviewer")
    numbers = {digest: number for number, digest in versions(client).items()}
    both = [clones[0], clones[2]]
    mine = [numbers[_digest(clone)] for clone in both]
    codes, said = zip(*at_once(both, *(("promote", str(number)) for number in mine), **user), strict=True)
    assert sorted(codes) == [0, 2], said
    winner, loser = codes.index(0), codes.index(2)
    aliases = client.get_registered_model(NAME).aliases
    assert int(aliases["champion"]) == mine[winner] and "previous" not in aliases
    assert "dvc repro -sf review" in said[loser] and "Traceback" not in said[loser]

    again = both[loser]
    again.run("dvc", "repro", "-sf", "review", **user)
    assert again.read("reports/review.json")["compared_with"] == mine[winner]
    again.run("shovel", "promote", str(mine[loser]), **user)
    aliases = {alias: int(number) for alias, number in client.get_registered_model(NAME).aliases.items()}
    assert (aliases["champion"], aliases["previous"]) == (mine[loser], mine[winner])


def _digest(clone) -> str:
    return digests.of_folder(clone.folder / "data/models/release")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_server_killed_in_mid_registration_leaves_no_half_version(clones, server, client, after: bool) -> None:
    known = versions(client)
    with killing(server, "/model-versions/create", after) as address:
        [(code, said)] = at_once(clones[3:], ("register",), **as_user(address, "builder"))
    assert code == 2 and "does not answer" in said and "Traceback" not in said
    server.start()
    made = {number: digest for number, digest in versions(client).items() if number not in known}
    assert list(made.values()) == ([_digest(clones[3])] if after else []), said
    if after:
        [(code, said)] = at_once(clones[3:], ("register",), **as_user(server.address, "builder"))
        assert code == 0 and set(versions(client)) - set(known) == set(made)
        version = client.get_model_version_by_alias(NAME, "challenger")
        assert int(version.version) in made and version.status == "READY" and "lineage" in version.tags
        assert f"{NAME}.lock" not in {model.name for model in client.search_registered_models()}
