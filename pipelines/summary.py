"""What the registry says of a version at first sight, in Markdown: figures, comparison, data, and where to read on."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import stage

if TYPE_CHECKING:
    from pipelines.tracking import MlflowRun

MODEL = """Each version says what it is and links to its review page. `champion` is live, `challenger` waits for
`shovel promote`, `previous` is what `shovel rollback` brings back; the tag `decision` says who moved it and why."""


def describe(reports: Path, facts: dict[str, Any], digest: str, review: MlflowRun | None) -> str:
    """The description of a version. facts: `lineage.facts`; review: the run whose artifact is the review page."""
    chat = stage.read_json(reports / "evaluate-chat.json", made_by="evaluate")
    low, high = chat["ci95"]
    figures = (
        f"**{chat['bits_per_byte']:.3f} bits per byte** held out (95 %: {low:.3f} to {high:.3f}; "
        f"xz {chat['baselines']['xz']:.3f}, 5-gram {chat['baselines']['five_gram']:.3f})"
    )
    figures += f", perplexity of answers {chat['assistant_perplexity']:.1f}." if chat["assistant_tokens"] else "."
    named = ", ".join(f"{source['name']} ({source['licence']})" for source in facts["sources"])
    sources = textwrap.shorten(named, 2000, placeholder=" ...")
    lines = [figures, *_against(reports), f"Trained on {sources}.", *_page(review)]
    return "\n\n".join([*lines, f"`shovel why` tells the story, `shovel verify` checks it. Digest {digest[:12]}."])


def _against(reports: Path) -> list[str]:
    """The comparison that the review page made."""
    paired = stage.read_json(reports / "review.json", made_by="review").get("paired")
    if not paired:
        return []
    ends = f"{paired['value']:+.3f} ({paired['low']:+.3f} to {paired['high']:+.3f})"
    return [f"Against version {paired['version']}, on {paired['documents']} documents: {ends}, {paired['verdict']}."]


def _page(review: MlflowRun | None) -> list[str]:
    if review is None:
        return []
    run = f"#/experiments/{review.info.experiment_id}/runs/{review.info.run_id}"
    return [f"[Review page]({run}/artifacts/review.html)"]
