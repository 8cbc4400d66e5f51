"""The commands of `shovel`, by theme; `pipelines/cli.py` names them. Everything heavy is imported inside a command."""

from __future__ import annotations

from pathlib import Path

PARAMS, SOURCES, PRESETS = Path("params.yaml"), Path("data/sources.yaml"), Path(__file__).parents[1] / "presets"
REPORTS, RELEASE = Path("reports"), Path("data/models/release")
