"""Data contracts: what must hold of the cleaned data before anything is trained on it.

    python -m pipelines.contracts       data/clean, data/chat, reports/profile.json -> reports/contracts.json, .html

Great Expectations checks the tables, the figures of each source and the drift since the last accepted profile, which
`shovel accept` writes and git keeps. The page is one file that needs no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from pipelines import pages, stage
from pipelines.clean import DIALOGUES, DOCUMENTS
from pipelines.corpus import dialogues, documents
from pipelines.overlap import RUN, shares
from pipelines.params import Contracts, UserError
from pipelines.tracking import Run

if TYPE_CHECKING:
    from great_expectations.expectations import Expectation

CLEAN, CHAT, REPORTS = Path("data/clean"), Path("data/chat"), Path("reports")
ACCEPTED, PAGE, FAILED = REPORTS / "profile.json", REPORTS / "contracts.html", REPORTS / "contracts-failed.html"
LANGUAGE = r"^(?:code|[a-z]{2,3}(?:[_-][A-Z][a-z]{3})?(?:[_-](?:[A-Z]{2}|\d{3}))?(?:@[a-z]+)?)$"
SECRETS = {  # literal beginning -> pattern; what stands before it is looked at behind it, which is many times faster
    "@": re.compile(r"@(?<=[\w.+-]@)[\w-]+\.[a-z]{2,}"),
    "AKIA": re.compile(r"AKIA[0-9A-Z]{16}"),
    "-----BEGIN ": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
} | {name: re.compile(rf"{name}[-_](?<!\w{name}[-_])\w{{20,}}") for name in ("sk", "ghp", "gho", "xoxb", "xoxp")}
MAYBE_SECRET = r"\S@\S|AKIA|-----BEGIN |(?:sk|gh[po]|xox[bp])[-_]"  # at least wherever one of SECRETS is
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
PRINTED = bytes(byte for byte in range(256) if byte in (9, 10, 13) or 32 <= byte < 127)
CONTAMINATED = 0.8  # of a document's runs


@dataclass(frozen=True)
class Finding:
    """One expectation and what was found."""

    suite: str
    expectation: str
    what: str
    observed: str
    limit: str
    success: bool


Check = tuple["Expectation", str, str]  # expectation, what it means, its limit in words


def contracts(
    params: Contracts, clean: Path, chat: Path, accepted: Path, page: Path, failed: Path, run: Run | None = None
) -> dict[str, Any]:
    """Check everything; writes `page`, or on failure `failed` and raises `UserError` with the first broken contract."""
    with stage.progress("contracts", 4) as advance, ThreadPoolExecutor(1) as beside:
        table, talk = documents(clean, DOCUMENTS.names), dialogues(chat, DIALOGUES.names)
        profile = stage.read_json(clean / "profile.json", made_by="clean")
        counted = beside.submit(by_source, table.copy(deep=False), talk.copy(deep=False), profile)
        validate = _validator()
        findings = validate("documents", table, document_checks(params, table))
        advance()
        findings += validate("dialogues", talk, dialogue_checks(talk)) if len(talk) else []
        advance()
        figures = counted.result()
        findings += validate("sources", figures, source_checks(params, figures))
        advance()
        drift = drift_table(figures, accepted)
        findings += validate("drift", drift, drift_checks(params, drift, accepted))
        advance()
    result = {"success": all(f.success for f in findings), "expectations": [asdict(f) for f in findings]}
    target = page if result["success"] else failed
    pages.write(
        target, "contracts.html.j2", result=result, figures=figures.to_dict("records"), drift=drift.to_dict("records")
    )
    if not result["success"]:
        raise UserError(_sentence([f for f in findings if not f.success], failed))
    failed.unlink(missing_ok=True)
    stage.say(f"contracts  all {len(findings)} expectations hold")
    return result


def accept(clean: Path, chat: Path, accepted: Path) -> dict[str, Any]:
    """Make the present figures the ones that later data is compared with; git keeps the file."""
    table, talk = documents(clean, DOCUMENTS.names), dialogues(chat, DIALOGUES.names)
    figures = by_source(table, talk, stage.read_json(clean / "profile.json", made_by="clean"))
    content = {
        row["source"]: {name: row[name] for name in DRIFTING} for row in figures.to_dict("records") if row["kept"]
    }
    stage.write_json(accepted, content)
    return content


def by_source(table: pd.DataFrame, talk: pd.DataFrame, profile: dict[str, Any]) -> pd.DataFrame:
    """One row a source of documents or dialogues: counts, rates and lengths that contracts and drift are about."""
    heldout = table[table["split"] == "heldout"]
    training = chain.from_iterable(part["text"][part["split"] == "train"].tolist() for part in _parts(table))
    shared = pd.Series(shares(heldout["text"].tolist(), training), heldout.index)
    spoken = talk["messages"].map(lambda turns: "\n".join(turn["content"] for turn in turns))
    everything = pd.concat(
        [
            kind[["source", "language"]].assign(secret=have_secrets(texts))
            for kind, texts in ((table, table["text"]), (talk, spoken))
        ]
    )
    rows = []
    for name, entry in profile["sources"].items():
        mine = everything[everything["source"] == name]
        held = shared[heldout["source"] == name] if entry["use"] != "chat" else shared[:0]
        dropped = entry["dropped"]
        raw, kept = max(entry["raw_documents"], 1), max(entry["kept"], 1)
        rows.append(
            {
                "source": name,
                "use": entry["use"],
                "raw_documents": entry["raw_documents"],
                "kept": entry["kept"],
                "megabytes": entry["bytes"] / 1e6,
                "bytes_per_document": entry["bytes"] / kept,
                "languages": int(mine["language"].nunique()),
                "kept_rate": entry["kept"] / raw,
                "duplicate_rate": (dropped.get("exact_duplicate", 0) + dropped.get("copy_of_eval", 0)) / raw,
                "copies_of_eval": dropped.get("copy_of_eval", 0),
                "secret_rate": float(mine["secret"].mean()) if len(mine) else 0.0,
                "heldout": len(held),
                "contaminated": int((held > CONTAMINATED).sum()),
            }
        )
    return pd.DataFrame(rows)


def _parts(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """A few rows at a time: as Python's strings all texts at once would take their memory again."""
    return (table.iloc[at : at + 256] for at in range(0, len(table), 256))


def have_secrets(texts: pd.Series) -> np.ndarray:
    """`has_secret` of each; only those are asked where RE2 finds that it may be so, which is many times faster."""
    found = pc.match_substring_regex(pa.array(texts, pa.large_string()), MAYBE_SECRET).to_numpy(zero_copy_only=False)
    found[found] = [has_secret(text) for text in texts[found]]
    return found


def has_secret(text: str) -> bool:
    """Whether the text holds an e-mail address or what looks like a key."""
    return any(start in text and pattern.search(text) for start, pattern in SECRETS.items())


def control_characters(text: str) -> int:
    """How many there are, tabs and line ends left out."""
    return len(CONTROL.findall(text)) if not text.isascii() else len(text.encode().translate(None, PRINTED))


DRIFTING = ("kept", "bytes_per_document", "languages", "kept_rate")


def drift_table(figures: pd.DataFrame, accepted: Path) -> pd.DataFrame:
    """One row a figure of a source that the accepted profile knows: before, now, relative change."""
    before = stage.read_json(accepted, made_by="contracts") if accepted.exists() else {}
    rows = [
        {
            "source": row["source"],
            "figure": figure,
            "accepted": old,
            "now": row[figure],
            "change": _change(old, row[figure]),
        }
        for row in figures.to_dict("records")
        for figure, old in before.get(row["source"], {}).items()
    ]
    return pd.DataFrame(rows, columns=["source", "figure", "accepted", "now", "change"])


def _change(old: float, new: float) -> float:
    return abs(new - old) / abs(old) if old else float(new != old)


def document_checks(params: Contracts, table: pd.DataFrame) -> Iterator[Check]:
    """Of data/clean/documents.parquet."""
    import great_expectations.expectations as gxe

    table["characters"] = table["text"].str.len()
    found = chain.from_iterable(part["text"].map(control_characters, na_action="ignore") for part in _parts(table))
    table["control_rate"] = np.fromiter(found, float, len(table)) / table["characters"].clip(lower=1)
    yield from _table_checks(table)
    yield gxe.ExpectColumnValuesToBeUnique(column="sha256"), "no document appears twice", "unique"
    yield (
        gxe.ExpectColumnValuesToBeInSet(column="split", value_set=["train", "heldout"]),
        "every document is for training or held out",
        "train, heldout",
    )
    yield (
        gxe.ExpectTableRowCountToBeBetween(min_value=params.min_documents),
        "there are enough documents",
        f"at least {params.min_documents} (`contracts.min_documents`)",
    )
    yield (
        gxe.ExpectColumnMinToBeBetween(column="characters", min_value=1),
        "no document is empty (characters of the shortest)",
        "at least 1",
    )
    yield (
        gxe.ExpectColumnMedianToBeBetween(
            column="characters", min_value=params.min_median_characters, max_value=params.max_median_characters
        ),
        "documents are of ordinary length (median characters)",
        f"{params.min_median_characters:,} to {params.max_median_characters:,} "
        "(`contracts.min_median_characters` and `contracts.max_median_characters`)",
    )
    yield (
        gxe.ExpectColumnMeanToBeBetween(column="control_rate", max_value=params.max_control_character_rate),
        "control characters are rare (share of all characters, mean over documents)",
        _at_most(params, "max_control_character_rate"),
    )


def dialogue_checks(table: pd.DataFrame) -> Iterator[Check]:
    """Of data/chat/dialogues.parquet."""
    import great_expectations.expectations as gxe

    table["turns"] = table["messages"].map(len)
    table["alternate"] = table["messages"].map(
        lambda turns: [t["role"] for t in turns] == ["user", "assistant"] * (len(turns) // 2)
    )
    table["messages"] = table["messages"].map(str)
    yield from _table_checks(table)
    yield gxe.ExpectColumnValuesToBeUnique(column="sha256"), "no dialogue appears twice", "unique"
    yield (
        gxe.ExpectColumnMinToBeBetween(column="turns", min_value=2),
        "every dialogue has two turns (of the shortest)",
        "at least 2",
    )
    yield (
        gxe.ExpectColumnValuesToBeInSet(column="alternate", value_set=[True]),
        "user and assistant take turns, the assistant speaks last",
        "every dialogue",
    )


def _table_checks(table: pd.DataFrame) -> Iterator[Check]:
    """What both tables promise: columns, no holes, known languages and licences."""
    import great_expectations.expectations as gxe

    schema = DOCUMENTS if "text" in table else DIALOGUES
    yield (
        gxe.ExpectTableColumnsToMatchSet(column_set=schema.names, exact_match=False),
        "every promised column is there",
        ", ".join(schema.names),
    )
    for column in schema.names:
        yield gxe.ExpectColumnValuesToNotBeNull(column=column), f"`{column}` is never missing", "no holes"
    yield gxe.ExpectColumnValuesToBeOfType(column="bytes", type_="int64"), "`bytes` is a whole number", "int64"
    yield (
        gxe.ExpectColumnValuesToMatchRegex(column="language", regex=LANGUAGE),
        "every language is a code such as en, pt_BR, zh_Hans, or `code` for programs",
        "language codes",
    )
    yield (
        gxe.ExpectColumnValuesToBeInSet(column="licence", value_set=_spdx(table["licence"])),
        "every licence is an SPDX identifier (LicenseRef-… for one of your own)",
        "SPDX",
    )


def source_checks(params: Contracts, figures: pd.DataFrame) -> Iterator[Check]:
    """Of the figures of each source."""
    import great_expectations.expectations as gxe

    figures["contaminated_rate"] = figures["contaminated"] / figures["heldout"].clip(lower=1)
    figures["eval_copy_rate"] = figures["copies_of_eval"] / max(figures["kept"][figures["use"] == "eval"].sum(), 1)
    text = figures[figures["use"] != "chat"]
    overall = text["contaminated"].sum() / max(text["heldout"].sum(), 1)
    figures["overall_contaminated_rate"] = overall
    figures["eval_contaminated_rate"] = figures["contaminated_rate"].where(figures["use"] == "eval", 0.0)
    overlap = _at_most(params, "max_overlap_rate")
    yield (
        gxe.ExpectColumnMaxToBeBetween(column="duplicate_rate", max_value=params.max_duplicate_rate),
        f"raw documents are rarely copies of one another (share of {_worst(figures, 'duplicate_rate')})",
        _at_most(params, "max_duplicate_rate"),
    )
    yield (
        gxe.ExpectColumnMaxToBeBetween(column="secret_rate", max_value=params.max_secret_rate),
        f"few documents hold an e-mail address or a key-like string (share of {_worst(figures, 'secret_rate')})",
        _at_most(params, "max_secret_rate"),
    )
    yield (
        gxe.ExpectColumnMaxToBeBetween(column="overall_contaminated_rate", max_value=params.max_overlap_rate),
        f"few held-out documents share {CONTAMINATED:.0%} of their {RUN}-word runs with training text",
        overlap,
    )
    yield (
        gxe.ExpectColumnMaxToBeBetween(column="eval_contaminated_rate", max_value=params.max_overlap_rate),
        f"the same of each evaluation source alone: {RUN}-word runs that training text knows "
        f"(share of {_worst(figures, 'eval_contaminated_rate')})",
        overlap,
    )
    yield (
        gxe.ExpectColumnMaxToBeBetween(column="eval_copy_rate", max_value=params.max_overlap_rate),
        "evaluation documents do not lie in training sources word for word (share of them in "
        f"{_worst(figures, 'eval_copy_rate')})",
        overlap,
    )


def _at_most(params: Contracts, key: str) -> str:
    """A limit and its key, by which `_fix` tells what can be done."""
    return f"at most {getattr(params, key):g} (`contracts.{key}`)"


def _worst(figures: pd.DataFrame, rate: str) -> str:
    """Of all sources, by name where it has any share at all."""
    worst = figures.loc[figures[rate].idxmax()]
    return f"the worst source, {worst['source']}" if worst[rate] else "the worst source"


def drift_checks(params: Contracts, drift: pd.DataFrame, accepted: Path) -> Iterator[Check]:
    """Of the figures that were accepted before; none is compared where nothing was accepted."""
    import great_expectations.expectations as gxe

    if len(drift):
        worst = drift.loc[drift["change"].idxmax()]
        yield (
            gxe.ExpectColumnMaxToBeBetween(column="change", max_value=params.max_drift),
            f"the data is like the accepted profile (largest relative change: {worst['figure']} of {worst['source']})",
            _at_most(params, "max_drift"),
        )


def _spdx(licences: pd.Series) -> list[str]:
    """Those among the licences that are valid SPDX expressions."""
    known = []
    for licence in licences.unique():
        try:
            canonicalize_license_expression(licence)
        except InvalidLicenseExpression:
            continue
        known.append(licence)
    return known or ["an SPDX identifier"]


def _validator() -> Callable[[str, pd.DataFrame, Iterable[Check]], list[Finding]]:
    """A function that puts a suite through Great Expectations; nothing is kept on disk."""
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_pandas("tables")

    def validate(name: str, table: pd.DataFrame, checks: Iterable[Check]) -> list[Finding]:
        suite = context.suites.add(gx.ExpectationSuite(name=name))
        for number, (expectation, what, limit) in enumerate(checks):
            expectation.meta = {"number": number, "what": what, "limit": limit}
            suite.add_expectation(expectation)
        if not suite.expectations:
            return []
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        validation = gx.ValidationDefinition(name=name, data=batch, suite=suite)
        result = validation.run(batch_parameters={"dataframe": table})
        ordered = sorted(result.results, key=lambda one: one.expectation_config.meta["number"])
        return [_finding(name, one) for one in ordered]

    return validate


def _finding(suite: str, result: Any) -> Finding:
    config, found = result.expectation_config, result.result
    if "unexpected_count" in found and "element_count" in found:
        examples = ", ".join(str(value)[:40] for value in found.get("partial_unexpected_list", [])[:3])
        observed = f"{found['unexpected_count']:,} of {found['element_count']:,} rows break it"
        observed += f" ({examples})" if examples else ""
    else:
        observed = _shown(found.get("observed_value", found))
    if not found:
        observed = f"it could not be checked: {result.exception_info}"
    return Finding(suite, config.type, config.meta["what"], observed, config.meta["limit"], bool(result.success))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _sentence(broken: list[Finding], page: Path) -> str:
    first, more = broken[0], len(broken) - 1
    others = f" and {more} more" if more else ""
    return (
        f"{first.suite}.{first.expectation} is broken{others}: {first.what}; found {first.observed}, "
        f"limit {first.limit}; open {page}, then {_fix(first)}."
    )


def _fix(finding: Finding) -> str:
    """What a person can do about it: only drift can be accepted, and not every expectation has a limit to change."""
    if finding.suite == "drift":
        return "mend the source, or `shovel accept` the data if the change is meant"
    limit = " or that limit in params.yaml" if "`contracts." in finding.limit else ""
    return f"mend the source in data/sources.yaml{limit}"


if __name__ == "__main__":
    stage.main("contracts", lambda params, run: contracts(params.contracts, CLEAN, CHAT, ACCEPTED, PAGE, FAILED, run))
