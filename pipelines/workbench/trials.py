"""Runs with parameters of their own, in folders of their own, by processes of their own: params.yaml stays as it is.

    python -m pipelines.workbench.trials FOLDER   runs what FOLDER/run.json lists; started by `launch`

A folder .runs/<id> looks like the repository to a stage: its params.yaml has the overrides, what it reads is linked,
what it writes stays there. The process has its own session, so neither a closed notebook nor a terminal ends it. `keep`
makes a run the result that `dvc repro` would have made.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from pipelines import live, processes, repository
from pipelines.params import UserError
from pipelines.workbench import graph, overrides
from pipelines.workbench.graph import Stage
from pipelines.workbench.overrides import Overrides

CODE = Path(__file__).parents[2]
HEAVY = ("data/", "reports/")  # what is linked; code is imported from where it is


def plan(targets: Sequence[Stage], upto: bool, changes: Overrides, known: dict[str, Stage]) -> list[Stage]:
    """The stages that a run has to execute; raises `UserError` when it cannot.

    upto: with what comes before the targets, as far as it is stale, changed by an override, or follows such a stage.
    """
    chosen = {stage.name for stage in targets}
    if upto:
        for stage in graph.before(chosen, known):
            again = stage.state != graph.FRESH or _reads(stage, changes)
            if again or any(maker.name in chosen for maker in graph.makers(stage, known)):
                chosen.add(stage.name)
    found = [stage for name, stage in known.items() if name in chosen]
    _require_read(found, targets, changes, known)
    _require_inputs(found, targets, known)
    return found


def _reads(stage: Stage, changes: Overrides) -> bool:
    return any(_covers(key, changed) for key in stage.keys for changed in overrides.keys(changes))


def _covers(key: str, changed: str) -> bool:
    return changed == key or changed.startswith(f"{key}.")


def _require_read(found: list[Stage], targets: Sequence[Stage], changes: Overrides, known: dict[str, Stage]) -> None:
    """Each override must mean something to a stage that runs."""
    for changed in overrides.keys(changes):
        if any(_covers(key, changed) for stage in found for key in stage.keys):
            continue
        readers = [s.name for s in known.values() if any(_covers(key, changed) for key in s.keys)]
        where = f"it is for {' and '.join(readers)}" if readers else "no stage reads it"
        ahead = {stage.name for stage in graph.before([stage.name for stage in targets], known)} & set(readers)
        fix = "; add upto=True to run that first" if ahead else ""
        raise UserError(f"`{changed}` changes nothing in {' and '.join(s.name for s in found)}: {where}{fix}.")


def _require_inputs(found: list[Stage], targets: Sequence[Stage], known: dict[str, Stage]) -> None:
    made = {out for stage in found for out in stage.outs}
    for stage in found:
        for path in stage.deps:
            if path not in made and not (repository.root() / path).exists():
                maker = next((other for other in known.values() if path in other.outs), None)
                if maker is None:
                    raise UserError(f"{path}, which {stage.name} reads, is missing; bring it back with git.")
                raise UserError(
                    f"{path}, which {stage.name} reads, is missing; the stage {maker.name} makes it: "
                    f"project.run({targets[0].name!r}, upto=True) or `shovel run {targets[0].name}` runs it first."
                )


def create(target: str, found: list[Stage], changes: Overrides, known: dict[str, Stage]) -> str:
    """A new folder below .runs for these stages; returns the run's id."""
    overrides.check(changes, repository.root() / "params.yaml")
    made = {out for stage in found for out in stage.outs}
    outside = [path for stage in found for path in stage.deps if path not in made]
    inputs = {path: md5 for path, md5 in graph.input_digests(s.name for s in found).items() if path in outside}
    folder = _new_folder(target.replace("@", "-"))
    text = overrides.apply(changes, repository.root() / "params.yaml")
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    others = [out for stage in known.values() for out in stage.outs if out not in made]
    for path in dict.fromkeys([*others, *outside, "dvc.yaml", "dvc.lock", "reports/passport.json"]):
        _link(path, folder)
    for path in made:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    commands = [[sys.executable, "-m", *stage.command] for stage in found]
    names = [stage.name for stage in found]
    what = overrides.in_words(changes)
    _write_card(folder, commands=commands, cwd=str(folder), stages=names, overrides=changes, what=what, inputs=inputs)
    return folder.name


def in_workspace(targets: Sequence[str], single: bool) -> str:
    """Prepare a run of `dvc repro` in the repository itself; returns its id, `workspace`."""
    folder = live.home() / live.WORKSPACE
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dvc", "repro", *(["--single-item"] if single else []), *targets]
    _write_card(folder, commands=[command], cwd=str(repository.root()), stages=list(targets), overrides={}, inputs={})
    return live.WORKSPACE


def _new_folder(name: str) -> Path:
    stem = f"{name}-{time.strftime('%m%d-%H%M%S')}"
    for number in range(1, 1000):
        folder = live.home() / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("a thousand runs in a second")


def _link(path: str, folder: Path) -> None:
    source = repository.root() / path
    if source.exists() and (path.startswith(HEAVY) or path.startswith("dvc.")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(source.resolve())


def _write_card(folder: Path, **content: Any) -> None:
    card = {"created": time.time(), **content}
    (folder / "run.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


def launch(run_id: str) -> None:
    """Start the process of a prepared run; it outlives this one. Its words go to output.log in the folder."""
    folder = live.home() / run_id
    paths = [str(CODE), str(CODE / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = folder / "run.jsonl"
    told.unlink(missing_ok=True)
    with (folder / "output.log").open("wb") as log, told.open("w", encoding="utf-8") as first:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.workbench.trials", str(folder)],
            cwd=repository.root(),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TTY_COMPATIBLE": "0"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        # the process replaces the file when it speaks itself: then this line, of the old one, is seen by nobody
        who = processes.identity(psutil.Process(process.pid))
        first.write(json.dumps({"stage": "run", "process": who, "status": live.STARTING, "at": time.time()}) + "\n")
    threading.Thread(target=process.wait, daemon=True).start()  # no zombie stays when it ends before this process


def main(folder: Path) -> int:
    """Execute the commands of a run one after the other; returns the exit code of the first that fails, or 0."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the stage gets it too, and puts things back
    card = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    progress = live.Progress(folder / "run.jsonl")
    progress.tell(stage="run", process=processes.identity(), status=live.RUNNING)
    for command in card["commands"]:
        code = subprocess.Popen(command, cwd=card["cwd"]).wait()
        if code:
            last = next((one for one in reversed(live.snapshots(folder.name)) if one.status != live.FINISHED), None)
            ended = last.status if last else live.FAILED
            progress.tell(status=ended, message=last.message if last else f"{command[2]} ended with {code}")
            return code
    progress.tell(status=live.FINISHED)
    return 0


def stop(process: str) -> None:
    """Ask a run's process and its stage to end; they keep checkpoints and put outputs back."""
    os.killpg(processes.pid(process), signal.SIGINT)


def interrupt(process: str) -> None:
    """The same for a stage that somebody else started, in a terminal for example."""
    os.kill(processes.pid(process), signal.SIGINT)


def remove(run_id: str) -> None:
    """Delete the folder of a run."""
    shutil.rmtree(live.home() / run_id)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
