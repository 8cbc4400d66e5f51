"""Starting a run, watching it, and all runs in one table: what the notebook surface and the commands share."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipelines import live, stage
from pipelines.params import UserError
from pipelines.workbench import display, graph, overrides, trials
from pipelines.workbench import runs as all_runs
from pipelines.workbench.graph import Stage
from pipelines.workbench.overrides import Overrides
from pipelines.workbench.runs import Run

if TYPE_CHECKING:
    import pandas as pd


def run(word: str, upto: bool, keywords: Mapping[str, Any], wait: bool) -> Run:
    """See `project.run`."""
    known = graph.states()
    targets = graph.named(word, known)
    changes = overrides.of_keywords(targets[0].section, keywords)
    return start(word, targets, upto, changes, known, wait)


def run_words(word: str, settings: list[str]) -> Run:
    """As `run` up to the stage `word`, overrides as `key=value`."""
    known = graph.states()
    targets = graph.named(word, known)
    return start(word, targets, True, overrides.of_words(targets[0].section, settings), known, wait=True)


def start(word: str, targets: list[Stage], upto: bool, changes: Overrides, known: dict[str, Stage], wait: bool) -> Run:
    """Prepare a run, start its process, and follow it where that is wanted."""
    found = trials.plan(targets, upto, changes, known)
    if changes:
        run_id = trials.create(word, found, changes, known)
    else:
        run_id = trials.in_workspace([target.name for target in targets], single=not upto)
    trials.launch(run_id)
    return follow(Run(run_id)) if wait else Run(run_id)


def follow(run: Run) -> Run:
    """Show a run that this cell or command started; an interrupt ends it. Raises `UserError` when it fails."""
    try:
        display.watch(run)
    except KeyboardInterrupt:
        run.stop()
        display.show(run)
        return run
    if run.status in (live.FAILED, live.KILLED):
        raise UserError(f"{run.id} {run.status}: {run.message or 'see project.attach(...).log'}")
    for line in dict.fromkeys(line for line in run.log.splitlines() if line.startswith("tracking ")):
        stage.say(line)  # MLflow did not answer
    return run


def look(run: Run) -> Run:
    """Show a run that may be somebody else's; an interrupt ends only the showing. Raises `UserError`."""
    if run.id == live.WORKSPACE and run.status == "created":
        raise UserError("nothing has run here yet; `shovel run` starts the stages.")
    with suppress(KeyboardInterrupt):
        display.watch(run)
    return run


def current() -> Run:
    """What runs now: in the repository, else the newest run with a folder of its own. Raises `UserError`."""
    running = [run for run in [Run(live.WORKSPACE), *all_runs.every()] if run.running]
    if not running:
        raise UserError("nothing runs here now; `shovel runs` lists what ran.")
    return running[0]


def table() -> pd.DataFrame:
    """See `project.runs`."""
    import pandas as pd

    rows = {run.id: _row(run) for run in all_runs.every()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def _row(run: Run) -> dict[str, Any]:
    shown = re.compile(r"[^/]+/(loss_last|bits_per_byte)")
    losses = {key: value for key, value in run.metrics.items() if shown.fullmatch(key)}
    return {
        "status": run.status,
        "stages": ", ".join(run.stages),
        "overrides": overrides.in_words(run.overrides),
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created)),
        **losses,
    }
