"""Reading what `clean` wrote: documents and dialogues as tables, the held-out sample that everything is scored on."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pipelines.params import UserError


def documents(clean: Path, columns: list[str]) -> pd.DataFrame:
    """`columns` of data/clean/documents.parquet; raises `UserError` when it is absent."""
    return _table(clean / "documents.parquet", columns)


def dialogues(chat: Path, columns: list[str]) -> pd.DataFrame:
    """`columns` of data/chat/dialogues.parquet; raises `UserError` when it is absent."""
    return _table(chat / "dialogues.parquet", columns)


def heldout(clean: Path, max_bytes: int) -> pd.DataFrame:
    """Held-out documents (text, source, language, bytes) in order of their hash, until `max_bytes` are reached.

    The order makes a smaller sample a part of every larger one; at least one document is always there.
    """
    table = documents(clean, ["text", "source", "language", "sha256", "bytes", "split"])
    table = table[table["split"] == "heldout"].sort_values("sha256", ignore_index=True)
    fits = table["bytes"].cumsum() <= max_bytes
    return table[fits | (table.index == 0)].drop(columns="split")


def in_turn(clean: Path, number: int) -> list[tuple[str, str]]:
    """(text, language) of `number` held-out documents, one language after the other so that several are covered."""
    table = documents(clean, ["text", "language", "sha256", "split"])
    heldout = table[table["split"] == "heldout"].sort_values("sha256")
    turn = heldout.groupby("language").cumcount()
    chosen = heldout.assign(turn=turn).sort_values(["turn", "sha256"]).head(number)
    return list(zip(chosen["text"], chosen["language"], strict=True))


def _table(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.exists():
        raise UserError(f"{path} is missing; `dvc repro clean` makes it.")
    return pd.read_parquet(path, columns=columns)
