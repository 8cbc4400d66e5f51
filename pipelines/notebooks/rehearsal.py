"""A copy of the project to rehearse in: the same files, data and models, its own git history and an empty registry.

Heavy files are links into DVC's cache, so the copy takes seconds and hardly any room. Whatever is promoted, kept or
committed there leaves the project as it is; the copy ends with the kernel.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines import repository
from pipelines.params import UserError

RECORDS = "reports/releases/"  # of another registry
IDENTITY = {"user.name": "Rehearsal", "user.email": "rehearsal@localhost"}


def rehearse() -> Path:
    """Make the copy and go there: it is the working directory afterwards. Returns its folder.

    Raises `UserError` when there is nothing to rehearse with, or DVC's cache does not hold what dvc.lock names.
    """
    root = repository.root()
    if not (root / "dvc.lock").exists():
        raise UserError("there is no result to rehearse with; `make demo` makes one.")
    folder = Path(tempfile.mkdtemp(prefix="shovel-rehearsal-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in _git(root, "ls-files", "-co", "--exclude-standard", "-z").split("\0"):
        if (root / name).is_file() and not name.startswith(RECORDS):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
    (folder / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {repository.cache_folder()}\n", encoding="utf-8")
    _commit(folder)
    _check_out(folder)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.chdir(folder)
    return folder


def _commit(folder: Path) -> None:
    """One commit with everything; a name for it where git knows none."""
    _git(folder, "init", "--quiet")
    for key, value in IDENTITY.items():
        if not _git(folder, "config", "--default", "", key).strip():
            _git(folder, "config", key, value)
    _git(folder, "add", "--all")
    _git(folder, "commit", "--quiet", "--message", "As it was when the rehearsal began")


def _check_out(folder: Path) -> None:
    command = [sys.executable, "-m", "dvc", "checkout", "--quiet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            "DVC's cache does not hold all that dvc.lock names; `shovel run` makes it, `dvc pull` fetches it."
        )


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout
