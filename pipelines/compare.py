"""Two models side by side for the person who decides: figures with intervals, samples, settings, data.

The other model's figures come from its evidence (pipelines/trust/evidence.py), so a champion that somebody else trained
can be compared too. Where both scored the same held-out documents the difference is taken document by document: what
makes a document hard is then the same for both, and a much smaller difference shows.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import lineage, register, stage, tracking
from pipelines.bootstrap import interval
from pipelines.params import Register, read_yaml
from pipelines.trust import evidence

VARIANTS = ("base", "chat")


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs in bits per byte over documents that both have scored, with its 95 % interval."""

    documents: int
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the interval allows to say; lower is better."""
        if self.low == self.high == 0:
            return "the same"
        if self.low <= 0 <= self.high:
            return "no difference that these documents can show"
        return "better" if self.high < 0 else "worse"


def difference(ours: pd.DataFrame, theirs: pd.DataFrame) -> Difference | None:
    """Of two tables with the columns sha256, bytes and nats; None when they share fewer than two documents."""
    both = ours.merge(theirs[["sha256", "nats"]], on="sha256", suffixes=("", "_theirs"))
    if len(both) < 2:
        return None
    parts, sizes = (both["nats"] - both["nats_theirs"]).to_numpy(), both["bytes"].to_numpy()
    low, high = interval(parts, sizes) / math.log(2)
    return Difference(len(both), float(parts.sum() / sizes.sum() / math.log(2)), float(low), float(high))


def with_live(params: Register, reports: Path, digest: str) -> dict[str, Any] | None:
    """The model of `reports`, whose exported folder has `digest`, beside the champion; None when there is none.

    When it is the champion itself, it is compared with the one that it replaced. Raises `UserError` when the other has
    no evidence.
    """
    client = tracking.connect()
    live, previous = (tracking.version_behind(client, params.name, a) for a in (register.CHAMPION, register.PREVIOUS))
    is_live = live is not None and live.tags.get("digest") == digest
    other = previous if is_live else live
    if other is None:
        return None
    with tempfile.TemporaryDirectory() as into:
        content = side_by_side(reports, evidence.find(client, other, reports, Path(into)))
    known = {source["licence"] for source in json.loads(other.tags["lineage"])["sources"]}
    licences = {source["licence"] for source in lineage.sources(lineage.RAW)} - known
    note = f"Version {other.version} is the champion."
    if is_live:
        note = f"This model is the champion, version {live.version}; it replaced version {other.version}."
    return content | {"version": int(other.version), "note": note, "licences": sorted(licences)}


def side_by_side(ours: Path, theirs: Path) -> dict[str, Any]:
    """Everything that the reports of two models allow to compare.

    ours: the folder reports. theirs: the evidence of another version.
    """
    mine = {name: _report(ours, name) for name in VARIANTS}
    other = {name: _report(theirs, name) for name in VARIANTS}
    return {
        "figures": [*_figures(mine, other, ours, theirs)],
        "sources": _sources(mine["base"], other["base"], ours, theirs),
        "languages": _only(mine["base"]["by_language"], other["base"]["by_language"]),
        "samples": [row for name in VARIANTS for row in _samples(mine[name], other[name])],
        "settings": settings(read_yaml(Path("params.yaml")), read_yaml(theirs / "params.yaml")),
        "load": {"ours": mine["chat"]["expert_load"], "theirs": other["chat"]["expert_load"]},
    }


def summary(comparison: dict[str, Any] | None) -> dict[str, Any]:
    """The paired difference of the chat models, for reports/review.json; empty where there is none."""
    rows = {row["name"]: row["paired"] for row in comparison["figures"]} if comparison else {}
    paired = rows.get("bits per byte, chat")
    return {"paired": asdict(paired) | {"verdict": paired.verdict, "version": comparison["version"]}} if paired else {}


def _report(folder: Path, variant: str) -> dict[str, Any]:
    return stage.read_json(folder / f"evaluate-{variant}.json", made_by="evaluate")


def _figures(mine: dict[str, Any], other: dict[str, Any], ours: Path, theirs: Path) -> list[dict[str, Any]]:
    """Rows of (name, our figure, theirs, difference); intervals where there are some."""
    rows = []
    for name in VARIANTS:
        a, b = mine[name], other[name]
        rows.append(
            _row(f"bits per byte, {name}", a, b, "bits_per_byte", "ci95") | {"paired": _paired(ours, theirs, name)}
        )
    a, b = mine["chat"], other["chat"]
    if a["assistant_tokens"] and b["assistant_tokens"]:
        rows.append(_row("perplexity of answers", a, b, "assistant_perplexity", "assistant_ci95"))
    rows.append(_row("busiest expert over an equal share", a, b, "max_load_over_mean", ""))
    return rows


def _row(name: str, ours: dict[str, Any], theirs: dict[str, Any], key: str, ends: str) -> dict[str, Any]:
    row = {"name": name, "ours": ours[key], "theirs": theirs[key], "paired": None, "digits": 1 if ours[key] > 10 else 3}
    return row | {"ours_ci": ours.get(ends), "theirs_ci": theirs.get(ends)}


def _paired(ours: Path, theirs: Path, variant: str) -> Difference | None:
    files = [ours / "plots" / f"documents-{variant}.csv", theirs / f"documents-{variant}.csv"]
    return difference(*map(pd.read_csv, files)) if all(file.exists() for file in files) else None


def _sources(mine: dict[str, Any], other: dict[str, Any], ours: Path, theirs: Path) -> list[dict[str, Any]]:
    """A row a source: what each model has kept of it, and its held-out bits per byte."""
    kept = [stage.read_json(folder / "clean.json", made_by="clean") for folder in (ours, theirs)]
    names = list(dict.fromkeys([*kept[0], *kept[1]]))
    return [
        {
            "name": name,
            "kept": [side[name]["kept"] if name in side else None for side in kept],
            "bytes": [side[name]["bytes"] if name in side else None for side in kept],
            "bits": [report["by_source"].get(name, {}).get("bits_per_byte") for report in (mine, other)],
        }
        for name in names
    ]


def _only(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, list[str]]:
    """Held-out languages that one of the two has alone."""
    return {"ours": sorted(mine.keys() - other.keys()), "theirs": sorted(other.keys() - mine.keys())}


def _samples(mine: dict[str, Any], other: dict[str, Any]) -> list[dict[str, str]]:
    """What both wrote after the same prompt."""
    theirs = {sample["prompt"]: sample["text"] for sample in other["samples"]}
    shared = [sample for sample in mine["samples"] if sample["prompt"] in theirs]
    return [{"prompt": s["prompt"], "ours": s["text"], "theirs": theirs[s["prompt"]]} for s in shared]


def settings(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """Parameters that differ, by their path in params.yaml."""
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += settings(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append({"name": f"{prefix}{key}", "ours": a, "theirs": b})
    return found
