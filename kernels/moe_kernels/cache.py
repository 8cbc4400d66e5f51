"""Where what is made once for a machine is kept: folders below ~/.cache/shovel; $XDG_CACHE_HOME counts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def folder(name: str) -> Path:
    """A folder that can be written: in the cache, else among the temporary ones. Raises `OSError` where neither can."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    candidates = (Path(home) / "shovel" / name, Path(tempfile.gettempdir()) / f"shovel-{name}-{os.getuid()}")
    for candidate in candidates:
        try:
            candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if candidate.stat().st_uid == os.getuid() and os.access(candidate, os.W_OK):
            return candidate
    raise OSError(f"none of {' and '.join(map(str, candidates))} can be written")
