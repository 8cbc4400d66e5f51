"""How fast text goes through `clean`, `contracts` and `encode`, on all cores: megabytes of raw text a second.

    python kernels/bench/data.py --output data.json

The text is that of the Python files installed here, as plain text. Times are wall time; encoding leaves the training of
the tokenizer out, which sees the first megabytes alone. Beside it: what the tokenizers library takes for the same ids.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import great_expectations.expectations  # noqa: F401  (seconds that are no part of the text's time)
import pandas as pd
import tiktoken
from measure import Row, Settings, Unequal, main
from tokenizers import Tokenizer

from pipelines.clean import clean
from pipelines.commands import PRESETS
from pipelines.contracts import contracts
from pipelines.encode import encoded, load_encoder, train_tokenizer, write_tokenizer
from pipelines.params import load_params

TARGETS = {"encode": 10.0, "clean": 20.0}
MEGABYTES, QUICK_MEGABYTES, TRAINING_DOCUMENTS, VOCABULARY = 96, 24, 400, 4096


def measure(settings: Settings, _: argparse.Namespace) -> list[Row]:
    """Two rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _gather(folder / "raw", (QUICK_MEGABYTES if settings.quick else MEGABYTES) * 10**6)
        taken = _clean_and_check(folder)
        table = pd.read_parquet(folder / "clean" / "documents.parquet", columns=["text", "bytes"])
        both = size / sum(taken.values()) / 1e6
        parts = ", ".join(f"{name} {size / seconds / 1e6:.0f}" for name, seconds in taken.items())
        first = Row("clean", "clean and contracts together", TARGETS["clean"], both, unit="MB/s", ours=parts)
        first.note = f"{size / 1e6:.0f} MB of plain text"
        return [_encode(table, folder), first]


def _gather(raw: Path, most: int) -> int:
    """data/raw with one source of installed Python files; returns its bytes."""
    raw.mkdir(parents=True)
    files, size = [], 0
    with ZipFile(raw / "text.zip", "w") as packed:
        for content in _texts():
            path = f"{len(files):05d}.txt"
            packed.writestr(path, content)
            files.append({"path": path, "language": "en"})
            size += len(content)
            if size >= most:
                break
    source = {"name": "text", "use": "pretrain", "format": "text", "licence": "MIT", "files": files}
    (raw / "manifest.json").write_text(json.dumps({"sources": [source]}))
    return size


def _texts() -> Iterator[bytes]:
    for folder in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        for file in sorted(Path(folder).rglob("*.py")) if folder.endswith("-packages") else ():
            content = file.read_bytes()
            if len(content) > 300 and content.isascii():
                yield content


def _clean_and_check(folder: Path) -> dict[str, float]:
    """Seconds of both stages."""
    params, start = load_params(PRESETS / "demo.yaml"), time.perf_counter()
    clean(params.clean, folder / "raw", folder / "clean", folder / "chat")
    middle = time.perf_counter()
    rates = ("duplicate_rate", "overlap_rate", "secret_rate", "control_character_rate")
    limits = params.contracts.model_copy(update={f"max_{name}": 1.0 for name in rates})  # any Python files will do
    pages = [folder / name for name in ("accepted.json", "page.html", "failed.html")]
    contracts(limits, folder / "clean", folder / "chat", *pages)
    return {"clean": middle - start, "contracts": time.perf_counter() - middle}


def _encode(table: pd.DataFrame, folder: Path) -> Row:
    tokenizer = train_tokenizer(VOCABULARY, table["text"].head(TRAINING_DOCUMENTS))
    (folder / "tokens").mkdir()
    write_tokenizer(tokenizer, folder / "tokens")
    encoder, size = load_encoder(folder / "tokens"), int(table["bytes"].sum())
    start = time.perf_counter()
    for _ in encoded(table["text"], encoder):
        pass
    speed = size / (time.perf_counter() - start) / 1e6
    peer = _library(table["text"].head(TRAINING_DOCUMENTS), tokenizer, encoder)
    return Row("encode", "encode", TARGETS["encode"], speed, unit="MB/s", peer=f"tokenizers {peer:.1f} MB/s")


def _library(texts: pd.Series, tokenizer: Tokenizer, encoder: tiktoken.Encoding) -> float:
    """Megabytes a second of the library that trained the merges; raises `Unequal` when its ids are others."""
    start = time.perf_counter()
    found = tokenizer.encode_batch_fast(texts.tolist(), add_special_tokens=False)
    speed = texts.str.encode("utf-8").str.len().sum() / (time.perf_counter() - start) / 1e6
    for text, one in zip(texts, found, strict=True):
        if one.ids != encoder.encode_ordinary(text):
            raise Unequal("tiktoken and tokenizers give different ids; nothing was compared")
    return float(speed)


if __name__ == "__main__":
    main("Speed of the data stages.", measure)
