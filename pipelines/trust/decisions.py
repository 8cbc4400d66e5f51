"""What people decided about a version: signed release records and comments, kept as tags where the registry shows them.

The record of a promotion is signed too: whoever moves `champion` by hand in the MLflow UI cannot make one, and what is
served asks for it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import repository, stage, tracking
from pipelines.trust import keys, statement

if TYPE_CHECKING:
    from pipelines.tracking import MlflowClient, ModelVersion

SEALED = "release.promote"  # tag of a version: the signed record of its promotion
RECORD, COMMENT = "urn:shovel:release-record:1", "comment."


def tags(record: dict[str, Any], reports: Path) -> dict[str, str]:
    """Tags of a version that was promoted or rolled back to: the signed record, and a sentence for people."""
    key, _ = keys.ensure(reports / keys.FOLDER)
    subject = [{"name": record["model"], "digest": {"sha256": record["digest"]}}]
    content = {"_type": statement.STATEMENT_TYPE, "subject": subject, "predicateType": RECORD, "predicate": record}
    return {f"release.{record['action']}": statement.seal(content, key), "decision": sentence(record)}


def sentence(record: dict[str, Any]) -> str:
    """A release record for a person to read."""
    words = {"promote": "promoted", "rollback": "brought back"}
    comment = f": {record['comment']}" if record.get("comment") else ""
    return f"{words[record['action']]} {record['at'][:16].replace('T', ' ')} by {record['by']}{comment}"


def comment(client: MlflowClient, version: ModelVersion, text: str) -> None:
    """Keep what a reviewer says about a version, with name and time, as a tag."""
    key = f"{COMMENT}{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}"
    tracking.tag_version(client, version, {key: f"{repository.person()}: {text}"})


def comments(version: ModelVersion) -> list[str]:
    """What reviewers said, oldest first."""
    found = sorted((key.removeprefix(COMMENT), text) for key, text in version.tags.items() if key.startswith(COMMENT))
    return [f"{at[:16].replace('T', ' ')} {text}" for at, text in found]


def records(version: ModelVersion, reports: Path) -> list[dict[str, Any]]:
    """The release records of a version that git keeps, oldest first."""
    found = [stage.read_json(file, made_by="register") for file in (reports / "releases").glob("*.json")]
    mine = [record for record in found if record["digest"] == version.tags.get("digest")]
    return sorted(mine, key=lambda record: record["at"])
