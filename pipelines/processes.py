"""Which process it is: names that outlive it, and whether it still runs."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil


def identity(process: psutil.Process | None = None) -> str:
    """host:pid:start, which no other process ever has; of this process when none is given."""
    process = process or psutil.Process()
    return f"{platform.node()}:{process.pid}:{process.create_time():.2f}"


def is_alive(name: str) -> bool:
    """Whether the process of that `identity` still runs; one on another host counts as alive, a nameless one not."""
    host, pid, started = (name or "?:0:0").rsplit(":", 2)
    if host != platform.node():
        return host != "?"
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(started)) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def pid(name: str) -> int:
    """The number in an `identity`."""
    return int(name.rsplit(":", 2)[1])


def ancestor(accept: Callable[[list[str]], bool]) -> psutil.Process | None:
    """The nearest ancestor of this process whose first words (without their folders) are accepted."""
    for process in psutil.Process().parents():
        with suppress(psutil.Error):
            if accept([Path(word).name for word in process.cmdline()[:3]]):
                return process
    return None
