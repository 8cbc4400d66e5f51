"""Facts about the git repository and DVC's lock file around the pipeline."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


def root() -> Path:
    """The repository's root: DVC's (for a temporary experiment the original one), else git's, else here."""
    if "DVC_ROOT" in os.environ:
        return Path(os.environ["DVC_ROOT"])
    return Path(git("rev-parse", "--show-toplevel") or Path.cwd())


def git(*arguments: str) -> str:
    """Output of a git command, the empty string when it fails (no repository, no commit, no git)."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.rstrip("\n") if done.returncode == 0 else ""


def commit() -> str:
    """The commit that is checked out, or the empty string."""
    return git("rev-parse", "HEAD")


def uncommitted() -> list[str]:
    """Paths that differ from the commit, new files included, as git names them."""
    lines = git("status", "--porcelain", "--untracked-files=all", "--no-renames").splitlines()
    return [line[3:].strip('"') for line in lines]


def uncommitted_sources() -> list[str]:
    """As `uncommitted`, without what the pipeline itself writes: dvc.lock and reports/."""
    return [path for path in uncommitted() if path != "dvc.lock" and not path.startswith("reports/")]


def stages() -> dict[str, Any]:
    """Stages of dvc.lock: name -> cmd, deps, params, outs."""
    return (_yaml(root() / "dvc.lock") or {}).get("stages", {})


def output_hashes() -> dict[str, str]:
    """md5 of every output in dvc.lock, by path; `.dir` marks a folder."""
    return {out["path"]: out["md5"] for stage in stages().values() for out in stage.get("outs", []) if "md5" in out}


def dependency_hashes(stage: str) -> dict[str, str]:
    """md5 of those inputs of a stage (`evaluate@base`) that other stages made, by path."""
    name, _, variant = stage.partition("@")
    declared = (_yaml(root() / "dvc.yaml") or {}).get("stages", {}).get(name, {})
    hashes = output_hashes()
    paths = declared.get("deps", [])
    for key in declared.get("matrix", {}):
        paths = [path.replace(f"${{item.{key}}}", variant) for path in paths]
    return {path: hashes[path] for path in paths if path in hashes}


def _yaml(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) if path.exists() else None
