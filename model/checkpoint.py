"""Training state on disk: written whole or not at all, checked when read.

A store is a folder with one folder a step: step-00000100/state.pt and its sha256. A damaged or half-written one is
skipped with a warning for the one before it. The store lies outside of the pipeline's outputs, under a key that names
everything the training depends on, so a state is never resumed by another training.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

KEPT = 2  # checkpoints that stay: the newest, and one to fall back to


class CheckpointStore:
    """The checkpoints of one training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state of `step` finished steps; returns its folder. Older ones beyond `KEPT` go."""
        target = self.folder / f"step-{step:08d}"
        fresh = self.folder / ".unfinished"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            with (fresh / "state.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            (fresh / "sha256").write_text(_sha256(fresh / "state.pt"))
            shutil.rmtree(target, ignore_errors=True)
            fresh.replace(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        for old in self._newest_first()[KEPT:]:
            shutil.rmtree(old)
        return target

    def latest(self) -> dict[str, Any] | None:
        """The newest sound state, or None."""
        path = self.latest_path()
        return None if path is None else torch.load(path / "state.pt", weights_only=True)

    def latest_path(self) -> Path | None:
        """Folder of the newest sound checkpoint, or None; warns of the damaged ones before it."""
        return next((path for path in self._newest_first() if _is_sound(path)), None)

    def clear(self) -> None:
        """Remove the store: the training has finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


class CheckpointWriter:
    """Writes to a store in a thread while training goes on: one checkpoint at a time, from a copy in host memory.

    Leaving the `with` block waits for the last one. What a write fails with is raised by the next call, or there.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store, self._pool = store, ThreadPoolExecutor(1)
        self._writing: Future[Path] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state of `step` finished steps, once the checkpoint before is written, and return."""
        self.wait()
        self._writing = self._pool.submit(self._store.save, step, _copied(state))

    def wait(self) -> None:
        """Until nothing is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()


def _copied(state: Any) -> Any:
    """Nested dicts and lists with every tensor in host memory of its own."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)((key, _copied(value)) for key, value in state.items())
    return [_copied(value) for value in state] if isinstance(state, list) else state


def _is_sound(path: Path) -> bool:
    """Whether the state is the one that was written; warns when it is not."""
    try:
        sound = (path / "sha256").read_bytes() == _sha256(path / "state.pt").encode()
    except OSError:
        sound = False
    if not sound:
        warnings.warn(f"checkpoint {path} is damaged or half written; taking the one before it", stacklevel=3)
    return sound


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
