"""Two models on held-out documents that both have scored: their difference, document by document.

What makes a document hard is then the same for both, and a much smaller difference shows than between two averages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pipelines.bootstrap import interval


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs in bits per byte over documents that both have scored, with its 95 % interval."""

    documents: int
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the interval allows to say; lower is better."""
        if self.low == self.high == 0:
            return "the same"
        if self.low <= 0 <= self.high:
            return "no difference that these documents can show"
        return "better" if self.high < 0 else "worse"


def difference(ours: pd.DataFrame | None, theirs: pd.DataFrame | None) -> Difference | None:
    """Of two tables with the columns sha256, bytes and nats; None without a table, or when they share fewer than two
    documents."""
    if ours is None or theirs is None:
        return None
    both = ours.merge(theirs[["sha256", "nats"]], on="sha256", suffixes=("", "_theirs"))
    if len(both) < 2:
        return None
    parts, sizes = (both["nats"] - both["nats_theirs"]).to_numpy(), both["bytes"].to_numpy()
    low, high = interval(parts, sizes) / math.log(2)
    return Difference(len(both), float(parts.sum() / sizes.sum() / math.log(2)), float(low), float(high))


def documents(folder: Path, variant: str) -> pd.DataFrame | None:
    """What `evaluate` wrote of each held-out document, below reports/plots or in a version's evidence."""
    file = folder / f"documents-{variant}.csv"
    return pd.read_csv(file) if file.exists() else None
