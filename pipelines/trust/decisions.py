"""What people decided about a version: signed release records and comments, kept as tags where the registry shows them.

The record of a promotion is signed too: whoever moves `champion` by hand in the MLflow UI cannot make one, and what is
served asks for it. reports/releases has the same records for git to keep; what they say counts as it was signed.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import repository, tracking
from pipelines.trust import keys, statement

if TYPE_CHECKING:
    from pipelines.tracking import MlflowClient, ModelVersion

RELEASES = "releases"  # below reports: a file a decision
SEALED = "release.promote"  # tag of a version: the signed record of its promotion
RECORD, COMMENT = "urn:shovel:release-record:1", "comment."
WORDS = {"promote": "promoted", "rollback": "brought back"}


def tags(record: dict[str, Any], reports: Path) -> dict[str, str]:
    """Tags of a version that was promoted or rolled back to: the signed record, and a sentence for people."""
    key, _ = keys.ensure(reports / keys.FOLDER)
    subject = [{"name": record["model"], "digest": {"sha256": record["digest"]}}]
    content = {"_type": statement.STATEMENT_TYPE, "subject": subject, "predicateType": RECORD, "predicate": record}
    return {f"release.{record['action']}": statement.seal(content, key), "decision": sentence(record)}


def sentence(record: dict[str, Any]) -> str:
    """A release record for a person to read."""
    comment = f": {record['comment']}" if record.get("comment") else ""
    note = "" if record.get("signed", True) else " (no signature of it is kept)"
    return f"{WORDS[record['action']]} {record['at'][:16].replace('T', ' ')} by {record['by']}{comment}{note}"


def comment(client: MlflowClient, version: ModelVersion, text: str) -> None:
    """Keep what a reviewer says about a version, with name and time, as a tag."""
    key = f"{COMMENT}{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}"
    tracking.tag_version(client, version, {key: f"{repository.person()}: {text}"})


def comments(version: ModelVersion) -> list[str]:
    """What reviewers said, oldest first."""
    found = sorted((key.removeprefix(COMMENT), text) for key, text in version.tags.items() if key.startswith(COMMENT))
    return [f"{at[:16].replace('T', ' ')} {text}" for at, text in found]


def signed(version: ModelVersion, known: dict[str, keys.Key]) -> list[tuple[dict[str, Any], keys.Key]]:
    """The last promotion and the last rollback of a version, with the keys that signed them.

    Raises `ValueError` that says what is wrong with one.
    """
    found = []
    for action in WORDS:
        if text := version.tags.get(f"release.{action}"):
            content, key = statement.unseal(text, known, RECORD)
            record = content["predicate"]
            if (record["action"], record["digest"]) != (action, version.tags.get("digest")):
                raise ValueError("it is about another model, or another decision")
            found.append((record, key))
    return found


def records(version: ModelVersion, reports: Path, known: dict[str, keys.Key]) -> list[dict[str, Any]]:
    """The release records of a version, oldest first: as they were signed, and those that only reports/releases has,
    with `signed` False: earlier ones, or another registry's. Raises `ValueError`.
    """
    found = [record for record, _ in signed(version, known)]
    told = {(record["action"], record["at"]) for record in found}
    digest = version.tags.get("digest")
    others = [record for record in _files(reports).values() if record["digest"] == digest and record["action"] in WORDS]
    found += [record | {"signed": False} for record in others if (record["action"], record["at"]) not in told]
    return sorted(found, key=lambda record: record["at"])


def is_kept(record: dict[str, Any], reports: Path) -> bool:
    """Whether reports/releases has a signed record. Raises `ValueError` where it says something else, or was lost."""
    kept = _files(reports)
    if record in kept.values():
        return True
    for file, found in kept.items():
        if all(found.get(name) == record[name] for name in ("model", "version", "action", "at")):
            wrong = sorted(name for name in record.keys() | found.keys() if found.get(name) != record.get(name))
            raise ValueError(f"{file} has another {', '.join(wrong)} than the signed release record")
    for name in repository.git("ls-tree", "--name-only", "HEAD", f"{(reports / RELEASES).as_posix()}/").splitlines():
        if _parsed(repository.committed("HEAD", Path(name))) == record:
            raise ValueError(f"{name} was deleted or changed; `git checkout HEAD {name}` brings it back")
    return False


def _files(reports: Path) -> dict[Path, dict[str, Any]]:
    """The release records in reports/releases, by file; what is none is left out."""
    found = {file: _parsed(file.read_bytes()) for file in sorted((reports / RELEASES).glob("*.json"))}
    return {file: record for file, record in found.items() if {"action", "at", "by", "digest"} <= record.keys()}


def _parsed(content: bytes) -> dict[str, Any]:
    """A JSON object, empty where it is none."""
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}
