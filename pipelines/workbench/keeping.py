"""Keeping a run: its overrides go into params.yaml, its outputs become what `dvc repro` would have made.

Nothing is trained again as long as data and code are those that the run had; where they are not, params.yaml is written
all the same, and the answer says what `dvc repro` has to do and why.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipelines import live, repository, stage, tracking
from pipelines.params import UserError, read_yaml
from pipelines.workbench import graph, overrides
from pipelines.workbench.graph import Stage
from pipelines.workbench.overrides import Overrides
from pipelines.workbench.runs import Run

PARAMS = Path("params.yaml")


@dataclass(frozen=True)
class Kept:
    """What keeping a run did. written: overrides now in params.yaml; in_place: stages whose results are there now;
    again: stages that `dvc repro` has to run, with the reason."""

    run: str
    written: Overrides
    in_place: list[str]
    again: dict[str, str]

    def __repr__(self) -> str:
        lines = [f"params.yaml now has {overrides.in_words(self.written)}"] if self.written else []
        lines += [f"{', '.join(self.in_place)}: the results of {self.run} are in place"] if self.in_place else []
        lines += [f"{name} has to run again: {why}" for name, why in self.again.items()]
        return "\n".join(lines)


def keep(run: Run) -> Kept:
    """See the module. Raises `UserError` when the run has not finished, or a stage of it runs just now."""
    if run.id == live.WORKSPACE:
        raise UserError("the workspace is kept already: it is what params.yaml says.")
    if run.status != live.FINISHED:
        raise UserError(f"{run.id} is {run.status}{f' ({run.message})' if run.message else ''}; keep a finished run.")
    known = graph.states()
    mine = [known[name] for name in run.stages if name in known]
    if busy := [one.name for one in mine if one.state in (live.RUNNING, live.WAITING)]:
        raise UserError(f"{' and '.join(busy)} runs in the repository now; keep {run.id} when that has ended.")
    text = overrides.apply(run.overrides, PARAMS)
    overrides.check(run.overrides, PARAMS)
    with stage.replacing(PARAMS) as fresh:
        fresh.write_text(text, encoding="utf-8")
    again = _changed_since(run, mine)
    in_place = [one for one in mine if one.name not in again]
    for one in in_place:
        _put(run.folder, one)
    graph.commit([one.name for one in in_place])
    _tag(run)
    return Kept(run.id, run.overrides, [one.name for one in in_place], again)


def _changed_since(run: Run, mine: list[Stage]) -> dict[str, str]:
    """Stages for which the run's results would not be those of `dvc repro` now, and why."""
    now = graph.input_digests(one.name for one in mine)
    changed = {path for path, md5 in run.inputs.items() if now.get(path) != md5}
    then, today = read_yaml(run.folder / "params.yaml"), read_yaml(PARAMS)
    again: dict[str, str] = {}
    for one in mine:
        reasons = [f"{path} changed since the run began" for path in one.deps if path in changed]
        reasons += [f"`{key}` of params.yaml was edited since" for key in one.keys if _at(then, key) != _at(today, key)]
        made = {out: other.name for other in mine if other.name in again for out in other.outs}
        reasons += [f"{made[path]} runs before it" for path in one.deps if path in made]
        if reasons:
            again[one.name] = ", ".join(reasons)
    return again


def _at(content: object, key: str) -> object:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _put(folder: Path, one: Stage) -> None:
    """The run's outputs of a stage, in place of the workspace's."""
    for out in one.outs:
        source = folder / out
        with stage.replacing(repository.root() / out) as fresh:
            shutil.copytree(source, fresh) if source.is_dir() else shutil.copyfile(source, fresh)


def _tag(run: Run) -> None:
    """The runs in MLflow say that they were kept; without a server they do not."""
    try:
        client = tracking.connect()
    except UserError:
        return
    for run_id in run.mlflow_ids.values():
        if found := tracking.find_run(client, run_id):
            client.set_tag(found.info.run_id, "kept", "true")
