"""From raw files to documents, contracts and tokens: on small cases, and on every default source."""

import io
import json
import re
import shutil
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipelines.baselines import KneserNey
from pipelines.clean import LONG, NAVIGATION, _repeated_lines, clean, normal, split_of
from pipelines.contracts import CONTAMINATED, accept, contracts, control_characters, has_secret, have_secrets
from pipelines.encode import BOS, EOS, SPECIAL, encode, encoded, load_encoder, train_tokenizer
from pipelines.finetune import mark_assistant
from pipelines.markup import as_dialogue, po_to_text, rst_to_text
from pipelines.overlap import RUN, shares
from pipelines.params import Clean, Contracts, Encode, UserError, load_params

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")


def raw(folder: Path, **sources: dict) -> Path:
    """data/raw with sources {name: {"use": ..., "files": {path: text or bytes}}}."""
    entries = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as packed:
            for path, content in source["files"].items():
                packed.writestr(path, content)
        files = [{"path": path, "language": "en"} for path in source["files"]]
        entries.append({"name": name, "licence": "MIT", "use": source["use"], "format": "auto", "files": files})
    (folder / "manifest.json").write_text(json.dumps({"sources": entries}))
    return folder


def text(seed: int, words: int = 120) -> str:
    random = np.random.default_rng(seed)
    return " ".join("".join(random.choice(list("abcdefghij"), 5)) for _ in range(words))


def parquet(columns: dict[str, list]) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame(columns).to_parquet(buffer)
    return buffer.getvalue()


def cleaned(folder: Path, params: Clean, **sources: dict) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    profile = clean(params, raw(folder / "raw", **sources), folder / "clean", folder / "chat")
    tables = [pd.read_parquet(path) for path in (folder / "clean/documents.parquet", folder / "chat/dialogues.parquet")]
    return *tables, profile


SMALL = Clean(heldout_percent=20.0, min_characters=20, max_characters=1000)
PLAIN = {"use": "pretrain", "files": {f"{n}.txt": text(n) for n in range(30)}}


def test_every_reason_to_drop_is_counted(tmp_path: Path) -> None:
    files = PLAIN["files"] | {
        "copy.txt": text(3) + "\n",
        "empty.txt": " \n ",
        "short.txt": "too short",
        "binary.txt": b"\xff\xfe\x00",
        "latin1.txt": "Où est la bibliothèque, s'il vous plaît ?\n".encode("latin-1"),
        "cyrillic.txt": "Где находится библиотека?\r\n".encode("cp1251"),
        "without-mark.txt": "“Where” is the library? It is in the old town, beside the river.".encode("utf-16-le"),
        "marked.txt": f"é {text(54)}".encode("utf-16"),
        "signed.txt": f"é {text(55)}".encode("utf-8-sig"),
        "nul.txt": b"text with a \0 inside that is long enough",
        "eval.txt": text(99),
        "lines.jsonl": json.dumps({"text": text(50), "language": "de"}) + '\n{"broken\n[1]\n',
        "rows.parquet": parquet({"text": [text(60), text(61)], "language": ["fr", "fr"], "extra": [1, 2]}),
        "line.jsonl": json.dumps({"text": text(51, 40) + "\u2028" + text(52, 40)}, ensure_ascii=False),
        "torn.parquet": parquet({"text": [text(62)]})[:200],
        "garbled.parquet": parquet({"text": [text(63)]}).replace(b"PAR1", b"\0\0\0\0", 1)[:-9] + b"\xff" * 5 + b"PAR1",
        "far.parquet": parquet({"text": [text(64)], "when": [np.datetime64(2**62, "us")]}),
        "odd.jsonl": f'{{"text": "\\ud800 {text(53)}", "language": "\\ud800"}}\n{"9" * 5000}\n{"[" * 100_000}',
        "odd.po": 'msgid "Yes"\nmsgstr[x] "Ja"\n',
        "name.po": str(ROOT / "params.yaml"),
        "deep.rst": "* " * 3000 + "a",
    }
    table, _, profile = cleaned(
        tmp_path, SMALL, a={"use": "pretrain", "files": files}, b={"use": "eval", "files": {"x.txt": text(99)}}
    )
    assert profile["a"]["dropped"] == {
        "binary": 4, "copy_of_eval": 1, "empty": 1, "exact_duplicate": 1, "malformed": 7, "not_utf8": 3, "too_short": 1,
    }  # fmt: skip
    assert profile["a"]["kept"] == 38 and profile["a"]["raw_documents"] == 56
    assert profile["a"]["not_utf8"] == ["latin1.txt", "cyrillic.txt", "without-mark.txt"]
    assert "not_utf8" not in profile["b"]
    assert set(table["path"][table["text"].str.startswith("é")]) == {"marked.txt", "signed.txt"}
    assert table[table["language"] == "\ufffd"]["text"].tolist() == [f"\ufffd {text(53)}"]
    assert set(table["split"][table["source"] == "b"]) == {"heldout"}
    assert table[table["language"] == "de"]["text"].tolist() == [text(50)]
    assert table[table["language"] == "fr"]["text"].tolist() == [text(60), text(61)]
    assert table["sha256"].is_unique and table["path"].is_unique


@pytest.mark.parametrize(
    ("use", "record", "sentence"),
    [
        ("chat", {"instruction": "a", "output": "b"}, 'is a dialogue; convert them to {"messages": '),
        ("chat", {"messages": [{"role": "system", "content": "a"}] * 2}, "without a system prompt"),
        ("pretrain", {"content": "a"}, 'is a document; convert them to {"text": '),
    ],
)
def test_a_source_in_another_format_is_not_left_out_in_silence(tmp_path: Path, use, record, sentence: str) -> None:
    with pytest.raises(UserError, match=f"source `b`: none of its 2 records .*{re.escape(sentence)}"):
        cleaned(tmp_path, SMALL, a=PLAIN, b={"use": use, "files": {"x.jsonl": f"{json.dumps(record)}\n" * 2}})


def test_text_that_is_not_utf8_is_named_and_random_bytes_are_none(tmp_path: Path, capsys) -> None:
    latin1 = {f"l{n}.txt": "Où est la bibliothèque ?".encode("latin-1") for n in range(7)}
    random = {f"r{n}.txt": b"\xff" + np.random.default_rng(n).bytes(2000) for n in range(20)}
    _, _, profile = cleaned(tmp_path, SMALL, a={"use": "pretrain", "files": PLAIN["files"] | random | latin1})
    assert profile["a"]["dropped"] == {"binary": 20, "not_utf8": 7}
    said = "a: not UTF-8: l0.txt, l1.txt, l2.txt, l3.txt, l4.txt and 2 more; convert them with iconv"
    assert said in capsys.readouterr().err


def test_the_tables_are_the_same_bytes_again_and_splits_follow_the_hash(tmp_path: Path) -> None:
    first, _, _ = cleaned(tmp_path / "1", SMALL, a=PLAIN)
    more = PLAIN["files"] | {f"more{n}.txt": text(1000 + n) for n in range(30)}
    second, _, _ = cleaned(tmp_path / "2", SMALL, a={"use": "pretrain", "files": more})
    cleaned(tmp_path / "3", SMALL, a=PLAIN)
    for name in ("clean/documents.parquet", "chat/dialogues.parquet", "clean/profile.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    splits = second.set_index("sha256")["split"]
    assert (splits[first["sha256"]].to_numpy() == first["split"].to_numpy()).all()
    assert [split_of(s, "pretrain", 20.0) for s in first["sha256"]] == first["split"].tolist()


def test_long_documents_are_split_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [text(n, 20) for n in range(40)]
    table, _, _ = cleaned(
        tmp_path, SMALL, a={"use": "pretrain", "files": PLAIN["files"] | {"long.txt": "\n\n".join(paragraphs)}}
    )
    parts = table[table["path"].str.startswith("long.txt#")]
    ordered = parts.iloc[parts["path"].str.split("#").str[1].astype(int).argsort()]
    assert ordered["text"].str.len().max() <= 1000
    assert "\n\n".join(ordered["text"]).split() == "\n\n".join(paragraphs).split()


def test_lines_that_many_documents_share_are_furniture(tmp_path: Path) -> None:
    menu = "Home | Products | Documentation | Support | Contact us today"
    files = {f"{n}.txt": f"{menu}\n{text(n)}" for n in range(30)} | {
        f"m{n}.txt": menu + "\n" + "ab " * n for n in range(3)
    }
    table, _, profile = cleaned(tmp_path, SMALL, a={"use": "pretrain", "files": files})
    assert not table["text"].str.contains("Products").any()
    assert profile["a"]["dropped"]["boilerplate"] == 3


LINES = [
    "a" * NAVIGATION,
    "\t" + "a" * NAVIGATION,
    "b" + "a" * NAVIGATION,
    "\u00e9" * NAVIGATION,
    "a" * NAVIGATION + "\xa0",
]


@given(st.lists(st.lists(st.sampled_from([*LINES, "short", "", "\u00e9"])).map("\n".join), max_size=6))
def test_no_repeated_line_is_missed(texts: list[str]) -> None:
    lines = [{line.strip() for line in text.split("\n") if len(line.strip()) >= NAVIGATION} for text in texts]
    repeated = {line for part in lines for line in part if sum(line in other for other in lines) > 2}
    for part, found in zip(lines, _repeated_lines(texts, 2), strict=True):
        assert part & repeated <= found <= part


@given(st.text(st.characters() | st.sampled_from("\ud83d\ude00")))
@example("e\x01\u0301")
def test_normal_text_stays_normal(anything: str) -> None:
    once = normal(anything)
    assert normal(once) == once and "\r" not in once and "\0" not in once
    assert unicodedata.is_normalized("NFC", once) and once == once.encode().decode()


def test_surrogates_become_characters_where_they_are_pairs() -> None:
    assert normal("a \ud83d\ude00 b \ud83d c \ude00") == "a \U0001f600 b \ufffd c \ufffd"


def test_restructured_text_reads_well() -> None:
    source = """
Title
=====

.. module:: secret
.. versionadded:: 5.2

See :class:`~django.db.Model`, :doc:`/topics/x`, :ref:`the part <label>` and ``code``.
A line goes on.

.. code-block:: python
    :linenos:

    x = 1

.. attribute:: Field.null

   It may be empty.

* one
* two

.. note:: Careful.

.. raw:: html
   :file: /etc/passwd
"""
    assert rst_to_text(source).strip() == (
        "# Title\n\nNew in version 5.2:\n\nSee `Model`, topics/x, the part and `code`. A line goes on.\n\n    x = 1\n\n"
        "`Field.null`\n\nIt may be empty.\n\n- one\n- two\n\nNote:\n\nCareful."
    )


def test_catalogues_become_their_translations() -> None:
    header = 'msgid ""\nmsgstr ""\n"Language: de\\n"\n\n'
    body = 'msgid "Yes"\nmsgstr "Ja"\n\n#, fuzzy\nmsgid "No"\nmsgstr "Vielleicht"\n\nmsgid "Open"\nmsgstr ""\n\n'
    body += 'msgid "%d day"\nmsgid_plural "%d days"\nmsgstr[0] "%d Tag"\nmsgstr[1] "%d Tage"\n'
    assert po_to_text(header + body) == "Ja\n%d Tag\n%d Tage"
    assert po_to_text((header + body).replace("Language: de", "Language: en")).split("\n")[:2] == ["Yes", "No"]


def test_dialogues_alternate_and_end_with_the_assistant() -> None:
    turns = [{"content": c} for c in ("Hi", "Hello", "Bye")]
    assert [t["role"] for t in as_dialogue(turns)] == ["user", "assistant"]
    assert as_dialogue(turns[:1]) is None
    assert as_dialogue([{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}]) is None
    assert as_dialogue([{"content": "Hi"}, {"content": "  "}]) is None


def check(folder: Path, params: Contracts, accepted: str = "accepted.json") -> dict:
    return contracts(
        params, folder / "clean", folder / "chat", folder / accepted, folder / "page.html", folder / "failed.html"
    )


LIMITS = Contracts(min_documents=20)
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
TALK = [json.dumps({"messages": [TURNS[0] | {"content": f"Q{n}"}, TURNS[1]]}) for n in range(20)]
DIALOGUES = {"use": "chat", "files": {"t.jsonl": "\n".join(TALK)}}
HELD = {"use": "eval", "files": {f"e{n}.txt": text(500 + n) for n in range(10)}}


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


LEAKED = [text(500 + n) for n in range(4)]
POISONS = {
    "duplicates": ({f"again{n}.txt": text(n) for n in range(15)}, "one another (share of the worst source, a)"),
    "copied": ({f"leak{n}.txt": leak for n, leak in enumerate(LEAKED)}, "word for word"),
    "edited": ({f"leak{n}.txt": edited(leak) for n, leak in enumerate(LEAKED)}, "13-word runs that"),
    "joined": ({"all.txt": "\n\n".join(LEAKED)}, "13-word runs that"),
    "secrets": ({f"{n}.txt": text(n) + " ada@example.org" for n in range(30)}, "string (share of the worst source, a)"),
    "control": ({f"{n}.txt": text(n).replace(" ", "\x85", 9) for n in range(30)}, "control characters are rare"),
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
        a={"use": "pretrain", "files": PLAIN["files"] | {f"n{n}.txt": text(200 + n) for n in range(20)}},
    )
    with pytest.raises(
        UserError, match=r"kept of a.*`contracts.max_drift`.*`shovel accept` the data if the change is meant\.$"
    ):
        check(tmp_path, LIMITS)
    accept(tmp_path / "clean", tmp_path / "chat", tmp_path / "accepted.json")
    assert check(tmp_path, LIMITS)["success"]


def test_overlap_counts_shared_runs() -> None:
    words = text(1).split()
    half = " ".join(words[:66] + text(2).split()[:54])
    whole, part, few = shares([" ".join(words).upper(), half, "few words"], [text(3), " ".join(words)])
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


@settings(max_examples=300)
@given(st.text(st.sampled_from("a \t\r\n\0\x0b\x85\xa0\ufeffe\u0301\u2028")))
def test_normal_text_is_what_expressions_make_of_it(anything: str) -> None:
    for given_text in (anything, f"{anything}{'a' * LONG}"):
        text = given_text.replace("\r\n", "\n").replace("\r", "\n")
        text = unicodedata.normalize("NFC", re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]", "", text))
        text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
        assert normal(given_text) == re.sub(r"\n{4,}", "\n\n\n", text).strip("\n").strip()


def test_a_vocabulary_beyond_the_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"`encode.vocab_size` is 5000, but the text yields only \d+"):
        train_tokenizer(5000, ["just a few words"])


def test_other_ids_of_the_other_library_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned(tmp_path, SMALL, a=PLAIN)
    byte = tiktoken.Encoding(
        "bytes", pat_str=".", mergeable_ranks={bytes([n]): n for n in range(256)}, special_tokens={}
    )
    monkeypatch.setattr("pipelines.encode.load_encoder", lambda folder: byte)
    with pytest.raises(UserError, match="tokenizers and tiktoken give different ids"):
        encode(Encode(vocab_size=300), tmp_path / "clean", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_the_chat_template_is_what_finetuning_trains_on(corpus: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(corpus / "tokens")
    ours = load_encoder(corpus / "tokens")
    messages = [
        {"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "Good day\n"},
        {"role": "user", "content": "你好"}, {"role": "assistant", "content": "."},
    ]  # fmt: skip
    ids, marks = mark_assistant(messages, ours)
    assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False) == ids.tolist()
    assert ours.decode(ids[marks].tolist()) == f"Good day\n{SPECIAL[1]}.{SPECIAL[1]}"
    assert [ours.encode_single_token(token) for token in SPECIAL] == list(range(5))


@given(st.text())
def test_both_libraries_give_the_same_ids_for_anything(tokenizers, anything: str) -> None:
    ours, theirs = tokenizers
    ids = ours.encode_ordinary(anything)
    stored = [anything, f"{SPECIAL[0]}{anything}{SPECIAL[3]}"]
    for text, row in zip(stored, encoded(pd.Series(stored, dtype=object), ours), strict=True):
        assert row.tolist() == [BOS, *ours.encode_ordinary(text), EOS]
    assert ids == theirs(anything, add_special_tokens=False).input_ids
    assert ours.decode_bytes(ids) == anything.encode()


@pytest.fixture(scope="module")
def tokenizers(corpus: Path) -> tuple:
    return load_encoder(corpus / "tokens"), AutoTokenizer.from_pretrained(corpus / "tokens")


def test_both_libraries_give_the_same_ids_on_every_source(corpus: Path, tokenizers) -> None:
    ours, theirs = tokenizers
    table = pd.read_parquet(corpus / "clean/documents.parquet")
    talk = pd.read_parquet(corpus / "chat/dialogues.parquet")["messages"]
    texts = [*table["text"], *(" ".join(turn["content"] for turn in turns) for turns in talk)]
    expected = theirs(texts, add_special_tokens=False).input_ids
    assert len(texts) > 8000 and expected == ours.encode_ordinary_batch(texts)


def test_shards_hold_every_document_between_its_marks(corpus: Path, tmp_path: Path) -> None:
    encode(Encode(vocab_size=1000, shard_mib=1), corpus / "clean", tmp_path / "tokens")
    manifest = json.loads((tmp_path / "tokens/manifest.json").read_text())
    train = manifest["splits"]["train"]
    assert len(train["shards"]) > 5 and manifest["dtype"] == "uint16"
    encoder, table = load_encoder(tmp_path / "tokens"), pd.read_parquet(corpus / "clean/documents.parquet")
    texts = (
        (table["source"] + "/" + table["path"]).to_frame("name").assign(text=table["text"]).set_index("name")["text"]
    )
    count = 0
    for shard in train["shards"]:
        ids = np.fromfile(tmp_path / "tokens" / shard["file"], dtype=manifest["dtype"])
        assert len(ids) <= 2**19 and len(ids) == shard["offsets"][-1] == shard["tokens"]
        for name, start, end in zip(shard["documents"], shard["offsets"], shard["offsets"][1:], strict=False):
            assert ids[start] == 0 and ids[end - 1] == 1
            count += encoder.decode(ids[start + 1 : end - 1].tolist()) == texts[name]
    assert count == train["documents"] == (table["split"] == "train").sum()


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


def test_the_byte_model_is_a_probability() -> None:
    model = KneserNey([b"abracadabra" * 20, b"the quick brown fox"])
    context = b"abra"
    total = sum(2 ** -(model.bits(context + bytes([byte])) - model.bits(context)) for byte in range(256))
    assert total == pytest.approx(1.0, abs=1e-9)
    assert model.bits(b"abracadabra") < model.bits(b"zzzzzzzzzzz")
