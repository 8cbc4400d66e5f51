"""Whether held-out text was trained on: runs of thirteen words that two texts share.

Every run becomes a 64-bit number; only the runs of held-out text, which are few, are kept and looked up while training
text passes by. Word boundaries and numbers come from whole-array operations over several texts at once, two hundred
megabytes a second and core.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np

RUN = 13  # words; a held-out document that shares most of its runs of so many words with training text is contaminated
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
INVERSE = pow(FACTOR, -1, 1 << 64)
CODES = 0x110000  # code points of Unicode
LETTERS = bytes(ord(chr(code).lower()) if chr(code).isalnum() or chr(code) == "_" else 0 for code in range(128))
LETTERS += bytes(128)
SIEVE_BITS = 22  # of a number, taken twice: enough to pass over nearly all runs that no held-out text has
SHIFTS, MASK = np.array([42, 20], np.uint64), np.uint64((1 << SIEVE_BITS) - 1)
BATCH = 1 << 16  # characters of short texts that are numbered together


def shares(heldout: Sequence[str], training: Iterable[str]) -> list[float]:
    """Of each held-out text, the share of its runs that are in any training text; 0 for a text without a run."""
    mine = [runs([text]) for text in heldout]
    wanted = np.sort(np.concatenate([np.zeros(0, np.uint64), *mine]))
    if not len(wanted):
        return [0.0] * len(mine)
    seen, sieves = np.zeros(len(wanted), bool), np.zeros((2, 1 << SIEVE_BITS), bool)
    for sieve, shift in zip(sieves, SHIFTS, strict=True):
        sieve[wanted >> shift & MASK] = True

    def look(texts: list[str]) -> None:
        found = runs(texts)
        for sieve, shift in zip(sieves, SHIFTS, strict=True):
            found = found[sieve[found >> shift & MASK]]
        place = np.minimum(wanted.searchsorted(found), len(wanted) - 1)
        seen[place[wanted[place] == found]] = True

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future[None]] = deque()
        for batch in _batches(training):
            waiting.append(pool.submit(look, batch))
            if len(waiting) > 4 * cores:
                waiting.popleft().result()
        for last in waiting:
            last.result()
    return [float(seen[wanted.searchsorted(numbers)].mean()) if len(numbers) else 0.0 for numbers in mine]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts together up to about `BATCH` characters, those in ASCII apart from others."""
    batch, size = [], 0
    for text in texts:
        if batch and (size + len(text) > BATCH or text.isascii() != batch[0].isascii()):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    yield batch


def runs(texts: list[str]) -> np.ndarray:
    """A 64-bit number for every run of `RUN` words in one of the texts; the same in every process."""
    words, owners = _words(texts)
    if len(words) < RUN:
        return np.zeros(0, np.uint64)
    size = _room(len(words))
    sums = np.zeros(len(words) + 1, np.uint64)
    np.cumsum(words * _powers(INVERSE, size)[: len(words)], out=sums[1:])
    count = len(words) - RUN + 1
    numbers = (sums[RUN:] - sums[:-RUN]) * _powers(FACTOR, size)[:count]
    return numbers[owners[:count] == owners[RUN - 1 :]]


def _words(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A number for every word (\\w+ of a regular expression) in lower case, and which text it is in.

    The number is the sum of letter * FACTOR^place, modulo 2^64, and then mixed.
    """
    joined = "\n".join(texts)
    if joined.isascii():
        letters = np.frombuffer(joined.encode().translate(LETTERS), np.uint8)
    else:
        texts = [text.lower() for text in texts]
        codes = np.frombuffer("\n".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        letters = codes * _in_words()[codes]
    inside = np.zeros(len(letters) + 2, bool)
    np.not_equal(letters, 0, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    first, after = edges[::2], edges[1::2]
    size = _room(len(letters))
    sums = np.zeros(len(letters) + 1, np.uint64)
    np.cumsum(letters * _powers(FACTOR, size)[: len(letters)], out=sums[1:])
    words = (sums[after] - sums[first]) * _powers(INVERSE, size)[first]
    words = (words ^ (words >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return words, np.cumsum([len(text) + 1 for text in texts]).searchsorted(first, side="right")


@cache
def _in_words() -> np.ndarray:
    """Of each code point, whether it belongs to words."""
    return np.array([chr(code).isalnum() or chr(code) == "_" for code in range(CODES)])


def _room(count: int) -> int:
    """A power of two that is not less, so that few lengths of `_powers` are kept."""
    return 1 << max(12, count.bit_length())


@cache
def _powers(factor: int, count: int) -> np.ndarray:
    """factor^0, factor^1, ... modulo 2^64."""
    powers = np.full(count, factor, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, out=powers)
