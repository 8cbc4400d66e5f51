"""Clean the fetched files: one row a document, duplicates and debris gone, held-out documents chosen by their hash.

    python -m pipelines.clean           data/raw -> data/clean, data/chat

data/clean/documents.parquet   text, source, path, language, licence, sha256, bytes, split (train | heldout)
data/clean/profile.json        what was dropped and why, by source; the first files that are text but not UTF-8
data/chat/dialogues.parquet    messages [{role, content}], and the same columns
"""

from __future__ import annotations

import codecs
import hashlib
import json
import multiprocessing
import re
import signal
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import stage
from pipelines.markup import Dialogue, as_dialogue, dialogues_in, po_to_text, rst_to_text
from pipelines.params import Clean, UserError
from pipelines.tracking import Run

RAW, CLEAN, CHAT = Path("data/raw"), Path("data/clean"), Path("data/chat")
COLUMNS = [pa.field(n, pa.string()) for n in ("source", "path", "language", "licence", "sha256")]
COLUMNS += [pa.field("bytes", pa.int64()), pa.field("split", pa.string())]
DOCUMENTS = pa.schema([pa.field("text", pa.string()), *COLUMNS])
MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
DIALOGUES = pa.schema([pa.field("messages", pa.list_(MESSAGE)), *COLUMNS])
NAVIGATION = 40  # characters; a line of prose at least this long in many documents of a source is furniture
LONG_LINE = re.compile(rf"^.{{{NAVIGATION},}}", re.MULTILINE)
LONG = 2000  # characters from which on whole-array operations are the faster ones
ROWS = 1024  # that Parquet takes at a time; a larger array in one piece would be moved again and again as it grows
FACTOR = np.int64(0x1E3779B97F4A7C15)  # odd, to mix numbers with
CONTROL = bytes([*range(9), 11, 12, *range(14, 32), 127])  # in UTF-8 such a byte is always a character of its own
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NAMED = 5  # files in another encoding that are named of a source
NOT_UTF8 = "not_utf8"  # why a file is dropped
FORMS = {  # of a record
    "document": '{"text": "..."}',
    "dialogue": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, user and '
    "assistant in turn, without a system prompt",
}
FIELDS = ("text", "messages", "language")  # of a record; others are not looked at
MARKUP = {".rst": "rst", ".po": "po", ".jsonl": "jsonl", ".parquet": "parquet"}
CODE_SUFFIXES = {".py", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".go", ".rs", ".java", ".sh", ".css", ".sql"}


@dataclass(frozen=True)
class Item:
    """A document (`text`) or a dialogue (`messages`), or the reason why neither came of it."""

    text: str = ""
    messages: Dialogue | None = None
    dropped: str = ""
    language: str = ""


Row = dict[str, Any]


def clean(params: Clean, raw: Path, documents: Path, chat: Path, run: Run | None = None) -> dict[str, Any]:
    """Write the folders `documents` and `chat` from `raw`. Returns the counts by source; raises `UserError`."""
    sources = stage.read_json(raw / "manifest.json", made_by="fetch")["sources"]
    rows: list[Row] = []
    profile: dict[str, Any] = {}
    with stage.progress("clean", sum(len(source["files"]) for source in sources)) as advance:
        for source in sources:
            found, dropped, foreign = _rows_of(source, raw / f"{source['name']}.zip", params, advance)
            raw_documents = len(found) + dropped.total()
            _require_form(source, raw_documents, dropped["malformed"])
            profile[source["name"]] = {"use": source["use"], "raw_documents": raw_documents, "dropped": dropped}
            profile[source["name"]] |= {NOT_UTF8: foreign[:NAMED]} if foreign else {}
            rows += [piece for row in found for piece in _split_long(row, params.max_characters)]
    rows = _without_duplicates(rows, profile)
    for name, entry in profile.items():
        kept = [row["bytes"] for row in rows if row["source"] == name]
        entry |= {"kept": len(kept), "bytes": sum(kept), "dropped": dict(sorted(entry["dropped"].items()))}
        stage.say(_summary(name, entry))
        if NOT_UTF8 in entry:
            stage.say(_advice(name, entry[NOT_UTF8], entry["dropped"][NOT_UTF8]))
    for row in rows:
        row["split"] = split_of(row["sha256"], row["use"], params.heldout_percent)
    _require_text(rows)
    with stage.replacing(documents) as fresh_documents, stage.replacing(chat) as fresh_chat:
        _write(fresh_documents / "documents.parquet", [row for row in rows if "text" in row], DOCUMENTS)
        stage.write_json(fresh_documents / "profile.json", {"sources": profile})
        _write(fresh_chat / "dialogues.parquet", [row for row in rows if "messages" in row], DIALOGUES)
    return profile


def _rows_of(
    source: dict[str, Any], packed: Path, params: Clean, advance: Any
) -> tuple[list[Row], Counter[str], list[str]]:
    """Every document of one source, in order of path; how many were dropped by reason; the files that are not UTF-8."""
    work = partial(read, packed, source["format"], source["use"])
    rows, dropped, foreign = [], Counter[str](), []
    for file, items in zip(source["files"], _side_by_side(work, source["files"], advance), strict=True):
        part = 0
        for item in items:
            if item.dropped:
                dropped[item.dropped] += 1
                foreign += [file["path"]] if item.dropped == NOT_UTF8 else []
                continue
            part += 1
            path = file["path"] if len(items) == 1 else f"{file['path']}#{part}"
            rows.append(_row(item, source, path, item.language or file["language"]))
    dropped["boilerplate"] += _drop_furniture(rows, params.min_characters)
    short = [row for row in rows if "text" in row and len(row["text"]) < params.min_characters]
    dropped["too_short"] += len(short)
    kept = [row for row in rows if "messages" in row or len(row["text"]) >= params.min_characters]
    return kept, +dropped, foreign


def _side_by_side(work: Any, files: list[dict[str, str]], advance: Any) -> Iterator[list[Item]]:
    """Convert files, results in order; those with markup on all cores where there are enough of them."""
    paths = [file["path"] for file in files]
    marked = [path for path in paths if _markup(*work.args[1:], Path(path).suffix)]
    converted, waiting = _on_all_cores(work, marked) if len(marked) >= 100 else map(work, marked), set(marked)
    for path in paths:
        yield next(converted) if path in waiting else work(path)
        advance()


def _on_all_cores(work: Any, paths: list[str]) -> Iterator[list[Item]]:
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit it: Ctrl-C is for this process
        converted = pool.map(work, paths, chunksize=16)
        signal.signal(signal.SIGINT, before)
        yield from converted


def _markup(kind: str, use: str, suffix: str) -> str:
    """What has to be parsed before there is text: rst, po, jsonl, parquet, dialogues; empty for plain text."""
    if suffix in (".parquet", ".jsonl"):
        return MARKUP[suffix]
    if kind == "dialogues" or use == "chat":
        return "dialogues"
    return MARKUP.get(suffix, "") if kind == "auto" else "" if kind == "text" else kind


def read(packed: Path, kind: str, use: str, path: str) -> list[Item]:
    """The documents or dialogues of the file `path` in a zip; a file that gives nothing gives its reason."""
    content = _opened(packed, packed.stat().st_mtime_ns).read(path)
    markup = _markup(kind, use, Path(path).suffix)
    if markup == "parquet":
        try:
            table = pq.read_table(pa.BufferReader(content))
            records = table.select([name for name in table.column_names if name in FIELDS]).to_pylist()
        except Exception:  # noqa: BLE001  its parser raises errors of many kinds for a damaged file
            return [Item(dropped="binary")]
        return _from_records(records, use)
    try:
        text = content.decode("utf-16" if content.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return [Item(dropped=NOT_UTF8 if _is_text(content) else "binary")]
    if markup == "jsonl":
        return _from_jsonl(text, use)
    if markup == "dialogues":
        good, malformed = dialogues_in(text)
        return [Item(messages=_normal_dialogue(turns)) for turns in good] + [Item(dropped="malformed")] * malformed
    try:
        text = {"rst": rst_to_text, "po": po_to_text}.get(markup, str)(text)
    except Exception:  # noqa: BLE001  their parsers too
        return [Item(dropped="malformed")]
    return [_document(text, "")]


def _is_text(content: bytes) -> bool:
    """Whether what is not UTF-8 looks like text in another encoding: its bytes, or in UTF-16 every other one."""
    halves = (content[at::2] for at in (0, 1) if content[1 - at :: 2].count(0) > len(content) // 3)  # Latin letters
    plain = next(halves, content)
    return b"\0" not in plain and len(plain.translate(None, CONTROL)) > 0.95 * len(plain)


@lru_cache(maxsize=1)
def _opened(packed: Path, changed_ns: int) -> ZipFile:
    """The zip, opened once a process, and again when it is another one."""
    return ZipFile(packed)


def _from_jsonl(text: str, use: str) -> list[Item]:
    items: list[Item] = []
    for line in filter(str.strip, text.split("\n")):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # also a number of thousands of digits, or thousands of brackets
            record = None
        items += _from_records([record], use)
    return items


def _from_records(records: list[Any], use: str) -> list[Item]:
    """Records with `text`, or with `messages` where dialogues are wanted; `language` may be given too."""
    items = []
    for record in records:
        record = record if isinstance(record, dict) else {}
        language = normal(record["language"]) if isinstance(record.get("language"), str) else ""
        if use == "chat":
            turns = record.get("messages")
            dialogue = as_dialogue(turns) if isinstance(turns, list) else None
            items.append(
                Item(messages=_normal_dialogue(dialogue), language=language) if dialogue else Item(dropped="malformed")
            )
        elif isinstance(record.get("text"), str):
            items.append(_document(record["text"], language))
        else:
            items.append(Item(dropped="malformed"))
    return items


def _document(text: str, language: str) -> Item:
    text = normal(text)
    return Item(text=text, language=language) if text else Item(dropped="empty")


def _normal_dialogue(dialogue: Dialogue) -> Dialogue:
    return [turn | {"content": normal(turn["content"])} for turn in dialogue]


def normal(text: str) -> str:
    """Unicode NFC, newlines as \\n, no trailing blanks, at most two empty lines in a row, no ASCII control characters.

    What UTF-8 cannot hold (lone surrogates) becomes U+FFFD. U+0080 to U+009F stay: they are the traces of a wrong
    encoding that `contracts` counts.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\ufeff", "")
    try:
        content = text.encode()
    except UnicodeEncodeError:  # surrogates, which UTF-16 makes characters of where they are pairs
        content = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    content = content.translate(None, CONTROL)
    text = unicodedata.normalize("NFC", content.decode())  # leaves blanks and newlines where `content` has them
    if len(text) < LONG or not _tidy(content):
        if " \n" in text or "\t\n" in text:
            text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
        if "\n\n\n\n" in text:
            text = re.sub(r"\n{4,}", "\n\n\n", text)
    return text.strip()


def _tidy(content: bytes) -> bool:
    """Whether no blank stands before a newline and no four newlines in a row, sooner than three searches would."""
    code = np.frombuffer(content, np.uint8)
    newlines = np.flatnonzero(code == ord("\n"))
    before = code[newlines - 1].tobytes()
    return b" " not in before and b"\t" not in before and bool((newlines[3:] - newlines[:-3] > 3).all())


def _row(item: Item, source: dict[str, Any], path: str, language: str) -> Row:
    """A row without its split, which depends on all rows."""
    body = {"messages": item.messages} if item.messages else {"text": item.text}
    return body | {
        "source": source["name"],
        "path": path,
        "language": language,
        "licence": source["licence"],
        "use": source["use"],
    }


def _drop_furniture(rows: list[Row], min_characters: int) -> int:
    """Take out long lines of prose that many documents share; returns how many documents were nothing else.

    Programs and translations repeat themselves by nature and are left alone.
    """
    prose = [
        row for row in rows if "text" in row and not row["path"].endswith(".po") and _suffix(row) not in CODE_SUFFIXES
    ]
    limit = max(10, len(prose) // 50)
    found = _repeated_lines([row["text"] for row in prose], limit)
    count = Counter(chain.from_iterable(found))
    furniture = {line for line, documents in count.items() if documents > limit and len(line) >= NAVIGATION}
    gone = set()
    for row, lines in zip(prose, found, strict=True):
        if furniture.isdisjoint(lines):
            continue
        stay = (n for n in row["text"].split("\n") if len(n) < NAVIGATION or n.strip() not in furniture)
        text = normal("\n".join(stay))
        if len(text) < min_characters <= len(row["text"]):
            gone.add(id(row))
        row["text"] = text
    rows[:] = [row for row in rows if id(row) not in gone]
    return len(gone)


def _repeated_lines(texts: list[str], limit: int) -> list[set[str]]:
    """Of each text its long lines, stripped, that more than `limit` texts may hold; a few others may be among them."""
    found: list[set[str]] = [set() for _ in texts]
    lines = [_long_lines(_framed(text)) for text in texts]
    owners = np.repeat(np.arange(len(texts)), [part.shape[1] for part in lines])
    ends, numbers = np.concatenate([np.zeros((2, 0), np.int64), *lines], axis=1)
    values, times = np.unique(numbers, return_counts=True)
    repeated = np.isin(numbers, values[times > limit])
    hits = zip(owners[repeated].tolist(), ends[repeated].tolist(), strict=True)
    for owner, places in groupby(hits, itemgetter(0)):
        content = _framed(texts[owner])
        found[owner] = {content[content.rfind(b"\n", 0, end) + 1 : end].decode().strip() for _, end in places}
    return found


def _framed(text: str) -> bytes:
    """UTF-8 between two newlines; nothing blank ends a line of it, which `normal` alone grants for ASCII only."""
    lines = text if text.isascii() else "\n".join(map(str.strip, LONG_LINE.findall(text)))
    return f"\n{lines}\n".encode()


def _long_lines(content: bytes) -> np.ndarray:
    """Where long lines end, and for each a number made of its last bytes, equal for equal lines: [2, n]."""
    newlines = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))
    ends = newlines[1:][newlines[1:] - newlines[:-1] > NAVIGATION]
    eights = np.ndarray(max(len(content) - 7, 0), np.int64, content, strides=(1,))  # from every byte on
    first, middle, last = (eights[ends - back] for back in (NAVIGATION, NAVIGATION // 2, 8))
    return np.stack([ends, (first * FACTOR + middle) * FACTOR + last])


def _suffix(row: Row) -> str:
    return Path(row["path"].split("#")[0]).suffix


def _split_long(row: Row, max_characters: int) -> Iterator[Row]:
    """Cut at paragraphs so that no part exceeds the limit (a longer paragraph is cut at a line, then anywhere)."""
    text = row.get("text", "")
    if len(text) <= max_characters:
        yield row
        return
    part = 0
    while text:
        part += 1
        end = (
            len(text)
            if len(text) <= max_characters
            else next(
                (
                    at
                    for mark in ("\n\n", "\n", " ")
                    if (at := text.rfind(mark, max_characters // 2, max_characters)) > 0
                ),
                max_characters,
            )
        )
        yield row | {"text": text[:end].strip(), "path": f"{row['path']}#{part}"}
        text = text[end:].strip()


def _without_duplicates(rows: list[Row], profile: dict[str, Any]) -> list[Row]:
    """Rows with hash, size and split, sorted; of equal contents one stays: an eval source's copy before any other."""
    kept: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row["use"] != "eval", row["source"], row["path"])):
        content = (row["text"] if "text" in row else json.dumps(row["messages"], ensure_ascii=False)).encode()
        digest = hashlib.sha256(content).hexdigest()
        if digest in kept:
            reason = "copy_of_eval" if kept[digest]["use"] == "eval" != row["use"] else "exact_duplicate"
            profile[row["source"]]["dropped"][reason] += 1
            continue
        kept[digest] = row | {"sha256": digest, "bytes": len(content)}
    return sorted(kept.values(), key=lambda row: (row["source"], row["path"]))


def split_of(sha256: str, use: str, heldout_percent: float) -> str:
    """`train` or `heldout`: a function of the content's hash alone, so a document never changes sides."""
    return "heldout" if use == "eval" or int(sha256[:8], 16) < heldout_percent / 100 * 2**32 else "train"


def _require_form(source: dict[str, Any], documents: int, malformed: int) -> None:
    """A source of malformed records alone has another format than ours; raises `UserError` with the one wanted."""
    if malformed and malformed == documents:
        form = "dialogue" if source["use"] == "chat" else "document"
        raise UserError(
            f"source `{source['name']}`: none of its {documents:,} records is a {form}; convert them to "
            f"{FORMS[form]}, or remove it from data/sources.yaml."
        )


def _require_text(rows: list[Row]) -> None:
    for split in ("train", "heldout"):
        if not any(row["split"] == split for row in rows if "text" in row):
            raise UserError(
                f"after cleaning, no document is left for the {split} split; add text in data/sources.yaml, or change "
                f"`clean.heldout_percent` or `clean.min_characters` in params.yaml."
            )


def _summary(name: str, entry: dict[str, Any]) -> str:
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in entry["dropped"].items())
    kept = f"{entry['kept']:,} of {entry['raw_documents']:,} kept, {entry['bytes'] / 1e6:.1f} MB"
    return f"clean      {name}: {kept}" + (f" (dropped: {reasons})" if reasons else "")


def _advice(name: str, named: list[str], count: int) -> str:
    more = f" and {count - len(named):,} more" if count > len(named) else ""
    return f"clean      {name}: not UTF-8: {', '.join(named)}{more}; convert them with iconv"


def _write(path: Path, rows: list[Row], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [pa.RecordBatch.from_pylist(rows[at : at + ROWS], schema) for at in range(0, len(rows), ROWS)]
    table = pa.Table.from_batches(parts, schema)
    pq.write_table(table, path, compression="zstd")


if __name__ == "__main__":
    stage.main("clean", lambda params, run: clean(params.clean, RAW, CLEAN, CHAT, run))
