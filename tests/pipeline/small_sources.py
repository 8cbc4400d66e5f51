"""Small sources of text, raw and cleaned, for the tests of the data stages."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from pipelines.clean import clean
from pipelines.params import Clean


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


def random_text(seed: int, words: int = 120) -> str:
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
PLAIN = {"use": "pretrain", "files": {f"{n}.txt": random_text(n) for n in range(30)}}
