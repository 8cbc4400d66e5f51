"""Which process does something, and whether it still runs: host, process id and start, which no other process has."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil


def dvc() -> psutil.Process | None:
    """The nearest ancestor that is a `dvc` command."""
    for process in psutil.Process().parents():
        with suppress(psutil.Error):
            words = [Path(word).name for word in process.cmdline()[:3]]
            if "dvc" in words:
                return process
    return None


def identity(process: psutil.Process) -> str:
    """host:pid:start, which no other process ever has."""
    return f"{platform.node()}:{process.pid}:{process.create_time():.2f}"


def tags() -> dict[str, str]:
    """The tag that tells `is_alive` whether this process still runs."""
    return {"process": identity(psutil.Process())}


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that a run names still runs; one on another host counts as alive."""
    host, pid, started = (tags.get("process") or "?:0:0").rsplit(":", 2)
    if host != platform.node():
        return host != "?"
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(started)) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
