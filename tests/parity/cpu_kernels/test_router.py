"""The router and the loss that balances experts."""

from __future__ import annotations

import moe_kernels
import pytest
import torch
from kernel_cases import FP32, assert_in_use, assert_near, assert_same, balance_inputs, outputs_and_gradients, random
from moe_kernels.reference import balance
from torch import Tensor

ROUTERS = [
    (700, 24, 64, 6, 1, 1),
    (33, 12, 16, 3, 4, 2),
    (5, 8, 7, 7, 1, 1),
    (40, 16, 256, 8, 8, 4),
    (0, 8, 4, 2, 1, 1),
]


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("given", [False, True], ids=["chosen", "given"])
@pytest.mark.parametrize("shape", ROUTERS, ids=str)
def test_route(shape: tuple[int, ...], given: bool, score: str) -> None:
    tokens, width, count, top_k, groups, top_groups = shape
    bias = None if given else random(count, seed=3) * 0.1
    chosen = torch.rand(tokens, count, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :top_k]
    inputs = [random(tokens, width), random(count, width) * width**-0.5, random(tokens, count), random(tokens, count)]

    def dense(x: Tensor, weight: Tensor, spread: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        """The choice as a table; every weight and every affinity has a gradient of its own."""
        how = {"score": score, "groups": groups, "top_groups": top_groups, "scale": 2.5}
        more = {"chosen_TK": chosen if given else None, "normalise": top_k > 2}
        indices, weights, scores = moe_kernels.route(x, weight, bias, top_k, **how, **more)
        table = torch.zeros_like(scores).scatter(1, indices, weights)
        return table.detach(), scores, (table * spread).sum() + (scores * own).sum()

    assert_in_use("route")
    ours = outputs_and_gradients(dense, inputs)
    with moe_kernels.reference_only():
        theirs = outputs_and_gradients(dense, inputs)
    assert torch.equal(ours[0] != 0, theirs[0] != 0) and len(ours) == len(theirs) == 7
    assert_near(ours, theirs, FP32)


def test_route_takes_the_first_of_equal_experts_and_large_logits() -> None:
    x = torch.tensor([[0.0], [1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [300.0], [0.0], [-300.0], [0.0]])
    for score in ("sigmoid", "sqrt_softplus"):
        indices, weights, scores = moe_kernels.route(x, weight, torch.zeros(5), 3, score=score, normalise=False)
        assert indices.tolist() == [[0, 1, 2], [1, 0, 2], [3, 0, 2]]
        (weights.sum() + scores.sum()).backward()
        assert x.grad.isfinite().all() and scores.max().item() == pytest.approx(1.0 if score == "sigmoid" else 300**0.5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "shape", [(4, 200, 64, 6), (1, 1, 3, 1), (3, 17, 9, 8), (2, 40, 130, 2), (0, 5, 4, 2)], ids=str
)
def test_balance(shape: tuple[int, ...], padded: bool) -> None:
    inputs = balance_inputs(*shape, padded=padded)
    assert_same("balance", balance.balance, inputs)
    assert moe_kernels.balance(*inputs)[0][-1] == 0


def test_balance_of_nothing_but_padding_is_zero() -> None:
    indices, scores, first, _ = balance_inputs(2, 9, 5, 2, padded=False)
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    load, entropy, loss = moe_kernels.balance(indices, scores.requires_grad_(), first, nothing)
    loss.backward()
    assert not load.any() and not scores.grad.any() and (entropy, loss) == (0, 0)


def test_a_router_refuses_what_does_not_exist() -> None:
    x, weight = random(3, 4), random(6, 4)
    with pytest.raises(RuntimeError, match="expert 6 does not exist"):
        moe_kernels.route(x, weight, None, 1, chosen_TK=torch.full((3, 1), 6))
    with pytest.raises(RuntimeError, match="cannot take 7 of 6 experts"):
        moe_kernels.route(x, weight, torch.zeros(6), 7)
    with pytest.raises(RuntimeError, match="expert 6 does not exist"):
        moe_kernels.balance(torch.full((3, 1), 6), random(3, 6).sigmoid(), torch.zeros(1, 3, dtype=torch.int64))
