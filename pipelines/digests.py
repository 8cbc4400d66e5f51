"""sha256 of a folder's files, and one digest for all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipelines.params import UserError


def of_path(path: Path) -> dict[str, str]:
    """sha256 of a file, or of every file below a folder, by name; empty where there is nothing."""
    digests = {}
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                digests[file.relative_to(path).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def of_files(folder: Path) -> dict[str, str]:
    """sha256 of every file, by name; raises `UserError` when the folder is not there."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is missing; `shovel run` makes it, `dvc pull` fetches it.")
    return of_path(folder)


def combined(digests: dict[str, str]) -> str:
    """One digest for all of them: of the lines that `sha256sum` would print, sorted by name."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def of_folder(folder: Path) -> str:
    """The one digest of a folder."""
    return combined(of_files(folder))
