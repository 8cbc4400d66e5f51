"""What is kept of a version so that others can check it: reports/evidence/<digest>/, small files, in git and in MLflow.

    statement.json    in-toto statement (SLSA provenance) in a signed envelope; names every other file by its sha256
    model.sig         OpenSSF model signature over the exported folder
    bom.cdx.json      CycloneDX bill of materials: model, data, packages
    dvc.lock params.yaml sources.yaml    what the version was made from
    *.json *.csv      the reports of its stages, the held-out documents one by one

The folder is named after the first digits of the exported folder's digest, so that two versions never share one.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import gates, lineage, stage, tracking
from pipelines.params import UserError

if TYPE_CHECKING:
    from pipelines.tracking import MlflowClient, ModelVersion

STATEMENT, SIGNATURE, BOM = "statement.json", "model.sig", "bom.cdx.json"
CHAT = "evaluate-chat.json"  # the report whose bits per byte count
INPUTS = (Path("dvc.lock"), Path("params.yaml"), Path("data/sources.yaml"))


def folder(reports: Path, digest: str) -> Path:
    """Where the evidence of the exported folder with that digest lies, or would lie."""
    return reports / "evidence" / digest[:16]


def artifact(digest: str) -> str:
    """The same in the artifacts of a run; two versions may share one, where the review came from DVC's run-cache."""
    return f"evidence/{digest[:16]}"


def collect(reports: Path, passports: str, target: Path) -> None:
    """Copy into `target` what the stages used and reported. passports: digests of those that the training ran under."""
    target.mkdir(parents=True)
    files = [*INPUTS, *(reports / run.name for run in sorted((reports / "runs").glob("*.json")))]
    files += sorted((reports / "plots").glob("documents-*.csv"))
    passport = reports / "passport.json"
    if passport.exists() and hashlib.sha256(passport.read_bytes()).hexdigest() in passports:
        files.append(passport)
    for file in files:
        shutil.copyfile(file, target / file.name)


def tags(facts: dict[str, Any], reports: Path, digest: str) -> dict[str, str]:
    """What the registry says of a version, by its facts and reports; those of the evidence say the same.

    facts: `lineage.facts`, or what the statement has of them.
    """
    return {
        "digest": digest,
        "bits_per_byte": repr(stage.read_json(reports / CHAT, made_by="evaluate")["bits_per_byte"]),
        "git.commit": facts["git"]["commit"],
        "git.dirty": str(bool(facts["git"]["uncommitted"])).lower(),
        **lineage.trained_on(reports),
        **gates.agreement_tags(reports),
    }


def exists(client: MlflowClient, version: ModelVersion, reports: Path) -> bool:
    """Whether a version has evidence that can be had."""
    with tempfile.TemporaryDirectory() as into:
        try:
            find(client, version, reports, Path(into))
        except UserError:
            return False
    return True


def find(client: MlflowClient, version: ModelVersion, reports: Path, into: Path) -> Path:
    """The evidence of a version: from git, or else from MLflow, downloaded below `into`. Raises `UserError`."""
    here = folder(reports, version.tags.get("digest", ""))
    if (here / STATEMENT).exists():
        return here
    found = tracking.download(client, version.run_id, artifact(version.tags.get("digest", "")), into)
    if found is None:
        raise UserError(
            f"version {version.version} has no signed evidence, neither in {here} nor in MLflow; "
            "`shovel register` signs the model that lies in data/models/release."
        )
    return found
