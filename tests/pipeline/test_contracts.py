"""Contracts: what stops poisoned data, and the default sources, which keep them."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sources import PLAIN, SMALL, cleaned, random_text, raw

from pipelines.clean import clean
from pipelines.contracts import CONTAMINATED, accept, contracts, control_characters, has_secret, have_secrets
from pipelines.overlap import RUN, shares
from pipelines.params import Contracts, UserError, load_params

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")


def check(folder: Path, params: Contracts, accepted: str = "accepted.json") -> dict:
    return contracts(
        params, folder / "clean", folder / "chat", folder / accepted, folder / "page.html", folder / "failed.html"
    )


LIMITS = Contracts(min_documents=20)
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
TALK = [json.dumps({"messages": [TURNS[0] | {"content": f"Q{n}"}, TURNS[1]]}) for n in range(20)]
DIALOGUES = {"use": "chat", "files": {"t.jsonl": "\n".join(TALK)}}
HELD = {"use": "eval", "files": {f"e{n}.txt": random_text(500 + n) for n in range(10)}}


def test_sound_data_passes_and_the_result_is_the_same_bytes_again(tmp_path: Path) -> None:
    cleaned(tmp_path, SMALL, a=PLAIN, e=HELD, t=DIALOGUES)
    first = check(tmp_path, LIMITS)
    assert first["success"] and {e["suite"] for e in first["expectations"]} == {"documents", "dialogues", "sources"}
    page = (tmp_path / "page.html").read_text()
    assert "Training may start" in page and "http://" not in page and "https://" not in page
    accept(tmp_path / "clean", tmp_path / "chat", tmp_path / "accepted.json")
    again = check(tmp_path, LIMITS)
    assert "drift" in {e["suite"] for e in again["expectations"]}
    assert again == check(tmp_path, LIMITS)


def edited(original: str) -> str:
    words = original.split()
    words[5] = "changed"
    return "Preface that was not there. " + " ".join(words)


LEAKED = [random_text(500 + n) for n in range(4)]
POISONS = {
    "duplicates": ({f"again{n}.txt": random_text(n) for n in range(15)}, "one another (share of the worst source, a)"),
    "copied": ({f"leak{n}.txt": leak for n, leak in enumerate(LEAKED)}, "word for word"),
    "edited": ({f"leak{n}.txt": edited(leak) for n, leak in enumerate(LEAKED)}, "13-word runs that"),
    "joined": ({"all.txt": "\n\n".join(LEAKED)}, "13-word runs that"),
    "secrets": (
        {f"{n}.txt": random_text(n) + " ada@example.org" for n in range(30)},
        "string (share of the worst source, a)",
    ),
    "control": ({f"{n}.txt": random_text(n).replace(" ", "\x85", 9) for n in range(30)}, "control characters are rare"),
}


@pytest.mark.parametrize(("poison", "reason"), POISONS.values(), ids=POISONS)
def test_poisoned_sources_are_stopped(tmp_path: Path, poison: dict[str, str], reason: str) -> None:
    wide = SMALL.model_copy(update={"max_characters": 100_000})
    cleaned(tmp_path, wide, a={"use": "pretrain", "files": PLAIN["files"] | poison}, e=HELD)
    limits = LIMITS.model_copy(update={"max_overlap_rate": 0.1})
    fix = r"then mend the source in data/sources.yaml or that limit in params.yaml\.$"
    with pytest.raises(UserError, match=rf"is broken.*found .*limit .*\(`contracts\.max_\w+`\).*failed.html, {fix}"):
        check(tmp_path, limits)
    page = (tmp_path / "failed.html").read_text()
    broken = page[page.index("<h2>Broken") : page.index("<h2>Sources")]
    assert reason in broken and not (tmp_path / "page.html").exists()


def test_what_has_no_limit_is_mended_at_its_source(tmp_path: Path) -> None:
    sources = raw(tmp_path / "raw", a=PLAIN)
    manifest = json.loads((sources / "manifest.json").read_text())
    manifest["sources"][0]["licence"] = "Free for all"
    (sources / "manifest.json").write_text(json.dumps(manifest))
    clean(SMALL, sources, tmp_path / "clean", tmp_path / "chat")
    with pytest.raises(UserError, match=r"limit SPDX; open .*, then mend the source in data/sources\.yaml\.$"):
        check(tmp_path, LIMITS)


def test_dialogues_are_searched_for_secrets_too(tmp_path: Path) -> None:
    leaky = [
        json.dumps({"messages": [{"content": f"Who is {n}?"}, {"content": f"{n}@example.org"}]}) for n in range(20)
    ]
    cleaned(tmp_path, SMALL, a=PLAIN, t={"use": "chat", "files": {"t.jsonl": "\n".join([*TALK, *leaky])}})
    with pytest.raises(
        UserError, match=r"e-mail address or a key-like string .* source, t\); found 0.5, limit at most 0.1"
    ):
        check(tmp_path, LIMITS)


def test_too_few_documents_are_no_corpus(tmp_path: Path) -> None:
    cleaned(tmp_path, SMALL, a=PLAIN)
    with pytest.raises(
        UserError, match=r"there are enough documents; found 30, limit at least 31 \(`contracts.min_documents`\)"
    ):
        check(tmp_path, Contracts(min_documents=31))


def test_drift_is_named_until_it_is_accepted(tmp_path: Path) -> None:
    cleaned(tmp_path, SMALL, a=PLAIN)
    accept(tmp_path / "clean", tmp_path / "chat", tmp_path / "accepted.json")
    shutil.rmtree(tmp_path / "raw")
    cleaned(
        tmp_path,
        SMALL,
        a={"use": "pretrain", "files": PLAIN["files"] | {f"n{n}.txt": random_text(200 + n) for n in range(20)}},
    )
    with pytest.raises(
        UserError, match=r"kept of a.*`contracts.max_drift`.*`shovel accept` the data if the change is meant\.$"
    ):
        check(tmp_path, LIMITS)
    accept(tmp_path / "clean", tmp_path / "chat", tmp_path / "accepted.json")
    assert check(tmp_path, LIMITS)["success"]


def test_overlap_counts_shared_runs() -> None:
    words = random_text(1).split()
    half = " ".join(words[:66] + random_text(2).split()[:54])
    whole, part, few = shares([" ".join(words).upper(), half, "few words"], [random_text(3), " ".join(words)])
    assert whole == 1.0 and 0.4 < part < CONTAMINATED and few == 0.0
    assert shares([half], []) == [0.0]


@given(st.lists(st.text(st.sampled_from("aB_1 .\n\u00e9\u0130\u4e2d\U00020000\u0301"), max_size=200), max_size=4))
def test_shared_runs_are_those_of_a_regular_expression(texts: list[str]) -> None:
    def words(text: str) -> list[tuple[str, ...]]:
        found = re.findall(r"\w+", text.lower())
        return [tuple(found[place : place + RUN]) for place in range(len(found) - RUN + 1)]

    known = {run for text in texts[1:] for run in words(text)}
    for text, share in zip(texts, shares(texts, texts[1:]), strict=True):
        mine = words(text)
        assert share == (pytest.approx(sum(run in known for run in mine) / len(mine)) if mine else 0.0)


SECRET = re.compile(  # as one would write it
    r"[\w.+-]+@[\w-]+\.[a-z]{2,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:sk|ghp|gho|xox[bp])[-_]\w{20,}"
)
PIECES = [
    "@",
    "a",
    "b.co",
    "sk-",
    "sk_",
    "tas",
    "k",
    "ghp_",
    "-",
    " ",
    "\u00e9",
    "x" * 20,
    "AKIA",
    "A1" * 8,
    "xoxb-",
    ".",
]
PIECES += ["+", "\n", "-----BEGIN ", "RSA ", "PRIVATE KEY", "\x07", "\x85"]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=7).map("".join))
def test_secrets_and_control_characters_are_those_of_one_expression(anything: str) -> None:
    assert has_secret(anything) == bool(SECRET.search(anything))
    assert have_secrets(pd.Series([anything, "none"])).tolist() == [has_secret(anything), False]
    assert control_characters(anything) == len(re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", anything))


def test_the_default_data_keeps_its_contracts(corpus: Path, tmp_path: Path) -> None:
    accepted = shutil.copyfile(ROOT / "reports/profile.json", tmp_path / "accepted.json")
    result = contracts(
        PARAMS.contracts, corpus / "clean", corpus / "chat", accepted, tmp_path / "page.html", tmp_path / "failed.html"
    )
    assert result["success"] and {e["suite"] for e in result["expectations"]} == {
        "documents",
        "dialogues",
        "sources",
        "drift",
    }
    table = pd.read_parquet(corpus / "clean/documents.parquet")
    assert table["language"].nunique() >= 95 and set(table["licence"]) == {"BSD-3-Clause"}
    documentation, translations = (table["text"][table["source"] == f"django-{s}"] for s in ("docs", "translations"))
    assert documentation.str.contains(":class:`", regex=False).mean() < 0.02
    assert not documentation.str.contains(r"^\.\. (?:versionadded|setting)::", regex=True).any()
    assert not translations.str.contains("msgstr", regex=False).any()
