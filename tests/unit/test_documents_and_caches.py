"""What must hold of V3 and V4 alike: documents do not see each other, caches change nothing, speculation is exact."""

import gc
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import V3, V4

from model import ModelConfig, build, generate
from model.cache import Cache
from model.config import SPARSE
from model.context import Context
from model.data import IGNORED
from model.decoding import DraftMonitor
from model.losses import later_targets, losses_of
from model.moe import HashRouter, balanced_table
from model.transformer import MoETransformer


def made(config: ModelConfig) -> MoETransformer:
    """With vectors away from their start, so that sinks, biases and norms matter."""
    net = build(config, seed=3).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if tensor.ndim < 2 or name.endswith("position_bias"):
                tensor.add_(torch.randn(tensor.shape, generator=random) * 0.3)
    return net


NETS = {"v3": made(V3), "v4": made(V4)}


@pytest.fixture(params=list(NETS), scope="module")
def net(request: pytest.FixtureRequest) -> MoETransformer:
    return NETS[request.param]


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def test_a_training_step_leaves_nothing_to_the_garbage_collector(net: MoETransformer) -> None:
    """A cycle would keep the step's memory until the collector comes, many steps later."""
    ids = tokens(2, 33)
    gc.disable()
    try:
        parts, statistics = losses_of(net.train(), ids[:, :-1], ids[:, 1:], torch.zeros(2, 32, dtype=torch.long), True)
        torch.autograd.grad(sum(parts.values()), list(net.parameters()), allow_unused=True)
        del parts, statistics
        left = [found for found in gc.get_objects() if type(found) is Context]
    finally:
        gc.enable()
        net.eval()
    assert not left


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), kind=st.sampled_from(list(NETS)))
def test_a_packed_document_has_the_logits_of_the_document_alone(lengths: list[int], kind: str) -> None:
    ids = tokens(1, sum(lengths))
    documents = torch.repeat_interleave(torch.arange(len(lengths)) % 2, torch.tensor(lengths))[None]  # ids come again
    with torch.no_grad():
        packed = NETS[kind](ids, documents, with_mtp=True)
        alone = [NETS[kind](part, with_mtp=True) for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed.logits[0], torch.cat([a.logits[0] for a in alone]), rtol=0, atol=1e-5)
    inner = [a.mtp_hidden[0, :-1] for a in alone]  # the last token of a document has no next one
    mine = [part[:-1] for part in packed.mtp_hidden[0].split(lengths)]
    torch.testing.assert_close(torch.cat(mine), torch.cat(inner), rtol=0, atol=1e-5)


def test_losses_of_packed_documents_are_means_over_their_tokens(net: MoETransformer) -> None:
    lengths = [9, 30, 25]
    ids, documents = tokens(1, 64), torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    targets = torch.where(documents == documents.roll(-1, 1), ids.roll(-1, 1), IGNORED)
    parts = [x.split(lengths, dim=1) for x in (ids, targets, documents)]
    net.train()
    packed, _ = losses_of(net, ids, targets, documents, sparse=True)
    alone = [losses_of(net, *part, sparse=True)[0] for part in zip(*parts, strict=True)]
    balance = net(ids, documents, with_mtp=True).statistics["balance_loss"]
    balances = torch.stack(
        [net(*part, with_mtp=True).statistics["balance_loss"] for part in zip(*parts[::2], strict=True)]
    )
    net.eval()
    entries = [n - V4.compress_rates[SPARSE] + 1 for n in lengths]  # queries that see one
    weights = {"loss": [n - 1 for n in lengths], "mtp_loss": [n - 2 for n in lengths], "indexer_loss": entries}
    for name in packed.keys() & weights.keys():
        mean = sum(w * part[name].item() for w, part in zip(weights[name], alone, strict=True)) / sum(weights[name])
        assert packed[name].item() == pytest.approx(mean, rel=1e-5), name
    counts = torch.tensor(lengths)[:, None] - torch.tensor([*[0] * (len(balance) - 1), 1])  # the MTP block: one less
    torch.testing.assert_close(balance, (balances * counts).sum(0) / counts.sum(0))


def test_padding_counts_nowhere(net: MoETransformer) -> None:
    ids = tokens(2, 30)
    documents = torch.zeros_like(ids)
    padded = torch.nn.functional.pad(ids, (0, 10)), torch.nn.functional.pad(documents, (0, 10), value=-1)
    targets = torch.nn.functional.pad(ids.roll(-1, 1), (0, 10), value=IGNORED)
    net.train()
    mine, seen = losses_of(net, padded[0], targets, padded[1], sparse=True)
    theirs, alone = losses_of(net, ids, ids.roll(-1, 1), documents, sparse=True)
    net.eval()
    assert torch.equal(seen["expert_load"], alone["expert_load"])
    assert {k: v.item() for k, v in mine.items()} == pytest.approx({k: v.item() for k, v in theirs.items()}, rel=1e-5)


def test_targets_of_the_second_next_token_stay_inside_documents() -> None:
    targets = torch.tensor([[11, 12, IGNORED, 14, 15, 16]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert later_targets(targets, documents).tolist() == [[12, IGNORED, IGNORED, 15, 16, IGNORED]]


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 23), min_size=1, max_size=8), kind=st.sampled_from(list(NETS)))
def test_a_cache_filled_in_pieces_gives_the_full_forward_at_every_position(cuts: list[int], kind: str) -> None:
    ids, cache = tokens(3, sum(cuts)), Cache(3)
    with torch.no_grad():
        full = NETS[kind](ids).logits
        pieces = []
        for part in ids.split(cuts, dim=1):
            pieces.append(NETS[kind](part, cache=cache).logits)
            cache.settle(cache.lengths_B + part.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=1e-4)


def test_rows_of_different_lengths_and_tokens_taken_back(net: MoETransformer) -> None:
    """Each row grows by 1 or 2 tokens a pass, of which a wrong second one is forgotten, as speculation does."""
    ids, cache = tokens(4, 60), Cache(4)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        full = net(ids).logits
        counts = torch.tensor([5, 17, 1, 30])
        net(ids[:, :30], cache=cache, counts_B=counts)
        cache.settle(counts)
        rows = torch.arange(4)
        while cache.lengths_B.max() < 55:
            at, kept = cache.lengths_B, torch.randint(1, 3, (4,), generator=random)
            second = torch.where(kept == 2, ids[rows, at + 1], 63 - ids[rows, at + 1])
            logits = net(torch.stack([ids[rows, at], second], dim=1), cache=cache).logits
            torch.testing.assert_close(logits[:, 0], full[rows, at], rtol=0, atol=1e-4)
            right = kept == 2
            torch.testing.assert_close(logits[right, 1], full[rows, at + 1][right], rtol=0, atol=1e-4)
            cache.settle(at + kept)


def test_greedy_decoding_of_unequal_prompts_is_that_of_each_alone(net: MoETransformer, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["model.decoding"], "CHUNK", 16)  # the longest prompt takes three passes
    prompts = [tokens(n, seed=n).tolist() for n in (5, 33, 1, 20)]
    plain = generate(net, prompts, 24, speculate=False)
    ahead = generate(net, prompts, 24, speculate=True)
    assert torch.equal(plain, ahead)
    for prompt, row in zip(prompts, plain, strict=True):
        row = row[: len(prompt) + 24]
        assert row[: len(prompt)].tolist() == prompt
        assert torch.equal(generate(net, row[None, : len(prompt)], 24)[0], row)
        assert torch.equal(net(row[None]).logits[0].argmax(-1)[len(prompt) - 1 : -1], row[len(prompt) :])


def test_speculation_saves_passes_where_drafts_are_right(net: MoETransformer, monkeypatch) -> None:
    """A constant model always drafts right: half the passes of the trunk."""
    with torch.no_grad():
        constant = made(net.config)
        constant.lm_head.weight.zero_()
    passes = []
    inner = MoETransformer.forward
    monkeypatch.setattr(MoETransformer, "forward", lambda self, *a, **k: passes.append(1) or inner(self, *a, **k))
    assert generate(constant, tokens(1, 4), 21).shape == (1, 25)
    assert len(passes) == 1 + 10


def test_drafting_stops_where_drafts_are_wrong_and_forgives_a_few() -> None:
    monitor, steps = DraftMonitor(), 0
    while monitor.pays and steps < 100:
        monitor.note(1.0)
        steps += 1
    assert steps == 5
    good = DraftMonitor()
    for step in range(1000):
        good.note(1.0 if step % 8 < 2 else 2.0)
        assert good.pays


def test_steps_with_drafts_have_the_bits_of_steps_without(net: MoETransformer) -> None:
    """Two tokens a pass, one a pass, and one of two taken back: the same logits, where kernels take each on its own."""
    ids = tokens(3, 24, seed=5)
    with torch.no_grad():
        if not net.decodes():
            pytest.skip("needs a C++ compiler")
        logits = []
        for width in (1, 2):
            cache, found = Cache(3), []
            net(ids[:, :10], cache=cache)
            cache.settle(cache.lengths_B + 10)
            while (at := int(cache.lengths_B[0])) < 22:
                part = net(ids[:, at : at + width], cache=cache).logits
                kept = 1 if at % 3 == 0 else width
                found.append(part[:, :kept])
                cache.settle(cache.lengths_B + kept)
            logits.append(torch.cat(found, dim=1))
    assert torch.equal(logits[0], logits[1][:, : logits[0].shape[1]])


def test_stop_tokens_end_a_row(net: MoETransformer) -> None:
    ids = tokens(2, 5)
    first, second = generate(net, ids, 2)[:, 5:].tolist()[0]
    assert generate(net, ids[:1], 30, eos_token_id=first).shape[1] == 6
    assert generate(net, ids[:1], 30, eos_token_id=[63 - first, second]).shape[1] <= 7
    both = generate(net, ids, 30, eos_token_id=first)
    assert set(both[0, 6:].tolist()) <= {first}


def test_every_parameter_learns_in_a_training_step(net: MoETransformer) -> None:
    ids, documents = tokens(4, 64), torch.arange(64).div(23, rounding_mode="floor").expand(4, -1)
    net.train()
    losses, _ = losses_of(net, ids, ids.roll(-1, 1), documents, sparse=True)
    sum(losses.values()).backward()
    net.eval()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    net.zero_grad()
    assert silent == []


def test_the_indexer_learns_from_its_loss_alone_and_finds_what_attention_wants() -> None:
    net = made(V4).train()
    ids, documents = tokens(4, 64), torch.zeros(4, 64, dtype=torch.int64)
    losses, _ = losses_of(net, ids, ids.roll(-1, 1), documents, sparse=True)
    losses["indexer_loss"].backward(retain_graph=True)
    assert all((".indexer." in name) == (p.grad is not None) for name, p in net.named_parameters())
    net.zero_grad()
    (losses["loss"] + losses["mtp_loss"] + losses["balance_loss"]).backward()
    assert all((".indexer." in name) == (p.grad is None) for name, p in net.named_parameters())
    indexer = [p for name, p in net.named_parameters() if ".indexer." in name]
    optimizer = torch.optim.Adam(indexer, lr=1e-2)
    seen = []
    for _ in range(60):
        losses, figures = losses_of(net, ids, ids.roll(-1, 1), documents, sparse=False)
        optimizer.zero_grad()
        losses["indexer_loss"].backward()
        optimizer.step()
        seen.append((losses["indexer_loss"].item(), figures["indexer_recall"].mean().item()))
    assert seen[-1][0] < 0.5 * seen[0][0]
    assert seen[-1][1] > seen[0][1] + 0.02


def test_the_hash_table_gives_different_experts_and_equal_shares() -> None:
    for experts, chosen, vocabulary in ((8, 3, 80), (7, 7, 21), (16, 2, 4096)):
        config = V4.replace(n_routed_experts=experts, num_experts_per_tok=chosen, vocab_size=vocabulary)
        table = balanced_table(config)
        assert table.shape == (vocabulary, chosen)
        assert (table.sort(dim=1).values.diff(dim=1) > 0).all()
        assert table.flatten().bincount(minlength=experts).unique().tolist() == [vocabulary * chosen // experts]
    assert isinstance(NETS["v4"].model.layers[0].mlp.gate, HashRouter)
