"""The model that a person names: of the registry, of the repository, of a run, or a folder."""

from __future__ import annotations

from pathlib import Path

from pipelines import live, register, repository
from pipelines.params import UserError, load_params
from pipelines.workbench import runs
from pipelines.workbench.assistant import Model
from pipelines.workbench.runs import Run

MODELS = Path("data/models")
MADE_BY = {"base": "pretrain", "chat": "finetune", "release": "export"}


def model(which: Run | str | int | Path) -> Model:
    """See `project.model`."""
    if isinstance(which, Run):
        return _of_run(which)
    word = str(which)
    if word in MADE_BY:
        return Model(MODELS / word, MADE_BY[word])
    if word.isdigit() or word in (register.CHAMPION, register.CHALLENGER, register.PREVIOUS):
        params = load_params()
        return Model(register.folder_of(register.version(params.register_, word), MODELS / "release"), "export")
    if Path(word).is_dir():
        return Model(Path(word), "pretrain")
    if (live.home() / word / "run.json").exists():
        return _of_run(Run(word))
    names = [*MADE_BY, register.CHAMPION, register.CHALLENGER, *(run.id for run in runs.every()[:3])]
    raise UserError(f"{word!r} names no model; choose for example one of {', '.join(names)}, or a folder.")


def _of_run(run: Run) -> Model:
    """The last model that the run itself made."""
    for name in reversed(MADE_BY):
        folder = run.folder / MODELS / name
        if (folder / "config.json").exists() and (run.id == live.WORKSPACE or not folder.is_symlink()):
            return Model(folder.relative_to(repository.root()), MADE_BY[name])
    raise UserError(f"{run.id} has made no model ({run.status}); one of a stage that trains has.")
