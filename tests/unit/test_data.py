"""Rows of a training: what they hold is a pure function of the seed and the index, for corpora and for dialogues."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.data import IGNORED, PackedDialogues, PackedTokens, batch


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three shards; document k holds only the token k; the two long ones come from sources of their own."""
    lengths = [[5, 9, 30], [17], [1, 2, 3, 40]]
    names = ["a/0", "a/1", "b/2", "a/3", "a/4", "a/5", "a/6", "c/7"]
    shards, number = [], 0
    for shard, sizes in enumerate(lengths):
        tokens = np.concatenate([np.full(size, number + i) for i, size in enumerate(sizes)]).astype(np.uint16)
        documents, number = names[number : number + len(sizes)], number + len(sizes)
        tokens.tofile(tmp_path / f"train-{shard:05d}.bin")
        offsets = [0, *np.cumsum(sizes).tolist()]
        shards.append({"file": f"train-{shard:05d}.bin", "offsets": offsets, "documents": documents})
    (tmp_path / "manifest.json").write_text(json.dumps({"dtype": "uint16", "splits": {"train": {"shards": shards}}}))
    return tmp_path


def test_an_epoch_holds_every_token_once_and_targets_stay_inside_documents(corpus: Path) -> None:
    rows = PackedTokens(corpus, "train", sequence_length=10, seed=0)
    assert rows.rows_per_epoch == 10
    seen = batch(rows, 0, 10)
    counts = np.bincount(seen.input_ids.flatten(), minlength=8)
    assert counts.sum() == 100 and (np.array([5, 9, 30, 17, 1, 2, 3, 40]) - counts).sum() == 7
    assert torch.equal(seen.input_ids, seen.document_ids)
    inside = seen.targets != IGNORED
    assert torch.equal(seen.targets[inside], seen.input_ids[inside])


def test_rows_are_a_pure_function_of_seed_and_index(corpus: Path) -> None:
    first, again = (PackedTokens(corpus, "train", 10, seed=4) for _ in range(2))
    late = [again.row(index) for index in (37, 3)]
    for mine, other in zip([first.row(37), first.row(3)], late, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, other, strict=True))
    other_seed = PackedTokens(corpus, "train", 10, seed=5)
    assert any(not np.array_equal(first.row(i)[0], other_seed.row(i)[0]) for i in range(10))


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_batch_holds_the_sources_in_proportion(corpus: Path, epoch: int) -> None:
    rows = PackedTokens(corpus, "train", sequence_length=1, seed=0)
    start = epoch * rows.rows_per_epoch
    owners = np.array([rows.row(start + index)[2][0] for index in range(rows.rows_per_epoch)])
    for document, share in ((2, 30 / 107), (7, 40 / 107)):
        seen = np.array([(owners[at : at + 10] == document).sum() for at in range(len(owners) - 10)])
        assert abs(seen - 10 * share).max() <= 2
    assert (np.diff(np.flatnonzero(owners == 3)) > 1).any()  # inside a source the order is random


def test_a_corpus_shorter_than_a_row_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match="fewer than one row"):
        PackedTokens(corpus, "train", sequence_length=500, seed=0)


def test_dialogues_are_packed_whole_and_only_the_assistant_counts() -> None:
    dialogues = [(np.arange(10) + 10 * k, np.arange(10) >= 5) for k in range(7)]
    rows = PackedDialogues(dialogues, sequence_length=20, seed=0)
    ids, targets, owner = rows.row(0)
    assert sorted(set(owner) - {-1}) == sorted({owner[0], owner[9]}) and (owner == -1).sum() == 2
    for number in set(owner) - {-1}:
        assert targets[owner == number].tolist() == [IGNORED] * 4 + [10 * number + k for k in range(5, 10)]
    assert len({tuple(rows.row(i)[0]) for i in range(40)}) > 4


def test_every_epoch_of_dialogues_is_packed_once() -> None:
    dialogues = [(np.arange(n) + 100 * n, np.arange(n) >= 3) for n in range(5, 20)]
    packed = []

    class Watched(PackedDialogues):
        def _pack(self, epoch: int) -> list[list[int]]:
            packed.append(epoch)
            return super()._pack(epoch)

    rows, resumed = (kind(dialogues, sequence_length=20, seed=0) for kind in (Watched, PackedDialogues))
    expected = [numbers for epoch in range(30) for numbers in resumed._pack(epoch)]
    for index in (*range(len(expected)), 3):
        owner = rows.row(index)[2]
        assert list(dict.fromkeys(owner[owner >= 0].tolist())) == expected[index]
    assert packed == [*range(30), 0]
    for index in (len(expected) - 1, 40):
        assert np.array_equal(resumed.row(index), rows.row(index))
