"""Why a version exists, for a person: data, filters, training, cost, comparison, decisions, on one screen.

    shovel why 3            and --json for programs

Everything comes from the version's signed evidence and release records; `shovel verify` checks more of them.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import compare, digests, paired, register, stage, tracking
from pipelines.params import UserError, read_yaml
from pipelines.trust import decisions, evidence, keys, statement, verify

if TYPE_CHECKING:
    from pipelines.tracking import MlflowClient, ModelVersion

WIDTH, INDENT = 80, 9


def story(client: MlflowClient, version: ModelVersion, reports: Path) -> dict[str, Any]:
    """Everything there is to tell, JSON-able. Raises `UserError` when the version has no evidence or a forged one."""
    with tempfile.TemporaryDirectory() as into:
        folder = evidence.find(client, version, reports, Path(into))
        known = keys.known(reports / keys.FOLDER)
        try:
            content, key = verify.opened(folder, known)
            records = decisions.records(version, reports, known)
        except ValueError as error:
            raise UserError(
                f"evidence or release record of version {version.version}: {error}; `shovel verify` says more."
            ) from None
        facts = statement.facts(content)
        signed = [record for record in records if record.get("signed", True)]
        champion = tracking.version_behind(client, version.name, register.CHAMPION)
        return {
            "model": version.name,
            "version": int(version.version),
            "is_champion": champion is not None and champion.version == version.version,
            "digest": digests.combined(facts["digests"]),
            "signed_by": key.fingerprint,
            "commit": facts["git"]["commit"],
            "data": _data(content, folder),
            "training": _training(content, folder),
            "result": _result(folder),
            "comparison": _comparison(client, version, reports, folder, signed),
            "gates": signed[-1]["gates"] if signed else [],
            "decisions": [decisions.sentence(record) for record in records],
            "comments": decisions.comments(version),
        }


def _annotations(content: dict[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    """Annotations of those ResourceDescriptors whose name begins so, by the rest of it."""
    predicate = content["predicate"]
    everything = predicate["buildDefinition"]["resolvedDependencies"] + predicate["runDetails"]["byproducts"]
    found = (one for one in everything if one["name"].startswith(prefix))
    return {one["name"].removeprefix(prefix): one.get("annotations", {}) for one in found}


def _data(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Each source with licence and what the filters took, and what the contracts said."""
    cleaned = stage.read_json(folder / "clean.json", made_by="clean")
    sources = [
        {"name": name, **{key: source[key] for key in ("version", "licence", "use")}}
        | {key: cleaned.get(name, {}).get(key) for key in ("raw_documents", "kept", "bytes", "dropped")}
        for name, source in _annotations(content, "source ").items()
    ]
    return {"sources": sources, "contracts": _annotations(content, "contracts.json")[""]}


def _training(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What was trained where, and what it cost; seconds of an emulated device say nothing of a real one."""
    trained, tuned = (stage.read_json(folder / f"{name}.json", made_by=name) for name in ("pretrain", "finetune"))
    parameters = content["predicate"]["buildDefinition"]["internalParameters"]
    runs = {label: run.get("seconds") for label, run in _annotations(content, "run ").items()}
    energy = [report.get("energy_kwh") for report in (trained, tuned)]
    return {
        "parameters": trained["parameters"],
        "active_parameters": trained["active_parameters"],
        "tokens": trained["tokens"],
        "epochs": trained["epochs"],
        "dialogues": tuned["dialogues"],
        **{key: parameters[key] for key in ("device", "emulated", "passport", "seeds")},
        "training_seconds": None if trained["emulated"] else trained["seconds"] + tuned["seconds"],
        "seconds": runs,
        "energy_kwh": None if None in energy else sum(energy),
    }


def _result(folder: Path) -> dict[str, Any]:
    chat = stage.read_json(folder / "evaluate-chat.json", made_by="evaluate")
    return {key: chat[key] for key in ("bits_per_byte", "ci95", "baselines", "assistant_perplexity")}


def _comparison(
    client: MlflowClient, version: ModelVersion, reports: Path, folder: Path, records: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """With the champion that the first promotion replaced, or would replace; None where there was none."""
    promotions = [record["replaces"] for record in records if record["action"] == "promote"]
    number = promotions[0] if promotions else register.number(client, version.name, register.CHAMPION)
    if number is None or number == int(version.version):
        return None
    other = next((known for known in register.versions(client, version.name) if int(known.version) == number), None)
    found = {"version": number, "bits_per_byte": register.bits_of(other, reports)}
    if other is None:  # deleted since
        return found
    with tempfile.TemporaryDirectory() as into:
        try:
            theirs = evidence.find(client, other, reports, Path(into))
        except UserError:
            return found
        return found | _paired(folder, theirs)


def _paired(folder: Path, theirs: Path) -> dict[str, Any]:
    """What was changed, and the difference on the documents that both have scored."""
    changed = compare.settings(*(read_yaml(side / "params.yaml") for side in (folder, theirs)))
    found = paired.difference(*(paired.documents(side, "chat") for side in (folder, theirs)))
    if found is None:
        return {"settings": changed}
    ends = {"settings": changed, "difference": found.value, "ci95": [found.low, found.high]}
    return ends | {"documents": found.documents, "verdict": found.verdict}


def lines(told: dict[str, Any]) -> list[str]:
    """The story in lines of at most 80 characters."""
    title = f"{told['model']} version {told['version']}{', the champion' if told['is_champion'] else ''}"
    rows = [*_rows(told)]
    return [title, *(line for label, text in rows for line in _wrapped(label, text))]


def _wrapped(label: str, text: str) -> list[str]:
    first, rest = f"{label:<{INDENT}}", " " * INDENT
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _rows(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, text) in the order of the story."""
    data, training, result = told["data"], told["training"], told["result"]
    for n, source in enumerate(data["sources"]):
        yield "" if n else "data", _source(source)
    contracts = data["contracts"]
    yield "", f"{contracts['held']} of {contracts['expectations']} data contracts held"
    sizes = f"{training['parameters'] / 1e6:.1f} M parameters, {training['active_parameters'] / 1e6:.1f} M at work"
    yield "model", f"mixture of experts, {sizes}"
    seeds = ", ".join(f"{name} {seed}" for name, seed in training["seeds"].items())
    read = f"{training['tokens']:,} tokens ({training['epochs']:.2f} epochs)"
    where = f"{training['device']}{' (emulated)' if training['emulated'] else ''}"
    yield "trained", f"on {read}, then {training['dialogues']:,} dialogues; {where}; seeds {seeds}"
    yield "cost", _cost(training)
    low, high = result["ci95"]
    beside = f"xz {result['baselines']['xz']:.3f}, 5-gram {result['baselines']['five_gram']:.3f}"
    yield "result", f"{result['bits_per_byte']:.3f} bits per byte held out (95 %: {low:.3f} to {high:.3f}); {beside}"
    yield "against", _against(told["comparison"], bool(told["decisions"]))
    if changed := (told["comparison"] or {}).get("settings"):
        yield "changed", ", ".join(f"{one['name']} {one['theirs']} -> {one['ours']}" for one in changed)
    passed = sum(gate["passed"] for gate in told["gates"])
    if told["gates"]:
        yield "gates", f"{passed} of {len(told['gates'])} passed"
    for n, sentence in enumerate(told["decisions"] or ["nothing yet; `shovel promote` asks the gates"]):
        yield "" if n else "decided", sentence
    for n, sentence in enumerate(told["comments"]):
        yield "" if n else "said", sentence
    yield "from", f"commit {(told['commit'] or 'none')[:12]}, signed with key {told['signed_by'][:16]}"


def _source(source: dict[str, Any]) -> str:
    """One source and what the filters took of it, most first."""
    name = " ".join(part for part in (source["name"], source["version"]) if part)
    if source["kept"] is None:
        return f"{name}, {source['licence']}"
    dropped = sorted((source["dropped"] or {}).items(), key=lambda item: -item[1])
    taken = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped)
    kept = f"{source['kept']:,} of {source['raw_documents']:,} kept"
    return f"{name}, {source['licence']}: {kept}{f' ({taken})' if taken else ''}"


def _cost(training: dict[str, Any]) -> str:
    """Time and energy, as far as they are known."""
    known = [seconds for seconds in training["seconds"].values() if seconds is not None]
    emulated = "time on an emulated device, which says nothing of a real one"
    trained = emulated if training["emulated"] else f"{_duration(training['training_seconds'])} of training"
    whole = f", {_duration(sum(known))} for all stages" if known else ""
    energy = "energy not measured" if training["energy_kwh"] is None else f"{training['energy_kwh']:.3f} kWh"
    return f"{trained}{whole}; {energy}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _against(comparison: dict[str, Any] | None, decided: bool) -> str:
    if comparison is None:
        return "no champion; it was the first"
    text = f"version {comparison['version']}, the champion{' of that time' if decided else ''}"
    bits = "" if comparison["bits_per_byte"] is None else f": {comparison['bits_per_byte']:.3f}"
    if "verdict" not in comparison:
        return text + bits
    low, high = comparison["ci95"]
    difference = (
        f"{comparison['difference']:+.3f} ({low:+.3f} to {high:+.3f}) on {comparison['documents']} documents of both"
    )
    return f"{text}{bits}; {difference}: {comparison['verdict']}"
