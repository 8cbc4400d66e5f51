"""From raw files to documents and dialogues: what is kept, what is dropped and why, splits, normal text."""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_sources import PLAIN, SMALL, cleaned, parquet, random_text

from pipelines.clean import LONG, NAVIGATION, _repeated_lines, normal, split_of
from pipelines.markup import as_dialogue, po_to_text, rst_to_text
from pipelines.params import UserError

ROOT = Path(__file__).parents[2]


def test_every_reason_to_drop_is_counted(tmp_path: Path) -> None:
    files = PLAIN["files"] | {
        "copy.txt": random_text(3) + "\n",
        "empty.txt": " \n ",
        "short.txt": "too short",
        "binary.txt": b"\xff\xfe\x00",
        "latin1.txt": "Où est la bibliothèque, s'il vous plaît ?\n".encode("latin-1"),
        "cyrillic.txt": "Где находится библиотека?\r\n".encode("cp1251"),
        "without-mark.txt": "“Where” is the library? It is in the old town, beside the river.".encode("utf-16-le"),
        "marked.txt": f"é {random_text(54)}".encode("utf-16"),
        "signed.txt": f"é {random_text(55)}".encode("utf-8-sig"),
        "nul.txt": b"text with a \0 inside that is long enough",
        "eval.txt": random_text(99),
        "lines.jsonl": json.dumps({"text": random_text(50), "language": "de"}) + '\n{"broken\n[1]\n',
        "rows.parquet": parquet(
            {"text": [random_text(60), random_text(61)], "language": ["fr", "fr"], "extra": [1, 2]}
        ),
        "line.jsonl": json.dumps({"text": random_text(51, 40) + "\u2028" + random_text(52, 40)}, ensure_ascii=False),
        "torn.parquet": parquet({"text": [random_text(62)]})[:200],
        "garbled.parquet": parquet({"text": [random_text(63)]}).replace(b"PAR1", b"\0\0\0\0", 1)[:-9]
        + b"\xff" * 5
        + b"PAR1",
        "far.parquet": parquet({"text": [random_text(64)], "when": [np.datetime64(2**62, "us")]}),
        "odd.jsonl": f'{{"text": "\\ud800 {random_text(53)}", "language": "\\ud800"}}\n{"9" * 5000}\n{"[" * 100_000}',
        "odd.po": 'msgid "Yes"\nmsgstr[x] "Ja"\n',
        "name.po": str(ROOT / "params.yaml"),
        "deep.rst": "* " * 3000 + "a",
    }
    table, _, profile = cleaned(
        tmp_path, SMALL, a={"use": "pretrain", "files": files}, b={"use": "eval", "files": {"x.txt": random_text(99)}}
    )
    assert profile["a"]["dropped"] == {
        "binary": 4, "copy_of_eval": 1, "empty": 1, "exact_duplicate": 1, "malformed": 7, "not_utf8": 3, "too_short": 1,
    }  # fmt: skip
    assert profile["a"]["kept"] == 38 and profile["a"]["raw_documents"] == 56
    assert profile["a"]["not_utf8"] == ["latin1.txt", "cyrillic.txt", "without-mark.txt"]
    assert "not_utf8" not in profile["b"]
    assert set(table["path"][table["text"].str.startswith("é")]) == {"marked.txt", "signed.txt"}
    assert table[table["language"] == "\ufffd"]["text"].tolist() == [f"\ufffd {random_text(53)}"]
    assert set(table["split"][table["source"] == "b"]) == {"heldout"}
    assert table[table["language"] == "de"]["text"].tolist() == [random_text(50)]
    assert table[table["language"] == "fr"]["text"].tolist() == [random_text(60), random_text(61)]
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
    more = PLAIN["files"] | {f"more{n}.txt": random_text(1000 + n) for n in range(30)}
    second, _, _ = cleaned(tmp_path / "2", SMALL, a={"use": "pretrain", "files": more})
    cleaned(tmp_path / "3", SMALL, a=PLAIN)
    for name in ("clean/documents.parquet", "chat/dialogues.parquet", "clean/profile.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    splits = second.set_index("sha256")["split"]
    assert (splits[first["sha256"]].to_numpy() == first["split"].to_numpy()).all()
    assert [split_of(s, "pretrain", 20.0) for s in first["sha256"]] == first["split"].tolist()


def test_long_documents_are_split_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [random_text(n, 20) for n in range(40)]
    table, _, _ = cleaned(
        tmp_path, SMALL, a={"use": "pretrain", "files": PLAIN["files"] | {"long.txt": "\n\n".join(paragraphs)}}
    )
    parts = table[table["path"].str.startswith("long.txt#")]
    ordered = parts.iloc[parts["path"].str.split("#").str[1].astype(int).argsort()]
    assert ordered["text"].str.len().max() <= 1000
    assert "\n\n".join(ordered["text"]).split() == "\n\n".join(paragraphs).split()


def test_lines_that_many_documents_share_are_furniture(tmp_path: Path) -> None:
    menu = "Home | Products | Documentation | Support | Contact us today"
    files = {f"{n}.txt": f"{menu}\n{random_text(n)}" for n in range(30)} | {
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


@settings(max_examples=300)
@given(st.text(st.sampled_from("a \t\r\n\0\x0b\x85\xa0\ufeffe\u0301\u2028")))
def test_normal_text_is_what_expressions_make_of_it(anything: str) -> None:
    for given_text in (anything, f"{anything}{'a' * LONG}"):
        text = given_text.replace("\r\n", "\n").replace("\r", "\n")
        text = unicodedata.normalize("NFC", re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]", "", text))
        text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
        assert normal(given_text) == re.sub(r"\n{4,}", "\n\n\n", text).strip("\n").strip()
