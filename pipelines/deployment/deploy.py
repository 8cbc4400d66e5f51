"""From an alias of the registry to a model that may answer: resolve, get the bytes, check them, keep a copy to serve.

    shovel deploy models:/shovel-demo@champion

Bytes come from the working tree where dvc.lock names them, else from DVC's cache, else from its remote. What is served
is a copy in .serve/<digest>, which no `dvc repro` touches. A version is refused when a byte, a signature or its
lineage is not as registered, and behind `champion` also when it was not promoted through the gates.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import digests, gates, repository, stage, tracking
from pipelines.params import Params, UserError
from pipelines.register import CHALLENGER, CHAMPION, PREVIOUS, RELEASE, REPORTS
from pipelines.trust import evidence, verify

if TYPE_CHECKING:
    from pipelines.tracking import MlflowClient, ModelVersion

SERVING = Path(".serve")


@dataclass(frozen=True)
class Target:
    """What is to be served: the version behind an alias of a registered model."""

    name: str
    alias: str

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


@dataclass(frozen=True)
class Model:
    """A version that passed its checks, and the folder to serve it from."""

    version: ModelVersion
    folder: Path


def target(text: str | None, name: str) -> Target:
    """`models:/NAME@alias`, `NAME@alias` or `NAME`, whose champion it is; an alias alone is of the model `name`."""
    if text in (CHAMPION, CHALLENGER, PREVIOUS):
        return Target(name, text)
    found, _, alias = (text or name).removeprefix("models:/").partition("@")
    if not found or "/" in found or "/" in alias:
        raise UserError(f"{text!r} names no alias; write models:/{name}@{CHAMPION}.")
    return Target(found, alias or CHAMPION)


def prepare(client: MlflowClient, where: Target, params: Params) -> Model:
    """The version behind the alias, checked, and a copy of its bytes. Raises `UserError` that names what fails."""
    version = behind(client, where)
    with tempfile.TemporaryDirectory(dir=_home()) as scratch:
        source = _bytes(version, Path(scratch) / "release")
        checks = verify.verify(client, version, source, REPORTS, promoted=where.alias == CHAMPION)
        if failed := [f"{check.name} ({check.what})" for check in checks if not check.passed]:
            reasons = "; ".join([*failed, *_failed_gates(client, version, params)])
            raise UserError(f"version {version.version} of {where.name} is not served: {reasons}.")
        model = Model(version, _copy(source, version.tags["digest"]))
    _sweep(client, where.name, model.folder)
    return model


def behind(client: MlflowClient, where: Target) -> ModelVersion:
    """The version to be served, not checked yet; raises `UserError` when the alias names none."""
    version = tracking.version_behind(client, where.name, where.alias)
    if version is None:
        raise UserError(f"{where.name} has no {where.alias}; `shovel status` shows what there is.")
    return version


def _home() -> Path:
    SERVING.mkdir(exist_ok=True)
    return SERVING


def _bytes(version: ModelVersion, into: Path) -> Path:
    try:
        return verify.bytes_of(version, RELEASE, into)
    except UserError:
        md5 = verify.lineage_of(version).get("dvc", {}).get(verify.EXPORTED)
        if md5 is None:
            raise
        stage.say(f"deploy     fetching version {version.version} from DVC's remote")
        repository.pull(md5)
        stage.remove(into)
        return verify.bytes_of(version, RELEASE, into)


def _failed_gates(client: MlflowClient, version: ModelVersion, params: Params) -> list[str]:
    """Of a version that nobody promoted: the gates that would not hold, by the reports that were kept of it."""
    if version.tags.get("release.promote"):
        return []
    with tempfile.TemporaryDirectory() as into:
        try:
            kept = evidence.find(client, version, REPORTS, Path(into))
            found = gates.of_reports(params, kept, None)
        except UserError as error:
            return [str(error).rstrip(".")]
    return [f"gate {gate.name} ({gate.what})" for gate in found if not gate.passed]


def _copy(source: Path, digest: str) -> Path:
    """The folder to serve from; one that was changed since is made again."""
    kept = _home() / digest[:16]
    if kept.exists() and digests.of_folder(kept) != digest:
        stage.say(f"deploy     {kept} was changed; making it again")
        stage.remove(kept)
    if not kept.exists():
        with stage.replacing(kept) as fresh:
            shutil.copytree(source, fresh)
    if digests.of_folder(kept) != digest:
        raise UserError(f"{kept} did not become what was registered; check the disk, then deploy again.")
    return kept


def _sweep(client: MlflowClient, name: str, fresh: Path) -> None:
    """Remove the copies that nobody serves and that are neither the champion nor the one before it."""
    behind = (tracking.version_behind(client, name, alias) for alias in (CHAMPION, PREVIOUS))
    kept = {version.tags.get("digest", "")[:16] for version in behind if version} | {fresh.name}
    states = (SERVING / "server.json", SERVING / "vllm" / "compose.yaml")  # what runs, or was written to run, names it
    used = "".join(file.read_text(encoding="utf-8") for file in states if file.exists())
    for folder in SERVING.iterdir():
        if re.fullmatch("[0-9a-f]{16}", folder.name) and folder.name not in kept and folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)


def tag(client: MlflowClient, version: ModelVersion, key: str, **content: str) -> None:
    """Note on a version what happened to it here; a registry that does not take it changes nothing."""
    content |= {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": repository.person()}
    try:
        tracking.tag_version(client, version, {key: json.dumps(content, sort_keys=True, ensure_ascii=False)})
    except Exception as error:  # noqa: BLE001  serving goes on without the registry
        stage.say(f"deploy     the registry does not take the tag {key} ({type(error).__name__})")
