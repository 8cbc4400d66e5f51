"""What the shell completes: presets, stages, runs. Called at every Tab, so nothing heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.commands import PRESETS


def presets(incomplete: str) -> list[str]:
    """Names of the scales in pipelines/presets."""
    return _starting(incomplete, (file.stem for file in sorted(PRESETS.glob("*.yaml"))))


def stages(incomplete: str) -> list[str]:
    """Names of the stages in dvc.yaml."""
    text = Path("dvc.yaml").read_text(encoding="utf-8") if Path("dvc.yaml").exists() else ""
    return _starting(incomplete, re.findall(r"^  (\w+):", text.partition("\nplots:")[0], re.MULTILINE))


def runs(incomplete: str) -> list[str]:
    """Ids of the runs below .runs."""
    return _starting(incomplete, (file.parent.name for file in sorted(Path(".runs").glob("*/run.json"))))


def _starting(incomplete: str, names: object) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
