"""The model that a person names: of the registry, of the repository, of a run, or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import digests, live, register, repository, stage
from pipelines.params import UserError, load_params
from pipelines.trust import verify
from pipelines.workbench import runs
from pipelines.workbench.assistant import Model
from pipelines.workbench.runs import Run

if TYPE_CHECKING:
    from pipelines.tracking import ModelVersion

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
        return Model(_of_version(register.version(params.register_, word)), "export")
    if Path(word).is_dir():
        if not (Path(word) / "config.json").exists():
            raise UserError(f"{word} holds no model: it has no config.json; name a folder like {MODELS / 'base'}.")
        return Model(Path(word), "pretrain")
    if (live.home() / word / "run.json").exists():
        return _of_run(Run(word))
    names = [*MADE_BY, register.CHAMPION, register.CHALLENGER, *(run.id for run in runs.every()[:3])]
    raise UserError(f"{word!r} names no model; choose for example one of {', '.join(names)}, or a folder.")


def _of_version(version: ModelVersion) -> Path:
    """A folder with its bytes: the working tree's where it holds them, else a copy out of DVC's cache."""
    release, digest = MODELS / "release", version.tags.get("digest", "")
    if (release / "config.json").exists() and digests.of_folder(release) == digest:
        return release
    copy = live.home() / "models" / digest[:16]
    if not copy.exists():
        with stage.replacing(copy) as fresh:
            verify.bytes_of(version, copy, fresh)
    return copy


def _of_run(run: Run) -> Model:
    """The last model that the run itself made."""
    for name in reversed(MADE_BY):
        folder = run.folder / MODELS / name
        if (folder / "config.json").exists() and (run.id == live.WORKSPACE or not folder.is_symlink()):
            return Model(folder.relative_to(repository.root()), MADE_BY[name])
    raise UserError(f"{run.id} has made no model ({run.status}); one of a stage that trains has.")
