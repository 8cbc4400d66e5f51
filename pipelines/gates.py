"""The gates of a promotion: conditions that the reports decide, and those of the working tree at that moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import digests, lineage, paired, repository, stage
from pipelines.params import Params, Policy

if TYPE_CHECKING:
    import pandas as pd

AGREEMENT = {"transformers": "train = export", "server": "train = serve"}


@dataclass(frozen=True)
class Gate:
    """One condition of a promotion, and what was found, as a sentence."""

    name: str
    passed: bool
    what: str


@dataclass(frozen=True)
class Champion:
    """What a model is measured by: the live version's bits per byte, and what each held-out document took it."""

    version: int
    bits_per_byte: float | None
    documents: pd.DataFrame | None


def of_reports(params: Params, reports: Path, champion: Champion | None) -> list[Gate]:
    """The conditions that the reports decide. champion: None when no version is live."""
    contracts = stage.read_json(reports / "contracts.json", made_by="contracts")
    export = stage.read_json(reports / "export.json", made_by="export")
    held = sum(expectation["success"] for expectation in contracts["expectations"])
    return [
        Gate("data contracts", contracts["success"], f"{held} of {len(contracts['expectations'])} expectations hold"),
        Gate(
            "export parity",
            export["passed"] and export["max_logit_difference"] <= export["limit"],
            f"logits differ from transformers' by {export['max_logit_difference']:.1e}, limit {export['limit']:.0e}",
        ),
        *_agreement(reports),
        _not_worse(reports, champion, params.register_.margin_bits_per_byte),
        *([_no_nvidia(reports)] if params.policy.no_nvidia else []),
    ]


def _not_worse(reports: Path, champion: Champion | None, margin: float) -> Gate:
    """On the documents that both have scored; with fewer than two of them, by the average of each on its own."""
    name = "not worse than the champion"
    bits = stage.read_json(reports / "evaluate-chat.json", made_by="evaluate")["bits_per_byte"]
    what = f"{bits:.3f} bits per byte held out"
    if champion is None or champion.bits_per_byte is None:
        return Gate(name, math.isfinite(bits), f"{what}; there is no champion to compare with")
    both = paired.difference(paired.documents(reports / "plots", "chat"), champion.documents)
    if both is None:
        worse, against = bits - champion.bits_per_byte, f"the champion has {champion.bits_per_byte:.3f} on its own"
    else:
        worse, against = both.value, f"{both.value:+.3f} against the champion on the {both.documents} documents of both"
    return Gate(name, worse <= margin, f"{what}; {against}, the margin is {margin:g}")


def agreement_tags(reports: Path) -> dict[str, str]:
    """Tags of a version: how far transformers and the server are from the trained module."""
    found = stage.read_json(reports / "agreement.json", made_by="agreement")
    return {f"agreement.{name}": distances(found[name]) for name in AGREEMENT}


def _agreement(reports: Path) -> list[Gate]:
    """Whether transformers and the server say what the trained module says."""
    found = stage.read_json(reports / "agreement.json", made_by="agreement")
    limits = found["limits"]
    return [Gate(title, agrees(found[name], limits), distances(found[name])) for name, title in AGREEMENT.items()]


def agrees(found: dict[str, float], limits: dict[str, float]) -> bool:
    """Whether the distances from the trained module keep the limits of params.yaml; a NaN does not."""
    return (
        found["kl"] <= limits["kl"]
        and found["top1_agreement"] >= limits["top1_agreement"]
        and found["difference"] <= limits["difference"]
    )


def distances(found: dict[str, float]) -> str:
    """Distances from the trained module, for a person to read."""
    return (
        f"KL {found['kl']:.1e} nats, best token the same at {found['top1_agreement']:.2%} of "
        f"{found['positions']:,} positions, log p differs by at most {found['difference']:.1e}"
    )


def _no_nvidia(reports: Path) -> Gate:
    """Whether training loaded no library of NVIDIA, by what its stages recorded."""
    trained = {name: stage.read_json(reports / f"{name}.json", made_by=name) for name in lineage.TRAINING}
    audits = {name: report.get("audit") for name, report in trained.items()}
    found = [
        f"{name} loaded {Path(library).name}"
        for name, audit in audits.items()
        for library in (audit or {}).get("nvidia_libraries", [])
    ]
    found += [f"{name} could not tell what it loaded" for name, audit in audits.items() if audit is None]
    fix = "train elsewhere or set `policy.no_nvidia: false`"
    what = f"{', '.join(found)}; {fix}" if found else f"{' and '.join(audits)} loaded none"
    return Gate("no NVIDIA part", not found, what)


def of_working_tree(digest: str | None, release: Path) -> list[Gate]:
    """What can change after the reports were written: the working tree, the folder, and the reports themselves."""
    loose = repository.uncommitted_sources()
    state = ", ".join(loose[:3]) + (" ..." if len(loose) > 3 else "") + " not committed" if loose else "it is"
    same = digests.of_folder(release) == digest
    return [
        Gate("everything committed but dvc.lock and reports/", not loose, state),
        Gate("digest", same, f"{release} {'is' if same else 'is not'} what was registered"),
        in_step(),
    ]


def in_step() -> Gate:
    """Whether reports and model are those that dvc.lock names."""
    stale = repository.stale_stages()
    return Gate("reports and model in step", not stale, f"`dvc status` names {', '.join(stale) or 'no stage'}")


def of_decision(policy: Policy, comment: str) -> list[Gate]:
    """What a person owes the record."""
    what = "the decision has one" if comment else "say why with --comment"
    return [Gate("comment", bool(comment), what)] if policy.comment else []


def of_comparison(reports: Path, live: int | None) -> Gate:
    """Whether the review page compares with the version that is live now. live: its number, None without one."""
    compared = stage.read_json(reports / "review.json", made_by="review")["compared_with"]
    with_what, now = (f"version {number}" if number else "no champion" for number in (compared, live))
    fix = "" if compared == live else f", but {now} is live; `dvc repro -sf review`, look at it, then decide"
    return Gate("compared with the champion", compared == live, f"the review page compares with {with_what}{fix}")
