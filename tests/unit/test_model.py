"""Sampling, losses, scores, the order of data, checkpoints, LoRA and impossible sizes."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from model import ModelConfig, build, generate
from model.checkpoint import CheckpointStore
from model.data import IGNORED, PackedDialogues, PackedTokens, batch
from model.lora import add_lora, merge_lora
from model.losses import cross_entropy
from model.optim import balance_experts
from model.schedule import learning_rate
from model.score import score, window_tokens

TINY = ModelConfig(
    model_type="deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, initializer_range=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return build(TINY, seed=3)


def test_sampling_follows_its_seed(net) -> None:
    ids = torch.randint(0, 64, (2, 5))
    draw = lambda seed: generate(net, ids, 10, temperature=1.0, top_p=0.9, seed=seed)  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    with pytest.raises(ValueError, match="top_p"):
        generate(net, ids, top_p=0.0)


def test_chunked_cross_entropy_equals_torch(monkeypatch) -> None:
    monkeypatch.setattr("model.losses.CHUNK", 7)
    hidden, head = torch.randn(30, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(0, 40, (30,))
    targets[::4] = IGNORED
    ours = cross_entropy(hidden, head, targets)
    theirs = torch.nn.functional.cross_entropy(hidden @ head.t(), targets)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours * 3, [hidden, head]), torch.autograd.grad(theirs * 3, [hidden, head]), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [2, 7, 8, 64])
def test_a_token_is_scored_once_in_the_first_window_that_holds_it(net, monkeypatch, window: int) -> None:
    monkeypatch.setattr("model.score.TOKENS", 2 * window)
    documents = [np.random.default_rng(n).integers(0, 64, n) for n in (0, 1, 2, 7, 8, 9, 21, 40, 40)]
    seen = []
    nats, load_ME = score(net, documents, window, torch.device("cpu"), seen.append)
    assert sum(seen) == window_tokens(documents, window) == load_ME.sum() / TINY.num_experts_per_tok
    for ids, found in zip(documents, nats, strict=True):
        expected = np.zeros(max(len(ids) - 1, 0))
        for token in range(1, len(ids)):
            start = 0 if token < window else (token - window) // (window // 2) * (window // 2) + window // 2
            with torch.no_grad():
                log_p = net(torch.from_numpy(ids[start:token])[None]).logits[0, -1].log_softmax(-1)
            expected[token - 1] = -log_p[ids[token]]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_head_s_gradient_is_summed_in_fp32_whatever_its_type(monkeypatch) -> None:
    """Of 128 chunks: off by 3e-3, the rounding of the result; sums in bfloat16 would be off by 9e-3."""
    monkeypatch.setattr("model.losses.CHUNK", 4)
    hidden, head = torch.randn(512, 16).bfloat16(), torch.randn(40, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 40, (512,))
    (ours,) = torch.autograd.grad(cross_entropy(hidden, head, targets), [head])
    exact = head.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(torch.nn.functional.cross_entropy(hidden.double() @ exact.t(), targets), [exact])
    assert ours.dtype is torch.bfloat16
    assert (ours.double() - theirs).norm() <= 5e-3 * theirs.norm()


def test_bias_rule_lifts_the_idle_and_lowers_the_busy(net) -> None:
    load = torch.tensor([[10, 0, 5, 5, 5, 5, 5, 5]])
    balance_experts(net, load, speed=0.5)
    bias = net.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]
    bias.zero_()


def test_schedule_warms_up_stays_and_decays() -> None:
    rates = [learning_rate(step, 100, 2.0, warmup_steps=9, decay_fraction=0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:51] == [2.0] * 42
    assert rates[-1] == pytest.approx(0.04)
    assert all(b < a for a, b in zip(rates[50:], rates[51:], strict=False))


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


def test_checkpoints_are_checked_and_a_damaged_one_is_skipped(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    assert store.latest() is None
    for step in (1, 2, 3):
        store.save(step, {"step": step})
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000002", "step-00000003"]
    (store.folder / "step-00000003" / "state.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.latest() == {"step": 2}
    (store.folder / "step-00000002" / "sha256").write_bytes(b"\xff")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert store.latest() is None
    assert len(caught) == 2


def test_a_failed_save_leaves_no_trace(tmp_path: Path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, {"step": 1})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        store.save(2, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_lora_starts_as_nothing_trains_little_and_merges_exactly() -> None:
    net = build(TINY, seed=0)
    ids = torch.randint(0, 64, (2, 12))
    before = net(ids).logits
    add_lora(net, rank=4, alpha=8.0, seed=0)
    torch.testing.assert_close(net(ids).logits, before, rtol=0, atol=1e-5)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.6 * sum(p.numel() for p in net.parameters())
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        net(ids).logits.square().mean().backward()
        optimizer.step()
    tuned = net(ids).logits
    assert (tuned - before).abs().max() > 1e-3
    merge_lora(net)
    torch.testing.assert_close(net(ids).logits, tuned, rtol=0, atol=1e-5)
    assert net.state_dict().keys() == build(TINY).state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"n_group": 3}, "multiple of n_group"),
        ({"n_group": 4, "topk_group": 5}, "topk_group"),
        ({"qk_rope_head_dim": 7}, "even"),
        ({"v_head_dim": 99}, "v_head_dim"),
        ({"hiden_size": 8}, "did you mean 'hidden_size'"),
        ({"hidden_size": "8"}, "must be of type int"),
        ({"num_hidden_layers": 0}, "at least 1"),
    ],
)
def test_impossible_architectures_are_named(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TINY.replace(**changes)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="demo, demo-v3, v3-671b, v4-flash, v4-pro"):
        ModelConfig.preset("huge")
