"""A signed version: what others make of its files, that no byte can be changed unseen, and the story that it tells."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf.json_format import ParseDict
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from mlflow import MlflowClient

from pipelines import register
from pipelines.params import UserError, load_params
from pipelines.trust import decisions, keys, statement, why
from pipelines.trust.verify import verify

RELEASE, REPORTS = Path("data/models/release"), Path("reports")


@pytest.fixture(scope="module")
def signed(project):
    """Version 1, registered, commented on and promoted."""
    project.commit("first model")
    assert "made a key to sign with" in project.run("shovel", "register").stderr
    project.run("shovel", "review", "1", "--comment", "samples are what they can be")
    project.run("shovel", "promote", "--comment", "the first one", GIT_COMMITTER_NAME="Grace")
    return project


@pytest.fixture(scope="module")
def client(signed) -> MlflowClient:
    uri = f"sqlite:///{signed.folder}/.mlflow/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture(scope="module")
def evidence(signed) -> Path:
    return next((signed.folder / "reports/evidence").iterdir())


def checks(project, client: MlflowClient, **options) -> dict[str, str]:
    """What `verify` finds wrong with version 1, by the name of the check."""
    with contextlib.chdir(project.folder):
        found = verify(client, client.get_model_version("shovel-demo", "1"), RELEASE, REPORTS, **options)
    assert len(found) > 5 or not all(check.passed for check in found)
    return {check.name: check.what for check in found if not check.passed}


def opened(project, evidence: Path) -> dict:
    known = keys.known(project.folder / "reports/keys")
    return statement.unseal((evidence / "statement.json").read_text(), known, statement.PROVENANCE)[0]


def test_everything_holds_and_the_command_says_so(signed, client) -> None:
    assert checks(signed, client, promoted=True) == {}
    done = json.loads(signed.run("shovel", "verify", "--json").stdout)
    assert done["passed"] and done["version"] == 1 and all(check["passed"] for check in done["checks"])


def test_openssfs_own_command_accepts_the_signature_and_refuses_other_bytes(signed, evidence, tmp_path) -> None:
    key = next((signed.folder / "reports/keys").iterdir())
    release = shutil.copytree(signed.folder / "data/models/release", tmp_path / "elsewhere")

    def theirs() -> int:
        command = [sys.executable, "-W", "ignore", "-m", "model_signing", "verify", "key", str(release)]
        command += ["--signature", str(evidence / "model.sig"), "--public_key", str(key)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert theirs() == 0
    (release / "extra.txt").write_text("x")
    assert theirs() != 0


def test_the_statement_is_provenance_as_in_toto_and_slsa_define_it(signed, evidence) -> None:
    content = opened(signed, evidence)
    predicate = ParseDict(content["predicate"], Provenance())  # raises on an unknown field
    theirs = Statement([], content["predicateType"], content["predicate"])
    theirs.pb.subject.extend(ParseDict({"subject": content["subject"]}, type(theirs.pb)()).subject)
    theirs.validate()
    named = {one.name: one for one in predicate.build_definition.resolved_dependencies}
    assert named["git commit"].digest["gitCommit"] == signed.run("git", "rev-parse", "HEAD").stdout.strip()
    assert named["source code"].annotations["licence"] == "PSF-2.0"
    assert named["data/models/chat"].digest["md5"].endswith(".dir")
    made = {one.name: one for one in predicate.run_details.byproducts}
    assert made["contracts.json"].annotations["success"] and made["pretrain.json"].annotations["seconds"] > 0
    assert made["run pretrain"].annotations["run_id"] == signed.read("reports/runs/pretrain.json")["run_id"]
    assert predicate.build_definition.external_parameters["params"]["pretrain"]["steps"] == 12


def test_the_bill_of_materials_is_cyclonedx_and_lists_model_data_and_packages(signed, evidence) -> None:
    text = (evidence / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    model, kinds = bill["metadata"]["component"], [part["type"] for part in bill["components"]]
    assert model["type"] == "machine-learning-model" and kinds.count("data") == 2 and kinds.count("library") > 50
    licences = {part["name"]: part["licenses"][0]["license"]["id"] for part in bill["components"] if part.get("data")}
    assert licences == {"code": "PSF-2.0", "talk": "CC0-1.0"}
    metrics = {one["type"]: one["value"] for one in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert float(metrics["bits per byte"]) == signed.read("reports/evaluate-chat.json")["bits_per_byte"]


def test_the_model_card_is_read_by_the_hubs_library(signed) -> None:
    card = ModelCard.load(signed.folder / "data/models/release/README.md")
    bits = signed.read("reports/evaluate-chat.json")["bits_per_byte"]
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", ["en"], ["code", "talk"])
    assert card.data.eval_results[0].metric_value == pytest.approx(bits, abs=1e-4)
    assert "| code | PSF-2.0 |" in card.text and "| talk | CC0-1.0 |" in card.text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found(signed, client, evidence, data) -> None:
    """Weights, tokenizer, configuration, card, statement, signature, bill, lock file, reports, public key."""
    folders = (signed.folder / "data/models/release", evidence, signed.folder / "reports/keys")
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    file = data.draw(st.sampled_from(files), "file")
    sound = file.read_bytes()
    position = data.draw(st.integers(0, len(sound) - 1), "position")
    changed = bytearray(sound)
    changed[position] ^= 1 << data.draw(st.integers(0, 7), "bit")
    file.unlink()  # DVC's cache may hold the same file
    try:
        file.write_bytes(changed)
        found = checks(signed, client)
        assert found, f"{file} was changed unseen"
        assert file.parent != folders[0] or f"{file.name} differs" in found["exported files"]
    finally:
        file.write_bytes(sound)


def test_a_file_too_many_or_too_few_is_found(signed, client, evidence) -> None:
    for folder in (signed.folder / "data/models/release", evidence):
        (folder / ".gitignore").write_text("x")
        assert ".gitignore is too much" in str(checks(signed, client))
        (folder / ".gitignore").unlink()
        file = next(
            path for path in sorted(folder.glob("*.json")) if path.name not in ("statement.json", "config.json")
        )
        aside = file.rename(signed.folder / "aside")
        assert f"{file.name} is missing" in str(checks(signed, client))
        aside.rename(file)
    assert checks(signed, client) == {}


def test_the_command_names_what_was_tampered_with_and_nothing_is_promoted(signed) -> None:
    config = signed.folder / "data/models/release/config.json"
    sound = config.read_text()
    config.unlink()
    config.write_text(sound.replace('"rope_theta": 10000', '"rope_theta": 10001'))
    assert config.read_text() != sound
    done = signed.run("shovel", "verify", "1", check=False)
    assert done.returncode == 1 and "FAILS  exported files: data/models/release is not" in done.stdout
    assert "config.json differs" in done.stdout and "FAILS  model signature" in done.stdout
    config.write_text(sound)


def test_who_signs_everything_again_is_found_out(signed, client, evidence, tmp_path, monkeypatch) -> None:
    """An intruder with a key of his own: the repository does not know it, or else the registry names another one."""
    sound = (evidence / "statement.json").read_text()
    content = opened(signed, evidence)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with contextlib.chdir(signed.folder):
        key = keys.make(tmp_path / "keys")
        (evidence / "statement.json").write_text(statement.seal(content, key))
        assert "which reports/keys does not hold" in checks(signed, client)["statement"]
        smuggled = shutil.copy(key.file, "reports/keys")
        found = checks(signed, client)
        assert "the registry names another statement" in found["registered statement"]
        assert "Key mismatch" in found["model signature"]
        Path(smuggled).unlink()
    (evidence / "statement.json").write_text(sound)


@pytest.fixture
def retag(client) -> Iterator[Callable[..., None]]:
    """Sets tags of version 1 as somebody does who may write to the registry; afterwards they are as before."""
    sound = client.get_model_version("shovel-demo", "1").tags

    def change(**tags: str) -> None:
        for name, value in tags.items():
            client.set_model_version_tag("shovel-demo", "1", name, value)

    yield change
    change(**sound)


def test_a_tag_that_says_something_else_than_the_evidence_is_found_by_its_name(signed, client, retag) -> None:
    sound = client.get_model_version("shovel-demo", "1").tags
    lineage = json.dumps(json.loads(sound["lineage"]) | {"seeds": {"pretrain": 7}})
    changed = {"bits_per_byte": "0.3", "git.commit": "c" * 40, "device": "npu", "emulated": "true", "lineage": lineage}
    for name, value in (changed | {"agreement.server": "KL 0", "signed.by": "f" * 64, "passport": "x"}).items():
        retag(**{name: value})
        found = checks(signed, client)
        assert list(found) == ["registered facts"] and f"the tag {name} " in found["registered facts"], name
        retag(**{name: sound[name]})
    retag(lineage=json.dumps({}))
    assert "does not say which bytes it has" in signed.run("shovel", "verify", "1", check=False).stdout


def test_a_changed_tag_is_not_told_as_signed_and_measures_no_promotion(signed, client, retag) -> None:
    bits = signed.read("reports/evaluate-chat.json")["bits_per_byte"]
    commit = signed.run("git", "rev-parse", "HEAD").stdout.strip()
    client.create_model_version("shovel-demo", "x", tags=client.get_model_version("shovel-demo", "1").tags)
    retag(bits_per_byte="9.9", **{"git.commit": "c" * 40})
    try:
        with contextlib.chdir(signed.folder):
            told = why.story(client, client.get_model_version("shovel-demo", "1"), REPORTS)
            assert told["commit"] == commit and told["result"]["bits_per_byte"] == bits
            assert register.status(load_params().register_)["champion"]["bits_per_byte"] == bits
            with pytest.raises(
                UserError, match=rf"champion as signed \(version 1: the tag bits_per_byte is 9\.9, signed was {bits}"
            ):
                register.promote(load_params(), RELEASE, REPORTS, 2)
    finally:
        client.delete_model_version("shovel-demo", "2")


def test_an_alias_that_was_moved_by_hand_is_no_decision(signed, client) -> None:
    version = client.get_model_version("shovel-demo", "1")
    sealed = version.tags[decisions.SEALED]
    client.delete_model_version_tag("shovel-demo", "1", decisions.SEALED)
    assert "nobody promoted version 1 through the gates" in checks(signed, client, promoted=True)["decision"]
    assert checks(signed, client) == {}
    client.set_model_version_tag("shovel-demo", "1", decisions.SEALED, sealed.replace("a", "b", 1))
    assert "the signed release record" in checks(signed, client)["decision"]
    client.set_model_version_tag("shovel-demo", "1", decisions.SEALED, sealed)
    assert checks(signed, client, promoted=True) == {}


def test_the_decision_and_what_was_said_are_kept(signed, client) -> None:
    record = json.loads(next((signed.folder / "reports/releases").iterdir()).read_text())
    assert record["comment"] == "the first one" and record["by"] == "Grace <ada@example.org>"
    assert record["comments"][0].endswith("Ada <ada@example.org>: samples are what they can be")
    assert {"name": "signature and lineage", "passed": True, "what": "12 of 12 checks hold"} in record["gates"]
    tags = client.get_model_version("shovel-demo", "1").tags
    assert tags["decision"].startswith("promoted 20") and tags["decision"].endswith(
        "Grace <ada@example.org>: the first one"
    )


def test_a_release_record_that_was_changed_or_lost_is_found_and_why_tells_the_signed_one(signed, client) -> None:
    file = next((signed.folder / "reports/releases").iterdir())
    sound = file.read_text()
    forged = json.loads(sound) | {"by": "Mallory", "bits_per_byte": 0.5}

    def told() -> list[str]:
        with contextlib.chdir(signed.folder):
            return why.story(client, client.get_model_version("shovel-demo", "1"), REPORTS)["decisions"]

    before = told()
    try:
        file.write_text(json.dumps(forged))
        assert "another bits_per_byte, by than the signed release record" in checks(signed, client)["decision"]
        assert told() == before
        file.write_text(json.dumps(forged | {"at": "2026-01-01T00:00:00+00:00"}))
        assert told() == ["promoted 2026-01-01 00:00 by Mallory: the first one (no signature of it is kept)", *before]
        file.unlink()
        assert "has no record of it" in signed.run("shovel", "verify", "1").stdout, "it may come with `git pull`"
        file.write_text(sound)
        signed.commit("released")
        file.unlink()
        fix = f"`git checkout HEAD reports/releases/{file.name}` brings it back"
        assert checks(signed, client)["decision"].endswith(f"{file.name} was deleted or changed; {fix}")
    finally:
        file.write_text(sound)


def test_a_review_tells_that_a_report_is_not_what_dvc_lock_names(signed) -> None:
    report = signed.folder / "reports/evaluate-chat.json"
    sound = report.read_text()

    def failing() -> dict[str, str]:
        rows = json.loads(signed.run("shovel", "review", "1", "--json").stdout)["gates"]
        return {row["gate"]: row["found"] for row in rows if not row["holds"]}

    assert failing() == {}
    report.write_text(json.dumps(json.loads(sound) | {"bits_per_byte": 0.896}))
    try:
        assert "evaluate@chat" in failing()["reports and model in step"]
    finally:
        report.write_text(sound)


def test_the_tag_that_people_read_says_what_was_signed(signed, client, retag) -> None:
    retag(decision="promoted 2026-01-01 00:00 by Mallory")
    found = checks(signed, client)["decision"]
    assert "the tag decision is promoted 2026-01-01 00:00 by Mallory, signed was promoted" in found


def test_why_tells_the_story_on_one_screen(signed) -> None:
    told = json.loads(signed.run("shovel", "why", "--json").stdout)
    assert told["is_champion"] and told["training"]["seeds"] == {"pretrain": 0, "finetune": 0}
    cleaned = signed.read("reports/clean.json")
    for source in told["data"]["sources"]:
        assert source["kept"] + sum(source["dropped"].values()) == source["raw_documents"]
        assert source["kept"] == cleaned[source["name"]]["kept"]
    assert told["training"]["seconds"].keys() == {file.stem for file in (signed.folder / "reports/runs").iterdir()}
    assert told["training"]["training_seconds"] < sum(told["training"]["seconds"].values())
    text = signed.run("shovel", "why", "1").stdout
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 80
    for word in ("PSF-2.0", "the first one", "samples are what", "energy not measured", "it was the first"):
        assert word in text


def test_why_is_told_when_the_version_that_was_replaced_is_deleted(signed, client, evidence) -> None:
    version, replaced = client.get_model_version("shovel-demo", "1"), [{"action": "promote", "replaces": 7}]
    told = why._comparison(client, version, signed.folder / "reports", evidence, replaced)
    assert told == {"version": 7, "bits_per_byte": None}
    assert why._against(told, decided=True) == "version 7, the champion of that time"


def test_the_registry_tells_where_evidence_lies_when_git_has_none(signed, client, tmp_path) -> None:
    """Another clone that has not pulled: keys come from git, the rest from MLflow."""
    kept = (signed.folder / "reports/evidence").rename(tmp_path / "evidence")
    try:
        assert checks(signed, client, promoted=True) == {}
    finally:
        kept.rename(signed.folder / "reports/evidence")


def test_without_a_registry_bytes_and_evidence_are_checked_and_the_rest_is_named(signed, tmp_path) -> None:
    """A fresh clone after `dvc pull`, whose registry is empty, and a tracking server that is down."""
    empty = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/empty.db"}
    told = signed.run("shovel", "verify", "1", **empty).stdout
    assert "data/models/release, whatever its number: every check holds that needs no registry" in told
    assert "holds  model signature" in told and "registered" not in told
    assert "not checked  version number, alias, tags and signed decision: the registry has no version" in told
    down = json.loads(signed.run("shovel", "verify", "--json", MLFLOW_TRACKING_URI="http://127.0.0.1:9").stdout)
    assert down["passed"] and len(down["checks"]) == 8 and "does not answer" in down["not_checked"]
    (signed.folder / "data/models/release/extra.txt").write_text("x")
    try:
        changed = signed.run("shovel", "verify", "1", check=False, **empty)
        assert changed.returncode == 1 and "FAILS  exported files: nobody signed what lies in" in changed.stdout
    finally:
        (signed.folder / "data/models/release/extra.txt").unlink()


def test_a_version_that_was_registered_too_early_is_signed_again(signed, client, tmp_path) -> None:
    clone = signed.copy(tmp_path / "early")
    uri = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/other.db"}
    (clone.folder / "stray.txt").write_text("not committed")
    clone.run("shovel", "register", **uri)
    early = clone.run("shovel", "verify", check=False, **uri)
    assert early.returncode == 1 and "stray.txt had changes that were not committed" in early.stdout
    clone.commit("stray")
    clone.run("shovel", "register", **uri)
    assert "version 1: every check holds" in clone.run("shovel", "verify", **uri).stdout
