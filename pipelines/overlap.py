"""Whether held-out text was trained on: runs of thirteen words that two texts share.

Every run becomes a 64-bit number; only the runs of held-out text, which are few, are kept and looked up while training
text passes by. Word boundaries and numbers come from whole-array operations, tens of megabytes a second and core.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

RUN = 13  # words; a held-out document that shares most of its runs of so many words with training text is contaminated
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
CODES = 0x110000  # code points of Unicode
SIEVE_BITS = 22  # of a number, enough to pass over nearly all runs that no held-out text has


def shares(heldout: Sequence[str], training: Iterable[str]) -> list[float]:
    """Of each held-out text, the share of its runs that are in any training text; 0 for a text without a run."""
    mine = [runs(text) for text in heldout]
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *mine]))
    if not len(wanted):
        return [0.0] * len(mine)
    seen, sieve = np.zeros(len(wanted), bool), np.zeros(1 << SIEVE_BITS, bool)
    sieve[wanted >> np.uint64(64 - SIEVE_BITS)] = True

    def look(text: str) -> None:
        found = runs(text)
        found = found[sieve[found >> np.uint64(64 - SIEVE_BITS)]]
        place = np.minimum(wanted.searchsorted(found), len(wanted) - 1)
        seen[place[wanted[place] == found]] = True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(look, training):
            pass
    return [float(seen[wanted.searchsorted(numbers)].mean()) if len(numbers) else 0.0 for numbers in mine]


def runs(text: str) -> np.ndarray:
    """A 64-bit number for every run of `RUN` words, [n - RUN + 1]; the same in every process."""
    words = _words(text.lower())
    count = len(words) - RUN + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    mixed = words[:count].copy()
    for place in range(1, RUN):
        mixed *= np.uint64(FACTOR)
        mixed += words[place : place + count]
    return mixed


def _words(text: str) -> np.ndarray:
    """A number for every word (\\w+ of a regular expression): sum of letter * FACTOR^place, modulo 2^64."""
    plain = text.isascii()
    coded = text.encode("ascii") if plain else text.encode("utf-32-le", "surrogatepass")
    letters = _letters(128 if plain else CODES)[np.frombuffer(coded, np.uint8 if plain else np.uint32)]
    edges = np.flatnonzero(np.diff(letters != 0, prepend=False, append=False))
    first, after = edges[::2], edges[1::2]
    size = 1 << max(12, len(letters).bit_length())
    letters *= _powers(FACTOR, size)[: len(letters)]
    sums = np.zeros(len(letters) + 1, np.uint64)
    np.cumsum(letters, out=sums[1:])
    return (sums[after] - sums[first]) * _powers(pow(FACTOR, -1, 1 << 64), size)[first]


@cache
def _letters(codes: int) -> np.ndarray:
    """A well-mixed number for each code point that belongs to words, 0 for the others."""
    mixed = (np.arange(1, codes + 1, dtype=np.uint64) * np.uint64(FACTOR)) >> np.uint64(3)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1)
    mixed[[not (chr(code).isalnum() or chr(code) == "_") for code in range(codes)]] = 0
    return mixed


@cache
def _powers(factor: int, count: int) -> np.ndarray:
    """factor^0, factor^1, ... modulo 2^64."""
    powers = np.full(count, factor, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, out=powers)
