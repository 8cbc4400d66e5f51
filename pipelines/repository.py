"""Facts about the git repository and DVC's lock file around the pipeline."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from pipelines.params import UserError, read_yaml

OWN = Path("data/own")
SMALL = 1 << 20  # bytes of a file that is read to see whether it changed
NAMED = 3  # files that a sentence names


def root() -> Path:
    """The repository's root: where DVC is (for a temporary experiment the original place), else here.

    The notebooks are a DVC project of their own inside of it, without parameters.
    """
    here = Path(os.environ.get("DVC_ROOT", Path.cwd()))
    ours = (folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir())
    return next((folder for folder in ours if (folder / "params.yaml").exists()), here)


def enter() -> None:
    """Make the repository's root the working directory: the one around it, else the one that this file belongs to."""
    here = root()
    os.chdir(here if (here / "dvc.yaml").exists() else Path(__file__).parents[1])


def git(*arguments: str) -> str:
    """Output of a git command, the empty string when it fails (no repository, no commit, no git)."""
    return _git(*arguments).decode(errors="replace").rstrip("\n")


def _git(*arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return b""
    return done.stdout if done.returncode == 0 else b""


def commit() -> str:
    """The commit that is checked out, or the empty string."""
    return git("rev-parse", "HEAD")


def uncommitted() -> list[str]:
    """Paths that differ from the commit, new files included."""
    entries = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=all", "--no-renames", "-z").split(
        "\0"
    )
    return [entry[3:] for entry in entries if entry]


def uncommitted_sources() -> list[str]:
    """As `uncommitted`, without what the pipeline itself writes: dvc.lock and reports/."""
    return [path for path in uncommitted() if path != "dvc.lock" and not path.startswith("reports/")]


def has_remote() -> bool:
    """Whether DVC knows a place to pull from."""
    from dvc.config import Config  # half a second of import

    return bool(Config(str(root() / ".dvc"))["remote"])


def stages() -> dict[str, Any]:
    """Stages of dvc.lock: name -> cmd, deps, params, outs."""
    return (_yaml(Path("dvc.lock")) or {}).get("stages", {})


def stale_stages() -> list[str]:
    """Stages of dvc.yaml whose inputs, parameters or outputs are not those of dvc.lock: what `dvc repro` would run."""
    require_readable()
    command = [sys.executable, "-m", "dvc", "status", "--json", "dvc.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`dvc status` fails ({(done.stderr.strip().splitlines() or ['?'])[0]}); mend that first.")
    return sorted(json.loads(done.stdout or "{}"))


def require_readable() -> None:
    """Raises `UserError` for what DVC cannot read in data/own: it would name no file, and delete outputs before."""
    found = []
    for folder, folders, files in os.walk(OWN):
        paths = (Path(folder, name) for name in sorted([*folders, *files]))
        found += [f"{_printable(path)} {why}" for path in paths if (why := _unreadable(path))]
    if found:
        more = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise UserError(f"{'; '.join(found[:NAMED])}{more}; mend or remove that, DVC reads all of {OWN}.")


def _unreadable(path: Path) -> str:
    if path.name != _printable(path.name):
        return "has a name that is not UTF-8"
    if not path.exists():
        return "is a link to nothing"
    if not path.is_file() and not path.is_dir():
        return "is neither a file nor a folder"
    return "" if os.access(path, os.R_OK) else "may not be read by you"


def _printable(path: Path | str) -> str:
    """Bytes of a name that are not UTF-8 as \\xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


def push(output: Path) -> None:
    """Copy an output to DVC's default remote, where there is one; raises `UserError` when the remote refuses."""
    if not _dvc_config(root())["core"].get("remote"):
        return
    command = [sys.executable, "-m", "dvc", "push", "--quiet", output.as_posix()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise UserError(f"`dvc push` fails ({reason}); the bytes of a version must be where others can get them.")


def pull(md5: str) -> None:
    """Bring a folder that dvc.lock once named by `md5` from DVC's default remote into its cache.

    Raises `UserError` when there is no remote, or when the remote has not got it.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo  # a second of import
    from dvc_data.hashfile.hash_info import HashInfo

    if not _dvc_config(root())["core"].get("remote"):
        raise UserError("DVC has no default remote to pull from; name one with `dvc remote add -d`.")
    try:
        with Repo(str(root())) as repo:
            missing = repo.cloud.pull([HashInfo("md5", md5)]).failed or not _cached(md5).exists()
            if not missing:  # a folder is a list of files
                entries = json.loads(_cached(md5).read_text(encoding="utf-8"))
                missing = repo.cloud.pull({HashInfo("md5", entry["md5"]) for entry in entries}).failed
    except (DvcException, OSError) as error:
        raise UserError(f"DVC's remote does not give {md5} ({error}); check it with `dvc status -c`.") from None
    if missing:
        raise UserError(f"DVC's remote has not got {md5}; `dvc push` where the model was registered brings it there.")


def output_hashes() -> dict[str, str]:
    """md5 of every output in dvc.lock, by path; `.dir` marks a folder."""
    return {out["path"]: out["md5"] for stage in stages().values() for out in stage.get("outs", []) if "md5" in out}


def folder_md5(folder: Path) -> str:
    """What dvc.lock says of a folder with these bytes: the md5 of DVC's list of its files, with `.dir`."""
    files = sorted((path.relative_to(folder).parts, path) for path in folder.rglob("*") if path.is_file())
    entries = [{"md5": _file_md5(path), "relpath": "/".join(parts)} for parts, path in files]
    return f"{_md5(json.dumps(entries, sort_keys=True).encode())}.dir"


def is_another(folder: Path, md5: str) -> bool:
    """Whether a folder holds an output that DVC has kept, but not the one of this md5."""
    found = folder_md5(folder)
    return found != md5 and _cached(found).exists()


def _file_md5(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def committed(commit: str, path: Path) -> bytes:
    """A file as a commit has it; nothing when it has not."""
    return _git("show", f"{commit}:./{path.as_posix()}")


def person() -> str:
    """Who decides here: name and address as git has them, else user and machine."""
    known = git("var", "GIT_COMMITTER_IDENT").rsplit(" ", 2)[0]
    return known or f"{psutil.Process().username()}@{platform.node()}"


def cache_folder() -> Path:
    """The folder of DVC's cache."""
    return Path(_dvc_config(root())["cache"].get("dir") or root() / ".dvc" / "cache")


def check_out(md5: str, path: Path, target: Path) -> None:
    """Make `target` the output `path` as dvc.lock names it by `md5`, from DVC's cache or from the commit.

    Raises `FileNotFoundError` when neither has it.
    """
    cached = _cached(md5)
    if md5.endswith(".dir"):
        target.mkdir()
        for entry in json.loads(cached.read_text(encoding="utf-8")):
            _link(_cached(entry["md5"]), target / entry["relpath"])
    elif cached.exists():
        shutil.copyfile(cached, target)
    else:
        content = committed("HEAD", path)
        if _md5(content) != md5:
            raise FileNotFoundError(errno.ENOENT, "neither DVC's cache nor the commit holds it", str(path))
        target.write_bytes(content)


def _cached(md5: str) -> Path:
    """Where DVC's cache keeps what has this md5."""
    return cache_folder() / "files" / "md5" / md5[:2] / md5[2:]


@cache
def _dvc_config(repository: Path) -> Mapping[str, Any]:
    from dvc.config import Config  # half a second of import

    return Config(str(repository / ".dvc"))


def _link(cached: Path, target: Path) -> None:
    """A hard link as DVC makes them, a copy across file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(cached)
    except OSError:
        shutil.copyfile(cached, target)


def dependency_hashes(stage: str) -> dict[str, str]:
    """md5 of the inputs of a stage (`evaluate@base`) by path, before it runs: what other stages made, and files.

    Folders of code are left out: the commit names them, and `shovel link` adds what DVC found.
    """
    hashes, paths = output_hashes(), _declared(stage, "deps")
    files = {path: _md5(Path(path).read_bytes()) for path in paths if path not in hashes and Path(path).is_file()}
    return files | {path: hashes[path] for path in paths if path in hashes}


def fingerprint(stage: str) -> dict[str, str]:
    """Of everything that dvc.yaml says a stage reads, now: files, and the values of its parameters."""
    found = {}
    for path in map(Path, _declared(stage, "deps")):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                found[file.as_posix()] = _state(file)
    content = _yaml(Path("params.yaml")) or {}
    for key in _declared(stage, "params"):
        found |= {f"`{name}` of params.yaml": value for name, value in _values(content, key)}
    return found


def _declared(stage: str, what: str) -> list[str]:
    """The list `deps` or `params` of a stage in dvc.yaml (`evaluate@base`), its variant filled in."""
    name, _, variant = stage.partition("@")
    declared = (_yaml(Path("dvc.yaml")) or {}).get("stages", {}).get(name, {})
    words = declared.get(what, [])
    for key in declared.get("matrix", {}):
        words = [word.replace(f"${{item.{key}}}", variant) for word in words]
    return words


def _state(file: Path) -> str:
    """The content of a small file; time and size of a large one."""
    status = file.stat()
    return _md5(file.read_bytes()) if status.st_size < SMALL else f"{status.st_mtime_ns} {status.st_size}"


def _values(content: Any, key: str) -> list[tuple[str, str]]:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    if isinstance(content, dict):
        return [(f"{key}.{inner}", json.dumps(value)) for inner, value in content.items()]
    return [(key, json.dumps(content))]


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _yaml(path: Path) -> Any:
    return read_yaml(path) if path.exists() else None
