"""What people decided about a version: signed release records and comments, kept as tags where the registry shows them.

The record of a promotion is signed too: whoever moves `champion` by hand in the MLflow UI cannot make one, and what is
served asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines import keys, statement

SEALED = "release.promote"  # tag of a version: the signed record of its promotion
RECORD = "urn:shovel:release-record:1"


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
