"""One self-contained page on which a person decides whether a model goes live.

    python -m pipelines.review          reports/*.json -> reports/review.html

What it is, gates, metrics beside the champion's, curves, contracts, samples, expert load, lineage, licences, and the
command that makes it again. No network is needed to read it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from model.config import ModelConfig
from pipelines import compare, digests, figures, gates, lineage, models, pages, register, stage, tracking
from pipelines.params import Params, Register, UserError
from pipelines.tracking import Run

RELEASE, REPORTS = Path("data/models/release"), Path("reports")
PAGE = REPORTS / "review.html"
SHOWN_LANGUAGES = 15


def review(params: Params, release: Path, reports: Path, page: Path, run: Run | None = None) -> dict[str, Any]:
    """Write `page`; returns how many gates hold, and the distance to the champion where there is one."""
    content = _reports(reports)
    digest = digests.of_folder(release)
    champion, comparison, note = _champion(params.register_, reports, digest)
    found = gates.of_reports(params, reports, champion)
    facts = lineage.facts(reports)
    config = ModelConfig.from_dict(json.loads((release / "config.json").read_text(encoding="utf-8")))
    pages.write(
        page,
        "review.html.j2",
        name=params.register_.name,
        gates=found,
        champion=champion,
        comparison=comparison,
        champion_note=note,
        model=models.describe(config),
        licences=sorted(Counter(source["licence"] for source in facts["sources"]).items()),
        facts=facts,
        digest=digest,
        figures=_figures(content, reports / "plots"),
        health=_health(content["base"]["health"], content["chat"]["health"]),
        languages=_top_languages(content["base"]["by_language"], content["chat"]["by_language"]),
        command=_command(facts),
        **content,
    )
    if run:
        for file in (page, *sorted((reports / "plots").glob("*.csv"))):
            run.artifact(file, "plots" if file.suffix == ".csv" else "")
    held = sum(gate.passed for gate in found)
    stage.say(f"review     {page}: {held} of {len(found)} gates hold")
    counts = {"gates_passed": held, "gates_total": len(found), "compared_with": champion and champion.version}
    return counts | compare.summary(comparison)


def _reports(reports: Path) -> dict[str, Any]:
    made_by = {"pretrain": "pretrain", "finetune": "finetune", "contracts": "contracts", "export": "export"}
    content = {name: stage.read_json(reports / f"{name}.json", made_by=maker) for name, maker in made_by.items()}
    for variant in ("base", "chat"):
        content[variant] = stage.read_json(reports / f"evaluate-{variant}.json", made_by="evaluate")
    return content


def _champion(params: Register, reports: Path, digest: str) -> tuple[gates.Champion | None, dict[str, Any] | None, str]:
    """(the live version's figures, the comparison with it, or else the reason why there is none)"""
    try:
        client = tracking.connect()
        live = register.measured(client, tracking.version_behind(client, params.name, register.CHAMPION), reports)
    except Exception as error:  # noqa: BLE001  the page must come about without a tracking server
        return None, None, f"the registry could not be asked ({type(error).__name__})"
    if live is None:
        return None, None, "there is no champion yet"
    try:
        return live, _drawn(compare.with_live(params, reports, digest)), "this model is the only one so far"
    except UserError as error:
        return live, None, str(error).rstrip(".")


def _drawn(comparison: dict[str, Any] | None) -> dict[str, Any] | None:
    """With the expert load of both as figures."""
    if comparison is None:
        return None
    captions = {"ours": "This model", "theirs": f"Version {comparison['version']}"}
    drawn = [(pages.inline_svg(figures.load(comparison["load"][side])), text) for side, text in captions.items()]
    return comparison | {"loads": [{"image": image, "caption": f"{text}, chat"} for image, text in drawn]}


HEALTH = {
    "mtp_acceptance": ("Drafts taken", "share of the MTP block's drafts that greedy decoding would take"),
    "indexer_recall": ("Indexer's recall", "share of dense attention on the entries that the indexer chooses"),
    "router_entropy": ("Router entropy", "nats, mean over layers and tokens"),
    "sinkhorn_error": ("Sinkhorn error", "how far a row of a mixing matrix is from a sum of 1, worst"),
}


def _health(base: dict[str, float], chat: dict[str, float]) -> list[dict[str, str]]:
    """Figures of the model's parts, as rows; those that it does not have are left out."""
    return [
        {"name": title, "base": f"{base[name]:.3g}", "chat": f"{chat[name]:.3g}", "what": what}
        for name, (title, what) in HEALTH.items()
        if name in base
    ]


def _command(facts: dict[str, Any]) -> str:
    commit = facts["git"]["commit"]
    return f"git checkout {commit[:12]} && make demo" if commit else "make demo"


def _top_languages(base: dict[str, Any], chat: dict[str, Any]) -> list[dict[str, Any]]:
    """The languages with most held-out text."""
    names = sorted(base, key=lambda name: -base[name]["bytes"])[:SHOWN_LANGUAGES]
    bits = "bits_per_byte"
    return [{"name": n, "bytes": base[n]["bytes"], "base": base[n][bits], "chat": chat[n][bits]} for n in names]


def _figures(content: dict[str, Any], plots: Path) -> list[dict[str, str]]:
    """Curves, bits per byte and expert load, as <img> sources with captions."""
    drawn = [
        (figures.curve(pd.read_csv(plots / f"{name}.csv")), f"Loss of {title}, nats a token") for name, title in CURVES
    ]
    drawn.append((figures.bits(content["base"], content["chat"]), "Bits per held-out byte, by source; lower is better"))
    load = figures.load(content["base"]["expert_load"])
    drawn.append((load, "Tokens that each expert takes, base model; white is even"))
    return [{"image": pages.inline_svg(figure), "caption": caption} for figure, caption in drawn]


CURVES = (("pretrain", "pretraining"), ("finetune", "fine-tuning (assistant's tokens)"))


if __name__ == "__main__":
    stage.main("review", lambda params, run: review(params, RELEASE, REPORTS, PAGE, run))
