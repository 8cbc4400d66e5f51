"""A repository that lay elsewhere before: MLflow's database in it holds absolute addresses, and they follow it."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote

ADDRESSES = {  # table -> columns in which MLflow keeps absolute addresses
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}
END = "/.mlflow/artifacts"


def follow(experiment: Any, uri: str, home: Path) -> None:
    """Where MLflow uses the database in `home`, and its experiment's artifacts were elsewhere, bring all addresses.

    experiment: MLflow's, or None where there is none yet.
    """
    database, artifacts = home / "mlflow.db", home / "artifacts"
    if experiment is None or uri != f"sqlite:///{database}" or not artifacts.is_dir():
        return
    address, new = experiment.artifact_location, artifacts.as_uri()
    if address == new or not (address.startswith("file:") and address.endswith(END)):
        return
    readdress(database, *(text.removesuffix(END) + "/" for text in (address, new)))
    before = unquote(address.removeprefix("file://").removesuffix(END))
    print(f"tracking   this repository was in {before} before; its runs' artifacts are found here now", file=sys.stderr)


def readdress(database: Path, old: str, new: str) -> None:
    """Let every address in the database that begins with `old` begin with `new`."""
    with closing(sqlite3.connect(database)) as opened, opened:
        for table, column in ((table, column) for table, columns in ADDRESSES.items() for column in columns):
            change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"  # noqa: S608
            opened.execute(change, (new, len(old) + 1, len(old), old))
