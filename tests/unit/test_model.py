"""Sampling, cross entropy, scores of documents, the selection bias and LoRA."""

import numpy as np
import pytest
import torch

from model import ModelConfig, build, generate
from model.data import IGNORED
from model.lora import add_lora, merge_lora
from model.losses import cross_entropy
from model.optim import balance_experts
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
