"""Choosing experts: the score, the best groups and the top-k of a few tokens at a time in one pass, all in fp32.

The logits and their gradients are plain products, which a device's own library does best.

Shapes: T tokens, D hidden size, E experts, K experts per token, G groups of experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.reference import router as reference
from moe_kernels.triton.tiles import ELEMENTS, fit, grid


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    chosen_TK: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices [T, K], weights [T, K], affinities [T, E]). Experts that are given take the reference."""
    if chosen_TK is not None or score not in reference.SCORES or not fit(x_TD, weight_ED):
        how = (score, groups, top_groups, normalise, scale)
        return reference.route(x_TD, weight_ED, bias_E, chosen_TK, top_k, *how)
    logits_TE = reference.logits(x_TD, weight_ED)
    bias = bias_E.detach().float().contiguous()
    return _TopK.apply(logits_TE, bias, top_k, score == "sigmoid", groups, top_groups, normalise, scale)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor, top_k: int, sigmoid: bool,
        groups: int, top_groups: int, normalise: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        tokens, experts = logits_TE.shape
        indices_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=logits_TE.device)
        weights_TK, scores_TE = logits_TE.new_empty(tokens, top_k), torch.empty_like(logits_TE)
        sizes = _sizes(tokens, experts)
        _forward[grid(triton.cdiv(tokens, sizes[1]), logits_TE)](
            logits_TE, bias_E, indices_TK, weights_TK, scores_TE, tokens, scale, *sizes,
            top_k, triton.next_power_of_2(top_k), groups, top_groups, sigmoid, normalise,
        )  # fmt: skip
        ctx.mark_non_differentiable(indices_TK)
        ctx.save_for_backward(logits_TE, indices_TK)
        ctx.numbers = sigmoid, normalise, scale
        return indices_TK, weights_TK, scores_TE

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad_TK: Tensor, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, indices_TK = ctx.saved_tensors
        (tokens, experts), (sigmoid, normalise, scale) = logits_TE.shape, ctx.numbers
        d_logits_TE, sizes = torch.empty_like(logits_TE), _sizes(tokens, experts)
        tensors = (grad_TK.contiguous(), grad_TE.contiguous(), logits_TE, indices_TK, d_logits_TE)
        numbers = (*sizes, indices_TK.shape[1], sigmoid, normalise)
        _backward[grid(triton.cdiv(tokens, sizes[1]), logits_TE)](*tensors, tokens, scale, *numbers)
        return d_logits_TE, *[None] * 7


def _sizes(tokens: int, experts: int) -> tuple[int, int, int]:
    """(experts, rows and columns of a tile)."""
    columns = triton.next_power_of_2(experts)
    return experts, max(1, min(ELEMENTS // columns, triton.next_power_of_2(max(1, tokens)))), columns


@triton.jit
def _scores(logits, SIGMOID: tl.constexpr) -> tl.tensor:
    """Sigmoid, or the root of log(1 + exp(x)) = max(x, 0) + log(1 + u), u = exp(-|x|), by its series for small u."""
    if SIGMOID:
        return tl.sigmoid(logits)
    u = tl.exp(-tl.abs(logits))
    grown = tl.where(u < 0.03, u * (1 - u * (1 / 2 - u * (1 / 3 - u / 4))), tl.log(1.0 + u))
    return tl.sqrt(tl.maximum(logits, 0.0) + grown)


@triton.jit
def _first_best(value, expert, COLUMNS: tl.constexpr) -> tl.tensor:
    """(best of each row [R, 1], the first expert that has it [R, 1])."""
    best = tl.max(value, axis=1)[:, None]
    first = tl.min(tl.where(value == best, expert, COLUMNS - 1), axis=1)[:, None]
    return best, first


@triton.jit
def _within_best_groups(
    value, expert, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr
) -> tl.tensor:
    """A group scores by its two best experts; the experts of the other groups leave."""
    SIZE: tl.constexpr = EXPERTS // GROUPS
    group = expert // SIZE
    strength = value * 0.0 + float("-inf")
    for number in range(GROUPS):
        members = tl.where(group == number, value, float("-inf"))
        best, first = _first_best(members, expert, COLUMNS)
        second = tl.max(tl.where(expert == first, float("-inf"), members), axis=1)[:, None]
        strength = tl.where(group == number, best + second, strength)
    kept = value * 0.0 + float("-inf")
    for _ in range(TOP_GROUPS):
        best, first = _first_best(strength, expert, COLUMNS)
        taken = group == first // SIZE
        kept = tl.where(taken, value, kept)
        strength = tl.where(taken, float("-inf"), strength)
    return kept


@triton.jit
def _forward(
    logits, bias, indices, weights, scores, tokens, scale,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP: tl.constexpr, PADDED: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
) -> None:  # fmt: skip
    expert = tl.arange(0, COLUMNS)[None, :]
    choice = tl.arange(0, PADDED)[None, :]
    push = tl.load(bias + expert, mask=expert < EXPERTS, other=0.0)
    for task in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        token = task * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (token < tokens) & (expert < EXPERTS)
        score = _scores(tl.load(logits + token * EXPERTS + expert, mask=inside, other=0.0), SIGMOID)
        tl.store(scores + token * EXPERTS + expert, score, mask=inside)
        value = tl.where(expert < EXPERTS, score + push, float("-inf"))
        if GROUPS > 1:
            value = _within_best_groups(value, expert, EXPERTS, COLUMNS, GROUPS, TOP_GROUPS)
        chosen = tl.zeros((ROWS, PADDED), dtype=tl.int32)
        shares = tl.zeros((ROWS, PADDED), dtype=tl.float32)
        for number in range(TOP):
            best, first = _first_best(value, expert, COLUMNS)
            own = tl.sum(tl.where(expert == first, score, 0.0), axis=1)[:, None]
            chosen = tl.where(choice == number, first, chosen)
            shares = tl.where(choice == number, own, shares)
            value = tl.where(expert == first, float("-inf"), value)
        if NORMALISE:
            shares = shares / (tl.sum(shares, axis=1)[:, None] + 1e-20)
        mask = (token < tokens) & (choice < TOP)
        tl.store(indices + token * TOP + choice, chosen.to(tl.int64), mask=mask)
        tl.store(weights + token * TOP + choice, shares * scale, mask=mask)


@triton.jit
def _backward(
    grad, d_scores, logits, indices, d_logits, tokens, scale,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
) -> None:  # fmt: skip
    """Of scores s among which w_k = scale s_k / sum(s): d_s_k = scale (g_k - sum(g s) / sum(s)) / sum(s), beside what
    the scores get by themselves."""
    expert = tl.arange(0, COLUMNS)[None, :]
    for task in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        token = task * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (token < tokens) & (expert < EXPERTS)
        logit = tl.load(logits + token * EXPERTS + expert, mask=inside, other=0.0)
        score = _scores(logit, SIGMOID)
        slope = score * 0.0
        chosen = score * 0.0
        for number in range(TOP):
            at = token * TOP + number
            owner = tl.load(indices + at, mask=token < tokens, other=0).to(tl.int32)
            own = expert == owner
            slope = tl.where(own, tl.load(grad + at, mask=token < tokens, other=0.0), slope)
            chosen = tl.where(own, 1.0, chosen)
        if NORMALISE:
            total = tl.sum(score * chosen, axis=1)[:, None] + 1e-20
            slope = (slope - tl.sum(slope * score, axis=1)[:, None] / total) / total
        steep = tl.sigmoid(logit) / (2.0 * tl.maximum(score, 1e-19))
        if SIGMOID:
            steep = score * (1.0 - score)
        direct = tl.load(d_scores + token * EXPERTS + expert, mask=inside, other=0.0)
        tl.store(d_logits + token * EXPERTS + expert, (slope * chosen * scale + direct) * steep, mask=inside)
