"""Two models side by side for the person who decides: figures with intervals, samples, settings, data.

The other model's figures come from its evidence (pipelines/trust/evidence.py), so a champion that somebody else trained
can be compared too.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines import lineage, paired, register, stage, tracking
from pipelines.params import Register, read_yaml
from pipelines.trust import evidence

VARIANTS = ("base", "chat")


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
    found = rows.get("bits per byte, chat")
    return {"paired": asdict(found) | {"verdict": found.verdict, "version": comparison["version"]}} if found else {}


def _report(folder: Path, variant: str) -> dict[str, Any]:
    return stage.read_json(folder / f"evaluate-{variant}.json", made_by="evaluate")


def _figures(mine: dict[str, Any], other: dict[str, Any], ours: Path, theirs: Path) -> list[dict[str, Any]]:
    """Rows of (name, our figure, theirs, difference); intervals where there are some."""
    rows = []
    for name in VARIANTS:
        a, b = mine[name], other[name]
        found = paired.difference(paired.documents(ours / "plots", name), paired.documents(theirs, name))
        rows.append(_row(f"bits per byte, {name}", a, b, "bits_per_byte", "ci95") | {"paired": found})
    a, b = mine["chat"], other["chat"]
    if a["assistant_tokens"] and b["assistant_tokens"]:
        rows.append(_row("perplexity of answers", a, b, "assistant_perplexity", "assistant_ci95"))
    rows.append(_row("busiest expert over an equal share", a, b, "max_load_over_mean", ""))
    return rows


def _row(name: str, ours: dict[str, Any], theirs: dict[str, Any], key: str, ends: str) -> dict[str, Any]:
    row = {"name": name, "ours": ours[key], "theirs": theirs[key], "paired": None, "digits": 1 if ours[key] > 10 else 3}
    return row | {"ours_ci": ours.get(ends), "theirs_ci": theirs.get(ends)}


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
