"""Whether a notebook's kernel still is what the repository holds: code that was edited, packages that were upgraded.

Runs have processes of their own and always use what is on disk; what a kernel imported once stays as it was.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.lineage import PACKAGES

CODE = Path(__file__).parents[2]
FOLDERS = [CODE / name for name in ("pipelines", "model", "kernels")]
_files: dict[Path, str] = {}
_versions: dict[str, str] = {}
_told: set[str] = set()


def check() -> None:
    """Note what is loaded; warn, once, of what changed on disk since it was."""
    changed = [
        str(path.relative_to(CODE)) for path in _loaded() if _files.setdefault(path, _digest(path)) != _digest(path)
    ]
    for name in (name for name in PACKAGES if name in sys.modules):
        now = _version(name)
        if _versions.setdefault(name, now) != now:
            changed.append(f"{name} ({_versions[name]} -> {now})")
    if fresh := sorted(set(changed) - _told):
        _told.update(fresh)
        warnings.warn(
            f"{', '.join(fresh)} changed since this kernel loaded it; restart the kernel (runs go on meanwhile, "
            f"and new ones use what is on disk)",
            stacklevel=3,
        )


def _loaded() -> list[Path]:
    """Files of this project that this process imported."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = [Path(file) for file in files if file and file.endswith(".py")]
    return [path for path in paths if any(path.is_relative_to(folder) for folder in FOLDERS)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "gone"
