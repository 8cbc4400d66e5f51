"""What text costs in tokens: bytes a token by language or source, and with vocabularies of other sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import tiktoken

from pipelines.encode import load_encoder, train_tokenizer


def fertility(encoder: tiktoken.Encoding, table: pd.DataFrame, column: str = "language") -> pd.DataFrame:
    """Bytes and tokens of the documents in `table` (text, bytes) by `column`, and bytes_per_token; most bytes first."""
    tokens = [len(ids) for ids in encoder.encode_ordinary_batch(table["text"].tolist())]
    sums = table[[column, "bytes"]].assign(tokens=tokens).groupby(column, as_index=False).sum()
    return sums.assign(bytes_per_token=sums["bytes"] / sums["tokens"]).sort_values("bytes", ascending=False)


def by_vocabulary(sizes: Iterable[int], texts: Sequence[str], table: pd.DataFrame) -> pd.DataFrame:
    """One row a size: bytes_per_token on `table` of a tokenizer with so many tokens that is learnt from `texts`.

    Raises `UserError` when the texts do not hold so many tokens.
    """
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer(size, texts).save(f"{folder}/tokenizer.json")
            cost = fertility(load_encoder(Path(folder)), table)
        rows.append({"vocab_size": size, "bytes_per_token": cost["bytes"].sum() / cost["tokens"].sum()})
    return pd.DataFrame(rows)
