"""The stages of dvc.yaml as DVC sees them: what each reads and writes, whether it is fresh, and why not.

DVC's own classes are asked, not its command: `dvc status` refuses while a stage runs, and knows nothing of the stages
that come after a stale one.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines import live, repository
from pipelines.params import UserError

FRESH, STALE = "fresh", "stale"
NEVER, MISSING, UNCACHED = "never run", "is missing", "is not in DVC's cache"


@dataclass(frozen=True)
class Stage:
    """name: DVC's, as `evaluate@chat`; deps and outs: paths; keys: of params.yaml; why: what makes it stale."""

    name: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    keys: tuple[str, ...]
    state: str = FRESH
    why: str = ""
    follows: bool = False  # stale only because a stage before it is

    @property
    def label(self) -> str:
        """The name of its reports and runs: `evaluate-chat`."""
        return self.name.replace("@", "-")

    @property
    def section(self) -> str:
        """Its part of params.yaml, which may not exist."""
        return self.name.partition("@")[0]

    @property
    def lacks_files(self) -> bool:
        """Whether it is stale only because files that dvc.lock names are not here."""
        return all(reason.endswith((MISSING, UNCACHED)) for reason in self.why.split(", "))

    @property
    def command(self) -> list[str]:
        """Words after `python -m`."""
        section, _, variant = self.name.partition("@")
        return [f"pipelines.{section}", *([variant] if variant else [])]

    @property
    def report(self) -> Path:
        """Where its metrics are."""
        return Path("reports") / f"{self.label}.json"


def all_stages() -> dict[str, Stage]:
    """All stages in an order in which they can run, without their states."""
    with _repo() as repo:
        return _ordered([_described(stage) for stage in _stages(repo)])


def states() -> dict[str, Stage]:
    """All stages in an order in which they can run, each with its state and, when it is not fresh, the reason."""
    repository.require_readable()
    with _repo() as repo:
        known = _ordered([_described(stage) for stage in _stages(repo)])
        changed = {stage.addressing: _changes(stage) for stage in _stages(repo)}
    found: dict[str, Stage] = {}
    for name, stage in known.items():
        stale = [maker.name for maker in makers(stage, known) if found[maker.name].state != FRESH]
        why = changed[name] or (f"{' and '.join(stale)} will run before it" if stale else "")
        found[name] = replace(stage, state=STALE if why else FRESH, why=why, follows=not changed[name])
    return {name: _with_progress(stage) for name, stage in found.items()}


def _ordered(found: list[Stage]) -> dict[str, Stage]:
    """As dvc.yaml has them, but none before what it reads."""
    ordered: dict[str, Stage] = {}
    while len(ordered) < len(found):
        unmade = {out for stage in found if stage.name not in ordered for out in stage.outs}
        ready = (stage for stage in found if stage.name not in ordered and not unmade & set(stage.deps))
        first = next(ready)
        ordered[first.name] = first
    return ordered


def _with_progress(stage: Stage) -> Stage:
    """Running, or how the last attempt in the workspace ended where that was no success."""
    last = live.read(live.file_of(live.WORKSPACE, stage.label))
    if last is None or (stage.state == FRESH and not last.running) or last.status == live.FINISHED:
        return stage
    return replace(stage, state=last.status, why=last.message or stage.why)


def makers(stage: Stage, known: dict[str, Stage]) -> list[Stage]:
    """The stages that write what `stage` reads."""
    return [other for other in known.values() if set(other.outs) & set(stage.deps)]


def before(names: Iterable[str], known: dict[str, Stage]) -> list[Stage]:
    """The stages `names` and everything that they come from, in an order in which they can run."""
    wanted = set(names)
    for name in reversed(known):
        if name in wanted:
            wanted |= {maker.name for maker in makers(known[name], known)}
    return [stage for name, stage in known.items() if name in wanted]


def named(word: str, known: dict[str, Stage]) -> list[Stage]:
    """The stages that a person means: `pretrain`, `evaluate@chat`, or `evaluate` for both. Raises `UserError`."""
    found = [stage for stage in known.values() if word in (stage.name, stage.label, stage.section)]
    if not found:
        raise UserError(f"no stage is called {word!r}; choose one of {', '.join(known)}.")
    return found


def input_digests(names: Iterable[str]) -> dict[str, str]:
    """What DVC knows the dependencies of these stages by, now: path -> md5; empty where one does not exist."""
    wanted = set(names)
    with _repo() as repo:
        deps = [dep for stage in _stages(repo) if stage.addressing in wanted for dep in _files(stage)]
        return {dep.def_path: dep.get_hash().value if dep.exists else "" for dep in deps}


def commit(names: Iterable[str]) -> None:
    """`dvc commit`: what the working tree holds becomes the recorded result of these stages, in DVC's caches too."""
    from dvc.lock import LockError

    try:
        with _repo() as repo, redirect_stdout(io.StringIO()):  # DVC tells of every write of dvc.lock
            for name in names:
                repo.commit(target=name, force=True)
    except LockError as error:
        raise UserError(f"DVC is busy in this repository ({str(error).splitlines()[0]}); try again later.") from None


def _repo() -> Any:
    from dvc.exceptions import DvcException  # half a second of import
    from dvc.repo import Repo
    from dvc.scm import SCMError

    logging.getLogger("dvc").setLevel(logging.WARNING)
    try:
        repo = Repo(str(repository.root()))
        list(repo.index.stages)  # reads dvc.yaml and dvc.lock
        return repo
    except SCMError:
        raise UserError("DVC needs a git repository here; `git init` makes one of a downloaded archive.") from None
    except DvcException as error:
        repository.stages()  # the sentence for a dvc.lock that cannot be read
        raise UserError(f"DVC cannot read this repository ({error}); mend that first.") from None


def _stages(repo: Any) -> list[Any]:
    """Those of dvc.yaml at the root."""
    return [stage for stage in repo.index.stages if stage.path_in_repo == "dvc.yaml"]


def _files(stage: Any) -> list[Any]:
    from dvc.dependency.param import ParamsDependency

    return [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]


def _described(stage: Any) -> Stage:
    keys = [key for dep in stage.deps for key in getattr(dep, "params", [])]
    deps, outs = tuple(dep.def_path for dep in _files(stage)), tuple(out.def_path for out in stage.outs)
    return Stage(stage.addressing, deps, outs, tuple(keys))


def _changes(stage: Any) -> str:
    """In words, why DVC would run this stage; the empty string when it would not."""
    reasons = []
    for dep in stage.deps:
        if hasattr(dep, "read_params"):
            reasons += _differences("", dep.hash_info.value or {}, dep.read_params()) if dep.status() else []
        else:
            reasons += [_in_words(path, how) for path, how in dep.status().items()]
    new = not any(dep.hash_info for dep in stage.deps)
    outs = [_in_words(path, how) for out in stage.outs for path, how in out.status().items()]
    reasons = [NEVER] if new else [*reasons, *outs, *(["its command changed"] if stage.changed_stage() else [])]
    return ", ".join(dict.fromkeys(reasons))


def _differences(prefix: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`pretrain.learning_rate 0.005 -> 0.003` of each parameter that differs."""
    words = []
    for key in (key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)):
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            words += _differences(f"{prefix}{key}.", old[key], new[key])
        else:
            words.append(f"{prefix}{key} {old.get(key)} -> {new.get(key)}")
    return words


def _in_words(path: str, how: str) -> str:
    words = {"modified": "changed", "new": "is new", "deleted": MISSING, "not in cache": UNCACHED}
    return f"{path} {words.get(how, how)}"
