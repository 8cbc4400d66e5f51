"""Batches of packed documents. Which tokens a row holds is a pure function of (seed, index of the row), so a run that
was killed and resumed sees the same stream.

Pretraining joins the documents of one epoch in a shuffled order and cuts that stream into rows; the rows are shuffled
again, so that any batch holds the sources in about the corpus's proportion. Chat packs whole dialogues into rows.
Shapes: B rows a batch, S tokens a row, N rows an epoch.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.losses import IGNORED


@dataclass(frozen=True)
class TokenBatch:
    """input_ids, targets, document_ids: [B, S] int64; `IGNORED` targets do not count. documents: their numbers."""

    input_ids: Tensor
    targets: Tensor
    document_ids: Tensor
    documents: list[int]

    def split(self, rows: int) -> list[TokenBatch]:
        """Parts of at most `rows` rows."""
        columns = (self.input_ids.split(rows), self.targets.split(rows), self.document_ids.split(rows))
        return [TokenBatch(*part, self.documents) for part in zip(*columns, strict=True)]


class Rows(Protocol):
    """An endless, shuffled sequence of rows."""

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row `index`: (input ids, targets, number of the document of each token), each [S]."""
        ...


def batch(rows: Rows, start: int, count: int) -> TokenBatch:
    """Rows `start` to `start + count - 1`."""
    columns = [np.stack(column) for column in zip(*(rows.row(start + i) for i in range(count)), strict=True)]
    ids, targets, documents = (torch.from_numpy(column.astype(np.int64)) for column in columns)
    return TokenBatch(ids, targets, documents, sorted(set(documents.flatten().tolist()) - {-1}))


class PackedTokens:
    """Rows of a split of an encoded corpus: a folder with manifest.json and .bin shards, mapped into memory."""

    def __init__(self, folder: Path, split: str, sequence_length: int, seed: int) -> None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        shards = manifest["splits"][split]["shards"]
        self.tokens = [np.memmap(folder / shard["file"], dtype=manifest["dtype"], mode="r") for shard in shards]
        self.shard = np.repeat(np.arange(len(shards)), [len(shard["offsets"]) - 1 for shard in shards])
        self.starts = np.concatenate([np.asarray(shard["offsets"][:-1], dtype=np.int64) for shard in shards])
        self.lengths = np.concatenate([np.diff(np.asarray(shard["offsets"], dtype=np.int64)) for shard in shards])
        names = [name for shard in shards for name in shard["documents"]]
        self.source = np.unique([name.partition("/")[0] for name in names], return_inverse=True)[1]
        self.sequence_length, self.seed = sequence_length, seed
        self.rows_per_epoch = (int(self.lengths.sum()) - 1) // sequence_length
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"the {split} split has {int(self.lengths.sum())} tokens, fewer than one row of sequence_length "
                f"{sequence_length}; lower sequence_length or add text"
            )
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order of documents, end of each in the epoch's stream, order of rows).

        A row counts to the source of its middle token.
        """
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.lengths))
        ends, rows = self.lengths[order].cumsum(), random.permutation(self.rows_per_epoch)
        middle = rows * self.sequence_length + self.sequence_length // 2
        return order, ends, rows[interleave(self.source[order[ends.searchsorted(middle, "right")]])]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Rows.row`; the first token of a document is never a target."""
        epoch, place = divmod(index, self.rows_per_epoch)
        order, ends, row_order = self._epoch(epoch)
        start = int(row_order[place]) * self.sequence_length
        stop = start + self.sequence_length + 1
        pieces, owners = [], []
        for number in range(int(ends.searchsorted(start, "right")), int(ends.searchsorted(stop, "left")) + 1):
            document = order[number]
            first = int(ends[number] - self.lengths[document])
            low, high = max(start, first) - first, min(stop, int(ends[number])) - first
            begin = int(self.starts[document])
            pieces.append(self.tokens[self.shard[document]][begin + low : begin + high])
            owners.append(np.full(high - low, document))
        ids, owner = np.concatenate(pieces).astype(np.int64), np.concatenate(owners)
        return ids[:-1], np.where(owner[1:] == owner[:-1], ids[1:], IGNORED), owner[:-1]


def interleave(kind_N: np.ndarray) -> np.ndarray:
    """Order, [N], in which every stretch holds each kind in about its proportion; those of a kind stay in theirs."""
    place_N = np.empty(len(kind_N))
    for kind in np.unique(kind_N):
        mine = np.flatnonzero(kind_N == kind)
        place_N[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return place_N.argsort(kind="stable")


class PackedDialogues:
    """Rows of whole dialogues; only tokens marked as the assistant's are targets."""

    def __init__(self, dialogues: Sequence[tuple[np.ndarray, np.ndarray]], sequence_length: int, seed: int) -> None:
        """dialogues: pairs of token ids [n] and booleans [n] that mark the assistant's tokens; cut to one row each."""
        if not dialogues:
            raise ValueError("there are no dialogues to train on; add a chat source or another language")
        self.dialogues = [(ids[: sequence_length + 1], marks[: sequence_length + 1]) for ids, marks in dialogues]
        self.sequence_length, self.seed = sequence_length, seed
        self._epoch = lru_cache(maxsize=2)(self._pack)
        self._starts = [0]  # the first row of each epoch, as far as they were needed

    def _pack(self, epoch: int) -> list[list[int]]:
        """Fill rows first come, first served in a shuffled order."""
        rows: list[list[int]] = [[]]
        room = self.sequence_length
        for number in np.random.default_rng([self.seed, epoch]).permutation(len(self.dialogues)).tolist():
            need = len(self.dialogues[number][0]) - 1
            if need > room:
                rows.append([])
                room = self.sequence_length
            rows[-1].append(number)
            room -= need
        return rows

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Rows.row`; the room that is left belongs to document -1."""
        while self._starts[-1] <= index:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, index) - 1
        ids, targets, owner = (np.full(self.sequence_length, fill) for fill in (0, IGNORED, -1))
        at = 0
        for number in self._epoch(epoch)[index - self._starts[epoch]]:
            tokens, marks = self.dialogues[number]
            span = slice(at, at + len(tokens) - 1)
            ids[span], targets[span] = tokens[:-1], np.where(marks[1:], tokens[1:], IGNORED)
            owner[span] = number
            at = span.stop
        return ids, targets, owner
