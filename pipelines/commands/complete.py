"""What the shell completes: presets, stages, runs. Called at every Tab, so nothing heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.commands import PRESETS

ALIASES = ("champion", "challenger", "previous")


def presets(incomplete: str) -> list[str]:
    """Names of the scales in pipelines/presets."""
    return _starting(incomplete, (file.stem for file in sorted(PRESETS.glob("*.yaml"))))


def stages(incomplete: str) -> list[str]:
    """Names of the stages in dvc.yaml: `evaluate` and, of each of its variants, `evaluate@chat`."""
    text = Path("dvc.yaml").read_text(encoding="utf-8") if Path("dvc.yaml").exists() else ""
    names = []
    for name, body in re.findall(r"^  (\w+):(.*?)(?=^\S|^  \w|\Z)", text.partition("\nplots:")[0], re.M | re.S):
        matrix = re.search(r"^    matrix:\n +\w+: \[(.*)\]$", body, re.M)
        names += [name, *(f"{name}@{variant}" for variant in (matrix[1].split(", ") if matrix else []))]
    return _starting(incomplete, names)


def runs(incomplete: str) -> list[str]:
    """Ids of the runs below .runs."""
    return _starting(incomplete, (file.parent.name for file in sorted(Path(".runs").glob("*/run.json"))))


def models(incomplete: str) -> list[str]:
    """What a model can be named by, numbers of versions and folders aside."""
    return _starting(incomplete, (*ALIASES, "base", "chat", "release", *runs("")))


def states(incomplete: str) -> list[str]:
    """What can be compared, revisions, experiments and numbers of versions aside."""
    return _starting(incomplete, ("workspace", *ALIASES, *runs("")))


def _starting(incomplete: str, names: object) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
