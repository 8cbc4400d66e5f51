"""The state of the repository in one screen: stages, the last figures, versions, what runs, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import digests, live, register, repository, stage, tracking
from pipelines.params import Params, UserError, load_params
from pipelines.workbench import graph, runs
from pipelines.workbench.graph import Stage

RELEASE, REPORTS = Path("data/models/release"), Path("reports")
FIGURES = {
    "pretraining loss": ("pretrain", "loss_last"),
    "fine-tuning loss": ("finetune", "loss_last"),
    "bits per held-out byte, base": ("evaluate-base", "bits_per_byte"),
    "bits per held-out byte, chat": ("evaluate-chat", "bits_per_byte"),
    "the same bytes by xz": ("baselines", "xz"),
    "the same bytes by a 5-gram model": ("baselines", "five_gram"),
}


@dataclass
class Overview:
    """summary: the state in one sentence; command and why: what to do next."""

    summary: str
    command: str
    why: str
    stages: dict[str, Stage]
    figures: dict[str, float]
    versions: dict[str, dict[str, Any]]
    running: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For scripts; the keys stay."""
        return {
            "summary": self.summary,
            "next": {"command": self.command, "why": self.why},
            "stages": {stage.name: {"state": stage.state, "why": stage.why} for stage in self.stages.values()},
            "figures": self.figures,
            "versions": self.versions,
            "running": self.running,
            "notes": self.notes,
        }


def overview() -> Overview:
    """Look at everything; raises `UserError` where params.yaml is wrong, which is then what to mend first."""
    params = load_params()
    stages, notes = graph.states(), []
    try:
        versions = register.status(params.register_) if _has_registry() else {}
    except UserError as error:
        versions, notes = {}, [str(error)]
    running = [run.id for run in runs.every() if run.running]
    loose = repository.uncommitted()
    if loose:
        notes.append(f"{len(loose)} files are not committed: {', '.join(loose[:3])}{', ...' if loose[3:] else ''}")
    return Overview(*_next(params, stages, versions), stages, _figures(), versions, running, notes)


def _has_registry() -> bool:
    """A local database that nobody has made yet holds nothing; asking would make it."""
    return not tracking.is_local() or not tracking.uri().startswith("sqlite") or Path(tracking.uri()[10:]).exists()


def _figures() -> dict[str, float]:
    found = {}
    for title, (label, key) in FIGURES.items():
        file = REPORTS / f"{label}.json"
        if file.exists() and (value := stage.read_json(file, made_by=label).get(key)) is not None:
            found[title] = value
    return found


def _next(params: Params, stages: dict[str, Stage], versions: dict[str, Any]) -> tuple[str, str, str]:
    """(the state in one sentence, the command to run now, why)."""
    by = {state: [s for s in stages.values() if s.state == state] for state in {s.state for s in stages.values()}}
    if busy := by.get(live.RUNNING, []) + by.get(live.WAITING, []):
        return f"{_names(busy)} is running.", "shovel watch", "shows how far it is"
    if failed := by.get(live.FAILED):
        return f"{failed[0].name} failed: {failed[0].why}", "shovel run", "once that is mended"
    if broken := by.get(live.INTERRUPTED, []) + by.get(live.KILLED, []):
        return f"{_names(broken)} did not end: {broken[0].why}.", "shovel run", "continues from the last checkpoint"
    stale = by.get(graph.STALE, [])
    if all(stage.why == graph.NEVER for stage in stages.values()):
        return "Nothing has run here yet.", "shovel demo", "raw text to a promoted model, about ten minutes"
    if stale:
        root = next(stage for stage in stale if not stage.follows)
        summary = f"{root.name} is stale: {root.why}."
        if root.lacks_files and repository.has_remote():
            return summary, "dvc pull", "brings what dvc.lock names; `shovel run` would make it again"
        return summary, "shovel run", f"runs {_names(stale)}"
    return _of_release(params, versions)


def _names(stages: list[Stage]) -> str:
    names = [stage.name for stage in stages]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _of_release(params: Params, versions: dict[str, Any]) -> tuple[str, str, str]:
    """What to do where everything is fresh: propose, review, promote, or use it."""
    name, digest = params.register_.name, digests.of_folder(RELEASE)
    role = next((alias for alias, entry in versions.items() if entry["digest"] == digest), None)
    if role == register.CHAMPION:
        return f"Everything is fresh; this is the champion of {name}.", "shovel chat", "talks to it"
    if role == register.CHALLENGER:
        version = versions[role]["version"]
        return f"Everything is fresh; version {version} waits as challenger.", "shovel review", "then shovel promote"
    if repository.uncommitted_sources():
        return "Everything is fresh, but not committed.", "git add -A && git commit", "then shovel propose"
    return "Everything is fresh; this model is no version yet.", "shovel propose", "registers it as challenger"
