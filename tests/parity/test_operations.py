"""The reference operations against independent originals: transformers, complex numbers, loops in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import moe_kernels
import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm, DeepseekV3TopkRouter

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with moe_kernels.reference_only():
        yield


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_rms_norm() -> None:
    theirs = DeepseekV3RMSNorm(24, eps=1e-5)
    theirs.weight.data = random(24)
    for dtype in (torch.float32, torch.bfloat16):
        x = random(3, 5, 24).to(dtype)
        ours = moe_kernels.rms_norm(x, theirs.weight, 1e-5)
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.float(), theirs(x).float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
        )


@pytest.mark.parametrize("inverse", [False, True])
def test_rotate_is_a_product_of_complex_numbers(inverse: bool) -> None:
    angles, x = random(2, 5, 1, 4), random(2, 5, 3, 10)
    ours = moe_kernels.rotate(x, angles.cos(), angles.sin(), inverse)
    turn = torch.polar(torch.ones(1), -angles if inverse else angles)
    pairs = torch.view_as_complex(x[..., 2:].unflatten(-1, (-1, 2)).contiguous())
    torch.testing.assert_close(ours[..., 2:], torch.view_as_real(pairs * turn).flatten(-2))
    assert torch.equal(ours[..., :2], x[..., :2])


@pytest.mark.parametrize("limit", [None, 0.5])
def test_swiglu(limit: float | None) -> None:
    x = random(6, 8).double()
    bound = math.inf if limit is None else limit
    gated = [
        [min(g, bound) / (1 + math.exp(-min(g, bound))) * max(-bound, min(u, bound)) for g, u in zip(*row, strict=True)]
        for row in x.unflatten(1, (2, 4)).tolist()
    ]
    torch.testing.assert_close(moe_kernels.swiglu(x, limit), torch.tensor(gated, dtype=torch.float64))


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2)])
def test_route(groups: int, top_groups: int) -> None:
    config = DeepseekV3Config(
        hidden_size=12, n_routed_experts=16, num_experts_per_tok=3, n_group=groups, topk_group=top_groups,
        routed_scaling_factor=2.5, moe_intermediate_size=8, norm_topk_prob=True,
    )  # fmt: skip
    theirs, x = DeepseekV3TopkRouter(config), random(11, 12)
    theirs.weight.data, theirs.e_score_correction_bias.data = random(16, 12), random(16) * 0.1
    _, weights, indices = theirs(x)
    keywords = {"groups": groups, "top_groups": top_groups, "scale": 2.5}
    ours = moe_kernels.route(x, theirs.weight, theirs.e_score_correction_bias, 3, **keywords)
    dense = [torch.zeros(11, 16).scatter(1, index, weight) for index, weight in (ours[:2], (indices, weights))]
    torch.testing.assert_close(dense[0], dense[1])


def test_route_by_the_root_of_softplus() -> None:
    x, weight = random(7, 12), random(8, 12)
    scores = (1 + (x @ weight.t()).exp()).log().sqrt()
    how = {"score": "sqrt_softplus", "normalise": False}
    indices, weights, affinities = moe_kernels.route(x, weight, torch.zeros(8), 2, **how)
    torch.testing.assert_close(affinities, scores)
    torch.testing.assert_close(weights, scores.gather(1, indices))
    torch.testing.assert_close(weights.sort(1).values, scores.topk(2).values.sort(1).values)
    given = torch.arange(14).view(7, 2) % 8
    indices, weights, _ = moe_kernels.route(x, weight, None, 2, chosen_TK=given, **how)
    assert torch.equal(indices, given)
    torch.testing.assert_close(weights, scores.gather(1, given))
    with pytest.raises(ValueError, match="choose 'sigmoid' or 'sqrt_softplus'"):
        moe_kernels.route(x, weight, torch.zeros(8), 2, score="softmax")


def test_permute_and_unpermute_bring_every_row_to_its_expert_and_back() -> None:
    x, weights = random(9, 6), random(9, 3)
    indices = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :3]
    rows, places, counts = moe_kernels.permute(x, indices, 7)
    assert counts.tolist() == [int((indices == expert).sum()) for expert in range(7)]
    owners = torch.repeat_interleave(torch.arange(7), counts)
    for token in range(9):
        for choice in range(3):
            assert owners[places[token, choice]] == indices[token, choice]
            assert torch.equal(rows[places[token, choice]], x[token])
    torch.testing.assert_close(moe_kernels.unpermute(rows, places, weights), x * weights.sum(1, keepdim=True))


def test_grouped_matmul() -> None:
    x, weight, counts = random(9, 6), random(4, 5, 6), torch.tensor([3, 0, 5, 1])
    owners = torch.repeat_interleave(torch.arange(4), counts)
    torch.testing.assert_close(
        moe_kernels.grouped_matmul(x, weight, counts), torch.einsum("nd,nfd->nf", x, weight[owners])
    )


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("documents", [None, [0, 0, 1, 1, 1, 2]], ids=str)
def test_attention(documents: list[int] | None, queries: int) -> None:
    q, k, v = random(1, queries, 2, 8), random(1, 6, 2, 8), random(1, 6, 2, 5)
    ids = None if documents is None else torch.tensor([documents])
    ours = moe_kernels.attention(q, k, v, 0.3, ids)
    for query in range(queries):
        place = 6 - queries + query
        seen = [key for key in range(place + 1) if documents is None or documents[key] == documents[place]]
        for head in range(2):
            logits = (k[0, seen, head].double() @ q[0, query, head].double()) * 0.3
            expected = logits.softmax(0) @ v[0, seen, head].double()
            torch.testing.assert_close(ours[0, query, head].double(), expected, rtol=1e-5, atol=1e-6)


def test_cross_entropy() -> None:
    logits, targets = random(5, 9), torch.tensor([3, -100, 0, 8, -100])
    expected = [
        0.0 if t < 0 else float(row.double().logsumexp(0) - row[t])
        for row, t in zip(logits, targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        moe_kernels.cross_entropy(logits, targets).double(), torch.tensor(expected, dtype=torch.float64)
    )


def test_adamw_step() -> None:
    theirs, ours = random(5, 7).requires_grad_(), random(5, 7)
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    state = moe_kernels.AdamWState([torch.zeros(5, 7)], [torch.zeros(5, 7)], [torch.zeros(())])
    for scale in (1.0, -0.3, 2.0):
        theirs.grad = random(7, 5).t() * scale
        optimizer.step()
        moe_kernels.adamw_step([ours], [theirs.grad], state, moe_kernels.AdamW(1e-2, weight_decay=0.1))
    torch.testing.assert_close(ours, theirs.detach())
