"""What a stage does now, in files, so that every notebook and terminal can watch a stage that another process runs.

A stage leaves one line of JSON an event in .runs/<place>/progress/<label>.jsonl. The place is `workspace` for stages in
the repository itself (`dvc repro`, by hand), the run's id for a run in a folder of its own
(pipelines/workbench/trials.py), the experiment's name for one that DVC runs in a temporary folder. A lock lets a stage
run once at a time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipelines import processes, repository

WORKSPACE = "workspace"
FLUSH_S, POINTS = 0.5, 4000  # seconds between two writes, points that a curve keeps at most
STARTING, RUNNING, WAITING, FINISHED, FAILED = "starting", "running", "waiting", "finished", "failed"
INTERRUPTED, KILLED = "interrupted", "killed"


def home() -> Path:
    """The folder of all runs, ignored by git and DVC."""
    return repository.root() / ".runs"


def place() -> str:
    """Where this process works: `workspace`, or the name of a run or an experiment with a folder of its own."""
    here = Path.cwd().resolve()
    if here.parent == home().resolve():
        return here.name
    return WORKSPACE if here == repository.root().resolve() else os.environ.get("DVC_EXP_NAME", here.name)


def card() -> dict[str, Any]:
    """What run this process is a part of: the run.json of a run with a folder of its own; empty for the others."""
    file = Path("run.json")
    return json.loads(file.read_text(encoding="utf-8")) if place() != WORKSPACE and file.exists() else {}


def tags() -> dict[str, str]:
    """For MLflow, of a run with overrides: its id, what differs from params.yaml, and what it reads."""
    found = card()
    inputs = {f"dvc.dep.{path}": md5 for path, md5 in found.get("inputs", {}).items()}
    return {"run": place(), "overrides": found["what"], **inputs} if found else {}


def file_of(where: str, label: str) -> Path:
    """The progress file of a stage at a place."""
    return home() / where / "progress" / f"{label}.jsonl"


class Progress:
    """The writer of one progress file. Nothing that goes wrong with the file stops a stage."""

    def __init__(self, file: Path | None) -> None:
        self._file, self._lines, self._latest = file, [], None
        self._flushed, self._done, self._total = 0.0, 0.0, 0.0
        if file:
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.unlink(missing_ok=True)

    def tell(self, **event: Any) -> None:
        """An event that is written at once."""
        self._settle()
        self._lines.append(event | {"at": time.time()})
        self._flush()

    def begin(self, what: str, total: float | None) -> None:
        """Work of `total` parts starts."""
        self._done, self._total = 0.0, total or 0.0
        self.tell(what=what, total=total)

    def advance(self, amount: float, figures: dict[str, Any]) -> None:
        """`amount` more parts are done; figures of a step become a point of the curve."""
        self._done += amount
        self._latest = {"done": self._done, **figures, "at": time.time()}
        if figures and self._done % max(1, self._total // POINTS) < amount:
            self._settle()
        if time.monotonic() - self._flushed > FLUSH_S:
            self._settle()
            self._flush()

    def _settle(self) -> None:
        self._lines += [self._latest] if self._latest else []
        self._latest = None

    def _flush(self) -> None:
        lines, self._lines, self._flushed = self._lines, [], time.monotonic()
        if self._file:
            with suppress(OSError), self._file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


@contextmanager
def stage_progress(label: str, explain: Callable[[BaseException], str]) -> Iterator[Progress]:
    """The progress file of the stage that this process runs, from its start to how it ended; alone with its stage.

    explain: the sentence for an error. Of the processes that torchrun starts only the first writes.
    """
    if os.environ.get("RANK", "0") != "0":
        yield Progress(None)
        return
    progress = Progress(file_of(place(), label))
    progress.tell(stage=label, process=processes.identity(), status=RUNNING)
    try:
        with alone(label, progress):
            yield progress
    except KeyboardInterrupt:
        progress.tell(status=INTERRUPTED, message="interrupted")
        raise
    except BaseException as error:
        progress.tell(status=FAILED, message=explain(error))
        raise
    progress.tell(status=FINISHED)


@contextmanager
def alone(label: str, progress: Progress) -> Iterator[None]:
    """One process at a time in a stage; the second says whom it waits for. A lock dies with its process."""
    shared = place() == WORKSPACE or (home() / place() / "run.json").exists()
    folder = home() if shared else home() / place()
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / f"{label}.lock"), folder / f"{label}.holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"waits for {_holder(holder)}"
        progress.tell(status=WAITING, message=message)
        text = f"{label:<10} {message}, which runs this stage; it starts when that ends, Ctrl-C gives up"
        print(text, file=sys.stderr, flush=True)
        lock.acquire()
        progress.tell(status=RUNNING)
    try:
        holder.write_text(json.dumps({"process": processes.identity(), "place": place(), "since": time.time()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(file: Path) -> str:
    """`process 4711 (workspace, since 12:30:05)`."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        since = time.strftime("%H:%M:%S", time.localtime(found["since"]))
        return f"process {processes.pid(found['process'])} ({found['place']}, since {since})"
    return "another process"


@dataclass
class Snapshot:
    """A progress file, read: what a stage does or how it ended. Times are seconds since 1970."""

    label: str
    process: str = ""
    status: str = ""
    message: str = ""
    what: str = ""
    started: float = 0.0
    updated: float = 0.0
    total: float = 0.0
    done: float = 0.0
    points: list[dict[str, float]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.status in (STARTING, RUNNING, WAITING)

    @property
    def seconds(self) -> float:
        """How long it runs, or ran."""
        return (time.time() if self.running else self.updated) - self.started

    @property
    def seconds_left(self) -> float | None:
        """By the speed of the last third of what is done; None before there is one."""
        timed = [(point["at"], point["done"]) for point in self.points if not point.get("replayed")]
        if len(timed) < 3 or not self.total:
            return None
        (then, few), (now, many) = timed[len(timed) * 2 // 3 - 1], timed[-1]
        return (self.total - many) * (now - then) / (many - few) if many > few and now > then else None


def read(file: Path) -> Snapshot | None:
    """The snapshot of a progress file, None where there is none; a process that is gone without a word was killed."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = Snapshot(file.stem)
    for line in lines:
        with suppress(ValueError):  # the last line may be half written
            _take(found, json.loads(line))
    if found.running and not processes.is_alive(found.process):
        began = found.status != STARTING
        found.status, found.message = (KILLED, "its process is gone") if began else (FAILED, "it did not start")
    return found if found.process else None


def _take(found: Snapshot, event: dict[str, Any]) -> None:
    found.updated = event["at"]
    match event:
        case {"process": process}:
            found.process, found.status, found.started = process, event["status"], event["at"]
        case {"status": status}:
            found.status, found.message = status, event.get("message", "")
        case {"what": what}:
            found.what, found.total, found.done, found.points = what, event["total"] or 0.0, 0.0, []
        case {"done": done}:
            found.done = done
            found.points.append(event)


def busy(running: Snapshot) -> str:
    """The sentence for a person who wants to start what runs in the workspace."""
    since = time.strftime("%H:%M", time.localtime(running.started))
    who = f"process {processes.pid(running.process)}, since {since}"
    return f"{running.label} runs here already ({who}); `shovel watch` shows it."


def snapshots(where: str) -> list[Snapshot]:
    """All of a place, the one that was last heard of at the end."""
    found = [read(file) for file in (home() / where / "progress").glob("*.jsonl")]
    return sorted((one for one in found if one), key=lambda one: (one.running, one.updated))
