"""Two honest opponents on the same held-out bytes: xz with the training text in its window, and a 5-gram byte model.

    python -m pipelines.baselines       data/clean -> reports/baselines.json

The byte model is interpolated Kneser-Ney (Ney, Essen and Kneser 1994; Chen and Goodman 1999, equation 22) with one
discount an order; contexts end at the start of a document.
"""

from __future__ import annotations

import lzma
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import stage
from pipelines.corpus import documents, heldout
from pipelines.params import Evaluate
from pipelines.tracking import Run

CLEAN = Path("data/clean")
ORDER = 5
START = 256  # the symbol before a document's first byte
SYMBOL_BITS = 9
WINDOW_BYTES = 64 << 20  # training text that xz sees at most
TRAINING_BYTES = 256 << 20  # training text that the byte model counts at most


def baselines(params: Evaluate, clean: Path, run: Run | None = None) -> dict[str, Any]:
    """Bits per byte of both models on the held-out sample."""
    table = documents(clean, ["text", "split"])
    train = [text.encode() for text in table["text"][table["split"] == "train"]]
    table = heldout(clean, params.max_bytes).sort_values("source", kind="stable")  # as the training text is
    scored = [text.encode() for text in table["text"]]
    with stage.progress("baselines", 2) as advance, ThreadPoolExecutor() as pool:
        compressed = pool.submit(xz_bits, train, scored)
        model = KneserNey(_first(train, TRAINING_BYTES))
        grams = sum(map(model.bits, scored))
        advance()
        bits = {"xz": compressed.result(), "five_gram": grams}
        advance()
    size = sum(map(len, scored))
    found = {name: total / size for name, total in bits.items()}
    stage.say(f"baselines  xz {found['xz']:.3f}, 5-gram {found['five_gram']:.3f} bits per byte held out")
    return found | {"bytes": size}


def xz_bits(train: list[bytes], heldout: list[bytes]) -> float:
    """Bits that `heldout` adds to the compressed training text."""
    window = b"\n".join(_first(train, WINDOW_BYTES))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": WINDOW_BYTES * 2}]

    def compressed(texts: list[bytes]) -> int:
        return 8 * len(lzma.compress(b"\n".join([window, *texts]), lzma.FORMAT_RAW, filters=filters))

    with ThreadPoolExecutor() as pool:
        before, after = pool.map(compressed, [[], heldout])
    return float(after - before)


class KneserNey:
    """Interpolated Kneser-Ney over bytes, `ORDER` - 1 bytes of context. Grams are integers of 9 bits a symbol."""

    def __init__(self, texts: list[bytes]) -> None:
        full = np.concatenate([_grams(text) for text in texts])
        grams, counts = np.unique(full, return_counts=True)
        self.levels = []
        for order in range(ORDER, 0, -1):
            self.levels.append(_Level(grams, counts))
            grams, counts = np.unique(grams & _mask(order - 1), return_counts=True)

    def bits(self, text: bytes) -> float:
        """Code length of one document."""
        grams = _grams(text)
        p = np.full(len(grams), 1 / 256)
        for order, level in zip(range(1, ORDER + 1), reversed(self.levels), strict=True):
            p = level.interpolate(grams & _mask(order), p)
        return float(-np.log2(p).sum())


class _Level:
    """Counts of one order: of grams at the highest, of different left neighbours (Kneser-Ney) below."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray) -> None:
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self.discount = once / (once + 2 * twice) if once else 0.5
        self.grams, self.counts = grams, counts
        self.contexts, first = np.unique(grams >> SYMBOL_BITS, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.followers = np.diff(np.append(first, len(grams)))

    def interpolate(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P(last symbol | the ones before) from this order's counts and the order below."""
        counts, _ = _look_up(self.grams, self.counts, grams)
        totals, known = _look_up(self.contexts, self.totals, grams >> SYMBOL_BITS)
        followers, _ = _look_up(self.contexts, self.followers, grams >> SYMBOL_BITS)
        totals = np.maximum(totals, 1)
        here = np.maximum(counts - self.discount, 0) / totals + self.discount * followers / totals * lower
        return np.where(known, here, lower)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(value of each wanted key or 0, whether the key is there); `keys` are sorted."""
    place = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
    found = keys[place] == wanted
    return np.where(found, values[place], 0), found


def _grams(text: bytes) -> np.ndarray:
    """The `ORDER` symbols that end at each byte, as one integer, [n] int64."""
    symbols = np.concatenate([np.full(ORDER - 1, START), np.frombuffer(text, np.uint8)]).astype(np.int64)
    grams = np.zeros(len(text), np.int64)
    for place in range(ORDER):
        grams = grams << SYMBOL_BITS | symbols[place : place + len(text)]
    return grams


def _mask(order: int) -> int:
    return (1 << SYMBOL_BITS * order) - 1


def _first(texts: list[bytes], limit: int) -> list[bytes]:
    """Texts from the start, as many as fit into `limit` bytes; at least one."""
    fits = np.cumsum([len(text) for text in texts]) <= limit
    return texts[: max(int(fits.sum()), 1)]


if __name__ == "__main__":
    stage.main("baselines", lambda params, run: baselines(params.evaluate, CLEAN, run))
