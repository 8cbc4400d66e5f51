"""What a tracking server that was down has not heard: a file a run in .mlflow/pending, one message of JSON a line."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pipelines import processes, repository


def home() -> Path:
    """The folder of these files."""
    return repository.root() / ".mlflow" / "pending"


def add(run_id: str, message: dict[str, Any]) -> None:
    """Keep a message, and who wrote it, at the end of the run's file; a disk that does not take it is told of once."""
    try:
        home().mkdir(parents=True, exist_ok=True)
        with (home() / f"{run_id}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(message | processes.tags()) + "\n")
    except OSError as error:
        _tell(f"tracking   {home()} cannot be written ({error.strerror}); MLflow will miss a part of this run")


@cache
def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def read(file: Path) -> list[dict[str, Any]]:
    """The messages of a file; half a line, of a process that was killed or had a full disk, is left out."""
    messages = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            messages.append(json.loads(line))
    return messages


def goes_on(messages: list[dict[str, Any]]) -> bool:
    """Whether the run has not ended and its process may write more."""
    last = messages[-1] if messages else {}
    return last.get("status", "RUNNING") == "RUNNING" and processes.is_alive(last.get("process", ""))
